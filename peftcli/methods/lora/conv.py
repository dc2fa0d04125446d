"""LoRA on convolutions."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import bare
from peftcli.errors import AdapterError
from peftcli.methods._linear import beside
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.layers import LoraPair

KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class LoraConv(LoraPair):
    """A convolution with ``A: (r, in, k, ...)``, which moves as the base layer's, and ``B: (out, r/groups, 1, ...)``.

    A sees all input channels, also where the base layer has groups. Such a delta is no convolution with groups, and
    cannot be merged into one.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        conv = bare(base_layer)
        if config.use_dora and conv.groups > 1:
            raise AdapterError(f"is not supported for {name}, a convolution with groups", key="use_dora")
        if self.r % conv.groups:
            raise AdapterError(f"{self.r} is no multiple of {name}'s {conv.groups} groups", key="r")
        kind = next(kind for kind in KINDS if isinstance(conv, kind))
        self.groups, like = conv.groups, beside(base_layer)
        moves = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        a = kind(
            conv.in_channels, self.r, conv.kernel_size, bias=False, padding_mode=conv.padding_mode, **moves, **like
        )
        b = kind(self.r, conv.out_channels, 1, groups=conv.groups, bias=config.lora_bias, **like)
        self.place(a, b, config)

    def delta(self) -> torch.Tensor:
        if self.groups > 1:
            raise AdapterError("LoRA on a convolution with groups cannot be merged into it", key="target_modules")
        a, b = self.lora_A.weight, self.lora_B.weight
        return (self.scaling * (b.flatten(1) @ a.flatten(1))).view(len(b), *a.shape[1:])
