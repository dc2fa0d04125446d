"""The training loop: one step at a time, to a caller who decides what happens between steps."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import TrainedCopy, adapter_layers
from peftcli.core.protocols import after_step, penalty
from peftcli.errors import Diverged
from peftcli.tasks.base import Batch, on_device
from peftcli.train.batches import BatchForm, batches, num_workers
from peftcli.train.data import RunData
from peftcli.train.devices.sharding import is_sharded
from peftcli.train.events import StepResult
from peftcli.train.plan import MicroBatch

LESS_LEARNING = "lower training.learning_rate, or add warm-up; the last checkpoint is kept"
"""What to do about a run that diverged."""


@dataclass(frozen=True)
class PreparedModel:
    """What trains, prepared by accelerate."""

    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    config: AdapterConfig
    optim: str = ""
    """The recipe's name for the optimizer, and its arguments: another one cannot go on with what this one remembers."""

    @property
    def in_step(self) -> bool:
        """Whether all processes must run the model equally often."""
        return is_sharded(self.model) or isinstance(self.model, DistributedDataParallel)

    def micro_batch(self, accelerator: Accelerator, *, is_last: bool) -> AbstractContextManager[Any]:
        """Inside, a micro-batch runs forward and backward; it may be a step's last one."""
        # DDP adds the gradients up over the processes in the last backward pass
        return nullcontext() if is_last else accelerator.no_sync(self.model)

    def backward(self, loss: Any, accelerator: Accelerator) -> None:
        """Add a micro-batch's part to the gradients of the step."""
        accelerator.backward(loss)

    def apply_gradients(self, accelerator: Accelerator, limit: float) -> float:
        """Sum the gradients over the processes, clip them, and update what trains, unless they are not finite.

        Returns their norm before clipping.
        """
        _sum_gradients(self, accelerator)
        norm = float(accelerator.clip_grad_norm_(self.parameters, limit))
        if math.isfinite(norm):
            self.optimizer.step()
        return norm

    def gather_parameters(self) -> None:
        """Make the trained parameters whole where each process holds a part. All processes do so together."""

    def sync_parameters(self) -> None:
        """Adopt the values that were put into the trained parameters from outside. All processes do so together."""

    def optimizer_state(self) -> dict[nn.Parameter, dict[str, Any]]:
        """Return the optimizer's state of each tensor that trains. All processes ask together."""
        state: dict[Any, dict[str, Any]] = self.optimizer.state
        return state

    def load_optimizer_state(self, state: dict[nn.Parameter, dict[str, Any]]) -> None:
        """Load the state of another optimizer of the same kind, over the same tensors."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        kept = {place: state[each] for place, each in enumerate(parameters) if state.get(each)}
        self.optimizer.load_state_dict({"state": kept, "param_groups": self.optimizer.state_dict()["param_groups"]})


class Gradients:
    """The gradients of one step after another, in this process."""

    def __init__(self, data: RunData, prepared: PreparedModel, accelerator: Accelerator, start: int = 0):
        """Begin before step ``start``, counted from 0."""
        self.task, self.examples, self.plan = data.task, data.examples.train, data.plan
        self.prepared, self.accelerator, self.start = prepared, accelerator, start
        self.in_step = prepared.in_step
        self.model: nn.Module = accelerator.unwrap_model(prepared.model)
        """The model without DDP around it."""
        copies = [layer for layer in adapter_layers(self.model).values() if isinstance(layer, TrainedCopy)]
        self.buffers = [buffer for each in copies for buffer in each.fixed_tensors().values()]
        """What a forward pass in training changes and the adapter file holds: the running statistics of batch norms."""
        self.form = BatchForm.of(self.model, self.task, prepared.config, self.plan, in_step=self.in_step)
        steps = range(start, self.plan.total_steps)
        work = ((step, rows or self._stand_in(step)) for step in steps for rows in self.micro_batches(step))
        mine = ((step, rows) for step, rows in work if rows)
        self.ahead = batches(self._make, mine, num_workers(self.plan.training, self.task))
        """The batches of the micro-batches to come."""
        self.measured = self.no_measures()
        """The sums of the task's ``measures`` over the step's rows in this process."""

    def _make(self, item: tuple[int, MicroBatch]) -> Batch:
        step, rows = item
        return self.form.batch(self.task, self.examples, self.plan, step, rows)

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step in this process, on a CPU in parts that need less memory."""
        return self.form.divided(self.plan.micro_batches(step, self.accelerator.process_index), self.examples)

    def _stand_in(self, step: int) -> MicroBatch:
        """What is computed where a process has no rows and the others have, and all must run the model."""
        return self.plan.micro_batches(step, 0)[0][:1] if self.in_step else []

    def of(self, step: int, num_targets: int) -> torch.Tensor:
        """Compute the gradients of a global batch's part in this process, and return its summed loss."""
        total, micro_batches = self.zero(), self.micro_batches(step)
        for number, rows in enumerate(micro_batches, 1):
            parts, is_last = [], number == len(micro_batches)
            with self.prepared.micro_batch(self.accelerator, is_last=is_last):
                if rows:  # the others may have more
                    loss = self.loss(next(self.ahead))
                    parts.append(loss * (1 / num_targets))
                    total += loss.detach()
                elif self.in_step:
                    parts.append(self.loss(next(self.ahead), counts=False) * 0)
                else:
                    self.task.gather_nothing(self.accelerator.device)
                if is_last and (added := self.penalty()) is not None:
                    parts.append(added / self.accelerator.num_processes)
                if parts:
                    self.prepared.backward(sum(parts), self.accelerator)
        if self.buffers and self.accelerator.num_processes > 1:
            self._average_buffers(sum(map(bool, micro_batches)))
        return total

    def _average_buffers(self, weight: int) -> None:
        """Take the mean over the processes. ``weight`` is how many micro-batches this one has computed; it may be 0."""
        parts = [buffer.flatten().double() for buffer in self.buffers]  # in float64 the mean of equals is exact
        flat = torch.cat([*parts, parts[0].new_ones(1)])
        flat = flat * weight if weight else torch.zeros_like(flat)  # which may not be finite there
        torch.distributed.all_reduce(flat)
        *summed, weights = flat.split([*map(len, parts), 1])
        for buffer, total in zip(self.buffers, summed, strict=True):
            buffer.copy_((total / weights).view_as(buffer))

    def zero(self) -> torch.Tensor:
        """Return what the losses of a step are added to."""
        return torch.zeros((), dtype=torch.float32, device=self.accelerator.device)

    def no_measures(self) -> dict[str, torch.Tensor]:
        """Return what the task's ``measures`` of a step are added to."""
        return {name: self.zero() for name in self.task.measures}

    def loss(self, batch: Batch, *, counts: bool = True) -> torch.Tensor:
        """Return the summed loss of a batch, whose measures are added to the step's if it ``counts``."""
        with self.accelerator.autocast():
            loss = self.task.loss(self.prepared.model, on_device(batch, self.accelerator.device))
        for name, total in self.measured.items():
            total += loss.sums[name].detach() * counts
        return loss.total

    def measures(self, num_targets: int) -> dict[str, float]:
        """Return the means of the step's measures over the targets of all processes, and begin the next step's."""
        found, self.measured = self.measured, self.no_measures()
        if not found:
            return {}
        means = torch.stack(list(self.accelerator.reduce(found, reduction="sum").values())) / num_targets
        return dict(zip(found, means.tolist(), strict=True))

    def penalty(self) -> torch.Tensor | None:
        """Return what the method adds to the loss of a step."""
        return penalty(self.model, self.prepared.config)

    def close(self) -> None:
        """End the processes that make batches."""
        self.ahead.close()


def fit(gradients: Gradients) -> Generator[StepResult]:
    """Train from the first step of ``gradients`` to the plan's end, yielding after each step.

    The loss is the sum over targets divided by all targets of the global batch, so the split into micro-batches,
    processes and packed rows does not matter.

    Raises:
        Diverged: the loss or a gradient is NaN or Inf. The step is not applied.
        DataError: a file of a row cannot be read any more.
        ProcessDied: a worker process was killed.
    """
    prepared, plan, accelerator = gradients.prepared, gradients.plan, gradients.accelerator
    limit = plan.training.max_grad_norm or math.inf
    for step in range(gradients.start, plan.total_steps):
        prepared.model.train()
        batch = plan.global_batch(step)
        num_targets = int(gradients.examples.targets[batch].sum())
        total = gradients.of(step, num_targets)
        loss_sum = float(accelerator.reduce(total, reduction="sum"))
        learning_rate = float(prepared.schedule.get_last_lr()[0])
        if not math.isfinite(loss_sum):
            raise Diverged(f"the loss of step {step + 1} is not finite", hint=LESS_LEARNING)
        grad_norm = prepared.apply_gradients(accelerator, limit)
        if not math.isfinite(grad_norm):
            raise Diverged(f"the gradient norm of step {step + 1} is not finite", hint=LESS_LEARNING)
        prepared.schedule.step()
        after_step(gradients.model, prepared.config, step + 1, plan.total_steps)
        prepared.optimizer.zero_grad(set_to_none=True)
        num_tokens = int(plan.sizes[batch].sum()) + (0 if gradients.task.targets_in_size else num_targets)
        loss, measures = loss_sum / num_targets, gradients.measures(num_targets)
        yield StepResult(step + 1, loss, grad_norm, learning_rate, num_targets, num_tokens, measures)


def _sum_gradients(prepared: PreparedModel, accelerator: Accelerator) -> None:
    """Sum the gradients over the processes, as one vector whose layout never changes.

    DDP's buckets are laid out anew after a process's first step. With three processes or more the order in which floats
    are added depends on the layout, so that a run which was stopped would end with other bits.
    """
    parameters = prepared.parameters
    if accelerator.num_processes == 1:
        return
    if isinstance(prepared.model, DistributedDataParallel):  # which has taken the mean
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(accelerator.num_processes)
        return
    found = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    has_one = torch.tensor([each.grad is not None for each in parameters], device=accelerator.device)
    flat = torch.cat([*(gradient.flatten().float() for gradient in found), has_one.float()])
    torch.distributed.all_reduce(flat)
    *summed, counts = flat.split([*(each.numel() for each in parameters), len(parameters)])
    for parameter, gradient, count in zip(parameters, summed, counts.tolist(), strict=True):
        parameter.grad = gradient.view_as(parameter).to(parameter.dtype) if count else None
