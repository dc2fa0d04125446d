"""Metrics of generated texts, which tasks measure in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from peftcli.tasks.base import Loss


def with_texts(loss: Loss, wanted: Sequence[str], generate: Callable[[], Iterable[str]], *, training: bool) -> Loss:
    """The loss of a batch with what is wanted of each row, and in evaluation what the model says, as its outputs."""
    return loss if training else replace(loss, outputs=list(zip(wanted, generate(), strict=True)))


def text_metrics(names: Iterable[str], pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Compute metrics of ``METRICS`` over pairs of the wanted text and the generated one."""
    wanted, found = ([pair[side] for pair in pairs] for side in (0, 1))
    return {name: METRICS[name](wanted, found) for name in names}


def _wer(wanted: list[str], found: list[str]) -> float:
    import jiwer

    return float(jiwer.wer(wanted, found))


def _cer(wanted: list[str], found: list[str]) -> float:
    import jiwer

    return float(jiwer.cer(wanted, found))


METRICS: dict[str, Callable[[list[str], list[str]], float]] = {"wer": _wer, "cer": _cer}
"""Each compares the wanted texts of a corpus with the generated ones."""
