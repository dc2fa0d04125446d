"""SHiRA: Sparse High Rank Adapters (https://arxiv.org/abs/2406.13175)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peftcli.core.config import FanInConfig
from peftcli.guard.ranges import AT_LEAST_1
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class ShiraConfig(FanInConfig):
    """Settings of SHiRA, under PEFT's names."""

    peft_type = "SHIRA"
    learning_rate = 1e-3
    always_written: ClassVar[tuple[str, ...]] = ("r", "target_modules")
    filled_later: ClassVar[tuple[str, ...]] = ("mask_type",)

    r: int = field(default=32, metadata=AT_LEAST_1)
    """As many numbers of each weight are trained as LoRA of this r would train: r * (in + out)."""
    mask_fn: ClassVar[Any] = None
    """A function that chooses the numbers, set on a config in Python: ``config.mask_fn = choose``. It gets the base
    layer and ``r`` (and ``random_seed`` while mask_type is random), and returns a mask of the weight, (out, in), of
    zeros and r * (in + out) ones."""
    mask_type: str = field(default="random", metadata={"python_only": "a mask of your own is a function, mask_fn"})
    """How the numbers are chosen: at random, or under another name by mask_fn in Python. The file says which they are.
    """
    random_seed: int | None = None
    """Seed of the choice. Unset: one that is always the same."""
    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def problems(self) -> Problems:
        found = super().problems()
        if self.mask_type != "random" and self.mask_fn is None and not self.inference_mode:
            found.append(
                ("mask_type", f"{self.mask_type!r} needs a function, config.mask_fn; without one it is random")
            )
        return found
