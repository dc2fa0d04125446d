"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (https://arxiv.org/abs/2512.23485)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from peftcli.core.config import BiasConfig, FanInConfig, LayeredConfig
from peftcli.guard.ranges import ABOVE_0, FRACTION, SHARE


@dataclass(kw_only=True)
class FrodConfig(BiasConfig, FanInConfig, LayeredConfig):
    """Settings of FRoD, under PEFT's names.

    Layers of one name, as q_proj, share a matrix of inputs x inputs, so they must have the same number of inputs. In a
    SegFormer each stage has another, so FRoD fails on one with its defaults; target_modules may name layers of one
    stage.
    """

    peft_type = "FROD"
    learning_rate = 2e-3
    always_written: ClassVar[tuple[str, ...]] = (
        "target_modules", "sparse_rate", "projection_prng_key", "save_projection",
    )  # fmt: skip

    sparse_rate: float = field(default=0.01, metadata=FRACTION)
    """Share of the numbers of an inputs x inputs matrix that train in each layer, besides one for each input."""
    projection_prng_key: int = 0
    """Seed of the places of those numbers."""
    save_projection: bool = True
    """Write what layers share to the file too: an inputs x inputs matrix for each kind of layer, but such an adapter
    does not depend on how a machine computes it, and it can be merged."""
    regularization_alpha: float = field(default=1e-3, metadata=ABOVE_0)
    """Small number that keeps finding that matrix stable where layers are alike."""
    frod_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    init_weights: bool = True
    """Start from no update, but for rounding; false starts at random, for tests."""
    progressbar: bool = field(default=True, metadata={"recipe": False})
    """Changes nothing here."""
    runtime_offload_base_weight: bool = field(default=False, metadata={"recipe": False})
    """Keep the weights of the adapted layers in the CPU's memory. They are moved to the device, one layer at a time,
    for dropout, beside other adapters and while the adapter is disabled, which is slow."""

    def merge_problem(self) -> str | None:
        if self.save_projection:
            return None
        return "with save_projection: false a layer's update depends on the weights of the others"
