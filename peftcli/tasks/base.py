"""What a task is: how rows become features, features a batch, and a batch a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from peftcli.data.prepare import Encoder
    from peftcli.data.store import Feature
    from peftcli.schema import Dataset, Source

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

    feature_columns: tuple[str, ...]
    """What a feature holds; ``input_ids`` is one of them."""

    def encoder(
        self, columns: Sequence[str], source: Source, described: str, tokenizer: Any, dataset: Dataset
    ) -> Encoder:
        """What turns the rows of a source into features.

        Args:
            columns: Those of its first rows.
            source: Says what its rows hold.
            described: The source as errors name it.
            tokenizer: The base model's.
            dataset: Settings of the encoding.

        Raises:
            DataError: the columns fit no format, or the tokenizer cannot do it.
        """
        ...

    def collate(self, features: Sequence[Feature], tokenizer: Any) -> Batch:
        """The features, or where they can be packed the rows that were joined from them, as one padded batch."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """The forward pass, and the loss over its targets."""
        ...

    def metrics(self, sums: Mapping[str, float], num_targets: int) -> dict[str, float]:
        """What evaluation reports, without the prefix ``eval_``."""
        ...
