"""The settings of SHiRA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peftcli.core.config import FanInConfig
from peftcli.errors import AdapterError
from peftcli.methods._settings import Problems, too_small


@dataclass(kw_only=True)
class ShiraConfig(FanInConfig):
    """Settings of SHiRA, under PEFT's names."""

    peft_type: ClassVar[str] = "SHIRA"
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules")

    r: int = 32
    """As many numbers of each weight are trained as LoRA of this r would train: r * (in + out)."""
    mask_type: Literal["random"] = "random"
    """How the numbers are chosen. The file says which they are, so files of other masks can be read."""
    random_seed: int | None = None
    """Seed of the choice. Unset: one that is always the same."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "mask_fn":  # PEFT's way to give a mask of one's own
            raise AdapterError("a mask of your own is not supported; the mask is random", key="mask_fn")
        super().__setattr__(name, value)

    def problems(self) -> Problems:
        found = super().problems() + too_small(self, r=1)
        if self.mask_type != "random" and not self.inference_mode:
            found.append(("mask_type", f"{self.mask_type!r} is not supported; the mask is random"))
        return found

    def usual_targets(self, model_type: str) -> list[str] | str:
        return ["q_proj", "v_proj"] if model_type == "phi" else super().usual_targets(model_type)
