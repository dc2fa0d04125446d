"""Gates: conditions on what a run has measured, and on how far it may be behind an earlier run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftcli.adapters.proof.bootstrap import Interval, paired_intervals
from peftcli.errors import GateFailed
from peftcli.recipe import (
    FORGETTING,
    LEARNT,
    MAX_REGRESSION,
    Bound,
    gate_holds,
    parse_gate,
    parse_regression,
    why_failed,
)
from peftcli.tasks.base import Task
from peftcli.train.compare import Comparison
from peftcli.train.evaluate import is_lower_better, no_learning
from peftcli.train.kept_rows import EarlierRun
from peftcli.train.runs.record import GateRecord
from peftcli.train.runs.typed_json import ABSENT


def check_gates(
    gates: Mapping[str, Any],
    metrics: Mapping[str, float],
    doubts: Sequence[str],
    task: Task[Any],
    comparison: Comparison | None = None,
    forgotten: float | str | None = None,
) -> list[GateRecord]:
    """Compare the metrics with the recipe's gates.

    ``doubts`` say why nothing seems to have been learnt; ``comparison`` has the rows for max_regression; ``forgotten``
    is what was forgotten, or why it is not known.
    """
    checked = []
    for name, text in gates.items():
        if text is False:
            continue
        if name == LEARNT:
            reason = no_learning(doubts) if doubts else ABSENT
            checked.append(GateRecord(metric=name, gate="true", value=None, passed=not doubts, reason=reason))
            continue
        if name == MAX_REGRESSION:
            checked += _check_regression(text, metrics, task, comparison)
            continue
        operator, bound = parse_gate(str(text))
        value, reason = metrics.get(name), ABSENT
        if name == FORGETTING:
            value, reason = (None, f"not measured: {forgotten}") if isinstance(forgotten, str) else (forgotten, ABSENT)
        passed = value is not None and gate_holds(operator, value, bound)
        checked.append(GateRecord(metric=name, gate=str(text), value=value, passed=passed, reason=reason))
    return checked


def raise_failed_gates(gates: list[dict[str, Any]]) -> None:
    """Raise GateFailed naming the gates of a run.json that do not hold."""
    failed = [why_failed(gate) for gate in gates if not gate["passed"]]
    if failed:
        raise GateFailed("; ".join(failed), key="gates")


def _check_regression(
    given: Mapping[str, str], metrics: Mapping[str, float], task: Task[Any], comparison: Comparison | None
) -> list[GateRecord]:
    """The gates of ``max_regression``: one a metric, decided by the interval of the difference of the two runs."""
    against, bounds = parse_regression(given)
    checked, found, why = [], dict[str, Interval](), "was not compared"
    hashes = None if comparison is None else comparison.hashes
    if comparison is not None and comparison.adapter and comparison.units is not None and hashes is not None:
        mine, why = comparison.adapter.parts, "has no interval: it is no function of sums over rows"
        order, values = EarlierRun.read(against).in_order_of(hashes)
        if values.shape[1] == mine.values.shape[1]:
            here = replace(mine, values=mine.values[order])
            found = paired_intervals(replace(mine, values=values), here, comparison.units[order])
    elif comparison is not None and comparison.record.skipped:
        why = f"{why}: {comparison.record.skipped}"
    for name, bound in bounds.items():
        interval = found.get(name.removeprefix("eval_"))
        passed, reason = (False, why) if interval is None else _judge(interval, bound, task, name)
        text = f"at most {bound} worse than {against}"
        checked.append(
            GateRecord(metric=name, gate=text, value=metrics.get(name), passed=passed, reason=reason or ABSENT)
        )
    return checked


def _judge(found: Interval, bound: Bound, task: Task[Any], name: str) -> tuple[bool, str]:
    """Whether a difference to an earlier run is within a bound, and what to say of it; nothing where all of it is."""
    sign = 1 if is_lower_better(task, name) else -1
    low, high = sorted((sign * found.low, sign * found.high))
    worse, most = sign * found.difference, bound.of(found.base)
    said = f"{found.base:.4g} -> {found.other:.4g}, worse by {worse:.3g} (95 % interval {low:.3g} to {high:.3g})"
    if high <= most:
        return True, ""
    if low > most:
        return False, f"{said}: all of the interval is beyond {most:.3g}"
    return worse <= most, f"{said}: the interval is on both sides of {most:.3g}, so the difference itself decides"
