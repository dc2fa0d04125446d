"""How LoRA's A and B start: one function for each initialisation.

Those that are drawn fill ``A: (r, in)`` and ``B: (out, r)`` in place; those that look at the base weight (out, in)
compute them from it. None changes the base weight: where ``B A`` is not zero at the start, the layer subtracts what it
starts with (``peftcli.methods.lora.residual_init``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from peftcli.errors import AdapterError
from peftcli.methods.lora.init_config import FAST_PISSA, CordaConfig, LoraGAConfig

if TYPE_CHECKING:
    from peftcli.methods.lora.config import LoraConfig

Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B."""


@torch.no_grad()
def start(
    a: torch.Tensor, b: torch.Tensor, init: bool | str, scaling: float, weight: Callable[[], torch.Tensor]
) -> None:
    """Fill ``a`` and ``b`` as ``init_lora_weights`` says. ``weight`` gives the base weight, where that is looked at.

    Raises:
        AdapterError: the layer has fewer directions than r.
    """
    if a.is_meta:
        return
    if (drawn := DRAWN.get(init)) is not None:
        drawn(a, b)
    else:
        computed = from_weight(init, weight(), len(a), scaling)
        a.copy_(computed[0])
        b.copy_(computed[1])


def kaiming(a: torch.Tensor, b: torch.Tensor) -> None:
    """What loralib does: A as nn.Linear starts, B zero."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    nn.init.zeros_(b)


def random(a: torch.Tensor, b: torch.Tensor) -> None:
    """B as nn.Linear started it, so that the adapter does something before it is trained."""
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))


def gaussian(a: torch.Tensor, b: torch.Tensor) -> None:
    """A normal with deviation 1/r, B zero."""
    nn.init.normal_(a, std=1 / len(a))
    nn.init.zeros_(b)


def orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """A and B random over two halves of an orthogonal basis of r directions, so that B A is zero."""
    r, (out, inputs) = len(a), (len(b), a.shape[1])
    basis, _ = torch.linalg.qr(a.new_empty(r, r).normal_())
    a.copy_((a.new_empty(inputs, r // 2).normal_() @ basis[0::2]).T / 10)
    b.copy_(b.new_empty(out, r // 2).normal_() @ basis[1::2] / 10)


DRAWN: dict[bool | str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    True: kaiming,
    False: random,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    **dict.fromkeys(("eva", "corda", "lora_ga", "loftq"), kaiming),  # until they are told what they start from
}


def from_weight(init: bool | str, weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """A and B of an initialisation that looks at the base weight (out, in) only.

    Raises:
        AdapterError: the layer has fewer directions than r.
    """
    need_directions(weight, r)
    fast = FAST_PISSA.fullmatch(str(init))
    compute = functools.partial(fast_pissa, iterations=int(fast[1])) if fast else FROM_WEIGHT[str(init)]
    return compute(weight, r, scaling)


def pissa(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """PiSSA (https://arxiv.org/abs/2404.02948): the r largest singular values, half of each in A, half in B."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return balanced(u[:, :r], s[:r] / scaling, vh[:r])


def fast_pissa(weight: torch.Tensor, r: int, scaling: float, iterations: int) -> Pair:
    """PiSSA by a randomised decomposition, the better the more iterations."""
    u, s, v = torch.svd_lowrank(weight, q=r, niter=iterations)
    return balanced(u, s / scaling, v.T)


def olora(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """OLoRA (https://arxiv.org/abs/2406.01775): the first r columns of Q and rows of R."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def mica(weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """MiCA (https://arxiv.org/abs/2604.01694): B the r smallest left singular vectors, A zero."""
    u, _, _ = torch.linalg.svd(weight, full_matrices=False)
    return weight.new_zeros(r, weight.shape[1]), u[:, -r:]


FROM_WEIGHT: dict[str, Callable[[torch.Tensor, int, float], Pair]] = {"pissa": pissa, "olora": olora, "mica": mica}


def corda(weight: torch.Tensor, covariance: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Pair:
    """CorDA (https://arxiv.org/abs/2406.05223): singular vectors of ``W C``, with ``C: (in, in)`` of the inputs.

    ``ipm`` takes the r largest, ``kpm`` the r smallest.
    """
    need_directions(weight, r)
    method = (config.corda_config or CordaConfig()).corda_method
    covariance, inverse = _inverted(covariance.to(weight.dtype))
    u, s, vh = torch.linalg.svd(weight @ covariance, full_matrices=False)
    kept = slice(0, r) if method == "ipm" else slice(len(s) - r, len(s))
    return balanced(u[:, kept], s[kept] / scaling, (vh @ inverse)[kept])


def lora_ga(weight: torch.Tensor, gradient: torch.Tensor, r: int, scaling: float, config: LoraConfig) -> Pair:
    """LoRA-GA (https://arxiv.org/abs/2407.05000): the leading 2r singular vectors of the weight's gradient (out, in).

    A and B are scaled as in the paper. PEFT leaves A as it is and multiplies B by the singular values too.
    """
    need_directions(weight, 2 * r)
    settings = config.lora_ga_config or LoraGAConfig()
    u, _, v = torch.svd_lowrank(gradient.to(weight.dtype), q=min(4 * r, *gradient.shape), niter=4)
    orders = {
        "ArB2r": torch.arange(2 * r),
        "A2rBr": torch.arange(2 * r).roll(r),
        "ArBr": torch.arange(2 * r).view(r, 2).T.flip(0).flatten(),
    }
    order = orders[settings.direction] if settings.direction in orders else torch.randperm(2 * r)
    size = 1.0
    if settings.scale == "stable":
        size = len(weight) ** 0.25 / math.sqrt(settings.stable_gamma)
    elif settings.scale == "weight_svd":
        size = float((torch.svd_lowrank(weight, q=r, niter=4)[1] / scaling).sqrt().mean())
    elif settings.scale == "gd_scale":
        size = 1 / scaling
    return size * v[:, order[:r].to(v.device)].T, size * u[:, order[r:].to(u.device)]


FROM_STATISTIC: dict[str, Callable[[torch.Tensor, torch.Tensor, int, float, LoraConfig], Pair]] = {
    "corda": corda,
    "lora_ga": lora_ga,
}
"""Those that look at the base weight and at what the training data says of it."""


def loftq(weight: torch.Tensor, quantised: torch.Tensor, r: int, scaling: float) -> Pair:
    """LoftQ (https://arxiv.org/abs/2310.08659): the r largest singular values of what quantisation took away."""
    return pissa(weight - quantised, r, scaling)


def balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> Pair:
    """A and B whose product is ``u diag(s) vh``, each with the roots of s."""
    return s.sqrt().unsqueeze(1) * vh, u * s.sqrt()


def need_directions(weight: torch.Tensor, r: int) -> None:
    """Raises AdapterError where a weight has fewer than r singular values."""
    if r > min(weight.shape):
        raise AdapterError(
            f"is {r}, and a layer of {weight.shape[0]} x {weight.shape[1]} has fewer directions", key="r"
        )


def _inverted(covariance: torch.Tensor) -> Pair:
    """The covariance with as much added to its diagonal as a good inverse takes, and that inverse."""
    damp, one = 0.01, torch.eye(len(covariance), device=covariance.device, dtype=covariance.dtype)
    while True:
        firm = covariance + damp * covariance.diagonal().mean() * one
        inverse = torch.linalg.inv(firm)
        if torch.dist(firm @ inverse, one) < 0.05:
            return firm, inverse
        damp *= 2
