"""Callbacks of ``generate`` that see the ids without the placeholders of virtual tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from peftcli.core.prompts.inputs import without


def without_placeholders(inputs: dict[str, Any], start: torch.Tensor, count: int) -> dict[str, Any]:
    """Return arguments of ``generate`` whose callbacks see no placeholders.

    Args:
        inputs: of ``generate``.
        start: where the placeholders start in each row: (B, 1).
        count: how many there are.
    """

    def see(ids: torch.Tensor) -> torch.Tensor:  # a streamer gets them on the CPU
        return without(ids, start.to(ids.device), count)

    def processor(given: Any) -> Any:
        return lambda ids, scores: given(see(ids), scores)

    def criterion(given: Any) -> Any:
        return lambda ids, scores, **more: given(see(ids), scores, **more)

    changed: dict[str, Any] = {}
    for key, seeing in (("logits_processor", processor), ("stopping_criteria", criterion)):
        if given := inputs.get(key):
            changed[key] = type(given)([each if _is_transformers(each) else seeing(each) for each in given])
    if allowed := inputs.get("prefix_allowed_tokens_fn"):
        changed["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(
            row, without(ids[None], start[row : row + 1], count)[0]
        )
    if streamer := inputs.get("streamer"):
        changed["streamer"] = _Streamer(streamer, see)
    return inputs | changed


def _is_transformers(given: Any) -> bool:
    """Return whether transformers wrote the class. ``generate`` tests the types of these, so they are not replaced."""
    return type(given).__module__.startswith("transformers.")


@dataclass
class _Streamer:
    """A streamer, which gets the prompt, (B, T), and then each new token."""

    given: Any
    see: Callable[[torch.Tensor], torch.Tensor]

    def put(self, value: torch.Tensor) -> None:
        self.given.put(self.see(value) if value.ndim > 1 else value)

    def end(self) -> None:
        self.given.end()
