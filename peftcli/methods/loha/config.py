"""The settings of LoHa."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from peftcli.methods._lycoris_settings import LycorisConfig

if TYPE_CHECKING:
    from torch import nn

    from peftcli.core.layer import AdapterLayer


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """Settings of LoHa, under PEFT's names."""

    peft_type: ClassVar[str] = "LOHA"

    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""

    def wrap(self, module: nn.Module, name: str) -> AdapterLayer:
        from peftcli.methods.loha.layers import wrap

        return wrap(module, name, self)
