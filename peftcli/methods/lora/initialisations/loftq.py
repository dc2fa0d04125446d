"""LoftQ: LoRA-Fine-Tuning-aware Quantization (https://arxiv.org/abs/2310.08659).

Over a quantised base model, A and B start from what quantisation took away. Over one in full precision, the adapted
layers also compute with weights that are rounded as quantisation would round them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import base_module, layers_below, widened
from peftcli.core.linear import dense_weight
from peftcli.core.quantised import is_quantised
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations.start import check_directions, pissa
from peftcli.methods.lora.lora import LoraLinear, lora_layers

_KEY = "init_lora_weights"
_BLOCK = 64
# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on
"""The values of NF4 (https://arxiv.org/abs/2305.14314): quantiles of the normal distribution, in [-1, 1]."""


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight rounded to NF4: each block of 64 values, in the order of memory, by its largest."""
    flat = weight.flatten().float()
    blocks = F.pad(flat, (0, -len(flat) % _BLOCK)).view(-1, _BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(_NF4, device=weight.device)
    middles = (values[1:] + values[:-1]) / 2
    codes = torch.bucketize(blocks / largest.clamp_min(torch.finfo(torch.float32).tiny), middles, out_int32=True)
    return (values[codes] * largest).flatten()[: len(flat)].view_as(weight).to(weight.dtype)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight (out, in) rounded to 8 bits, each row by its largest value, as in half precision."""
    half = weight.half().float()
    largest = half.abs().amax(dim=1, keepdim=True)
    codes = (half * (127 / largest.clamp_min(torch.finfo(torch.float32).tiny))).round()
    return (codes * (largest / 127)).to(weight.dtype)


def rounded(weight: torch.Tensor, r: int, config: LoraConfig) -> torch.Tensor:
    """Return the weight (out, in) that ``loftq_config`` gives a layer, for an adapter of ``r``."""
    assert config.loftq_config is not None
    rounding = nf4 if config.loftq_config.loftq_bits == 4 else int8
    value = rounding(weight)
    for _ in range(config.loftq_config.loftq_iter - 1):
        a, b = pissa(weight - value, r, 1.0)
        value = rounding(weight - b @ a)
    return value


class LoftQLinear(LoraLinear):
    """``y = Q x + scaling B A x``, with ``Q`` the rounded base weight, over a base weight that stays.

    ``Q - W`` is kept beside the base weight, and computed anew from it by whoever reads the file. Over a quantised
    base, ``Q`` is the base weight.
    """

    error: torch.Tensor | None

    @torch.no_grad()
    def start(self, config: LoraConfig) -> None:
        super().start(config)
        self.config = config
        weight: Any = base_module(self).weight
        if is_quantised(base_module(self)):
            self.register_buffer("error", None)
            return
        error = weight if weight.is_meta else self._error(dense_weight(self.base_layer))
        self.register_buffer("error", error.detach().to(weight.dtype), persistent=False)
        if config.inference_mode or weight.is_meta:
            return
        for own, value in zip((self.lora_A, self.lora_B), pissa(-error, self.r, self.scaling), strict=True):
            own.weight.copy_(value)

    def _error(self, weight: torch.Tensor) -> torch.Tensor:
        """Return what rounding adds to a weight (out, in)."""
        check_directions(weight, self.r)
        return rounded(weight, self.r, self.config) - weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = super().forward(x, *args, **kwargs)
        if self.error is None or not self.enabled or self._is_rounded_below():
            return y
        return y + F.linear(x.to(self.error.dtype), self.error).to(y.dtype)

    def _is_rounded_below(self) -> bool:
        """Return whether another enabled adapter has rounded the same weight."""
        return any(isinstance(layer, LoftQLinear) for layer in layers_below(self))

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        merged, error = super().merged_tensors(base), self.error
        if error is None or self._is_rounded_below():
            return merged
        if error.is_meta:  # the base weights come one by one
            weight = self.view.as_stored(base["weight"])
            error = self._error(widened(weight))
        return merged | {"weight": merged["weight"] + self.view.as_stored(error)}


def check_loftq(layer: nn.Module, name: str, config: LoraConfig) -> None:
    """Refuse a module that does not go with the settings of LoftQ.

    Raises:
        AdapterError: it is quantised, and ``loftq_config`` would do it; or it is not, and that is missing.
    """
    settings = config.loftq_config
    if settings is None and not is_quantised(layer):
        raise AdapterError(
            f"loftq goes with a quantised base model, and its {name} is not quantised",
            key=_KEY,
            hint="load the base model in 4 bits; or give a loftq_config, and the adapted layers compute as if it were",
        )
    if settings and is_quantised(layer) and not (config.inference_mode and settings.loftq_iter == 1):
        raise AdapterError(
            f"rounds the weights of a base model in full precision, and its {name} is quantised already",
            key="loftq_config",
            hint="leave loftq_config out: A and B then start from what quantisation took away",
        )


@torch.no_grad()
def start_loftq(
    model: nn.Module,
    weight: Callable[[str], torch.Tensor],
    adapter: str | None = None,
    keep: Callable[[str], bool] = lambda name: True,
) -> None:
    """Start the LoRA layers over quantised layers from the largest singular values that quantisation took away.

    ``weight`` returns the base weight of that name as it was before. ``keep`` is called with the name of each layer
    that was started; where it returns False, the layer is put back.

    Raises:
        AdapterError: no layer is quantised, or a weight is of another shape.
    """
    layers = {
        name: layer
        for name, layer in lora_layers(model, adapter).items()
        if isinstance(layer, LoraLinear) and is_quantised(base_module(layer))
    }
    if not layers:
        raise AdapterError("loftq makes up for the error of a quantised base model, and this one is not", key=_KEY)
    for name, layer in layers.items():
        quantised = dense_weight(layer.base_layer)
        original = weight(f"{name}.weight").to(quantised)
        if getattr(base_module(layer), "source_cls", nn.Linear).__name__ == "Conv1D":  # bitsandbytes turns it round
            original = original.T
        if original.shape != quantised.shape:
            shapes = f"{tuple(original.shape)}, the model needs {tuple(quantised.shape)}"
            raise AdapterError(f"the base weight of {name} is {shapes}", key=_KEY)
        own = (layer.lora_A.weight, layer.lora_B.weight)
        before = [value.clone() for value in own]
        for value, new in zip(own, pissa(original - quantised, layer.r, layer.scaling), strict=True):
            value.copy_(new)
        if not keep(name):
            for value, old in zip(own, before, strict=True):
                value.copy_(old)
