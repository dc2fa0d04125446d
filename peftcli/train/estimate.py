"""How much memory a run needs, found before a weight is loaded.

The largest micro-batch goes through the model forward and backward, with tensors that have shapes and no values, and
what lives at once is counted. So every model, method and task is counted by the code that trains it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import base_module
from peftcli.core.linear import linear_view
from peftcli.core.weights import named_tensors
from peftcli.models.quantization import bytes_of_weight
from peftcli.models.stacks import stacks
from peftcli.schema import Recipe
from peftcli.system.memory import resident_memory
from peftcli.tasks.base import on_device
from peftcli.tasks.text.output_head import take_head_as_it_is
from peftcli.tasks.text.unpadded import unpad
from peftcli.train.batches import collate
from peftcli.train.data import Data
from peftcli.train.launch import total_processes
from peftcli.train.micro_batches import BatchForm
from peftcli.train.optim import STATE_BYTES
from peftcli.train.plan import MicroBatch, Plan
from peftcli.train.setup import base_dtype, checkpoint_activations, uses_bf16
from peftcli.train.sizes import Sizes

_STEPS = 2000
"""Among the micro-batches of so many steps the largest is looked for."""


@dataclass(frozen=True)
class Estimate:
    """What a process of a run needs at most, in bytes."""

    device: str
    """Whose memory: cpu or cuda."""
    packages: int
    """Python and its packages, and the data; 0 on a GPU."""
    weights: int
    """The base model's weights."""
    file: int
    """What is mapped of the model's files while it is loaded, and is not the weights themselves; 0 on a GPU."""
    adapter: int
    """What trains: values, gradients and what the optimizer remembers."""
    step: int
    """What the largest micro-batch needs beyond these, forward and backward."""
    evaluation: int
    """What the largest batch of an evaluation needs beyond the weights and the adapter; 0 without one."""

    @property
    def peak(self) -> int:
        """At most: while the model is loaded, in a step or in an evaluation."""
        return self.packages + self.weights + max(self.file, self.adapter + max(self.step, self.evaluation))

    def as_dict(self) -> dict[str, Any]:
        """Return all figures."""
        return {**asdict(self), "peak": self.peak}


def estimate(model: nn.Module, config: AdapterConfig, recipe: Recipe, data: Data, plan: Plan, folder: Path) -> Estimate:
    """Return what a run needs.

    Args:
        model: On the meta device, with its adapter. It is changed, and of no use afterwards.
        config: The adapter's.
        recipe: Says how it trains.
        data: What it trains on.
        plan: In which batches.
        folder: The base model's, whose files may be there.

    Raises:
        RuntimeError: what the model computes depends on values, so that it cannot be known without them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packages = resident_memory() if device.type == "cpu" else 0
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(model)
    sizes = Sizes(device)
    sizes.place(model, base_dtype(recipe))
    trained = [parameter for _, _, parameter in named_tensors(model).values()]
    values = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    weights = sizes.live - values - _saved_by_quantization(model, recipe) - _held_by_others(model, recipe)
    unpad(model, config, try_out=False)
    take_head_as_it_is(model)
    form = BatchForm.of(model, data.task, config, plan)
    batch = form.batch(data.task, data.train, plan, *_largest(form, plan, data))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(recipe))
    model.train()
    for parameter in trained:
        parameter.grad = sizes.like(parameter)
    with autocast:
        training = sizes.of(lambda: data.task.loss(model, on_device(batch, device)).total.backward())
    evaluation = 0
    if data.eval is not None and recipe.training.eval_strategy != "no":
        model.eval()
        largest = np.argsort(data.eval.sizes)[-recipe.training.per_device_eval_batch_size :].tolist()
        rows = collate(data.task, data.eval, largest, training=False)
        with torch.no_grad(), autocast:
            evaluation = sizes.of(lambda: data.task.loss(model, on_device(rows, device)))
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    is_mapped = abs(stored - weights) < weights / 20  # the weights are the file's own pages
    return Estimate(
        device=device.type,
        packages=packages,
        weights=weights,
        file=0 if is_mapped or device.type != "cpu" else stored,
        adapter=2 * values + sum(each.numel() for each in trained) * STATE_BYTES[recipe.training.optim],
        step=training,
        evaluation=evaluation,
    )


def _largest(form: BatchForm, plan: Plan, data: Data) -> tuple[int, MicroBatch]:
    """A step, from 0, and what of it is in the model at once and has the most tokens, padding included if computed."""
    sizes = plan.sizes

    def size(item: tuple[int, MicroBatch]) -> int:
        rows = [int(sizes[row].sum()) for row in item[1]]
        return len(rows) * max(rows) if form.pads else sum(rows)

    steps = range(min(plan.steps_per_epoch, plan.total_steps, _STEPS))
    found = ((step, part) for step in steps for part in form.divided(plan.micro_batches(step, 0), data.train) if part)
    return max(found, key=size)


def _saved_by_quantization(model: nn.Module, recipe: Recipe) -> int:
    """Bytes by which quantised linear weights are smaller."""
    quantization = recipe.base_model.quantization
    if quantization is None:
        return 0
    layers = {base_module(each) for each in model.modules() if linear_view(each) is not None}
    frozen = [each.weight for each in layers if not each.weight.requires_grad]
    return sum(int(each.numel() * (each.element_size() - bytes_of_weight(quantization))) for each in frozen)


def _held_by_others(model: nn.Module, recipe: Recipe) -> int:
    """Bytes of the layers' weights that other processes hold, less a whole layer, which computes."""
    count = total_processes(recipe.launch)
    if recipe.launch.strategy != "fsdp" or count == 1:
        return 0
    layers = [layer for _, found in stacks(model) for layer in found]
    sizes = [sum(each.numel() * each.element_size() for each in layer.parameters()) for layer in layers]
    return sum(sizes) - sum(sizes) // count - 2 * max(sizes)
