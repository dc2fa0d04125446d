"""Examples of language models, made from and read back as lists of ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftcli.data.store import Column, Example, Outcome

COLUMNS = {"input_ids": Column(), "labels": Column()}
Ids = dict[str, list[int]]


def example(ids: Ids, targets: int = 0) -> Example:
    return Example(ids, len(ids["input_ids"]), targets)


def outcome(examples: Sequence[Ids], targets: Sequence[int], *, tokens: int = 0, **more: Any) -> Outcome:
    return Outcome([example(*each) for each in zip(examples, targets, strict=True)], size=tokens, **more)


def plain(found: Example) -> Ids:
    return {name: [int(each) for each in array] for name, array in found.arrays.items()}
