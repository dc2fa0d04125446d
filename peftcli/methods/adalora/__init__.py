"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from peftcli.core.config import (
    BOOKKEEPING,
    UNSUPPORTED,
    BiasConfig,
    ExcludingConfig,
    FanInConfig,
    LayeredConfig,
    TargetedConfig,
)
from peftcli.errors import PeftWarning
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, INSIDE_0_1, SHARE
from peftcli.methods._settings import Problems
from peftcli.methods.lora import LoraRuntimeConfig


@dataclass(kw_only=True)
class _LoraSettings(TargetedConfig):
    """LoRA's settings, which AdaLoRA's config in PEFT inherits, and which AdaLoRA does not have."""

    alora_invocation_tokens: Any = field(default=None, metadata=UNSUPPORTED)
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata=UNSUPPORTED)
    arrow_config: Any = field(default=None, metadata=UNSUPPORTED)
    corda_config: Any = field(default=None, metadata=UNSUPPORTED)
    ensure_weight_tying: bool = field(default=False, metadata=UNSUPPORTED)
    eva_config: Any = field(default=None, metadata=UNSUPPORTED)
    kasa_config: Any = field(default=None, metadata=UNSUPPORTED)
    layer_replication: Any = field(default=None, metadata=UNSUPPORTED)
    loftq_config: Any = field(default=None, metadata=UNSUPPORTED)
    lora_bias: bool = field(default=False, metadata=UNSUPPORTED)
    lora_ga_config: Any = field(default=None, metadata=UNSUPPORTED)
    megatron_config: Any = field(default=None, metadata=UNSUPPORTED)
    megatron_core: str | None = field(default="megatron.core", metadata=UNSUPPORTED)
    monteclora_config: Any = field(default=None, metadata=UNSUPPORTED)
    qalora_group_size: int = field(default=16, metadata=UNSUPPORTED)
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata={**BOOKKEEPING, "file": False}
    )
    target_parameters: Any = field(default=None, metadata=UNSUPPORTED)
    trainable_token_indices: Any = field(default=None, metadata=UNSUPPORTED)
    use_bdlora: Any = field(default=None, metadata=UNSUPPORTED)
    use_dora: bool = field(default=False, metadata=UNSUPPORTED)
    use_qalora: bool = field(default=False, metadata=UNSUPPORTED)
    use_rslora: bool = field(default=False, metadata=UNSUPPORTED)
    velora_config: Any = field(default=None, metadata=UNSUPPORTED)


@dataclass(kw_only=True)
class AdaLoraConfig(_LoraSettings, BiasConfig, FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of AdaLoRA, under PEFT's names."""

    peft_type = "ADALORA"
    learning_rate = 1e-2
    sizes: ClassVar[tuple[str, ...]] = ("init_r",)
    found_by_training: ClassVar[tuple[str, ...]] = ("total_step",)
    always_written: ClassVar[tuple[str, ...]] = ("target_modules", "lora_alpha", "target_r", "init_r", "total_step")

    target_r: int = field(default=8, metadata=AT_LEAST_1)
    """Size of the bottleneck that is left at the end, on average over the layers."""
    init_r: int = field(default=12, metadata=AT_LEAST_1)
    """Size of every bottleneck at the start. Parameters and memory while training grow with it."""
    tinit: int = field(default=0, metadata=AT_LEAST_0)
    """Steps at the start during which nothing is taken away."""
    tfinal: int = field(default=0, metadata=AT_LEAST_0)
    """Steps at the end during which what is left is trained and no longer changes place."""
    deltaT: int = field(default=1, metadata=AT_LEAST_1)
    """Number of steps between two prunings, each of which sets the least important directions to zero."""
    beta1: float = field(default=0.85, metadata=INSIDE_0_1)
    """How slowly the importance of a weight follows its last steps; nearer to 1 is slower."""
    beta2: float = field(default=0.85, metadata=INSIDE_0_1)
    """The same for how much that importance varies."""
    orth_reg_weight: float = field(default=0.5, metadata=AT_LEAST_0)
    """How strongly A's rows and B's columns are kept orthogonal: the weight of their deviation in the loss."""
    total_step: int | None = None
    """Optimizer steps of the whole training. Unset: as many as there are."""
    lora_alpha: float = field(default=8, metadata=ABOVE_0)
    """Strength of the update: it is multiplied by lora_alpha / init_r."""
    lora_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the input values that the update does not see during training."""
    init_lora_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
    rank_pattern: dict[str, list[bool]] = field(default_factory=dict, metadata={"recipe": False})
    """Which directions of each layer were kept; the file's tensors hold only those. Training writes it."""
    r: int = field(default=8, metadata={"recipe": False})
    """Not used, here as in PEFT: init_r and target_r say the sizes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r != 8:
            warnings.warn("AdaLoRA does not use r; init_r and target_r say its sizes", PeftWarning, stacklevel=3)

    def problems(self) -> Problems:
        found = super().problems()
        if self.target_r > self.init_r:
            found.append(
                ("target_r", f"{self.target_r} is above init_r, {self.init_r}; directions are only taken away")
            )
        if self.total_step is not None and self.tinit >= self.total_step - self.tfinal:
            said = f"tinit + tfinal leave no step of {self.total_step}"
            found.append(("tinit", f"The supplied schedule values don't allow for a budgeting phase: {said}"))
        return found

    def check_steps(self, total: int) -> None:
        if self.total_step is None:
            replace(self, total_step=total).check()

    def file_dict(self) -> dict[str, Any]:
        # PEFT reads no file without total_step: before any training it gets the least that its schedule allows
        total = self.tinit + self.tfinal + 1 if self.total_step is None else self.total_step
        written = {**super().file_dict(), "total_step": total, "init_lora_weights": True}
        written.pop("r", None)  # PEFT warns of it
        return written
