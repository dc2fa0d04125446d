"""The settings of LoRA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from peftcli.core.config import ExcludingConfig, LayeredConfig

if TYPE_CHECKING:
    from torch import nn

    from peftcli.core.layer import AdapterLayer


@dataclass(kw_only=True)
class LoraConfig(ExcludingConfig, LayeredConfig):
    """Settings of LoRA, under PEFT's names."""

    peft_type: ClassVar[str] = "LORA"
    always_written: ClassVar[tuple[str, ...]] = ("r", "lora_alpha", "target_modules", "lora_dropout", "bias")
    unsupported: ClassVar[dict[str, tuple[Any, ...]]] = {
        "megatron_core": ("megatron.core",),
        "qalora_group_size": (16,),
        "runtime_config": ({"ephemeral_gpu_offload": False},),
    }

    r: int = 8
    """Size of the bottleneck. Parameters and memory grow linearly with it."""
    lora_alpha: float = 8
    """Strength of the update: it is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Share of the input values that the update does not see during training."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead, which keeps large r stable (https://arxiv.org/abs/2312.03732)."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base model are trained too: none, all, or those of the adapted layers."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """An r of their own for some layers: name ending or regular expression -> r."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """A lora_alpha of their own for some layers: name ending or regular expression -> lora_alpha."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """How A starts; B starts at zero. true: Kaiming uniform; gaussian: normal with deviation 1/r;
    false: B starts random too, for tests."""
    fan_in_fan_out: bool = field(default=False, metadata={"recipe": False})
    """Whether the adapted weights are stored (in, out), as GPT-2's are. Found from the layer itself."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.r < 1:
            found.append(("r", f"must be at least 1, not {self.r}"))
        if self.lora_alpha <= 0:
            found.append(("lora_alpha", f"must be above 0, not {self.lora_alpha}"))
        if not 0 <= self.lora_dropout < 1:
            found.append(("lora_dropout", f"must be in [0, 1), not {self.lora_dropout}"))
        found += [
            ("rank_pattern", f"{k}: r must be at least 1, not {v}") for k, v in self.rank_pattern.items() if v < 1
        ]
        found += [
            ("alpha_pattern", f"{k}: lora_alpha must be above 0, not {v}")
            for k, v in self.alpha_pattern.items()
            if v <= 0
        ]
        if self.init_lora_weights not in (True, False, "gaussian"):
            found.append(("init_lora_weights", f"{self.init_lora_weights!r} is not supported; true, false or gaussian"))
        if self.bias not in ("none", "all", "lora_only"):
            found.append(("bias", f"must be none, all or lora_only, not {self.bias!r}"))
        return found

    def targets(self, model: nn.Module) -> list[str]:
        from peftcli.core.targets import check_patterns

        names = super().targets(model)
        check_patterns(dict(self.rank_pattern), names, "rank_pattern")
        check_patterns(self.alpha_pattern, names, "alpha_pattern")
        return names

    def wrap(self, module: nn.Module, name: str) -> AdapterLayer:
        from peftcli.methods.lora.layers import wrap

        return wrap(module, name, self)

    def attach(self, model: nn.Module, layers: dict[str, AdapterLayer]) -> None:
        from peftcli.methods.lora.layers import attach

        super().attach(model, layers)
        attach(model, self, layers)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "init_lora_weights": True}
