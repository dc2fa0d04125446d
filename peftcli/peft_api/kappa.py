"""KappaTune: adapt the weights with the smallest condition numbers (https://arxiv.org/abs/2506.16289).

A weight that treats all directions alike loses less of what it knows when it is changed. The names are PEFT's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import nn

from peftcli.core.linear import dense_weight, linear_view

_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""Endings of the names of weights that hold an expert in each row: (experts, ., .)."""


class KappaTuneSelector:
    """The weights of a model by their condition numbers, smallest first."""

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ):
        """Compute nothing yet. There will be no progress bar.

        Weights with a side longer than ``max_dim_size_to_analyze`` are left out. ``moe_param_suffixes`` are endings of
        the names of fused experts.
        """
        self._model, self._largest, self._endings = model, max_dim_size_to_analyze, moe_param_suffixes or _EXPERTS

    @functools.cached_property
    def _layers(self) -> dict[str, float]:
        """The condition number of each linear layer, by name."""
        found = {}
        for name, module in self._model.named_modules():
            view = linear_view(module)
            if view is not None and max(view.in_features, view.out_features) <= self._largest:
                found[name] = float(_condition_number(dense_weight(module)))
        return found

    @functools.cached_property
    def _experts(self) -> dict[str, float]:
        """The mean condition number of the experts in each fused weight, by the parameter's name."""
        return {
            name: float(_condition_number(value.detach().float()).mean())
            for name, value in self._model.named_parameters()
            if name.endswith(tuple(self._endings)) and value.ndim == 3 and max(value.shape[1:]) <= self._largest
        }

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the best ``target_modules``: a number of them, a share of all, or those up to a condition number."""
        return _best(self._layers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the best ``target_parameters``, chosen in the same way."""
        return _best(self._experts, top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Return the best ``target_modules`` and ``target_parameters`` of a config: a share ``top_p`` of all.

    The other arguments are those of ``KappaTuneSelector``.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def _condition_number(weight: torch.Tensor) -> torch.Tensor:
    values = torch.linalg.svdvals(weight)
    return values[..., 0] / (values[..., -1] + 1e-8)


def _best(numbers: dict[str, float], share: float | None, count: int | None, largest: float | None) -> list[str]:
    names = sorted(numbers, key=numbers.__getitem__)
    if count is not None:
        return names[:count]
    if share is not None:
        return names[: max(1, int(len(names) * share))]
    return [name for name in names if largest is None or numbers[name] <= largest]
