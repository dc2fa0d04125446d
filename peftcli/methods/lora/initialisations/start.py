"""The starts that need no data: drawn, or computed from the base weight; and what the others read of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftcli.core.inject import evaluating
from peftcli.errors import AdapterError
from peftcli.methods._delta import draw_as_linear
from peftcli.methods.lora.initialisations import FAST_PISSA, FROM_DATA

Pair = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r)."""


@torch.no_grad()
def initialise(
    a: torch.Tensor, b: torch.Tensor, init: bool | str, scaling: float, weight: Callable[[], torch.Tensor]
) -> None:
    """Fill ``a`` and ``b`` as ``init_lora_weights`` says. ``weight`` returns the base weight (out, in).

    Raises:
        AdapterError: the layer has fewer directions than r.
    """
    if a.is_meta:
        return
    if (draw := _DRAWN.get(init)) is not None:
        draw(a, b)
    else:
        values = from_weight(init, weight(), len(a), scaling)
        a.copy_(values[0])
        b.copy_(values[1])


def kaiming(a: torch.Tensor, b: torch.Tensor) -> None:
    """Draw A as nn.Linear does and set B to zero, as loralib does."""
    draw_as_linear(a)
    nn.init.zeros_(b)


def gaussian(a: torch.Tensor, b: torch.Tensor) -> None:
    """Draw A from a normal distribution with standard deviation 1/r and set B to zero."""
    nn.init.normal_(a, std=1 / len(a))
    nn.init.zeros_(b)


def orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """Draw A and B over two halves of an orthogonal basis of r directions, so that ``B A`` is zero."""
    r, (out, inputs) = len(a), (len(b), a.shape[1])
    basis, _ = torch.linalg.qr(a.new_empty(r, r).normal_())
    a.copy_((a.new_empty(inputs, r // 2).normal_() @ basis[0::2]).T / 10)
    b.copy_(b.new_empty(out, r // 2).normal_() @ basis[1::2] / 10)


def pissa(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return the r largest singular values, half of each in A, half in B (https://arxiv.org/abs/2404.02948)."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return balanced(u[:, :r], s[:r] / scaling, vh[:r])


def olora(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return the first r rows of R and columns of Q, of ``weight = Q R`` (https://arxiv.org/abs/2406.01775)."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def mica(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return zero as A, which alone trains, and the r weakest directions as B (https://arxiv.org/abs/2604.01694)."""
    u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return weight.new_zeros(r, weight.shape[1]), u[:, -r:]


_DRAWN: dict[bool | str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    True: kaiming,
    False: lambda a, b: draw_as_linear(a),  # B stays as nn.Linear drew it, so that there is an effect at once
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    **dict.fromkeys((*FROM_DATA, "loftq"), kaiming),  # until the data or the weights are known
}
FROM_WEIGHT: dict[str, Callable[[torch.Tensor, int, float], Pair]] = {"pissa": pissa, "olora": olora, "mica": mica}


def from_weight(init: bool | str, weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return A and B of an initialisation that needs the base weight (out, in) only."""
    check_directions(weight, r)
    if fast := FAST_PISSA.fullmatch(str(init)):  # the more iterations, the nearer to pissa
        u, s, v = torch.svd_lowrank(weight, q=r, niter=int(fast[1]))
        return balanced(u, s / scaling, v.T)
    return FROM_WEIGHT[str(init)](weight, r, scaling)


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> Pair:
    """Return A and B whose product is ``u diag(s) vh``, each with the roots of s."""
    return s.sqrt().unsqueeze(1) * vh, u * s.sqrt()


def check_directions(weight: torch.Tensor, r: int) -> None:
    """Raise AdapterError if a weight has fewer than r singular values."""
    if r > min(weight.shape):
        raise AdapterError(
            f"is {r}, and a layer of {weight.shape[0]} x {weight.shape[1]} has fewer directions", key="r"
        )


Batches = Iterable[Mapping[str, torch.Tensor]]
PADDED = -100  # the label of a position that a decoder does not read


def first_batches(batches: Batches, examples: int) -> Iterator[Mapping[str, torch.Tensor]]:
    """Return the first batches that hold ``examples`` together."""
    for batch in batches:
        if examples <= 0:
            return
        examples -= len(next(iter(batch.values())))
        yield batch


@contextmanager
def inputs_recorded(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    record: Callable[[str, list[torch.Tensor]], None],
    label: int | None,
) -> Iterator[None]:
    """Inside, ``record`` gets each module's name and inputs (n, in), example by example, without padding.

    Positions whose label is ``label`` are left out too, unless it is None.
    """
    masks: list[torch.Tensor] = []

    def look(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        masks[:] = _masks(model, kwargs, label)

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def watch(_module: nn.Module, args: Any) -> None:
            rows = _rows(args[0].detach(), reversed(masks) if "decoder" in name.split(".") else masks)
            if rows:
                record(name, rows)

        return watch

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    handles += [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        with evaluating(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _masks(model: Any, inputs: Mapping[str, Any], label: int | None) -> list[torch.Tensor]:
    """Return which positions (B, T) count, of what the model reads; and of what its decoder reads, if it has one."""
    padding, labels = inputs.get("attention_mask"), inputs.get("labels")
    labels = labels if labels is not None and labels.ndim == 2 else None
    found = [padding.bool()] if padding is not None and padding.ndim == 2 else []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return found if labels is None else [*found, labels != (PADDED if label is None else label)]
    if label is None or labels is None:
        return found
    return [mask & (labels != label) if mask.shape == labels.shape else mask for mask in found] or [labels != label]


def _rows(x: torch.Tensor, masks: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return inputs (B, T, in) as (n, in) for each example that has any; (n, in) as they are."""
    if x.ndim == 2:
        return [x] if len(x) else []
    mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
    rows = x.flatten(1, -2) if mask is None else [example[keep] for example, keep in zip(x, mask, strict=True)]
    return [row for row in rows if len(row)]


def check_reached(modules: Iterable[str], found: Mapping[str, Any]) -> None:
    """Raise AdapterError for a module that the data did not reach."""
    if missing := next((name for name in modules if name not in found), None):
        raise AdapterError(f"the data do not reach {missing}; leave it out of target_modules", key="init_lora_weights")
