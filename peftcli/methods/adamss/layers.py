"""The layer of AdaMSS (https://neurips.cc/virtual/2025/poster/119606), its subspaces, and which of these train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import base_module, widened
from peftcli.core.linear import dense_weight
from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaLinear, factory_kwargs, layers_of_kind, stored_weight
from peftcli.methods.adamss import AdamssConfig

_SEED = 123456789
_ROUNDS = 10
_TOLERANCE = 1e-4


def decompose(weight: torch.Tensor, r: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return about the first ``r`` singular vectors of ``weight``: left (out, r) and right (r, in)."""
    devices = [] if weight.device.type == "cpu" else [weight.device]
    with torch.random.fork_rng(devices, device_type=weight.device.type if devices else "cuda"):
        torch.manual_seed(seed)  # the method starts from a random matrix
        left, _, right = torch.svd_lowrank(weight, q=min(r, *weight.shape))
    return left, right.T


def cluster(points: torch.Tensor, count: int) -> torch.Tensor:
    """Return the number of the cluster of each of the ``points``, (N, r) -> (N,), by k-means from random points."""
    points = points.double().cpu()
    limit = _TOLERANCE * points.var(0, correction=0).mean()
    points = points - points.mean(0)
    shares = np.full(len(points), 1 / len(points))  # without them NumPy draws others
    first = np.random.RandomState(_SEED).choice(len(points), count, replace=False, p=shares)
    centres, labels = points[first], points.new_full((len(points),), -1, dtype=torch.long)
    for _ in range(_ROUNDS):
        before, labels = labels, _nearest(points, centres)
        if torch.equal(labels, before):
            return labels
        moved = _centres(points, labels, centres)
        shift, centres = (moved - centres).square().sum(), moved
        if shift <= limit:
            break
    return _nearest(points, centres)


def _nearest(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    return (centres.square().sum(1) - 2 * points @ centres.T).argmin(1)


def _centres(points: torch.Tensor, labels: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return the mean of each cluster's points. A cluster without any gets the point that is farthest from its own."""
    sums = torch.zeros_like(before).index_add_(0, labels, points)
    sizes = torch.bincount(labels, minlength=len(before))
    empty = (sizes == 0).nonzero().flatten().tolist()
    farthest = (points - before[labels]).square().sum(1).topk(len(empty)).indices.tolist()
    for cluster_, point in zip(empty, farthest, strict=True):
        sums[labels[point]] -= points[point]
        sizes[labels[point]] -= 1
        sums[cluster_], sizes[cluster_] = points[point], 1
    return sums / sizes.clamp(min=1).unsqueeze(1)


_SAME_DIRECTIONS = 0.999
"""Share of the file's directions that are found again in the base weight, up to rounding."""


class AdamssLinear(DeltaLinear):
    """``delta = B A newB`` with ``newB: (r, in)`` the weight's right singular vectors, which stay as they are.

    The outputs are divided into subspaces. Of each, ``A_i: (rank, r)`` and ``B_i: (n_i, rank)`` train: ``A: (R, r)`` is
    all the ``A_i`` one below the other, and ``B: (out, R)`` has the rows of the ``B_i``, with zeros elsewhere.
    ``adamss_rows: (out,)`` says which row of the ``B_i``, one below the other, each output has. PEFT's files lack it,
    and it is found again from the base weight. A layer with a bias has one more input, always 1.
    """

    optional = ("adamss_rows",)
    adamss_newB: nn.Parameter
    adamss_rows: torch.Tensor
    active: torch.Tensor

    def __init__(self, module: nn.Module, name: str, config: AdamssConfig):
        super().__init__(module, name, "AdaMSS")
        self.config, like = config, factory_kwargs(module)
        self.has_bias = getattr(base_module(module), "bias", None) is not None
        inputs, outputs = self.view.in_features + self.has_bias, self.view.out_features
        count, r = min(config.num_subspaces, outputs), min(config.r, inputs, outputs)
        sizes = [outputs // count + (number < outputs % count) for number in range(count)]
        ranks = [min(size, config.subspace_rank, r) for size in sizes]
        self.adamss_newB = nn.Parameter(torch.zeros(r, inputs, **like), requires_grad=False)
        self.adamss_A = nn.ParameterList(torch.zeros(rank, r, **like) for rank in ranks)
        self.adamss_B = nn.ParameterList(
            torch.zeros(size, rank, **like) for size, rank in zip(sizes, ranks, strict=True)
        )
        self.register_buffer("adamss_rows", torch.arange(outputs, device=like["device"]))
        self.knows_rows = True
        if not config.inference_mode and not stored_weight(module).is_meta:
            self._start()
        self.fixed = ("adamss_newB", "adamss_rows")
        if config.use_asa and not config.inference_mode:
            self._follow_importance()

    def _start(self) -> None:
        """Take the directions and the subspaces from the weight, and in each subspace start with its own directions."""
        left, right, members = self._find(self._weight())
        self._set_rows(members)
        sizes = [len(each) for each in members]
        parts = [torch.linalg.svd(left[each], full_matrices=False) for each in members]
        self._resize(sizes, [self._rank(size, values) for size, (_, values, _) in zip(sizes, parts, strict=True)])
        with torch.no_grad():
            self.adamss_newB.copy_(right)
            for a, b, (_, _, directions) in zip(self.adamss_A, self.adamss_B, parts, strict=True):
                a.copy_(directions[: len(a)])
                if self.config.init_weights is None:
                    b.normal_(std=0.01)

    def _rank(self, size: int, values: torch.Tensor) -> int:
        """Return the bottleneck of a subspace with ``size`` outputs, whose part of the weight has these values."""
        most = self._largest_rank(size)
        if self.config.use_dynamic_rank:  # the threshold is one of squares
            most = min(most, int((values.square() > self.config.svd_threshold * values[0].square()).sum()))
        return max(most, 1)

    def _largest_rank(self, size: int) -> int:
        return min(size, self.config.subspace_rank, len(self.adamss_newB))

    def _is_rank(self, rank: int, size: int) -> bool:
        """Return whether a subspace of this size can have such a bottleneck."""
        most = self._largest_rank(size)
        return 1 <= rank <= most if self.config.use_dynamic_rank else rank == most

    def _weight(self) -> torch.Tensor:
        return _with_bias(dense_weight(self), getattr(base_module(self), "bias", None))

    def _find(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Return the singular vectors of ``weight``, (out, in), left and right, and the outputs of each subspace."""
        left, right = decompose(weight.float(), self.config.r, self.config.random_seed)
        labels = cluster(left, len(self.adamss_A)).to(left.device)
        return left, right, [(labels == number).nonzero().flatten() for number in range(len(self.adamss_A))]

    def _set_rows(self, members: list[torch.Tensor]) -> None:
        self.adamss_rows = torch.cat(members).argsort()  # not copied: it may be on the meta device
        self.knows_rows = True

    def before_loading(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the subspaces' sizes from a file, and if it does not say which outputs they have, find these again."""
        parts = [
            [tensors.get(f"{tensor}.{number}") for number in range(len(self.adamss_A))]
            for tensor in ("adamss_A", "adamss_B")
        ]
        directions = tensors.get("adamss_newB")
        if directions is None or any(value is None or value.ndim != 2 for part in parts for value in part):
            return
        ranks, sizes = ([len(value) for value in part if value is not None] for part in parts)
        self.knows_rows = "adamss_rows" in tensors
        if not self.knows_rows and not stored_weight(self).is_meta:
            sizes = self._find_again(self._weight(), directions)
        if sum(sizes) == self.view.out_features and all(map(self._is_rank, ranks, sizes)):
            self._resize(sizes, ranks)

    def _find_again(self, weight: torch.Tensor, directions: torch.Tensor) -> list[int]:
        """Find the rows for a file that lacks them, and return the subspaces' sizes."""
        if len(self.adamss_newB) == len(weight):
            raise AdapterError(
                "r is not below the layer's outputs, so that rounding decides which of them form a subspace, and the "
                "file, which PEFT wrote, does not say it",
                key="r",
            )
        _, right, members = self._find(weight)
        same = right.shape == directions.shape
        if not same or (right @ directions.to(right).T).square().sum() < _SAME_DIRECTIONS * len(right):
            raise AdapterError(
                "the base model's weights have other directions than the file: it was trained on another base model, "
                "in another precision or on another kind of device, and PEFT, which wrote it, left out its subspaces"
            )
        self._set_rows(members)
        return [len(each) for each in members]

    def _resize(self, sizes: Sequence[int], ranks: Sequence[int]) -> None:
        for a, b, size, rank in zip(self.adamss_A, self.adamss_B, sizes, ranks, strict=True):
            if b.shape != (size, rank):
                a.data, b.data = a.new_zeros(rank, a.shape[1]), b.new_zeros(size, rank)

    def adapt_from_file(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        checked = tensor == "adamss_rows" and not value.is_meta and value.shape == self.adamss_rows.shape
        if checked and not torch.equal(value.sort().values, torch.arange(len(value)).to(value)):
            raise AdapterError("adamss_rows does not give each output a row of its own")
        return value

    def file_tensors(self) -> dict[str, torch.Tensor]:
        return {**self.own_tensors(), "adamss_newB": self.adamss_newB, "adamss_rows": self.adamss_rows}

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``B`` (out, R) and ``A`` (R, r)."""
        return torch.block_diag(*self.adamss_B)[self.adamss_rows], torch.cat([*self.adamss_A])

    def update(self, x: torch.Tensor) -> torch.Tensor:
        (b, a), inputs = self.factors(), self.view.in_features
        bias = self.adamss_newB[:, inputs] if self.has_bias else None
        return F.linear(F.linear(F.linear(x, self.adamss_newB[:, :inputs], bias), a), b)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.knows_rows:  # the layer had no base weight when the file was read
            dense = widened(self.view.as_stored(base["weight"]))
            sizes = self._find_again(_with_bias(dense, base.get("bias")), self.adamss_newB)
            if sizes != [len(b) for b in self.adamss_B]:
                raise AdapterError("the subspaces of the file are not those that the base model's weights have")
        b, a = self.factors()
        delta, inputs = b @ a @ self.adamss_newB, self.view.in_features
        added = {"weight": self.view.as_stored(delta[:, :inputs])}
        if self.has_bias:
            added["bias"] = delta[:, inputs]
        return {name: widened(base[name]) + value for name, value in added.items()}

    def _follow_importance(self) -> None:
        device = self.adamss_rows.device
        self.register_buffer("active", torch.ones(len(self.adamss_A), dtype=torch.bool, device=device))
        names = ["active"]
        for name, value in self.own_tensors().items():
            for average in ("importance", "uncertainty"):
                names.append(f"{average}_{name.replace('.', '_')}")
                self.register_buffer(names[-1], torch.zeros_like(value))
        self.fixed = (*self.fixed, *names)

    def training_subspaces(self) -> list[int]:
        """Return the numbers of the subspaces that are not frozen."""
        return [number for number, active in enumerate(self.active.tolist()) if active]

    @torch.no_grad()
    def see_gradients(self) -> None:
        """Let the averages follow the importance ``|weight * gradient|`` of this step."""
        for number in self.training_subspaces():
            for tensor, weight in (("adamss_A", self.adamss_A[number]), ("adamss_B", self.adamss_B[number])):
                if weight.grad is None:
                    raise AdapterError(
                        "AdaMSS needs the gradients of the step; update the subspaces before they are cleared"
                    )
                now = (weight * weight.grad).abs()
                importance, uncertainty = self._averages(tensor, number)
                uncertainty.lerp_((now - importance).abs(), 1 - self.config.asa_uncertainty_beta)
                importance.lerp_(now, 1 - self.config.asa_importance_beta)

    def score(self, number: int) -> torch.Tensor:
        """Return the importance of a subspace: a scalar."""
        found = [self._averages(tensor, number) for tensor in ("adamss_A", "adamss_B")]
        return torch.stack([(importance * uncertainty).mean() for importance, uncertainty in found]).sum()

    def clear_averages(self) -> None:
        """Forget the importance of past steps."""
        for number in range(len(self.adamss_A)):
            for average in (*self._averages("adamss_A", number), *self._averages("adamss_B", number)):
                average.zero_()

    def freeze(self) -> None:
        """Stop the training of the subspaces that are not active."""
        for a, b, active in zip(self.adamss_A, self.adamss_B, self.active.tolist(), strict=True):
            for parameter in (a, b) if not active else ():
                parameter.requires_grad_(False)
                parameter.grad = None

    def _averages(self, tensor: str, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return getattr(self, f"importance_{tensor}_{number}"), getattr(self, f"uncertainty_{tensor}_{number}")


wrap = AdamssLinear


def after_step(model: nn.Module, config: AdamssConfig, step: int, total: int) -> None:
    """Freeze the subspaces that matter least, as many as the schedule wants at this step."""
    if not config.use_asa or not config.init_warmup <= step <= config.final_warmup:
        return
    layers = _allocating(model, config)
    for layer in layers:
        layer.see_gradients()
    if not layers or (step % config.mask_interval and step != config.final_warmup):
        return
    left = 1 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    every = sum(len(layer.adamss_A) for layer in layers)
    target = config.asa_target_subspaces
    count = int(target + (every - target) * left**config.asa_schedule_exponent)
    places = [(layer, number) for layer in layers for number in layer.training_subspaces()]
    if len(places) > count:
        scores = torch.stack([layer.score(number).cpu() for layer, number in places])
        for place in scores.argsort(descending=True, stable=True)[count:].tolist():
            layer, number = places[place]
            layer.active[number] = False
            layer.freeze()
    for layer in layers:
        layer.clear_averages()


def model_attributes(model: nn.Module, configs: Mapping[str, AdamssConfig]) -> dict[str, Any]:
    """Return the method of a model with AdaMSS, under PEFT's name."""

    def update_and_allocate(global_step: int) -> None:
        for config in configs.values():
            after_step(model, config, global_step, 0)

    return {"update_and_allocate": update_and_allocate}


def after_resume(model: nn.Module, config: AdamssConfig, step: int, total: int) -> None:
    """Freeze again what was frozen when the checkpoint was written."""
    for layer in _allocating(model, config):
        layer.freeze()


def _allocating(model: nn.Module, config: AdamssConfig) -> list[AdamssLinear]:
    """Return the adapter's layers whose subspaces share the budget: none if it was loaded from a file, or is frozen."""
    return [
        layer
        for layer in layers_of_kind(model, AdamssLinear).values()
        if layer.config is config
        and "active" in layer.fixed
        and all(layer.adamss_A[each].requires_grad for each in layer.training_subspaces())
    ]


def _with_bias(weight: torch.Tensor, bias: Any) -> torch.Tensor:
    """Return the weight (out, in) with the bias as one more column."""
    return weight if bias is None else torch.cat([weight, bias.detach().to(weight).unsqueeze(1)], dim=1)
