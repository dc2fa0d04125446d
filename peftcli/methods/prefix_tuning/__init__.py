"""Prefix tuning (https://arxiv.org/abs/2101.00190)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

from peftcli.core.prompts.config import PrefixConfig
from peftcli.errors import PeftWarning
from peftcli.guard.ranges import AT_LEAST_1


@dataclass(kw_only=True)
class PrefixTuningConfig(PrefixConfig):
    """Settings of prefix tuning, under PEFT's names."""

    peft_type = "PREFIX_TUNING"
    learning_rate = 3e-2

    prefix_projection: bool = False
    """Let a two-layer network make the keys and values while they train. Steadier, and many more weights to train;
    the adapter file stays as small."""
    encoder_hidden_size: int | None = field(default=None, metadata=AT_LEAST_1)
    """Width of that network. Unset: the size of a layer's keys."""
    init_weights: Literal["zero"] | None = None
    """How keys and values start. Unset: normal; zero: all zero."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_hidden_size and not self.prefix_projection and not self.inference_mode:
            said = "encoder_hidden_size is not used: it is the width of a network that prefix_projection switches on"
            warnings.warn(said, PeftWarning, stacklevel=3)
