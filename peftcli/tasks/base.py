"""What a task is: how rows become features, features a batch, and a batch a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftcli.data.encode import DataReport
    from peftcli.data.load import Rows
    from peftcli.schema import Dataset

Feature = dict[str, list[int]]
"""One example as the model takes it: ``input_ids`` and ``labels``, where -100 does not count."""
Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Losses:
    """What a forward pass over one batch gives."""

    loss: torch.Tensor
    """Sum of the loss over the batch's targets, float32, with gradients."""
    sums: dict[str, torch.Tensor]
    """Sums over the targets that metrics are made of, without gradients."""


class Task(Protocol):
    """One task. Holds no state."""

    def features(self, rows: Rows, tokenizer: Any, dataset: Dataset) -> tuple[list[Feature], DataReport]:
        """The rows as features, and the account of what was used and what was not.

        Raises:
            DataError: a row that cannot be used, or none that can.
        """
        ...

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> Batch:
        """The features as one padded batch of tensors on the CPU."""
        ...

    def num_targets(self, feature: Feature) -> int:
        """How many label positions of the feature count in the loss."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """The forward pass, and the loss over its targets."""
        ...

    def metrics(self, sums: Mapping[str, float], num_targets: int) -> dict[str, float]:
        """What evaluation reports, without the prefix ``eval_``."""
        ...
