"""Base model against adapter, on the same evaluation rows: each metric's difference with its interval."""

from __future__ import annotations

import math
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from peftcli.adapters.proof.bootstrap import DRAWS, Interval, measured_intervals, paired_intervals
from peftcli.core.inject import disabled
from peftcli.data.rows import count_of
from peftcli.data.sources import eval_source
from peftcli.data.split import find_groups
from peftcli.data.store import View
from peftcli.data.used_rows import UsedRows
from peftcli.errors import DataError
from peftcli.guard.files import command_word
from peftcli.recipe import needs_base
from peftcli.schema import Recipe
from peftcli.system.signals import wants_save
from peftcli.tasks.base import Loss, Task
from peftcli.tasks.parts import Parts, RowScore
from peftcli.tasks.shown_rows import Examples, answers_of, describe_rows
from peftcli.train.batches import num_workers
from peftcli.train.data import Data, RunData
from peftcli.train.devices.sharding import is_sharded
from peftcli.train.evaluate import is_lower_better, losses_of_batches, main_metric
from peftcli.train.events import Message
from peftcli.train.kept_rows import hashes_of, save_rows
from peftcli.train.runs.checkpoint import random_state, restore_random
from peftcli.train.runs.record import ComparisonRecord, DifferenceRecord, OutputRecord, RightRecord
from peftcli.train.runs.resume import Run
from peftcli.train.runs.typed_json import ABSENT

SHARE = 0.1
"""Share of a run's time so far that ``compare_with_base: auto`` may take."""
_DRAW_SECONDS = 5.0
"""For metrics that no sums give."""
_SURE = 0.02
"""Share of the rows after which their time is believed."""


_Score = tuple[list[int], dict[str, np.ndarray], list[Any]]
"""Examples, their sums, and their outputs."""


@dataclass(frozen=True)
class Measured:
    """A model's scores of rows, and their parts."""

    scores: list[RowScore]
    parts: Parts

    def metrics(self, task: Task[Any], rows: np.ndarray) -> Mapping[str, float]:
        """The task's own metrics of some rows, repeats among them."""
        some = [self.scores[at] for at in rows.tolist()]
        sums = {name: np.sum([each.sums[name] for each in some], axis=0) for name in some[0].sums}
        outputs = [output for each in some for output in each.outputs]
        with warnings.catch_warnings(action="ignore"):  # of draws that lack a class
            return task.metrics(sums, outputs, sum(each.num_targets for each in some))


@dataclass(frozen=True)
class Scorer:
    """Scores the evaluation rows of a task, in all processes together."""

    task: Task[Any]
    view: View
    batch_size: int
    accelerator: Accelerator
    num_workers: int = 0

    def score(self, model: nn.Module, stopping: Callable[[], bool] = lambda: False) -> list[RowScore] | None:
        """Return the score of each row, or of each batch where the task compares the rows of one.

        None: ``stopping`` said so; it is called as by ``evaluate``.
        """
        found = list[_Score]()
        size = self.size
        given = (model, self.task, self.view, size, self.accelerator, self.num_workers, stopping)
        for indices, counts, loss in losses_of_batches(*given):
            if loss is None:
                return None
            if counts:
                found += self._of_rows(indices, loss) if self.task.sums_targets else [_of_batch(indices, loss)]
        gathered = sorted(gather_object(found), key=lambda each: each[0][0])
        starts, scores = UsedRows(self.view).first, dict[int, RowScore]()
        for number, (indices, sums, outputs) in enumerate(gathered):
            row = int(np.searchsorted(starts, indices[0], side="right")) if self.rows_apart else number
            targets = int(self.view.targets[indices].sum())
            if (before := scores.get(row)) is not None:
                sums = {name: before.sums[name] + value for name, value in sums.items()}
                outputs, targets = [*before.outputs, *outputs], before.num_targets + targets
            scores[row] = RowScore(sums, outputs, targets)
        return list(scores.values())

    @property
    def size(self) -> int:
        """Examples of a batch: more than one only where their shares of a loss are known, or cannot be told apart."""
        return self.batch_size if self.task.sums_targets or not self.rows_apart else 1

    def _of_rows(self, indices: list[int], loss: Loss) -> list[_Score]:
        """The scores of the examples of a batch, from what each of their targets adds to the sums."""
        ends = np.cumsum(self.view.targets[indices])
        each = {name: value.to("cpu", torch.float64).numpy() for name, value in loss.of_targets.items()}
        assert all(len(value) == ends[-1] for value in each.values())
        split = {name: np.split(value, ends)[:-1] for name, value in each.items()}
        outputs = [[output] for output in loss.outputs] or [[] for _ in indices]
        return [
            ([index], {name: parts[at].sum() for name, parts in split.items()}, outputs[at])
            for at, index in enumerate(indices)
        ]

    @property
    def rows_apart(self) -> bool:
        """Whether the score of a row does not depend on other rows."""
        try:
            self.task.refuse_rows(self.view, 1, training=False)
        except DataError:
            return False
        return True

    def units(self, count: int) -> np.ndarray:
        """The unit of each of ``count`` scores: rows of one group, or of one input in part, share it."""
        groups = find_groups(UsedRows(self.view), ()) if self.rows_apart else np.arange(count)
        return np.unique(groups, return_inverse=True)[1]


def _of_batch(indices: list[int], loss: Loss) -> _Score:
    sums = {name: value.detach().to("cpu", torch.float64).numpy() for name, value in loss.sums.items()}
    return indices, sums, list(loss.outputs)


class Allowance:
    """Decides whether the scoring of rows goes on: it ends at a request, or where it would take too long."""

    def __init__(self, scorer: Scorer, seconds: float, requested: Callable[[], bool]):
        sizes = np.sort(scorer.view.sizes)
        step = scorer.accelerator.num_processes * scorer.size
        cost = np.cumsum(sizes + sizes.mean())
        self._shares, self._step, self._round = cost / cost[-1], step, 0
        self._accelerator, self._seconds, self._requested = scorer.accelerator, seconds, requested
        self._started = time.perf_counter()
        self.needs, self.was_requested = 0.0, False
        """Seconds that both models would take, as far as that is known; whether a request came."""

    def __call__(self) -> bool:
        """Whether to give up, agreed by all processes."""
        done = float(self._shares[min(self._round * self._step, len(self._shares)) - 1]) if self._round else 0.0
        self._round += 1
        elapsed = time.perf_counter() - self._started
        if done >= _SURE:
            self.needs = 2 * elapsed / done
        flags = torch.tensor([self.needs, elapsed, float(self._requested())], device=self._accelerator.device)
        if self._accelerator.num_processes > 1:
            torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        self.needs, elapsed, requested = flags.tolist()
        self.was_requested = self.was_requested or bool(requested)
        return self.was_requested or max(self.needs, elapsed) > self._seconds


@contextmanager
def _random_kept() -> Iterator[None]:
    """Inside, random numbers may be drawn; afterwards the generators are as they were."""
    states, own = random_state(), random.getstate()
    try:
        yield
    finally:
        restore_random(states)
        random.setstate(own)


@dataclass(frozen=True)
class Comparison:
    """A comparison with the base model, and what is kept of its rows."""

    record: ComparisonRecord
    base: Measured | None = None
    adapter: Measured | None = None
    units: np.ndarray | None = None
    """The unit of each score."""
    hashes: np.ndarray | None = None
    """Of each row's content; None where scores are of batches."""

    def save(self, folder: Path) -> list[str]:
        """Write what a later run is compared with, and return the names of the files."""
        if self.base is None or self.adapter is None or self.hashes is None:
            return []
        return save_rows(folder, self.hashes, self.base.parts.values, self.adapter.parts.values)


def compare(
    model: nn.Module,
    scorer: Scorer,
    *,
    seconds: float = math.inf,
    requested: Callable[[], bool] = lambda: False,
    examples: Examples | None = None,
    head_is_new: bool = False,
    how: str = "",
    base: list[RowScore] | None = None,
) -> Comparison:
    """Compare a model with its adapter with the same one without. All processes call this.

    Args:
        model: Has the adapter, enabled.
        scorer: Of the evaluation rows.
        seconds: What it may take.
        requested: Whether the run was asked to stop.
        examples: From where a few rows come, to show them; None: none are shown.
        head_is_new: Whether the base model lacks the head that the adapter has.
        how: How to have the comparison, where it is not made.
        base: The base model's scores of these rows, if they are known; in one process.
    """
    started = time.perf_counter()
    with _random_kept():
        allowance = Allowance(scorer, seconds, requested)
        if base is None:
            with disabled(model):
                base = scorer.score(model, allowance)
        other = None if base is None else scorer.score(model, lambda: _agreed(scorer.accelerator, requested()))
        if base is None or other is None:
            if base is not None or allowance.was_requested:
                return _skipped("the run was asked to stop", how)
            return _skipped(f"it would take about {allowance.needs:.0f} s, over a tenth of the run so far", how)
        if not scorer.accelerator.is_main_process:
            return Comparison(ComparisonRecord())
        found = _measured(scorer, base, other, head_is_new)
        if not found.record.metrics:
            return _skipped("no metric of both models is a finite number, or there is one row only", how)
        if examples is not None and not is_sharded(model):
            found.record.outputs = _outputs(model, scorer, found, examples, started + seconds) or ABSENT
    found.record.seconds = round(time.perf_counter() - started, 3)
    return found


def compare_run(run: Run, data: RunData, model: nn.Module, *, is_kept: bool) -> Comparison | None:
    """Compare a run's adapter with its base model; None where the recipe, or the lack of evaluation data, says so.

    ``is_kept``: the model holds the adapter that the run keeps.
    """
    training, view, recipe = run.recipe.training, data.examples.eval, run.pinned
    wanted = training.compare_with_base
    forced = wanted is True or needs_base(recipe)
    if view is None or not (forced or (wanted == "auto" and training.eval_strategy != "no")):
        return None
    folder = command_word(training.output_dir)
    how = f"to have it: training.compare_with_base=true, or peftcli evaluate RECIPE --adapter {folder}"
    if not is_kept:
        return _skipped("the adapter of the best evaluation cannot be put back into the model here", how)
    allowed = math.inf if forced else SHARE * (run.record.wall_seconds or 0.0) - seconds_of_draws(len(view))
    (seconds,) = broadcast_object_list([allowed])
    if seconds <= 0:
        most = f"a tenth of the run's {run.record.wall_seconds or 0.0:.1f} s"
        return _skipped(f"it would take about {2 * seconds_of_draws(len(view)):.1f} s or more, over {most}", how)
    run.tell(Message(f"comparing with the base model on {count_of(len(view), 'example')}"))
    scorer = Scorer(
        data.task, view, training.per_device_eval_batch_size, run.accelerator, num_workers(training, data.task)
    )

    def stopped() -> bool:
        request = run.stop.request
        return bool(request) and not wants_save(request)

    return compare(
        model,
        scorer,
        seconds=seconds,
        requested=stopped,
        examples=examples_of(recipe, data.examples),
        head_is_new=data.task.head_is_new,
        how=how,
    )


def examples_of(recipe: Recipe, data: Data) -> Examples:
    """Return from where the evaluation rows of a recipe come."""
    source, report = eval_source(recipe.dataset), dict[str, Any](data.report)
    columns = {name: column for name, column in recipe.dataset.columns.items() if isinstance(column, str)}
    sources = [source] if source else recipe.dataset.sources()
    return Examples(sources, columns or report.get("columns") or {}, report["format"])


def seconds_of_draws(rows: int) -> float:
    """Return about how long the draws for some rows take, which no scoring shows."""
    return 0.5 + 2e-4 * rows


def _skipped(why: str, how: str) -> Comparison:
    return Comparison(ComparisonRecord(skipped=f"{why}{f'; {how}' if how else ''}"))


def _agreed(accelerator: Accelerator, requested: bool) -> bool:
    """Whether any process received a request."""
    if accelerator.num_processes == 1:
        return requested
    flag = torch.tensor(float(requested), device=accelerator.device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def _measured(scorer: Scorer, base: list[RowScore], other: list[RowScore], head_is_new: bool) -> Comparison:
    """The comparison of two models' scores of the same rows."""
    task, count = scorer.task, len(base)
    units = scorer.units(count)
    both = [Measured(scores, task.parts(scores)) for scores in (base, other)]
    record = ComparisonRecord(
        rows=len(UsedRows(scorer.view)),
        units=int(units.max()) + 1,
        unit="rows" if scorer.rows_apart and units.max() + 1 == count else "groups",
        draws=DRAWS,
        base_head_is_new=head_is_new,
        metrics=differences(task, intervals(task, both[0], both[1], units)),
        right=_right(both[0].parts, both[1].parts) or ABSENT,
    )
    record.main = main_metric(task, dict.fromkeys(record.metrics, 0.0))
    return Comparison(record, both[0], both[1], units, hashes_of(task, scorer.view) if scorer.rows_apart else None)


def intervals(task: Task[Any], base: Measured, other: Measured, units: np.ndarray) -> dict[str, Interval]:
    """Return the interval of each metric's difference, of two models' scores of the same rows; none of one unit."""
    if units.max() == 0:
        return {}
    found = paired_intervals(base.parts, other.parts, units)
    everything = np.arange(len(base.scores))
    missing = [name for name in other.metrics(task, everything) if name not in found]

    def measure(rows: np.ndarray) -> tuple[Mapping[str, float], Mapping[str, float]]:
        return base.metrics(task, rows), other.metrics(task, rows)

    return found | (measured_intervals(measure, units, missing, _DRAW_SECONDS) if missing else {})


def differences(task: Task[Any], found: Mapping[str, Interval]) -> dict[str, DifferenceRecord]:
    """Return the records of intervals, by the metrics' names in run.json."""
    records = dict[str, DifferenceRecord]()
    for name, each in found.items():
        verdict: Any = each.verdict(lower_is_better=is_lower_better(task, name))
        values = (each.base, each.other, each.difference, each.low, each.high)
        base, adapter, difference, low, high = values
        fewer = each.draws if each.draws < DRAWS else ABSENT
        records[f"eval_{name}"] = DifferenceRecord(
            base=base, adapter=adapter, difference=difference, low=low, high=high, verdict=verdict, draws=fewer
        )
    return records


def _right(base: Parts, other: Parts) -> RightRecord | None:
    if base.right is None or other.right is None:
        return None
    kept, gained = int((base.right & other.right).sum()), int((other.right & ~base.right).sum())
    return RightRecord(base=int(base.right.sum()), kept=kept, lost=int(base.right.sum()) - kept, gained=gained)


def _outputs(model: nn.Module, scorer: Scorer, found: Comparison, examples: Examples, end: float) -> list[OutputRecord]:
    """Five rows before and after: of the largest gain, loss and change, and two by chance. None where time is short."""
    assert found.base is not None
    assert found.adapter is not None
    if not scorer.rows_apart:
        return []
    chosen = _choose(found, scorer.task, found.record.main.removeprefix("eval_"))
    rows, texts = describe_rows(scorer.task, scorer.view, list(chosen), examples)
    answers = list[list[str]]()
    for off in (True, False):
        started = time.perf_counter()
        with scorer.accelerator.autocast(), disabled(model) if off else nullcontext():
            answers.append(answers_of(model, scorer.task, rows, examples))
        if 2 * time.perf_counter() - started > end:  # the other one takes as long
            return []
    kinds: list[Any] = list(chosen.values())
    return [
        OutputRecord(row=text.row, chosen=kind, input=text.input, wanted=text.wanted, base=base, adapter=adapter)
        for kind, text, base, adapter in zip(kinds, texts, *answers, strict=False)
    ]


def _choose(found: Comparison, task: Task[Any], main: str) -> dict[int, str]:
    """The rows to show, by the change of the main metric and, where that is equal, of the loss."""
    assert found.base is not None
    assert found.adapter is not None
    base, other = (each.parts.metrics_of(each.parts.values) for each in (found.base, found.adapter))
    lower, none = is_lower_better(task, main), np.zeros(1)
    gains = [np.nan_to_num(base.get(name, none) - other.get(name, none)) for name in (main, "loss")]
    by_main, by_loss = (np.broadcast_to(gain, len(found.base.scores)) for gain in gains)
    order = np.lexsort((by_loss, by_main if lower else -by_main)).tolist()
    chosen = dict[int, str]()
    for kind, places in (
        ("best", order[::-1]),
        ("worst", order),
        ("most_changed", np.argsort(-np.abs(by_loss), kind="stable").tolist()),
        ("random", np.random.default_rng(0).permutation(len(order)).tolist()),
        ("random", np.random.default_rng(1).permutation(len(order)).tolist()),
    ):
        if (place := next((at for at in places if at not in chosen), None)) is not None:
            chosen[place] = kind
    return chosen
