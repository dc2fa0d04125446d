"""The layers of OSF (https://arxiv.org/abs/2504.07097)."""

from __future__ import annotations

import torch
from torch import nn

from peftcli.core.linear import dense_weight
from peftcli.core.targets import check_pattern_keys, find_targets, pattern_value
from peftcli.errors import AdapterError
from peftcli.methods._delta import WeightDeltaLinear, factory_kwargs, stored_weight
from peftcli.methods.osf import OSFConfig


class OSFLinear(WeightDeltaLinear):
    """``W + U S V - U0 S0 V0``: of the singular value decomposition of ``W``, the weaker part ``U0 S0 V0`` is trained.

    What of the gradients of ``U: (out, k)`` and ``V: (k, in)`` lies along the stronger part is taken away, so that
    training leaves alone what that part does.
    """

    start_U: torch.Tensor
    start_S: torch.Tensor
    start_V: torch.Tensor
    strong_U: torch.Tensor | None
    strong_V: torch.Tensor | None

    def __init__(self, module: nn.Module, name: str, config: OSFConfig):
        super().__init__(module, name, "OSF")
        rows, columns = self.view.out_features, self.view.in_features
        self.kept = kept_directions(min(rows, columns), name, config)
        k, like = min(rows, columns) - self.kept, factory_kwargs(self)
        sizes = {"U_low": (rows, k), "S_low": (k,), "V_low": (k, columns)}
        self.osf_svd_params = nn.ParameterDict({key: torch.randn(size, **like) for key, size in sizes.items()})
        if stored_weight(module).is_meta:
            return
        u, s, v = torch.linalg.svd(dense_weight(self), full_matrices=False)
        for key, value in {"U": u[:, self.kept :], "S": s[self.kept :], "V": v[self.kept :]}.items():
            self.register_buffer(f"start_{key}", _contiguous_copy(value), persistent=False)
            if config.init_weights:
                self.osf_svd_params[f"{key}_low"].data.copy_(value)
        # of a square matrix of singular vectors, the weaker ones say as well what is not along the stronger
        self.register_buffer(
            "strong_U", _contiguous_copy(u[:, : self.kept]) if rows > columns else None, persistent=False
        )
        self.register_buffer("strong_V", _contiguous_copy(v[: self.kept]) if columns > rows else None, persistent=False)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.update(x.to(self.start_S.dtype)).to(y.dtype)

    def update(self, x: torch.Tensor) -> torch.Tensor:
        u, s, v = (self.osf_svd_params[key].to(x.dtype) for key in ("U_low", "S_low", "V_low"))
        if torch.is_grad_enabled():
            u = _restrict_gradients(u, self.start_U, self.strong_U)
            v = _restrict_gradients(v.T, self.start_V.T, None if self.strong_V is None else self.strong_V.T).T
        return (x @ v.T * s) @ u.T - (x @ self.start_V.T * self.start_S) @ self.start_U.T

    def delta_of(self, weight: torch.Tensor) -> torch.Tensor:
        u, s, v = torch.linalg.svd(self.view.as_stored(weight), full_matrices=False)
        started = (u[:, self.kept :] * s[self.kept :]) @ v[self.kept :]
        trained = (self.osf_svd_params["U_low"] * self.osf_svd_params["S_low"]) @ self.osf_svd_params["V_low"]
        return self.view.as_stored(trained - started)


def kept_directions(side: int, name: str, config: OSFConfig) -> int:
    """Return how many singular directions of a weight, whose smaller side is ``side``, stay as they are.

    Raises:
        AdapterError: none of them, or all.
    """
    given = pattern_value(config.anywhere(), name, config.effective_rank or 0.5)
    kept = int(side * given) if isinstance(given, float) and given <= 1 else int(given)
    if not 0 < kept < side:
        raise AdapterError(f"{kept} of the {side} directions of {name} would stay as they are", key="effective_rank")
    return kept


def _contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a part of a matrix, one after another, as processes send them."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _restrict_gradients(vectors: torch.Tensor, start: torch.Tensor, strong: torch.Tensor | None) -> torch.Tensor:
    """``vectors`` (n, k), with gradients that have nothing along ``strong`` (n, r), or only what is along ``start``."""
    free = start @ (start.T @ vectors) if strong is None else vectors - strong @ (strong.T @ vectors)
    return free + (vectors - free).detach()


def targets(model: nn.Module, config: OSFConfig) -> list[str]:
    """Return the names of the target modules."""
    names = find_targets(model, config)
    check_pattern_keys(dict(config.rank_pattern), names, "rank_pattern", config, config.anywhere())
    return names


wrap = OSFLinear
