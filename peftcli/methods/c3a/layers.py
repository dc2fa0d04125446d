"""The layer of C3A (https://arxiv.org/abs/2407.19342)."""

from __future__ import annotations

import math

import torch
from torch import nn

from peftcli.core.layer import widened
from peftcli.core.targets import pattern_value
from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaLinear, factory_kwargs
from peftcli.methods.c3a import C3AConfig


class C3ALinear(DeltaLinear):
    """``delta`` is made of circulant blocks ``(b, b)``: each is one kernel of ``b`` numbers, shifted by one a row.

    ``c3a_kernel: (out / b, in / b, b)``; the update is divided by ``in``.
    """

    def __init__(self, module: nn.Module, name: str, config: C3AConfig):
        super().__init__(module, name, "C3A", config.bias)
        self.block = int(pattern_value(config.block_size_pattern, name, config.block_size))
        rows, columns = self.view.out_features, self.view.in_features
        for side in (rows, columns):
            if side % self.block:
                raise AdapterError(f"{self.block} does not divide {side}, a side of {name}", key="block_size")
        self.c3a_kernel = nn.Parameter(
            torch.zeros(rows // self.block, columns // self.block, self.block, **factory_kwargs(self))
        )
        if config.init_weights == "gaussian":
            nn.init.normal_(self.c3a_kernel)
        elif config.init_weights is not True:
            bound = math.sqrt((1 / columns) if config.init_weights == "kaiming_uniform" else 6 / (rows + columns))
            nn.init.uniform_(self.c3a_kernel, -bound, bound)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        # a circulant block is a circular correlation with its kernel, which the Fourier transform makes a product
        blocks = torch.fft.rfft(widened(x).unflatten(-1, (-1, self.block)))
        kernel = torch.fft.rfft(widened(self.c3a_kernel) / self.view.in_features).conj()
        return torch.fft.irfft(torch.einsum("...nb,mnb->...mb", blocks, kernel), n=self.block).flatten(-2)

    def delta(self) -> torch.Tensor:
        steps = torch.arange(self.block, device=self.c3a_kernel.device)
        shifts = (steps - steps.unsqueeze(1)) % self.block
        blocks = self.c3a_kernel[..., shifts]  # (out / b, in / b, b, b)
        return blocks.transpose(1, 2).reshape(self.view.out_features, self.view.in_features) / self.view.in_features


wrap = C3ALinear
