"""The starts that need no data: drawn, as LoRA's own, or computed from the base weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from peftcli.errors import AdapterError
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
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def random(a: torch.Tensor, b: torch.Tensor) -> None:
    """Leave B as nn.Linear drew it, so that the adapter has an effect before it is trained."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))


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
    False: random,
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
