"""The layers of AdaLoRA (https://arxiv.org/abs/2303.10512), and how the budget of directions is shared out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, path_in_file
from peftcli.errors import AdapterError
from peftcli.methods._delta import DeltaConv, LowRank, by_kind, factory_kwargs, layers_of_kind
from peftcli.methods.adalora import AdaLoraConfig
from peftcli.methods.updates import Update

_TENSORS = ("lora_A", "lora_E", "lora_B")


class AdaLoraLayer(AdapterLayer):
    """``delta = scaling * B (E * A)`` with ``A: (r, in)``, ``E: (r, 1)``, ``B: (out, r)``; ``E`` starts at zero.

    While training, averages of each weight's importance go along, and which directions are kept in the end. A layer
    that is made for an adapter file has neither: its directions are those of the file.
    """

    def start(self, out_features: int, in_features: int, name: str, config: AdaLoraConfig) -> None:
        """Make the weights of a delta (out, in)."""
        mask = config.rank_pattern.get(f"{name}.lora_E") if config.inference_mode else None
        r = config.init_r if mask is None else sum(mask)
        like = factory_kwargs(self)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, **like))
        self.lora_E = nn.Parameter(torch.zeros(r, 1, **like))
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        if not config.init_lora_weights:
            nn.init.normal_(self.lora_E)
        self.scaling = _scaling(config)
        if not config.inference_mode:
            self.begin_to_share()

    def begin_to_share(self) -> None:
        """Keep all directions, and averages of how important each is."""
        self.register_buffer("kept", torch.ones(len(self.lora_E), dtype=torch.bool, device=self.lora_E.device))
        for tensor in _TENSORS:
            for average in ("importance", "uncertainty"):
                self.register_buffer(f"{average}_{tensor}", torch.zeros_like(getattr(self, tensor)))
        self.fixed = tuple(self._buffers)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the matrices (r, in) and (out, r) that an input goes through."""
        return self.lora_A * self.lora_E, self.lora_B

    def file_tensors(self) -> dict[str, torch.Tensor]:
        own: dict[str, torch.Tensor] = {**self.own_tensors()}
        if not self.fixed or self.kept.all():
            return own
        rows = {name: own[name][self.kept] for name in ("lora_A", "lora_E")}
        return {**own, **rows, "lora_B": own["lora_B"][:, self.kept]}

    @torch.no_grad()
    def see_gradients(self, beta1: float, beta2: float) -> None:
        """Let the averages follow the importance ``|weight * gradient|`` of this step, unless it left the layer out."""
        if self.lora_E.grad is None:
            return
        for tensor in _TENSORS:
            weight, importance = getattr(self, tensor), getattr(self, f"importance_{tensor}")
            now = (weight * weight.grad).abs()
            importance.lerp_(now, 1 - beta1)
            getattr(self, f"uncertainty_{tensor}").lerp_((now - importance).abs(), 1 - beta2)

    def scores(self) -> torch.Tensor:
        """Return the importance of each direction: (r,)."""
        score = {name: getattr(self, f"importance_{name}") * getattr(self, f"uncertainty_{name}") for name in _TENSORS}
        return score["lora_E"].squeeze(1) + score["lora_A"].mean(1) + score["lora_B"].mean(0)

    @torch.no_grad()
    def clear(self, kept: torch.Tensor) -> None:
        """Set the directions to zero that are not kept."""
        self.lora_E.masked_fill_(~kept.unsqueeze(1), 0.0)


class AdaLoraLinear(AdaLoraLayer, LowRank):
    """AdaLoRA over a linear layer."""

    kinds = "Linear, Conv1D and Conv2d"

    def __init__(self, module: nn.Module, name: str, config: AdaLoraConfig):
        super().__init__(module, name, "AdaLoRA", config.bias, config.lora_dropout)
        self.start(self.view.out_features, self.view.in_features, name, config)


class AdaLoraConv2d(AdaLoraLayer, DeltaConv):
    """AdaLoRA over a convolution: its kernel as a matrix, ``in`` being input channels times kernel size."""

    def __init__(self, module: nn.Module, name: str, config: AdaLoraConfig):
        super().__init__(module, config.bias, config.lora_dropout)
        weight = base_module(module).weight
        self.start(weight.shape[0], weight[0].numel(), name, config)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y + self.update(self.dropout(x.to(self.lora_E.dtype))).to(y.dtype)

    def delta(self) -> torch.Tensor:
        first, second = self.factors()
        return (self.scaling * (second @ first)).reshape(base_module(self).weight.shape)


wrap = by_kind({nn.Conv2d: AdaLoraConv2d}, otherwise=AdaLoraLinear)


def updates(config: AdaLoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Update]:
    """Return what the tensors of a file add to each weight."""
    found = {}
    for path in (name.removesuffix(".lora_E") for name in tensors if name.endswith(".lora_E")):
        names = (f"{path}.lora_A", f"{path}.lora_E", f"{path}.lora_B")
        if missing := [name for name in names if name not in tensors]:
            raise AdapterError(f"missing: {missing[0]}")
        a, e, b = (tensors[name] for name in names)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == e.numel() == b.shape[1] or e.shape[1:] != (1,):
            shapes = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in names)
            raise AdapterError(f"these do not go together: {shapes}")
        place = path.removeprefix(config.file_prefix)
        found[place] = Update(b, a * e, _scaling(config), names)
    return found


def describe(config: AdaLoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the config for a file with these tensors, with the ranks that they have.

    They need not be the last ones: tensors may be those of an earlier, better step.
    """
    written = config.file_dict()
    written.pop("rank_pattern", None)
    left = {
        name.removeprefix(config.file_prefix): len(value) for name, value in tensors.items() if name.endswith(".lora_E")
    }
    if any(kept < config.init_r for kept in left.values()):
        written["rank_pattern"] = {name: _mask(config, name, kept) for name, kept in left.items()}
    return written


def _mask(config: AdaLoraConfig, name: str, left: int) -> list[bool]:
    """Return which directions a layer kept; if unknown, as many at the front: readers only count them."""
    known = config.rank_pattern.get(name, [])
    return known if sum(known) == left else [index < left for index in range(config.init_r)]


def penalty(model: nn.Module, config: AdaLoraConfig) -> torch.Tensor | None:
    """Return how far A's rows and B's columns are from orthogonal, on average over the matrices, times the weight."""
    layers = [layer for layer in layers_of_kind(model, AdaLoraLayer).values() if layer.lora_A.requires_grad]
    if not config.orth_reg_weight or not layers:
        return None
    squares = [square for layer in layers for square in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B)]
    deviations = [
        torch.linalg.norm(square - torch.eye(len(square), dtype=square.dtype, device=square.device))
        for square in squares
    ]
    return config.orth_reg_weight * torch.stack(deviations).mean()


def _scaling(config: AdaLoraConfig) -> float:
    return config.lora_alpha / (config.init_r + 1e-5)  # init_r whatever is left, so that nothing jumps


def after_step(model: nn.Module, config: AdaLoraConfig, step: int, total: int) -> None:
    """Follow the weights' importance, and take away what the budget of this step does not allow.

    The adapter file holds what is left from the last step on that changes it; until then it holds everything. An
    adapter that was loaded from a file keeps its directions.
    """
    last, layers = _last_step(config, total), _sharing(model)
    if not layers:
        return
    if step < last:
        if all(layer.lora_E.grad is None for layer in layers.values()):
            raise AdapterError("AdaLoRA needs the gradients of the step; share out the budget before they are cleared")
        for layer in layers.values():
            layer.see_gradients(config.beta1, config.beta2)
    if step == last or (config.tinit < step < last and step % config.deltaT == 0):
        budget = _budget(config, step, last, sum(len(layer.kept) for layer in layers.values()), len(layers))
        kept = _most_important(layers.values(), budget)
        for layer, mask in zip(layers.values(), kept, strict=True):
            layer.clear(mask)
            if step == last:
                layer.kept.copy_(mask)
    elif step > last:
        for layer in layers.values():
            layer.clear(layer.kept)
    if step >= last:
        _note_kept(model, config)


def after_resume(model: nn.Module, config: AdaLoraConfig, step: int, total: int) -> None:
    """Write into the config which directions are left, if that is settled."""
    if step >= _last_step(config, total):
        _note_kept(model, config)


def _last_step(config: AdaLoraConfig, total: int) -> int:
    """Return the step from which on it is settled which directions are left. The config then has its total_step."""
    if config.total_step is None:
        config.total_step = total
        config.check()
    return config.total_step - config.tfinal


def model_attributes(model: nn.Module, configs: Mapping[str, AdaLoraConfig]) -> dict[str, Any]:
    """Return the methods of a model with AdaLoRA, under PEFT's names."""
    return {
        "update_and_allocate": partial(_update_and_allocate, model, configs),
        "resize_modules_by_rank_pattern": partial(_resize, model),
    }


def _update_and_allocate(model: nn.Module, configs: Mapping[str, AdaLoraConfig], global_step: int) -> None:
    """Act after an optimizer step. An adapter that was saved before its directions were settled goes on to settle."""
    for name, config in configs.items():
        for layer in layers_of_kind(model, AdaLoraLayer, name).values() if not config.rank_pattern else ():
            if layer.lora_E.requires_grad and not layer.fixed:
                layer.begin_to_share()
        if config.total_step is not None:
            after_step(model, config, global_step, config.total_step)


def _resize(model: nn.Module, rank_pattern: Mapping[str, Sequence[bool]], adapter_name: str) -> None:
    """Take away every direction of the adapter but those of ``rank_pattern``. One that was loaded has no others."""
    for path, layer in layers_of_kind(model, AdaLoraLayer, adapter_name).items():
        mask = rank_pattern.get(f"{path_in_file(model, path)}.lora_E")
        if layer.fixed and mask is not None:
            layer.kept.copy_(torch.as_tensor(mask))
            layer.clear(layer.kept)


def _note_kept(model: nn.Module, config: AdaLoraConfig) -> None:
    if not config.rank_pattern:
        config.rank_pattern = {
            f"{path_in_file(model, path)}.lora_E": layer.kept.tolist() for path, layer in _sharing(model).items()
        }


def _sharing(model: nn.Module) -> dict[str, AdaLoraLayer]:
    """The layers that share the budget. Those that were loaded from a file keep their directions."""
    layers = layers_of_kind(model, AdaLoraLayer).items()
    return {path: layer for path, layer in layers if layer.fixed and layer.lora_E.requires_grad}


def _budget(config: AdaLoraConfig, step: int, last: int, start: int, num_layers: int) -> int:
    """Return how many directions the model may have at this step: from ``start`` to the target along a cubic."""
    target = config.target_r * num_layers
    left = 1 - (step - config.tinit) / (last - config.tinit)
    return int((start - target) * left**3 + target)


def _most_important(layers: Iterable[AdaLoraLayer], budget: int) -> list[torch.Tensor]:
    """For each layer which directions are among the ``budget`` most important ones of the model."""
    scores = [layer.scores() for layer in layers]
    every = torch.cat([score.to(scores[0].device) for score in scores])
    kept = torch.zeros_like(every, dtype=torch.bool)
    kept[every.topk(min(budget, len(every))).indices] = True
    parts = kept.split([len(score) for score in scores])
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]
