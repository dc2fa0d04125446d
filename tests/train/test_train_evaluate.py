"""Evaluation of a made-up task: sums of any shape, and outputs in the order of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from trainkit import reset_accelerate

from peftcli.data.rows import Place
from peftcli.data.store import Column, Example, Outcome, Selection, Store, View, Writer
from peftcli.tasks.base import Loss, Task
from peftcli.train import evaluate as module
from peftcli.train.devices.launch import MEASURING, STATUS
from peftcli.train.evaluate import evaluate

CLASSES = 3


class Classes(Task[None]):
    """Rows of a number and a class; the model says a class."""

    columns = {"x": Column("float32", ()), "class": Column("int64", ())}  # noqa: RUF012
    mark, marked = Path(), False

    def read(self, table: Any) -> Any: ...

    def encode(self, rows: Any, reader: Any) -> Any: ...

    def collate(self, examples: Sequence[Example], *, training: bool) -> dict[str, torch.Tensor]:
        assert not training
        return {name: torch.tensor(np.stack([each.arrays[name] for each in examples])) for name in ("x", "class")}

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> Loss:
        assert not torch.is_grad_enabled(), "evaluation keeps no activations"
        said = (batch["x"] * 10).long() % CLASSES
        confusion = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
        for wanted, found in zip(batch["class"], said, strict=True):
            confusion[wanted, found] += 1
        return Loss(batch["x"].sum(), {"loss": batch["x"].sum(), "confusion": confusion}, batch["x"].tolist())

    def metrics(self, sums: Any, outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        assert sums["confusion"].shape == (CLASSES, CLASSES)
        self.seen, self.marked = list(outputs), self.mark.exists()
        accuracy = np.trace(sums["confusion"]) / num_targets
        return {"loss": float(sums["loss"]) / num_targets, "accuracy": accuracy}


@pytest.fixture
def view(tmp_path: Path) -> View:
    generator = np.random.default_rng(0)
    rows = [(float(x), int(c)) for x, c in zip(generator.random(17), generator.integers(0, CLASSES, 17), strict=True)]
    sizes = generator.integers(1, 9, 17)
    with Writer(tmp_path, Classes.columns) as writer:
        for number, ((x, c), size) in enumerate(zip(rows, sizes, strict=True), start=1):
            writer.add([Place("a", number)], [Outcome([Example({"x": x, "class": c}, int(size), 1)])])
        writer.finish()
    return View([Selection(Store(tmp_path))])


def test_sums_of_any_shape_and_outputs_in_order_whatever_the_batch_size(view: View) -> None:
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    in_order = [float(each.arrays["x"]) for each in view]
    confusion = np.zeros((CLASSES, CLASSES))
    for each in view:
        confusion[each.arrays["class"], int(each.arrays["x"] * 10) % CLASSES] += 1
    for batch_size in (1, 4, 32):
        task = Classes(None, None, None)  # type: ignore[arg-type]
        found = evaluate(nn.Linear(1, 1), task, view, batch_size, accelerator)
        assert found == {
            "eval_loss": pytest.approx(sum(in_order) / 17),
            "eval_accuracy": pytest.approx(np.trace(confusion) / 17),
        }
        assert task.seen == in_order
        assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("processes", [2, 3, 20])
def test_processes_add_up_to_one(view: View, processes: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each process's share, put together as accelerate puts it together; some have no batch at all.

    The first one alone computes metrics, and says so meanwhile, so that it may wait. The others wait for its word, in
    no collective, which would end.
    """
    reset_accelerate()
    single = Classes(None, None, None)  # type: ignore[arg-type]
    alone = evaluate(nn.Linear(1, 1), single, view, 1, Accelerator(cpu=True))
    shares: list[dict[str, torch.Tensor]] = []
    outputs: list[Any] = []

    class Process:
        def __init__(self, index: int):
            self.process_index, self.num_processes = index, processes
            self.device, self._real = torch.device("cpu"), Accelerator(cpu=True)
            self.unwrap_model, self.autocast = self._real.unwrap_model, self._real.autocast

        def reduce(self, sums: dict[str, torch.Tensor], reduction: str) -> dict[str, torch.Tensor]:
            shares.append(sums)
            return {name: torch.stack([share[name] for share in shares]).sum(0) for name in sums}

    def gather(own: list[Any]) -> list[Any]:
        outputs.extend(own)
        return outputs

    class Together:
        looks = 0

        def check(self, keys: list[str]) -> bool:
            self.looks += 1
            return keys == getattr(self, "measured", None) or self.looks % 2 == 0

        def set(self, key: str, value: str) -> None:
            self.measured = [key]

    store = Together()
    monkeypatch.setattr(module, "gather_object", gather)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setenv(STATUS, str(tmp_path))
    monkeypatch.setattr(Classes, "mark", tmp_path / MEASURING)
    for index in reversed(range(processes)):
        task = Classes(None, None, None)  # type: ignore[arg-type]
        together = evaluate(nn.Linear(1, 1), task, view, 1, Process(index))  # type: ignore[arg-type]
        assert (together is None, task.marked, Classes.mark.exists()) == (index > 0, index == 0, False)
    assert together == {name: pytest.approx(value) for name, value in (alone or {}).items()}
    assert task.seen == single.seen
    assert store.looks == 2 * (processes - 1) + 1
