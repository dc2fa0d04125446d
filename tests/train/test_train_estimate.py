"""What a run needs of memory is known before: by a step without values that lives as one with them does."""

from __future__ import annotations

import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from taskkit import CASES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainkit import base_folder

from peftcli.models.open import open_base
from peftcli.recipe import load_recipe, method_config
from peftcli.schema import Recipe, Training
from peftcli.system.cores import bytes_of_kernels
from peftcli.tasks import open_task
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.train import setup
from peftcli.train.batches import BatchForm
from peftcli.train.data import load_data, plan_of, with_task
from peftcli.train.devices.accelerator import uses_bf16
from peftcli.train.memory.estimate import _HELD_BACK, _largest
from peftcli.train.plan import MicroBatch, Plan
from peftcli.train.preview import preview


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once, at most, beyond those of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.most = 0
        before = [*model.parameters(), *model.buffers(), *(each.grad for each in model.parameters())]
        self.known = {each.untyped_storage()._cdata for each in before if each is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in self.known:
                storage = each.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.most = max(self.most, self.live)
                weakref.finalize(storage, self.forget, storage._cdata, storage.nbytes())
        return made

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def step_of(recipe: Recipe) -> int:
    """What the largest micro-batch of a run takes, counted while it is computed."""
    task = open_task(recipe, open_base(recipe.base_model))
    data, config = load_data(recipe, task), method_config(recipe)
    plan = plan_of(recipe, data, 1)
    model, _, _ = setup.adapted_model(recipe, config, data.task, None, setup.load_base)
    unpad(model, config)
    form = BatchForm.of(model, data.task, config, plan)
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None

    def computed(step: int, rows: MicroBatch) -> int:
        batch, living = form.batch(data.task, data.train, plan, step, rows), Living(model)
        for mode in (nullcontext(), living):  # at first it looks for the head
            with torch.autocast("cpu", torch.bfloat16, enabled=uses_bf16(recipe)), mode:
                data.task.loss(model, batch).total.backward()
        return living.most

    parts = ((step, part) for step in range(plan.total_steps) for part in plan.micro_batches(step, 0))
    return max(computed(*part) for part in parts)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("dtype", ["false", "true"])
@pytest.mark.parametrize(
    ("task", "base"),
    [
        ("causal_lm", None),
        ("causal_lm", "gemma3_towers"),
        ("seq2seq_lm", None),
        ("sequence_classification", None),
        ("image_classification", None),
    ],
)
def test_a_step_without_values_takes_what_one_with_them_does(
    task: str, base: str | None, dtype: str, tmp_path: Path
) -> None:
    settings = [f"training.bf16={dtype}", "training.max_steps=4"]
    settings += [f"base_model={base_folder(base)}"] if base else []
    recipe = load_recipe(CASES[task].write(tmp_path), settings)
    found = preview(recipe)
    known = found["memory"]
    measured = step_of(with_task(recipe))
    kernels = bytes_of_kernels() if dtype == "true" else 0
    assert known["step"] - kernels == pytest.approx(_HELD_BACK * measured, rel=0.05)
    assert known["adapter"] == 16 * found["parameters"]["trainable"], "values, gradients and two averages, in float32"
    parts = known["adapter"] + max(known["step"], known["evaluation"]) + known["saving"]
    assert known["peak"] == known["packages"] + known["weights"] + max(known["file"], parts)


@pytest.mark.parametrize(("pads", "steps"), [(False, [1, 2]), (True, [2])])
def test_the_rows_with_most_tokens_are_counted_and_those_with_most_pairs(pads: bool, steps: list[int]) -> None:
    training = Training(output_dir="out", per_device_train_batch_size=3, train_sampling_strategy="sequential")
    plan = Plan([2, 3, 9, 5, 5, 5, 11, 1, 1], training, 1)
    form, data = BatchForm(joins=False, pads=pads, divides=False), Mock(train=None)
    assert [step for step, _ in _largest(form, plan, data)] == steps


def test_packages_that_only_an_evaluation_imports_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_metrics.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("peftcli.tasks.classification.Classification.packages", {"of_metrics": "metrics"})
    monkeypatch.setattr("peftcli.train.memory.estimate.resident_memory", lambda: int("of_metrics" in sys.modules))
    recipe = CASES["sequence_classification"].write(tmp_path)
    packages = {
        strategy: preview(load_recipe(recipe, [f"training.eval_strategy={strategy}"]))["memory"]["packages"]
        for strategy in ("no", "epoch")
    }
    assert packages == {"no": 0, "epoch": 1}


def test_the_best_adapter_that_is_kept_is_counted(recipe: Path) -> None:
    settings = ["training.eval_strategy=steps", "training.eval_steps=2", "training.load_best_model_at_end=true"]
    found = preview(load_recipe(recipe, settings))
    assert found["memory"]["adapter"] == (16 + 4) * found["parameters"]["trainable"]
