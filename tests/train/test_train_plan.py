"""Which examples each step sees, for how long, and at which learning rate."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftcli.schema import Training
from peftcli.train.optim import build_optimizer, build_schedule
from peftcli.train.plan import Plan, best_fit

LENGTHS = [(7 * n) % 31 + 1 for n in range(57)]


def plan(lengths: list[int] = LENGTHS, processes: int = 1, **settings: Any) -> Plan:
    names = ("counts", "weights", "max_length", "divides", "groups")
    own = {name: settings.pop(name) for name in names if name in settings}
    training = Training(output_dir="out", **{"per_device_train_batch_size": 4, **settings})
    return Plan(lengths, training, processes, **own)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_an_epoch_sees_each_example_once(strategy: str) -> None:
    made = plan(train_sampling_strategy=strategy, gradient_accumulation_steps=2)
    epochs = [
        [
            index
            for step in range(made.steps_per_epoch)
            for index in made.global_batch(epoch * made.steps_per_epoch + step)
        ]
        for epoch in range(3)
    ]
    assert all(Counter(epoch) == Counter(range(57)) for epoch in epochs)
    assert (epochs[0] == epochs[1]) == (strategy == "sequential")


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_rows_of_a_step_are_of_one_group(strategy: str, processes: int) -> None:
    groups = np.array([(3 * n) % 5 for n in range(57)])
    settings: dict[str, Any] = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": 2 // processes}
    made = plan([1] * 57, processes, groups=groups, num_train_epochs=2, **settings)
    steps = range(made.steps_per_epoch)
    of_processes = [[made.micro_batches(step, process) for step in steps] for process in range(processes)]
    each = [[index for row in rows for index in row] for parts in chain(*of_processes) for rows in parts]
    assert Counter(chain(*each)) == Counter(range(57))
    assert max(map(len, each)) == 4
    assert all(len({*groups[made.global_batch(step)]}) == 1 for step in steps)
    assert {len({len(parts[step]) for parts in of_processes}) for step in steps} == {1}, "as many in each process"
    seen = [index for step in range(made.total_steps) for index in made.global_batch(step)]
    assert Counter(seen) == Counter(dict.fromkeys(range(57), 2))
    assert (seen[:57] == seen[57:]) == (strategy == "sequential")
    whole: dict[str, Any] = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 8}
    other = plan([1] * 57, groups=groups, num_train_epochs=2, **whole)
    at = range(made.total_steps - 1, -1, -1)
    assert [other.global_batch(step) for step in at] == [made.global_batch(step) for step in at], "however it is split"


def test_group_by_length_saves_padding() -> None:
    def padding(strategy: str) -> int:
        made = plan([n % 97 + 1 for n in range(1000)], train_sampling_strategy=strategy)
        batches = [[made.sizes[index] for index in made.global_batch(step)] for step in range(made.steps_per_epoch)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding("group_by_length") < padding("random") / 4


def test_group_by_length_does_not_go_from_short_to_long() -> None:
    made = plan([n % 97 + 1 for n in range(1000)], train_sampling_strategy="group_by_length")
    longest = [max(made.sizes[index] for index in made.global_batch(step)) for step in range(50)]
    assert longest != sorted(longest)


def test_group_by_length_mixes_batches_anew_in_each_epoch_of_few_steps() -> None:
    made = plan([(7 * n) % 101 + 1 for n in range(160)], train_sampling_strategy="group_by_length")
    epochs = [{frozenset(made.global_batch(40 * epoch + step)) for step in range(40)} for epoch in range(2)]
    assert len(epochs[0] & epochs[1]) < 4


def test_order_follows_the_seed_alone() -> None:
    first, again, other = plan(seed=1), plan(seed=1), plan(seed=2)
    # asking in another order, as a resumed run does, changes nothing
    backwards = [again.global_batch(step) for step in reversed(range(40))][::-1]
    assert [first.global_batch(step) for step in range(40)] == backwards
    assert first.global_batch(0) != other.global_batch(0)


@given(
    rows=st.integers(1, 70),
    size=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    processes=st.integers(1, 4),
    step=st.integers(0, 20),
    max_length=st.sampled_from([None, 80]),
    divides=st.booleans(),
)
def test_micro_batches_split_the_global_batch(
    rows: int, size: int, accumulation: int, processes: int, step: int, max_length: int | None, divides: bool
) -> None:
    made = plan(
        list(range(1, rows + 1)),
        processes,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_length=max_length,
        divides=divides,
    )
    shares = [made.micro_batches(step, process) for process in range(processes)]
    seen = [index for share in shares for part in share for row in part for index in row]
    assert sorted(seen) == sorted(made.global_batch(step))
    assert all(len(part) <= size for share in shares for part in share)
    assert len({len(share) for share in shares}) == 1, "processes would wait for one another for ever"
    assert all(0 < len(share) <= accumulation for share in shares)


def test_rows_that_are_compared_are_as_many_as_there_are() -> None:
    made = plan(LENGTHS[:20], gradient_accumulation_steps=4, train_sampling_strategy="sequential", divides=False)
    steps = [[[index for row in part for index in row] for part in made.micro_batches(at, 0)] for at in range(2)]
    assert steps == [[[4 * at + place for place in range(4)] for at in range(4)], [[16, 17, 18, 19]]]
    two = plan(LENGTHS[:20], 2, gradient_accumulation_steps=2, train_sampling_strategy="sequential", divides=False)
    assert [two.micro_batches(1, process) for process in range(2)] == [[[[16], [17]]], [[[18], [19]]]]


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"num_train_epochs": 1}, 15),
        ({"num_train_epochs": 2}, 30),
        ({"num_train_epochs": 0.5}, 8),
        ({"num_train_epochs": 0.01}, 1),
        ({"num_train_epochs": 2, "max_steps": 7}, 7),
        ({"num_train_epochs": 1, "max_steps": 100}, 100),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 2}, 8),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 100}, 1),
    ],
)
def test_total_steps(training: dict[str, Any], steps: int) -> None:
    assert plan(**training).total_steps == steps


def test_fractional_epochs_are_not_rounded_up_for_float_error() -> None:
    assert 2.2 * 25 > 55
    assert plan([5] * 100, num_train_epochs=2.2).total_steps == 55


def test_epochs_end_where_the_data_does() -> None:
    made = plan()
    assert [step for step in range(1, 46) if made.ends_epoch(step)] == [15, 30, 45]
    assert made.epoch(15) == 1.0


def test_the_order_without_packing_does_not_change() -> None:
    """Later versions resume a run that this one began."""
    assert plan([1] * 10).global_batch(0) == [8, 4, 0, 7]
    grouped = plan(per_device_train_batch_size=2, train_sampling_strategy="group_by_length")
    assert [grouped.global_batch(step) for step in range(3)] == [[37, 15], [31, 18], [1, 32]]


# --- packing ----------------------------------------------------------------------------------------------------------

ORDERS = st.sampled_from(["random", "sequential", "group_by_length"])


def steps_of(made: Plan, epoch: int) -> range:
    """The steps of an epoch."""
    ends = [0]
    while len(ends) < epoch + 2:
        step = ends[-1] + 1
        while not made.ends_epoch(step):
            step += 1
        ends.append(step)
    return range(ends[epoch], ends[epoch + 1])


def rows_of(made: Plan, steps: range) -> list[list[int]]:
    return [row for step in steps for part in made.micro_batches(step, 0) for row in part]


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80), order=ORDERS, size=st.integers(1, 4))
def test_every_packed_epoch_sees_each_example_once(lengths: list[int], order: str, size: int) -> None:
    made = plan(lengths, max_length=50, per_device_train_batch_size=size, train_sampling_strategy=order)
    for epoch in range(3):
        rows = rows_of(made, steps_of(made, epoch))
        assert Counter(index for row in rows for index in row) == Counter(range(len(lengths)))
        assert all(sum(lengths[index] for index in row) <= 50 for row in rows)


def test_each_epoch_packs_anew() -> None:
    made = plan(np.random.default_rng(0).integers(42, 513, 400), max_length=1024)
    epochs = [rows_of(made, steps_of(made, epoch)) for epoch in range(2)]
    together = [{frozenset(row) for row in rows} for rows in epochs]
    assert len(together[0] & together[1]) < len(together[0]) / 10
    assert made.efficiency > 0.98


def test_packing_keeps_the_order_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.train.plan._PACKED", 100)
    made = plan([10] * 400, max_length=40, train_sampling_strategy="sequential")
    rows = rows_of(made, range(made.steps_per_epoch))
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert all(len({index // 100 for index in row}) == 1 for row in rows)
    shuffled = rows_of(plan([10] * 400, max_length=40), range(made.steps_per_epoch))
    assert np.corrcoef([row[0] for row in shuffled], range(len(shuffled)))[0, 1] < 0.3


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    seed=st.integers(-3, 3),
    step=st.integers(0, 30),
    weights=st.sampled_from([None, [1.0, 2.0]]),
)
def test_a_packed_step_depends_on_seed_and_step_alone(
    lengths: list[int], seed: int, step: int, weights: list[float] | None
) -> None:
    settings: dict[str, Any] = {"max_length": 30, "seed": seed, "counts": [1, len(lengths)], "weights": weights}
    first, later = plan([5, *lengths], **settings), plan([5, *lengths], **settings)
    before = [first.micro_batches(earlier, 0) for earlier in range(step + 1)]
    assert later.micro_batches(step, 0) == before[step], "a resumed run reads nothing of what came before"


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    epochs=st.sampled_from([0.3, 1, 2, 2.5, 4]),
    size=st.integers(1, 3),
)
def test_packed_steps_add_up(lengths: list[int], epochs: float, size: int) -> None:
    made = plan(lengths, max_length=30, num_train_epochs=epochs, per_device_train_batch_size=size)
    counts = [len(steps_of(made, epoch)) for epoch in range(5)]
    whole = int(epochs)
    assert made.total_steps == max(1, math.ceil(round(sum(counts[:whole]) + (epochs - whole) * counts[whole], 6)))
    assert made.steps_per_epoch == counts[0]
    assert [step for step in range(1, sum(counts) + 1) if made.ends_epoch(step)] == np.cumsum(counts).tolist()
    passed = [made.epoch(step) for step in range(sum(counts) + 1)]
    assert passed == sorted(passed)
    assert [passed[end] for end in np.cumsum([0, *counts])] == [0, 1, 2, 3, 4, 5]


def test_packed_epochs_differ_in_steps() -> None:
    made = plan(np.random.default_rng(0).integers(5, 40, 300), max_length=64, per_device_train_batch_size=1)
    assert len({len(steps_of(made, epoch)) for epoch in range(8)}) > 1, "else the tests above prove little"


@pytest.mark.parametrize("max_length", [None, 128])
@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("count", [5, 203])
def test_efficiency_is_that_of_the_micro_batches(max_length: int | None, processes: int, count: int) -> None:
    lengths = np.random.default_rng(1).integers(10, 100, count)
    made = plan(lengths, processes, max_length=max_length, gradient_accumulation_steps=2)
    parts = [
        [int(lengths[row].sum()) for row in part]
        for step in range(made.steps_per_epoch)
        for process in range(processes)
        for part in made.micro_batches(step, process)
        if part
    ]
    assert made.efficiency == pytest.approx(lengths.sum() / sum(len(part) * max(part) for part in parts))
    assert lengths[made.epoch_examples].sum() == lengths.sum()


# --- mixing -----------------------------------------------------------------------------------------------------------

MIXES = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(1, 30), min_size=count, max_size=count),
        st.lists(st.floats(0.01, 100), min_size=count, max_size=count),
    )
)


@given(mix=MIXES, order=ORDERS, max_length=st.sampled_from([None, 20]))
def test_sources_are_mixed_by_weight_and_seen_evenly(
    mix: tuple[list[int], list[float]], order: str, max_length: int | None
) -> None:
    sizes, weights = mix
    total, owner = sum(sizes), np.repeat(np.arange(len(sizes)), sizes)
    made = plan(
        [n % 7 + 1 for n in range(total)],
        counts=sizes,
        weights=weights,
        max_length=max_length,
        train_sampling_strategy=order,
    )
    assert sum(made.draws) == total
    shares = [weight / sum(weights) * total for weight in weights]
    assert all(abs(draws - share) < 1 for draws, share in zip(made.draws, shares, strict=True))
    assert made.passes == [draws / size for draws, size in zip(made.draws, sizes, strict=True)]
    seen = np.zeros(total, int)
    for epoch in range(4):
        drawn = [index for step in steps_of(made, epoch) for index in made.global_batch(step)]
        assert np.bincount(owner[drawn], minlength=len(sizes)).tolist() == made.draws
        np.add.at(seen, drawn, 1)
        for source in range(len(sizes)):
            counts = seen[owner == source]
            assert counts.max() - counts.min() <= 1, "a source starts anew only when all of it was seen"


def test_without_weights_sources_stand_one_after_another() -> None:
    sizes = [20, 30, 7]
    assert plan(counts=sizes).global_batch(3) == plan().global_batch(3)
    assert plan(counts=sizes).passes == [1.0, 1.0, 1.0]
    in_order = plan(counts=sizes, train_sampling_strategy="sequential")
    assert [index for step in range(in_order.steps_per_epoch) for index in in_order.global_batch(step)] == [*range(57)]


def test_sequential_sources_are_interleaved_and_go_on_where_they_stopped() -> None:
    made = plan(
        [1] * 12, counts=[8, 4], weights=[1, 1], train_sampling_strategy="sequential", per_device_train_batch_size=12
    )
    assert made.global_batch(0) == [0, 8, 1, 9, 2, 10, 3, 11, 4, 8, 5, 9]
    assert made.global_batch(1) == [6, 10, 7, 11, 0, 8, 1, 9, 2, 10, 3, 11]


def test_a_sources_order_is_its_own() -> None:
    """Passes through a source are shuffled each by itself, and unlike those of another source."""

    def stream(source: int) -> list[int]:
        sizes = [0, 30, 60]
        made = plan([1] * 60, counts=[30, 30], weights=[1, 1], per_device_train_batch_size=60)
        return [
            index - sizes[source]
            for step in range(2)
            for index in sorted(made.global_batch(step))
            if sizes[source] <= index < sizes[source + 1]
        ]

    assert Counter(stream(0)) == Counter(stream(1)) == Counter([*range(30)] * 2)
    made = plan([1] * 60, counts=[30, 30], weights=[1, 3], per_device_train_batch_size=60)
    first, second = ({index for index in made.global_batch(step) if index < 30} for step in range(2))
    assert len(first) == len(second) == 15
    assert not first & second
    assert sorted(first) != list(range(15))


def test_a_source_that_is_seen_often_is_told_of() -> None:
    sizes, weights = [90, 10], [1.0, 1.0]
    made = plan([1] * 100, counts=sizes, weights=weights, num_train_epochs=2)
    (text,) = made.repeated(["big.jsonl", "small.jsonl"])
    assert text.startswith("small.jsonl is seen 10.0 times over the run")
    assert plan([1] * 100, counts=sizes, weights=weights, num_train_epochs=0.5).repeated(["a", "b"]) == []
    assert plan([1] * 100, counts=sizes, num_train_epochs=9).repeated(["a", "b"]) == [], "the user asked for 9 epochs"


# --- the learning rate ------------------------------------------------------------------------------------------------

PEAK, TOTAL, WARM = 0.5, 20, 4


def _expected(kind: str, step: int, warm: int) -> float:
    """The published formulas."""
    if kind == "constant":
        return 1.0
    if step < warm:
        return step / warm
    done = (step - warm) / (TOTAL - warm)
    return {
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "constant_with_warmup": 1.0,
        "polynomial": (1e-7 + (PEAK - 1e-7) * (1 - done)) / PEAK,
        "inverse_sqrt": 1 / math.sqrt(1 + (step - warm) / (warm or 10_000)),
    }[kind]


@pytest.mark.parametrize("warm", [0, WARM])
@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"])
def test_schedules(kind: str, warm: int) -> None:
    training = Training(output_dir="out", learning_rate=PEAK, lr_scheduler_type=kind, warmup_steps=warm)  # type: ignore[arg-type]
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], training)
    schedule = build_schedule(optimizer, training, TOTAL)
    rates = []
    for _ in range(TOTAL):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([PEAK * _expected(kind, step, warm) for step in range(TOTAL)], rel=1e-9)


@pytest.mark.parametrize("kind", ["linear", "polynomial"])
def test_all_steps_may_warm_up(kind: Literal["linear", "polynomial"]) -> None:
    training = Training(output_dir="out", learning_rate=PEAK, lr_scheduler_type=kind, warmup_ratio=1)
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], training)
    schedule = build_schedule(optimizer, training, 4)
    rates = []
    for _ in range(4):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0, PEAK / 4, PEAK / 2, 3 * PEAK / 4])


@pytest.mark.parametrize("share", [{"warmup_ratio": 0.16}, {"warmup_steps": 0.16, "warmup_ratio": 0.9}])
def test_a_share_of_the_steps_warms_up_and_is_rounded_up(share: dict[str, float]) -> None:
    training = Training(output_dir="out", learning_rate=PEAK, **share)  # type: ignore[arg-type]
    steps = replace(training, warmup_ratio=0.9, warmup_steps=4)

    def rates(each: Training) -> list[float]:
        optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], each)
        schedule = build_schedule(optimizer, each, TOTAL)
        found = []
        for _ in range(6):
            found.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return found

    assert rates(training) == rates(steps)
    assert rates(training)[:5] == pytest.approx([0, PEAK / 4, PEAK / 2, 3 * PEAK / 4, PEAK])


def test_optimizer_takes_the_recipes_settings() -> None:
    training = Training(
        output_dir="out", learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
    )
    (group,) = build_optimizer([torch.nn.Parameter(torch.zeros(1))], training).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (1e-3, 0.1, (0.8, 0.9), 1e-6)


def textbook(lengths: list[int], max_length: int) -> list[int]:
    """What each row is left with, sorted: best fit in decreasing order, written out."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        room = min(fitting) if fitting else max(max_length, length)
        if fitting:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60), max_length=st.integers(10, 63))
def test_best_fit_is_the_textbooks(lengths: list[int], max_length: int) -> None:
    """With rows this short, each length is a step of its own."""
    rows = best_fit(np.array(lengths), max_length)
    filled = np.bincount(rows, lengths).astype(int)
    assert set(rows.tolist()) == set(range(len(filled)))
    assert (np.bincount(rows)[filled > max_length] == 1).all(), "only one example can be longer than a row"
    assert sorted((np.maximum(max_length, filled) - filled).tolist()) == textbook(lengths, max_length)


@given(lengths=st.lists(st.integers(1, 1000), min_size=2, max_size=60))
def test_no_two_rows_would_fit_into_one(lengths: list[int]) -> None:
    filled = sorted(np.bincount(best_fit(np.array(lengths), 1000), lengths))
    assert filled[-1] <= 1000
    assert len(filled) == 1 or filled[0] + filled[1] > 1000


def test_another_order_packs_other_examples_together() -> None:
    lengths = np.random.default_rng(0).integers(42, 513, 400)

    def pairs(seed: int) -> set[tuple[int, int]]:
        order = np.random.default_rng(seed).permutation(400)
        rows = best_fit(lengths[order], 1024)
        together = [order[rows == row].tolist() for row in range(rows.max() + 1)]
        return {(a, b) for row in together for a in row for b in row if a < b}

    assert len(pairs(1) & pairs(2)) < len(pairs(1)) / 5


def test_best_fit_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(42, 513, 10_000)
    rows = best_fit(lengths, 1024)
    assert lengths.sum() / (1024 * (rows.max() + 1)) > 0.99
