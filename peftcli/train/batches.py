"""Which examples each step sees: a function of the seed, the epoch and the step, and of nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from peftcli.schema import Training

_WINDOW = 50
"""With group_by_length: how many global batches are sorted by length together."""


@dataclass(frozen=True)
class Plan:
    """The order of the examples over a run."""

    lengths: list[int]
    """Tokens of each training example."""
    training: Training
    num_processes: int
    _orders: dict[int, list[int]] = field(default_factory=dict, repr=False)
    """The order of the epoch that was asked for last."""

    @property
    def global_batch_size(self) -> int:
        """Examples of one step, over all processes and micro-batches."""
        training = self.training
        return training.per_device_train_batch_size * training.gradient_accumulation_steps * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every example once; the last one may be smaller."""
        return math.ceil(len(self.lengths) / self.global_batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        steps = round(self.training.num_train_epochs * self.steps_per_epoch, 6)  # 2.2 * 25 is a little more than 55
        return max(1, math.ceil(steps))

    def epoch(self, step: int) -> float:
        """Passes over the data after ``step`` steps."""
        return step / self.steps_per_epoch

    def ends_epoch(self, step: int) -> bool:
        """Whether the ``step``-th step, from 1, is the last of an epoch."""
        return step % self.steps_per_epoch == 0

    def global_batch(self, step: int) -> list[int]:
        """Indices of the examples of step ``step``, from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders.clear()
            self._orders[epoch] = self._order(epoch)
        order = self._orders[epoch]
        start = position * self.global_batch_size
        return order[start : start + self.global_batch_size]

    def micro_batches(self, step: int, process: int) -> list[list[int]]:
        """The step's examples that ``process`` sees, one list a micro-batch.

        Every process gets as many micro-batches as the others; where the last step of an epoch has too few
        examples for all, some are empty. Examples of like length stand together, which saves padding and, since
        the loss is a sum over the global batch, changes nothing else.
        """
        examples = sorted(self.global_batch(step), key=lambda index: self.lengths[index])
        parts = self.training.gradient_accumulation_steps * self.num_processes
        size = min(self.training.per_device_train_batch_size, math.ceil(len(examples) / parts))
        chunks = [examples[start : start + size] for start in range(0, size * parts, size)]
        mine = chunks[process :: self.num_processes]
        return mine if self.num_processes > 1 else [chunk for chunk in mine if chunk]

    def _order(self, epoch: int) -> list[int]:
        strategy = self.training.train_sampling_strategy
        if strategy == "sequential":
            return list(range(len(self.lengths)))
        generator = torch.Generator().manual_seed(self.training.seed * 1_000_003 + epoch)
        order: list[int] = torch.randperm(len(self.lengths), generator=generator).tolist()
        if strategy == "random":
            return order
        size = self.global_batch_size
        windows = [order[start : start + size * _WINDOW] for start in range(0, len(order), size * _WINDOW)]
        order = [index for window in windows for index in sorted(window, key=lambda index: self.lengths[index])]
        whole = len(order) // size
        shuffled = torch.randperm(whole, generator=generator).tolist()
        batches = [order[number * size : (number + 1) * size] for number in shuffled]
        return [index for batch in batches for index in batch] + order[whole * size :]
