"""OFT: Orthogonal Finetuning (https://arxiv.org/abs/2306.07280)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peftcli.core.config import AdapterConfig, BiasConfig, ExcludingConfig, FanInConfig, LayeredConfig
from peftcli.errors import AdapterError
from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, SHARE
from peftcli.methods._settings import Problems


@dataclass(kw_only=True)
class OFTConfig(BiasConfig, FanInConfig, ExcludingConfig, LayeredConfig):
    """Settings of OFT, under PEFT's names."""

    peft_type = "OFT"
    learning_rate = 1e-3
    readable_by: ClassVar[str] = "0.18.0"  # since when the series is this one
    sizes: ClassVar[tuple[str, ...]] = ("r", "oft_block_size")
    always_written: ClassVar[tuple[str, ...]] = (
        "r",
        "oft_block_size",
        "target_modules",
        "bias",
        "use_cayley_neumann",
        "num_cayley_neumann_terms",
        "block_share",
        "coft",
        "eps",
    )

    r: int = field(default=0, metadata=AT_LEAST_0)
    """Number of blocks that the inputs of a layer are cut into; 0: as oft_block_size says."""
    oft_block_size: int = field(default=32, metadata=AT_LEAST_0)
    """Side of the blocks, each of which is rotated by itself; 0: as r says. A number that does not divide a layer's
    inputs becomes the nearest that does. Parameters grow linearly with it."""
    module_dropout: float = field(default=0.0, metadata=SHARE)
    """Share of the blocks that are not rotated in a step of training."""
    init_weights: bool = True
    """Start from no rotation; false starts at random, for tests."""
    coft: bool = False
    """Hold the rotations near the identity: no block goes further than eps."""
    eps: float = field(default=6e-5, metadata=ABOVE_0)
    """With coft, how far the blocks of a layer may go."""
    block_share: bool = False
    """Rotate all blocks of a layer alike: fewer parameters."""
    use_cayley_neumann: bool = True
    """Sum up a series instead of inverting a matrix: faster, and the rotation is not quite one."""
    num_cayley_neumann_terms: int = field(default=5, metadata=AT_LEAST_1 | {"most": 100})
    """Length of that series."""

    def problems(self) -> Problems:
        found = super().problems()
        if (self.r == 0) == (self.oft_block_size == 0):
            found.append(("oft_block_size", "give either r or oft_block_size, and 0 for the other"))
        return found

    @classmethod
    def from_dict(cls, values: dict[str, Any], file: str | None = None, **options: Any) -> AdapterConfig:
        version = [int(part) for part in re.findall(r"\d+", str(values.get("peft_version", "")))[:2]]
        if values.get("use_cayley_neumann") and version < [0, 18]:
            raise AdapterError(
                "written before PEFT 0.18, whose use_cayley_neumann is another series", key="peft_version", file=file
            )
        return super().from_dict(values, file, **options)
