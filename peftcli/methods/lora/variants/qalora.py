"""QA-LoRA: Quantization-Aware Low-Rank Adaptation (https://arxiv.org/abs/2309.14717).

A reads the average of each group of inputs, as a quantised layer has one scale for each group of its weights.
"""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.layer import base_module
from peftcli.core.quantised import is_packed
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear


class QaLoraLinear(LoraLinear):
    """``y = W x + scaling * B A p`` with ``A: (r, in / g)`` and ``p`` the averages of g inputs, times ``in / g``."""

    def make_pair(self, name: str, config: LoraConfig) -> None:
        super().make_pair(name, config)
        base, size, inputs = base_module(self), config.qalora_group_size, self.view.in_features
        if not is_packed(base):
            raise AdapterError(
                f"adapts layers of GPTQ and AWQ; {name} is a {type(base).__name__}, where PEFT trains a plain LoRA",
                key="use_qalora",
            )
        if inputs % size:
            raise AdapterError(f"{size} does not divide {name}'s {inputs} inputs", key="qalora_group_size")
        like = self.lora_A.weight
        self.group_size = size
        self.lora_A = nn.Linear(inputs // size, self.r, bias=False, device=like.device, dtype=like.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        groups = self.lora_A.in_features
        return super().update(x.unflatten(-1, (groups, -1)).mean(-1) * groups)

    def delta(self) -> torch.Tensor:
        return self.view.as_stored(self.scaling * (self.lora_B.weight @ spread(self.lora_A.weight, self.group_size)))


def spread(a: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the A (r, in) that reads the inputs themselves."""
    return a.repeat_interleave(group_size, dim=1) * (a.shape[1] / group_size)
