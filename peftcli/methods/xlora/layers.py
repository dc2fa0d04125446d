"""The layers of X-LoRA: a base layer, and of each LoRA adapter the update, scaled anew for each token."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.files import read_config, read_tensors
from peftcli.core.inject import on_unload
from peftcli.core.layer import AdapterLayer, base_module, base_modules, model_ends
from peftcli.core.linear import linear_view
from peftcli.core.prompts.inputs import bound, hook_once
from peftcli.errors import AdapterError
from peftcli.methods._delta import factory_kwargs, lookup_scale
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora import updates as lora_updates
from peftcli.methods.updates import Update
from peftcli.methods.xlora import XLoraConfig
from peftcli.methods.xlora.mixture import Mixture


@dataclass(frozen=True)
class Expert:
    """A LoRA adapter as its folder holds it."""

    updates: dict[str, Update]
    """Path in the base model -> what the adapter adds to the weight there."""
    dropout: float
    base: dict[str, torch.Tensor]
    """Path -> the base model's weight, which PEFT writes into the file of an adapted embedding."""


class XLoraLayer(AdapterLayer):
    """``y = W x + sum over experts e of s_e(x) * scaling_e * B_e A_e x``, with ``s_e`` one number for each token."""

    saves_fixed = False
    mixture: Mixture
    place: int
    """Which of the adapted layers this is."""

    def __init__(self, base_layer: nn.Module, name: str, config: XLoraConfig):
        super().__init__(base_layer)
        own = {str(number): each for number, each in enumerate(config.experts) if name in each.updates}
        found, like = {number: each.updates[name] for number, each in own.items()}, factory_kwargs(base_layer)
        train = config.use_trainable_adapters
        self.embeds = isinstance(base_module(base_layer), nn.Embedding)
        for part, side in (("lora_A", "right"), ("lora_B", "left")):
            tensors = {number: getattr(update, side).to(**like).clone() for number, update in found.items()}
            setattr(self, part, nn.ParameterDict({n: nn.Parameter(value, train) for n, value in tensors.items()}))
        self.scaling = {number: update.scaling for number, update in found.items()}
        self.dropout = nn.ModuleDict({number: nn.Dropout(each.dropout) for number, each in own.items()})
        if not train:
            self.fixed = tuple(f"{part}.{number}" for part in ("lora_A", "lora_B") for number in found)

    def file_name(self, path: str, tensor: str) -> str:
        part, _, rest = tensor.partition(".")
        if part == "mixture":
            return f"base_model.internal_xlora_classifier.{rest}"
        # where PEFT's X-LoRA model has it in memory
        kind = f"{part.replace('lora', 'lora_embedding')}.{rest}" if self.embeds else f"{tensor}.weight"
        return f"base_model.lora_model.model.{path}.{kind}"

    def overrides(self, below: AdapterLayer) -> bool:
        return isinstance(below, XLoraLayer)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.mixture.reads_base:
            return y
        scalings = self.mixture.scalings_at(self.place)
        if x.shape[:2] != scalings.shape[:2]:
            raise AdapterError(
                f"X-LoRA scales tokens, {tuple(scalings.shape[:2])}; the layer's input is {tuple(x.shape)}"
            )
        z = [
            self.scaling[number] * self._update(number, x, scalings[..., int(number), None]) for number in self.scaling
        ]
        return y + torch.stack(z).sum(0).to(y.dtype)

    def _update(self, number: str, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        a, b = self.lora_A[number], self.lora_B[number]
        if self.embeds:
            return F.linear(scale * F.embedding(x, a.T), b) * lookup_scale(self)
        return F.linear(F.linear(self.dropout[number](x.to(a.dtype) * scale.to(a.dtype)), a), b)


def targets(model: Any, config: XLoraConfig) -> list[str]:
    """Return the names of the modules that any of the adapters adapts."""
    width = _hidden_size(model)
    if config.hidden_size not in (None, width):
        raise AdapterError(f"is {config.hidden_size}, the base model's is {width}", key="hidden_size")
    config.hidden_size = width
    config.experts = [_read(name, place, config) for name, place in (config.adapters or {}).items()]
    adapted = {path for expert in config.experts for path in expert.updates}
    modules = base_modules(model)
    names = [name for name in modules if name in adapted]
    if missing := adapted.difference(names):
        raise AdapterError(f"an adapter adapts {min(missing)}, which the base model does not have", key="adapters")
    for path, weight in [item for expert in config.experts for item in expert.base.items()]:
        own = modules[path].weight
        if own.shape != weight.shape or not (own.is_meta or torch.equal(own, weight.to(own))):
            raise AdapterError(f"an adapter holds other weights of {path} than the base model", key="adapters")
    return names


def wrap(module: nn.Module, name: str, config: XLoraConfig) -> XLoraLayer:
    """Return the layer over ``module``."""
    base, view = base_module(module), linear_view(module)
    if view is None and not isinstance(base, nn.Embedding):
        raise AdapterError(
            f"{name} is a {type(base).__name__}; X-LoRA adapts Linear, Conv1D and Embedding", key="adapters"
        )
    size = (view.out_features, view.in_features) if view else (base.weight.shape[1], base.weight.shape[0])
    for expert in config.experts:
        update = expert.updates.get(name)
        if update and (len(update.left), update.right.shape[1]) != size:
            there = (len(update.left), update.right.shape[1])
            raise AdapterError(
                f"{name} is {size}, in an adapter {there}: they are of different base models", key="adapters"
            )
    return XLoraLayer(module, name, config)


def attach(model: Any, config: XLoraConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Let the new layers share a classifier, which reads the model's inputs before the model does."""
    like = next(iter(layers.values()))
    mixture = Mixture(config, len(layers), **factory_kwargs(like)).train(like.training)
    config.experts = []
    for place, layer in enumerate(cast("list[XLoraLayer]", list(layers.values()))):
        layer.mixture, layer.place = mixture, place
    hook_once(model, _Read(next(iter(layers))))
    hook_once(model, _Forget(next(iter(layers))), after=True)
    for settings in (model.config, getattr(model, "generation_config", None)):
        before = getattr(settings, "use_cache", False)
        if settings is not None and before is not False:  # None: transformers uses one
            on_unload(model, functools.partial(setattr, settings, "use_cache", before))
            settings.use_cache = False


def find_mixture(module: nn.Module) -> Mixture | None:
    """Return the classifier of the X-LoRA layer that is enabled in ``module``, if there is one."""
    found = (each.mixture for each in module.modules() if isinstance(each, XLoraLayer) and each.enabled)
    return next(found, None)


def model_attributes(model: nn.Module, configs: Mapping[str, XLoraConfig]) -> dict[str, Any]:
    """Return what PEFT's X-LoRA model has besides: the classifier, and the methods of that with PEFT's names."""
    if (mixture := find_mixture(model)) is None:
        return {}
    kinds = ("clear_", "disable_", "enable_", "get_", "set_")
    methods = {name: getattr(mixture, name) for name in vars(Mixture) if name.startswith(kinds)}
    return {"internal_xlora_classifier": mixture, **methods}


@dataclass(frozen=True)
class _Read:
    """The model's forward pre-hook: the classifier reads the inputs."""

    path: str

    def __call__(self, model: Any, args: Any, kwargs: Any) -> None:
        if (mixture := find_mixture(model.get_submodule(self.path))) is not None:
            mixture.read(model, bound(model.forward, args, kwargs))


@dataclass(frozen=True)
class _Forget:
    """The model's forward hook: the scalings are of no more use, unless the backward pass computes layers again."""

    path: str

    def __call__(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:
        mixture = find_mixture(model.get_submodule(self.path))
        if mixture is not None and not torch.is_grad_enabled():
            mixture.scalings = None


def _read(name: str, place: str, config: XLoraConfig) -> Expert:
    """Read an adapter's folder."""
    folder = config.find_folder(place)
    values = read_config(folder)
    if values.get("peft_type") != LoraConfig.peft_type:
        raise AdapterError(f"{name} is {values.get('peft_type')}; X-LoRA mixes LORA", key="adapters", file=str(folder))
    lora = cast("LoraConfig", LoraConfig.from_dict(values, str(folder)))
    if variant := lora.variant_key:
        raise AdapterError(f"{name} has {variant}; X-LoRA mixes plain LoRA", key="adapters", file=str(folder))
    tensors = read_tensors(folder)
    found = lora_updates.updates(lora, tensors)
    base = {f"{LoraConfig.file_prefix}{path}.base_layer.weight": path for path in found}
    if more := tensors.keys() - base.keys() - {tensor for update in found.values() for tensor in update.tensors}:
        raise AdapterError(f"{name} holds {min(more)}; X-LoRA mixes plain LoRA", key="adapters", file=str(folder))
    return Expert(found, lora.lora_dropout, {path: tensors[key] for key, path in base.items() if key in tensors})


def _hidden_size(model: Any) -> int:
    """Return the size of the model's last hidden states."""
    settings = getattr(model, "config", None)
    width = getattr(settings and settings.get_text_config(), "hidden_size", None)
    embedding, head = model_ends(model)
    if width is None or model.config.is_encoder_decoder or not hasattr(base_module(embedding), "num_embeddings"):
        raise AdapterError(f"X-LoRA reads a state of each token; {type(model).__name__} does not have one")
    view = None if head is None else linear_view(head)
    return view.in_features if view else int(width)  # some models make the states narrower in the end
