"""One view of "a linear layer", however the base model stores it; and whether a foreign class computes as torch's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import base_module, check_not_offloaded, widened
from peftcli.core.quantised import dequantised_weight, is_packed, is_quantised
from peftcli.errors import AdapterError

PLAIN_WEIGHTS: set[type] = {nn.Parameter}
"""Types of weights that are ordinary numbers, unlike quantised ones; ``train.memory.sizes`` adds one without values."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRIED = 8
"""How many rows of a weight are enough to see how a layer uses it."""
_ROUNDED = 0.01
"""How far a layer that rounds its weight, its input and its output to bfloat16 may be off, as a share."""


@dataclass(frozen=True)
class Linear:
    """Sizes and orientation of a linear layer."""

    in_features: int
    out_features: int
    transposed: bool
    """Whether the weight is stored (in, out), as in GPT-2's Conv1D."""

    def as_stored(self, weight: torch.Tensor) -> torch.Tensor:
        """Turn a weight (out, in) into the layer's own orientation, or back."""
        return weight.T if self.transposed else weight


def linear_view(module: Any) -> Linear | None:
    """Return the view of ``module``, or of the module below its adapter layers; None if that is not a linear layer."""
    module = base_module(module)
    if is_packed(module) or (isinstance(module, nn.Linear) and _gives_outputs(module)):
        return Linear(module.in_features, module.out_features, transposed=False)
    if type(module).__name__ == "Conv1D" and "nf" in vars(module):  # transformers', which core does not import
        rows, columns = module.weight.shape
        return Linear(rows, columns, transposed=True)
    return None


def needs_no_trial(layer: Any, kind: Any) -> bool:
    """Return whether a layer has the forward of torch's ``kind``, or is a quantiser's, which is taken for right."""
    own = type(layer)
    if own.forward is kind.forward or own.__module__.startswith("transformers.integrations."):
        return True
    return is_quantised(layer) or type(layer._parameters.get("weight")) not in PLAIN_WEIGHTS


def _gives_outputs(layer: nn.Linear) -> bool:
    """Return whether a layer of a class of its own gives one output (..., out) for an input (..., in).

    A router of experts may give scores and indices, and a grouped layer takes another input. It is tried out on
    tensors without values; layers of quantisers are not, whose kernels need values.
    """
    kind: Any = type(layer)
    if needs_no_trial(layer, nn.Linear):
        return True
    dtype, empty = layer.weight.dtype, kind.__new__(kind)
    weights = {name: value if value is None else value.to("meta") for name, value in layer._parameters.items()}
    weights["weight"] = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
    vars(empty).update(vars(layer), _parameters=weights)
    try:
        made = kind.forward(empty, torch.empty(3, 1, layer.in_features, dtype=dtype, device="meta"))
    except Exception:  # whatever code the class has
        return False
    return isinstance(made, torch.Tensor) and made.shape == (3, 1, layer.out_features)


def check_forward(module: nn.Module, name: str, key: str = "target_modules") -> None:
    """Raise AdapterError if ``module`` has a forward of its own that computes otherwise than torch's."""
    base = base_module(module)
    kind = next((kind for kind in (*CONVOLUTIONS, nn.Linear, nn.Embedding) if isinstance(base, kind)), None)
    if kind and not _computes_as(base, kind):
        raise AdapterError(
            f"{name} is a {type(base).__name__}, which computes otherwise than torch's {kind.__name__}, so that an "
            "adapter there would be wrong, or could not be merged",
            key=key,
            hint="leave it out",
        )


def _computes_as(layer: Any, kind: Any) -> bool:
    """Return whether a layer of a class of its own computes as torch's ``kind``, by values drawn for a trial.

    An embedding may multiply what it looks up by its ``embed_scale``. Numbers may be rounded to half precision.
    """
    if needs_no_trial(layer, kind):
        return True
    if kind is nn.Embedding and (layer._modules or len(layer._parameters) > 1):
        return False  # it looks some ids up elsewhere: those beyond its rows, or a token of pictures
    with torch.device("cpu"):
        trial, random = _with_drawn_weights(layer, kind), torch.Generator().manual_seed(1)
        rows, *sizes = trial.weight.shape
        given = torch.tensor([[2, 0, 1]]) % rows
        if kind is not nn.Embedding:
            shape = [3, 1, *sizes]
            if kind in CONVOLUTIONS:
                widths = zip(layer.kernel_size, layer.dilation, strict=True)
                shape = [1, layer.in_channels, *((width - 1) * step + 2 for width, step in widths)]
            given = 3 * torch.randn(shape, generator=random) / math.prod(sizes) ** 0.5  # so that a bias counts
        try:
            made, expected = type(layer).forward(trial, given), kind.forward(trial, given)
            expected = expected * getattr(trial, "embed_scale", 1.0)
            return made.shape == expected.shape and bool((made - expected).norm() <= _ROUNDED * expected.norm())
        except Exception:  # whatever code the class has
            return False


def _with_drawn_weights(layer: Any, kind: Any) -> Any:
    """Return a copy of a layer for a trial, with drawn weights and without the weights of modules in it."""
    random = torch.Generator().manual_seed(0)

    def draw(name: str, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        shape = list(getattr(value, "ds_shape", value.shape))  # DeepSpeed may have divided it
        if name in ("weight", "bias") and kind not in CONVOLUTIONS:
            shape[0] = min(shape[0], _TRIED)
        return 1 + 2 * torch.randn(shape, generator=random)

    trial = object.__new__(type(layer))
    vars(trial).update(vars(layer), training=False)
    for held in ("_parameters", "_buffers"):
        vars(trial)[held] = {name: draw(name, value) for name, value in vars(layer)[held].items()}
    without = {name: child for name, child in layer._modules.items() if next(child.parameters(), None) is None}
    vars(trial).update(_modules=without)  # a layer that calls others fails, and so is refused
    size = {nn.Linear: "out_features", nn.Embedding: "num_embeddings"}.get(kind)
    if size:
        vars(trial).update({size: len(trial.weight)}, padding_idx=None)
    return trial


def dense_weight(module: nn.Module) -> torch.Tensor:
    """Return the weight (out, in) of a linear layer, dequantised if necessary, detached, in float32 or wider.

    Raises:
        AdapterError: the layer is offloaded.
    """
    layer, view = base_module(module), linear_view(module)
    assert view is not None
    check_not_offloaded(layer, f"a {type(layer).__name__}")
    if is_quantised(layer):
        return dequantised_weight(layer)
    return widened(view.as_stored(layer.weight.detach()))
