"""X-LoRA: Mixture of Low-Rank Adapter Experts (https://arxiv.org/abs/2402.07148)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from peftcli.core.config import AdapterConfig
from peftcli.errors import PeftWarning
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1, SHARE

_INTERNAL: dict[str, Any] = {"recipe": False, "file": False}


@dataclass(kw_only=True)
class XLoraConfig(AdapterConfig):
    """Settings of X-LoRA, under PEFT's names.

    It mixes LoRA adapters that are trained already, which adapters must name. A start without any has nothing to mix,
    so nothing to learn from, and docs/learning_rates.md has no run of X-LoRA.
    """

    peft_type = "XLORA"
    learning_rate = 1e-3
    unknown_to_peft: ClassVar[tuple[str, ...]] = ("modules_to_save",)
    sizes: ClassVar[tuple[str, ...]] = ("xlora_depth", "inner_size")
    always_written: ClassVar[tuple[str, ...]] = ("hidden_size", "adapters")
    filled_later: ClassVar[tuple[str, ...]] = ("adapters",)

    hidden_size: int | None = field(default=None, metadata={"recipe": False})
    """Size of the base model's hidden states. Found from the model."""
    adapters: dict[str, str] | None = None
    """The LoRA adapters to mix: a name each, and its folder. They must be trained already, and must be there whenever
    the mixture is loaded."""
    use_trainable_adapters: bool = False
    """Train the adapters on, too. The mixture's file then holds them."""
    layerwise_scalings: bool = False
    """Mix differently in each adapted layer. Off: alike in all."""
    enable_softmax: bool = True
    """Make each token's scalings shares, whose sum is 1."""
    softmax_temperature: float = field(default=1.0, metadata=ABOVE_0)
    """Below 1, the shares are sharper."""
    top_k_lora: int | None = None
    """Number of adapters that each token uses: those with the largest scalings. Unset: all."""
    enable_softmax_topk: bool = False
    """Make shares of the scalings that top_k_lora leaves. For enable_softmax: false, which makes shares of all."""
    xlora_depth: int = field(default=1, metadata=AT_LEAST_1)
    """Number of the classifier's layers."""
    xlora_size: int = field(default=2048, metadata=AT_LEAST_1)
    """Width of the classifier's inner layers, which xlora_depth above 1 makes."""
    xlora_dropout_p: float = field(default=0.2, metadata=SHARE)
    """Dropout between the classifier's layers."""
    scaling_pass_value: float = 0.0
    """What scales every adapter while the model reads the input for the classifier. 0: the base model reads it."""
    global_scaling_weight: float = 1.0
    """What every adapter's update is multiplied by besides."""

    find_folder: Callable[[str], Path] = field(default=Path, metadata=_INTERNAL, repr=False, compare=False)
    """Returns the folder of an adapter that is named. Adapters of the hub need another than the default."""
    experts: list[Any] = field(default_factory=list, metadata=_INTERNAL, repr=False, compare=False)
    """What the adapters' folders hold, while the layers are made."""

    @property
    def inner_size(self) -> int:
        """Width of the classifier's inner layers, if it has any."""
        return self.xlora_size if self.xlora_depth > 1 else 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.enable_softmax_topk and not self.inference_mode:
            if self.enable_softmax:
                said = "enable_softmax_topk makes shares of shares beside enable_softmax; set enable_softmax: false"
                warnings.warn(said, PeftWarning, stacklevel=3)
            if self.top_k_lora is None:
                warnings.warn("enable_softmax_topk needs top_k_lora: all adapters are used", PeftWarning, stacklevel=3)

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if not self.adapters:
            found.append(("adapters", "names no LoRA adapter to mix"))
        elif self.top_k_lora is not None and not 1 <= self.top_k_lora <= len(self.adapters):
            found.append(("top_k_lora", f"must be in [1, {len(self.adapters)}], not {self.top_k_lora}"))
        return found

    def merge_problem(self) -> str | None:
        return "X-LoRA's scalings differ from token to token, so it cannot be merged; combine the LoRA adapters instead"

    def file_dict(self) -> dict[str, Any]:
        out = super().file_dict()
        # PEFT loads them whatever they are called, but then finds them by their numbers only
        out["adapters"] = {str(number): place for number, place in enumerate((self.adapters or {}).values())}
        return out
