"""The layer of PSOFT (https://arxiv.org/abs/2505.11235)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import widened
from peftcli.core.linear import dense_weight
from peftcli.errors import AdapterError
from peftcli.methods._delta import WeightDeltaLinear, factory_kwargs
from peftcli.methods._rotation import cayley, neumann, skew_of
from peftcli.methods.psoft import PsoftConfig


class PsoftLinear(WeightDeltaLinear):
    """``delta = scaling * B (R - I) A`` with ``scaling * B A`` the weight's best approximation of rank r.

    ``A: (r, in)`` and ``B: (out, r)`` come from the base weight and never train; the file does not hold them.
    ``R: (r, r)``, which trains, is a rotation with a factor for each direction.
    """

    fixed = ("psoft_A", "psoft_B")
    saves_fixed = False
    psoft_A: torch.Tensor
    psoft_B: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: PsoftConfig):
        super().__init__(module, name, "PSOFT", dropout=config.psoft_dropout)
        smaller = min(self.view.in_features, self.view.out_features)
        if config.r > smaller:
            raise AdapterError(f"{config.r} is more than {smaller}, the smaller side of {name}", key="r")
        self.config = config
        self.scaling = config.psoft_alpha / config.r
        self.psoft_R = Rotation(config, module)
        for tensor, value in zip(self.fixed, self._principal(dense_weight(module)), strict=True):
            setattr(self, tensor, nn.Parameter(value, requires_grad=False))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        a = F.linear(x, self.psoft_A)
        return self.scaling * F.linear(F.linear(a, self.psoft_R().to(a.dtype)) - a, self.psoft_B)

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        a, b = self._principal(self.view.as_stored(weight))
        turned = self.psoft_R()
        identity = torch.eye(len(turned), device=turned.device, dtype=turned.dtype)
        return self.view.as_stored(self.scaling * (b @ (turned - identity) @ a))

    def _principal(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``A`` and ``B`` of a weight (out, in).

        A singular vector's sign is free, and what trains depends on it. So they are found on the CPU, wherever the
        model is: an adapter means the same on every device.
        """
        r, config, dense = self.config.r, self.config, weight if weight.is_meta else weight.cpu()
        if config.psoft_svd == "full":
            u, s, vt = torch.linalg.svd(dense, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(config.random_seed)
                u, s, v = torch.svd_lowrank(dense, q=r, niter=config.psoft_svd_lowrank_niter)
            vt = v.T
        s = s[:r] / self.scaling
        left, right = (s, torch.ones_like(s)) if config.ab_svd_init == "psoft_init" else (s.sqrt(), s.sqrt())
        a, b = right.unsqueeze(1) * vt[:r], u[:, :r] * left
        return a.contiguous().to(weight.device), b.contiguous().to(weight.device)


class Rotation(nn.Module):
    """``R = diag(vector_b) (I + Q) (I - Q)^-1 diag(vector_a)``; ``Q: (r, r)`` is skew-symmetric and starts at zero.

    ``weight`` is the upper triangle of ``Q``, or with ``psoft_orth: false`` what stands between the vectors.
    """

    def __init__(self, config: PsoftConfig, module: nn.Module):
        super().__init__()
        self.config = config
        r, like = config.r, factory_kwargs(module)
        start = torch.zeros(r * (r - 1) // 2, **like) if config.psoft_orth else torch.eye(r, **like)
        self.weight = nn.Parameter(start if config.init_weights else start + 0.1 * torch.randn_like(start))
        self.vector_b = nn.Parameter(torch.ones(r, **like)) if config.psoft_mag_b else None
        self.vector_a = nn.Parameter(torch.ones(r, **like)) if config.psoft_mag_a else None

    def forward(self) -> torch.Tensor:
        turned = self._rotation() if self.config.psoft_orth else self.weight
        if self.vector_b is not None:
            turned = self.vector_b.unsqueeze(1) * turned
        return turned if self.vector_a is None else turned * self.vector_a

    def _rotation(self) -> torch.Tensor:
        q, config = skew_of(widened(self.weight), self.config.r), self.config
        if not config.use_cayley_neumann:
            return cayley(-q)
        if (bound := config.cayley_neumann_eps) is not None:
            q = q * (bound / (q.norm() + 1e-12)).clamp(max=1)
        return neumann(q, config.num_cayley_neumann_terms)


wrap = PsoftLinear
