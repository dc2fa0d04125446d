"""Layers whose weight is stored in fewer bits than they compute with.

They are recognised by what they hold, since core imports torch only: bitsandbytes' weights by their scales, torchao's
by being tensors that can ``dequantize``, the packed layers of GPTQ and AWQ by ``qweight``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from peftcli.errors import AdapterError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of weights that are not quantised."""
_ROWS_AT_ONCE = 1024


def is_quantised(module: Any) -> bool:
    """Return whether the module's weight is stored in fewer bits."""
    weight = module._parameters.get("weight")  # its own: an adapter layer has its base layer's attributes too
    if weight is None:
        return is_packed(module)
    return weight.dtype not in FLOATS or _dequantises(weight)


def is_packed(module: Any) -> bool:
    """Return whether the module is a linear layer of GPTQ or AWQ, which have no tensor called weight."""
    return "qweight" in module._buffers.keys() | module._parameters.keys() and "in_features" in vars(module)


def in_four_bits(module: Any) -> bool:
    """Return whether the module is a 4-bit linear layer of bitsandbytes."""
    return _scales(module) is not None


def keep_scales(module: Any) -> None:
    """Let a 4-bit layer have its scales by itself, so that its weight may become any tensor with the same bytes."""
    module.quant_state = module.weight.quant_state


def dequantised_weight(module: Any) -> torch.Tensor:
    """Return the weight (out, in) that a quantised linear layer computes with, detached, in float32."""
    weight = module._parameters.get("weight")
    if in_four_bits(module):
        return _from_four_bits(module)
    scales = getattr(weight, "SCB", None)
    if scales is None:  # bitsandbytes moves them there in the first forward pass
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if weight is not None and scales is not None:
        return weight.detach().float() * (scales.float() / 127).unsqueeze(1)
    if weight is not None and _dequantises(weight):
        dense: torch.Tensor = weight.dequantize()  # torchao refuses a view of its tensors in inference mode
        return dense.detach().float()
    return _from_outputs(module)


def dense_layer(module: Any, dtype: torch.dtype) -> nn.Linear:
    """Return an ordinary layer that computes what a quantised linear layer does.

    Raises:
        AdapterError: the module is not a linear layer.
    """
    if "in_features" not in vars(module):
        raise AdapterError(f"a quantised {type(module).__name__} cannot be dequantised")
    bias = module.bias
    layer = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(dequantised_weight(module).to(dtype), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return layer.train(module.training)


def as_before_quantising(layer: nn.Linear, quantised: Any) -> nn.Module:
    """Return ``layer`` in the class that ``quantised`` was made from: bitsandbytes transposes a Conv1D."""
    kind = getattr(quantised, "source_cls", nn.Linear)
    if kind.__name__ != "Conv1D":
        return layer
    with torch.device("meta"):
        turned: nn.Module = kind(layer.out_features, layer.in_features)
    turned.weight = nn.Parameter(layer.weight.T.contiguous(), requires_grad=False)
    turned.bias = layer.bias
    return turned.train(layer.training)


def num_weights(model: nn.Module) -> int:
    """Return how many weights the model has, however they are packed."""
    packed: list[Any] = [module for module in model.modules() if is_packed(module)]
    shapes = [getattr(getattr(each, "quant_state", None), "shape", each.shape) for each in model.parameters()]
    return sum(map(math.prod, shapes)) + sum(each.in_features * each.out_features for each in packed)


def keep_layout(model: nn.Module) -> None:
    """Make the model's 4-bit layers compute the same in evaluation as in training.

    On a CPU with bfloat16 instructions, bitsandbytes reorders the weights of a layer in its first evaluation. From
    then on their scales are rounded, and no gradient passes the layer.
    """
    layers: Any = model.modules()
    for module in layers:
        if "support_avx512bf16_for_cpu" in vars(module):
            _in_order(module)
            module.support_avx512bf16_for_cpu = False


def check_gradients(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse a model with quantised layers that pass no gradients: adapters below them would not train.

    Args:
        model: the model.
        dtype: of the weights that are not quantised.

    Raises:
        AdapterError: with the kind of layer.
    """
    kinds: dict[Any, Any] = {}
    for module in model.modules():
        if is_quantised(module) and "in_features" in vars(module):
            kinds.setdefault((type(module), type(module._parameters.get("weight"))), module)
    for (kind, storage), module in kinds.items():
        device = next(iter([*module.parameters(), *module.buffers()])).device
        x = torch.ones(1, module.in_features, device=device, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            passes = module(x).requires_grad
        if not passes:
            stored = "" if storage in (type(None), nn.Parameter) else f" ({storage.__name__})"
            raise AdapterError(
                f"the base model's {kind.__name__}{stored} passes no gradients, so it cannot be trained on"
            )


def _dequantises(weight: torch.Tensor) -> bool:
    return type(weight).dequantize is not torch.Tensor.dequantize


def _scales(module: Any) -> Any:
    weight = module._parameters.get("weight")
    return getattr(weight, "quant_state", None) or vars(module).get("quant_state")


def _from_four_bits(module: Any) -> torch.Tensor:
    """Dequantise a weight of bitsandbytes with a scale per block; with double_quant the scales are quantised too."""
    _in_order(module)
    state, ops = _scales(module), torch.ops.bitsandbytes
    scales = state.absmax
    if state.nested:
        of_scales = state.state2
        scales = ops.dequantize_blockwise(
            scales, of_scales.absmax, of_scales.code, of_scales.blocksize, of_scales.dtype
        )
        scales = scales + state.offset
    return ops.dequantize_4bit(
        module.weight.data, scales.float(), state.blocksize, state.quant_type, list(state.shape), torch.float32
    )


def _in_order(module: Any) -> None:
    """Undo the reordering that ``keep_layout`` prevents."""
    if getattr(_scales(module), "packing_format_for_cpu", False):
        module.state_dict()  # bitsandbytes puts the weight back before it gives it out


@torch.no_grad()
def _from_outputs(module: Any) -> torch.Tensor:
    """Compute the weight of a layer of any format from its outputs for the unit vectors."""
    device = module.qweight.device if is_packed(module) else module.weight.device
    dtype = torch.float32 if device.type == "cpu" else torch.float16  # the packages' kernels take no other there
    inputs = torch.eye(module.in_features, device=device, dtype=dtype).split(_ROWS_AT_ONCE)
    columns = torch.cat([module(part).float() for part in inputs])
    return (columns if module.bias is None else columns - module.bias.float()).T
