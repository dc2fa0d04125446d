"""EVA: Explained Variance Adaptation (https://arxiv.org/abs/2410.07170)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peftcli.core.inject import disabled, replace_modules
from peftcli.core.layer import TrainedBias
from peftcli.core.targets import as_pattern, pattern_value, shortest_names
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import EvaConfig
from peftcli.methods.lora.initialisations.start import Batches, check_reached, inputs_recorded
from peftcli.methods.lora.lora import LoraLayer, LoraLinear

_MAX_BATCHES = 2000
"""EVA converges far sooner, or not at all."""
_KEY = "init_lora_weights"


@dataclass
class _Spectrum:
    """The main directions of rows that come in batches: an incremental singular value decomposition."""

    count: int
    """Number of directions."""
    tau: float
    seen: int = 0
    """Number of rows so far."""
    squares: float = 0.0
    """Sum of the squares of the rows about their mean."""
    mean: torch.Tensor | None = None
    directions: torch.Tensor | None = None
    """(count, in), orthonormal, by falling singular value."""
    values: torch.Tensor | None = None
    """Their singular values."""
    similar: tuple[bool, ...] = ()
    """Which of them changed by less than tau with the last rows."""
    waiting: tuple[torch.Tensor, ...] = ()
    """Rows that are too few yet for ``count`` directions."""

    def add(self, rows: list[torch.Tensor]) -> None:
        """Add rows (n, in)."""
        self.waiting += tuple(rows)
        if sum(map(len, self.waiting)) < self.count:
            return
        x, self.waiting = torch.cat(self.waiting).float(), ()
        mean = x.mean(0)
        x = x - mean
        self.squares += float(x.square().sum())
        total = self.seen + len(x)
        before = self.directions
        if self.mean is not None and self.directions is not None and self.values is not None:
            gap = math.sqrt(self.seen / total * len(x)) * (self.mean - mean)
            self.squares += float(gap.square().sum())
            x = torch.cat([self.values.unsqueeze(1) * self.directions, x, gap.unsqueeze(0)])
            mean = (self.seen * self.mean + (total - self.seen) * mean) / total
        self.mean, self.seen = mean, total
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(42)
            _, s, v = torch.svd_lowrank(x, q=min(2 * self.count, *x.shape), niter=4)
        v = v * v.gather(0, v.abs().argmax(0, keepdim=True)).sign()
        self.directions, self.values = v.T[: self.count], s[: self.count]
        if before is not None:
            cosine = torch.nn.functional.cosine_similarity(self.directions, before)
            self.similar = tuple((cosine >= self.tau).tolist())

    def shares(self) -> list[float]:
        """Return each direction's share of the rows' variance."""
        assert self.values is not None
        return (self.values.square() / self.squares).tolist()

    def main(self, count: int, whiten: bool) -> torch.Tensor:
        """Return the first ``count`` directions; to whiten, each divided by the root of its singular value."""
        assert self.directions is not None
        assert self.values is not None
        found = self.directions[:count]
        return found / self.values[:count].sqrt().unsqueeze(1) if whiten else found

    def has_converged(self, count: int) -> bool:
        """Return whether the first ``count`` directions have converged."""
        return len(self.similar) >= count and all(self.similar[:count])


def eva_directions(
    model: nn.Module,
    config: LoraConfig,
    layers: Mapping[str, LoraLayer],
    batches: Batches,
    run: Callable[[Any], Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Return each linear layer's A: the main directions of its inputs.

    Layers whose inputs vary more get more directions, up to ``rho`` times their r; others get fewer, down to none.
    ``run`` runs the model on a batch; None: the batch is the model's keyword arguments.

    Raises:
        AdapterError: the data do not reach a layer, or do not converge.
    """
    run = run or (lambda batch: model(**batch))
    settings = config.eva_config or EvaConfig()
    label = settings.label_mask_value if settings.use_label_mask else None
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, LoraLinear)}
    with disabled(model), torch.no_grad():
        leaders = _leaders(model, linear, batches, run, label)
        most = dict.fromkeys(leaders.values(), 0)
        for name, layer in linear.items():
            wanted = min(round(layer.r * settings.rho), layer.view.in_features)
            most[leaders[name]] = max(most[leaders[name]], wanted)
        spectra = {leader: _Spectrum(count, settings.tau) for leader, count in most.items()}
        counts = {name: most[leader] for name, leader in leaders.items()}
        stream = _endless(batches)
        for _ in range(_MAX_BATCHES):
            needed = {leader: max(counts[name] for name in counts if leaders[name] == leader) for leader in spectra}
            open_ones = {
                leader: linear[leader] for leader in spectra if not spectra[leader].has_converged(needed[leader])
            }
            batch = next(stream, None)
            if not open_ones or batch is None:
                break
            with inputs_recorded(model, open_ones, lambda name, rows: spectra[name].add(rows), label):
                run(batch)
            if all(spectrum.values is not None for spectrum in spectra.values()):
                counts = _counts(spectra, leaders, sum(layer.r for layer in linear.values()))
    if open_ones:
        raise AdapterError(
            f"the directions of {next(iter(open_ones))} did not converge",
            key=_KEY,
            hint="a lower eva_config.tau accepts them sooner; a lower r makes them steadier",
        )
    return {name: spectra[leader].main(counts[name], settings.whiten) for name, leader in leaders.items()}


def start_eva(
    model: nn.Module, config: LoraConfig, layers: Mapping[str, LoraLayer], directions: Mapping[str, torch.Tensor]
) -> None:
    """Give each layer its directions, and with them its r. A layer without directions is removed.

    ``config`` then says which layers there are, and their r and lora_alpha.
    """
    settings = config.eva_config or EvaConfig()
    sizes: dict[str, int] = {}
    alphas: dict[str, float] = {}
    removed: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
        if isinstance(layer, LoraLinear) and name in directions:
            r = len(directions[name])
            if settings.adjust_scaling_factors and r != layer.r:
                alpha *= r / layer.r
            if not r:
                below = layer.base_layer  # with bias: all the bias is trained here, too
                own_bias = config.bias == "lora_only" and isinstance(below, TrainedBias)
                removed[layer] = below.base_layer if own_bias else below
                continue
            _restart(layer, directions[name], alpha / (math.sqrt(r) if config.use_rslora else r))
        sizes[name], alphas[name] = layer.r, alpha
    replace_modules(model, removed)
    if removed:
        config.target_modules = shortest_names(model, list(sizes))
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {name: sizes[name] for name in as_pattern(sizes, config.r)}
    config.alpha_pattern = as_pattern(alphas, config.lora_alpha)


@torch.no_grad()
def _restart(layer: LoraLinear, a: torch.Tensor, scaling: float) -> None:
    """Start ``layer`` from A, which may have another r, and a B of zeros."""
    r, like = len(a), layer.lora_A.weight
    if r != layer.r:
        options: dict[str, Any] = {"bias": False, "device": like.device, "dtype": like.dtype}
        layer.lora_A = nn.Linear(layer.view.in_features, r, **options).requires_grad_(like.requires_grad)
        layer.lora_B = nn.Linear(r, layer.view.out_features, **options).requires_grad_(like.requires_grad)
    layer.lora_A.weight.copy_(a)
    nn.init.zeros_(layer.lora_B.weight)
    layer.r, layer.scaling, layer.full_scaling = r, scaling, scaling


def _leaders(
    model: nn.Module,
    linear: Mapping[str, LoraLinear],
    batches: Batches,
    run: Callable[[Any], Any],
    label: int | None,
) -> dict[str, str]:
    """Return layer -> the first layer with the same inputs, as query, key and value projections have."""
    prints: dict[str, Any] = {}

    def note(name: str, rows: list[torch.Tensor]) -> None:
        x = torch.cat(rows).double()
        prints.setdefault(name, (tuple(x.shape), x.sum().item(), x.square().sum().item(), x[-1].sum().item()))

    with inputs_recorded(model, linear, note, label):
        for batch in itertools.islice(batches, 1):
            run(batch)
    check_reached(linear, prints)
    first: dict[Any, str] = {}
    return {name: first.setdefault(prints[name], name) for name in linear}


def _counts(spectra: Mapping[str, _Spectrum], leaders: Mapping[str, str], budget: int) -> dict[str, int]:
    """Return layer -> number of directions. The ``budget`` goes to the directions with the largest shares."""
    shares = {leader: spectrum.shares() for leader, spectrum in spectra.items()}
    order = [*spectra, *(name for name in leaders if name not in spectra)]  # of equal ones, leaders get more
    ranked = sorted(((share, name) for name in order for share in shares[leaders[name]]), key=lambda one: -one[0])
    counts = dict.fromkeys(leaders, 0)
    for _, name in ranked[:budget]:
        counts[name] += 1
    return counts


def _endless(batches: Batches) -> Iterator[Mapping[str, torch.Tensor]]:
    """Repeat the batches endlessly, unless there are none."""
    found = True
    while found:
        found = False
        for batch in batches:
            found = True
            yield batch
