"""Which examples each step sees, for how long, and at which learning rate."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftcli.schema import Training
from peftcli.train.batches import Plan
from peftcli.train.optim import build_optimizer, build_schedule

LENGTHS = [(7 * n) % 31 + 1 for n in range(57)]


def plan(lengths: list[int] = LENGTHS, processes: int = 1, **training: Any) -> Plan:
    return Plan(lengths, Training(output_dir="out", **{"per_device_train_batch_size": 4, **training}), processes)


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


def test_group_by_length_saves_padding() -> None:
    def padding(strategy: str) -> int:
        made = plan([n % 97 + 1 for n in range(1000)], train_sampling_strategy=strategy)
        batches = [[made.lengths[index] for index in made.global_batch(step)] for step in range(made.steps_per_epoch)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding("group_by_length") < padding("random") / 4


def test_group_by_length_does_not_go_from_short_to_long() -> None:
    made = plan([n % 97 + 1 for n in range(1000)], train_sampling_strategy="group_by_length")
    longest = [max(made.lengths[index] for index in made.global_batch(step)) for step in range(50)]
    assert longest != sorted(longest)


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
)
def test_micro_batches_split_the_global_batch(
    rows: int, size: int, accumulation: int, processes: int, step: int
) -> None:
    made = plan(
        list(range(1, rows + 1)),
        processes,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
    )
    shares = [made.micro_batches(step, process) for process in range(processes)]
    assert sorted(index for share in shares for part in share for index in part) == sorted(made.global_batch(step))
    assert all(len(part) <= size for share in shares for part in share)
    assert len({len(share) for share in shares}) == 1, "processes would wait for one another for ever"
    assert all(0 < len(share) <= accumulation for share in shares)


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


def test_warmup_ratio_is_a_share_of_the_steps() -> None:
    training = Training(output_dir="out", learning_rate=PEAK, warmup_ratio=0.2)
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
