"""Before LoRA's layers are in, find the modules that its settings name; afterwards complete the adapter."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.inject import on_unload, replace_modules, train_other_biases
from peftcli.core.layer import (
    AdapterLayer,
    TrainedBias,
    TrainedCopy,
    adapter_layers,
    base_module,
    base_modules,
    base_name,
    layers_at,
    model_ends,
    name_in,
    outer_modules,
)
from peftcli.core.linear import check_forward
from peftcli.core.targets import (
    check_pattern_keys,
    find_modules,
    find_targets,
    matching,
    module_matches,
    shortest_names,
)
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods._delta import draw_as_linear
from peftcli.methods._token_rows import check_tokens, share_rows, tied_group, wrap_rows
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations.residual import ResidualFromFile, ResidualLinear
from peftcli.methods.lora.lora import LoraEmbedding, LoraLayer, LoraLinear
from peftcli.methods.lora.parameters import LoraAttention
from peftcli.methods.lora.variants.alora import find_invocations, keep_active
from peftcli.methods.lora.variants.arrow import find_experts

_TOKENS = "trainable_token_indices"


def targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return the names of the modules that LoRA wraps, in the model's order: see ``core.protocols.FindsTargets``."""
    owners = find_parameters(model, config.target_parameters or ())
    modules = find_targets(model, config) if config.target_modules or not config.target_parameters else []
    group = tied_group(model) if config.ensure_weight_tying else []
    if any(name in group for name in modules):
        modules = [group[0], *(name for name in modules if name not in group)]
    if both := [name for name in modules if name in owners]:
        raise AdapterError(f"{both[0]} is among target_modules too; name it in one of them", key="target_parameters")
    adapted = [*modules, *(f"{name}.{parameter}" for name, own in owners.items() for parameter in own)]
    check_pattern_keys(dict(config.rank_pattern), adapted, "rank_pattern", config)
    check_pattern_keys(config.alpha_pattern, adapted, "alpha_pattern", config)
    if config.trainable_token_indices is not None:
        _check_tokens(model, config, modules)
    if owners and config.target_modules in (None, "all-linear"):
        config.target_modules = shortest_names(model, modules)
    return [name for name in base_modules(model) if name in owners or name in modules]


def find_parameters(model: nn.Module, entries: Iterable[str]) -> dict[str, list[str]]:
    """Return the parameters that the entries of ``target_parameters`` match: module's name -> names in it.

    Raises:
        AdapterError: an entry matches nothing, and the message gives near names; or a parameter of the model itself,
            which stands in no module that a layer could be put around.
    """
    key, modules = "target_parameters", base_modules(model).items()
    places = {f"{name}.{own}": name for name, module in modules for own, _ in module.named_parameters(recurse=False)}
    found: dict[str, list[str]] = {}
    for name in matching(model, places, list(entries), key, "parameter"):
        if not places[name]:
            reason = f"{name.lstrip('.')} is a parameter of {type(model).__name__} itself, not of a module inside it"
            raise AdapterError(reason, key=key, hint="adapt a model that holds this one as a module")
        found.setdefault(places[name], []).append(name.rpartition(".")[2])
    return found


def read_names(model: nn.Module, config: LoraConfig, names: Collection[str]) -> None:
    """Switch ``ensure_weight_tying`` off for a file with tensors of one module of those that share the weight.

    PEFT ties modules that are called ``embed_tokens`` and ``lm_head`` alone, whatever the file's config says.
    """
    if config.ensure_weight_tying:
        held = [
            name
            for name in tied_group(model)
            if any(each.startswith(f"{config.file_prefix}{name}.") and "base_layer" not in each for each in names)
        ]
        config.ensure_weight_tying = len(held) > 1


def name_group(config: LoraConfig, group: Iterable[str], key: Literal["target_modules", "modules_to_save"]) -> None:
    """Add to a setting the modules that share a weight, by their full names.

    PEFT ties those that are called ``embed_tokens`` or ``lm_head``, if one of them is named, and adapts others alone.
    """
    wanted = getattr(config, key)
    if isinstance(wanted, str):
        setattr(config, key, "|".join([f"(?:{wanted})", *(re.escape(name) for name in group)]))
    else:
        more = [name for name in group if not any(module_matches(name, entry) for entry in wanted)]
        setattr(config, key, type(wanted)([*wanted, *more]))


def token_modules(model: nn.Module, config: LoraConfig) -> dict[str, list[int]]:
    """Return the embeddings and heads whose rows are trained: name -> token ids.

    Raises:
        AdapterError: a name matches nothing.
    """
    wanted = config.trainable_token_indices or {}
    if isinstance(wanted, list):
        embedding = base_module(model_ends(model)[0])
        if embedding is None:
            raise AdapterError(f"{type(model).__name__} has no input embedding; name the module", key=_TOKENS)
        return {name_in(model, embedding): wanted}
    return {name: tokens for entry, tokens in wanted.items() for name in find_modules(model, [entry], _TOKENS)}


def _check_tokens(model: nn.Module, config: LoraConfig, targets: list[str]) -> None:
    modules, group = token_modules(model, config), tied_group(model)
    saved = find_modules(model, config.modules_to_save or (), "modules_to_save")
    layers = base_modules(model)
    for name, tokens in modules.items():
        check_tokens(layers[name], name, tokens, _TOKENS)
        for key, names in (("modules_to_save", saved), ("target_modules", targets)):
            if name in names:
                raise AdapterError(f"{name} is among {key} too; name it in one of them", key=_TOKENS)
    tied = [tokens for name, tokens in modules.items() if name in group]
    if config.ensure_weight_tying and any(tokens != tied[0] for tokens in tied):
        raise AdapterError("tied layers need the same tokens, or ensure_weight_tying off", key=_TOKENS)


def attach(model: nn.Module, config: LoraConfig, layers: dict[str, AdapterLayer]) -> None:
    """Complete the adapter once its ``layers`` are in place, by the names of the modules that they adapt.

    Raises:
        AdapterError: it, or another adapter, adapts the output's projection of an attention that is adapted as a whole.
    """
    for path, layer in adapter_layers(model).items():
        inside = layers_at(base_module(layer).out_proj) if isinstance(layer, LoraAttention) else []
        if any(not isinstance(each, TrainedBias) for each in inside):
            whole = base_name(model, path)
            raise AdapterError(f"{whole} adapts {whole}.out_proj too; name one of them", key="target_modules")
    config.fan_in_fan_out = any(isinstance(layer, LoraLinear) and layer.view.transposed for layer in layers.values())
    residual = (ResidualLinear, ResidualFromFile)
    config.subtracts_start = any(isinstance(layer, residual) for layer in layers.values())
    if config.bias == "all":
        train_other_biases(model, config, layers)
    if config.alora_invocation_tokens:
        _watch_calls(model, find_invocations, keep_active)
    if config.arrow_config:
        _watch_calls(model, find_experts)
    unbiased = (name for name, layer in layers.items() if base_module(layer).bias is None)
    if config.lora_bias and not config.inference_mode and (name := next(unbiased, None)):
        told = f"lora_bias: {name} has no bias in the base model, so this adapter cannot be merged"
        warnings.warn(told, PeftWarning, stacklevel=2)
    if config.ensure_weight_tying:
        _tie(model, config, layers)
    if config.trainable_token_indices is not None:
        _train_rows(model, config)


class TiedHead(LoraLayer):
    """A head that shares its weight with an embedding, and the embedding's A and B: ``y = W x + scaling * (B A)^T x``.

    PEFT copies A and B, and each copy has gradients of its own; here they are one.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig, source: LoraEmbedding, place: str):
        super().__init__(base_layer, name, config)
        self.scaling = self.full_scaling = source.scaling
        self.fixed = source.fixed
        self.place = place
        """The embedding's name in the model."""
        self.lora_embedding_A, self.lora_embedding_B = source.lora_embedding_A, source.lora_embedding_B

    def file_tensors(self) -> dict[str, torch.Tensor]:
        copies = {"lora_A.weight": self.lora_embedding_B.T, "lora_B.weight": self.lora_embedding_A.T}
        return {**super().file_tensors(), **copies}

    def file_name(self, path: str, tensor: str) -> str:
        return super().file_name(path if tensor.endswith(".weight") else self.place, tensor)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = F.linear(self.lora_dropout(x.to(self.lora_embedding_B.dtype)), self.lora_embedding_B.T)
        return y + (self.scaling * F.linear(z, self.lora_embedding_A.T)).to(y.dtype)

    def delta(self) -> torch.Tensor:
        return self.scaling * (self.lora_embedding_B @ self.lora_embedding_A).T


def _watch_calls(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None = None) -> None:
    """Call functions of a module around every call of the model, as PyTorch's hooks, until its adapters are unloaded.

    They get the keywords too. Each is registered once.
    """
    if before not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(before, with_kwargs=True)
        if after is not None:
            model.register_forward_hook(after, with_kwargs=True)
        on_unload(model, functools.partial(_stop_watching, model, before, after))


def _stop_watching(model: nn.Module, *functions: Callable[..., Any] | None) -> None:
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [number for number, hook in hooks.items() if hook in functions]:
            del hooks[number]


def _tie(model: nn.Module, config: LoraConfig, layers: dict[str, AdapterLayer]) -> None:
    """Let the layers that share the input embedding's weight share its adapter, or its trained copy.

    Warns if no layer shares it, or if none that does is adapted.
    """
    group = tied_group(model)
    at: dict[str, Any] = outer_modules(model)
    saved = [name for name in find_modules(model, config.modules_to_save or (), "modules_to_save") if name in group]
    new: dict[nn.Module, AdapterLayer] = {}
    if saved:
        new = {at[name]: TrainedCopy(at[name], config.file_prefix) for name in group if name not in saved}
        kept = at[saved[0]].copy.weight
        for layer in [*new.values(), *(at[name] for name in saved)]:
            layer.copy.weight = kept
        # PEFT ties the embeddings of an encoder and a decoder by itself, and their names confuse it
        if len(group) == 2:
            name_group(config, group, "modules_to_save")
    elif group and group[0] in layers:
        source = at[group[0]]
        name_group(config, group, "target_modules")
        for name in group[1:]:
            check_forward(at[name], name)
            if isinstance(base_module(at[name]), nn.Embedding):
                new[at[name]] = twin = LoraEmbedding(at[name], name, config)
                twin.scaling = twin.full_scaling = source.scaling
                twin.lora_embedding_A, twin.lora_embedding_B = source.lora_embedding_A, source.lora_embedding_B
            else:
                new[at[name]] = TiedHead(at[name], name, config, source, group[0])
                if config.init_lora_weights is True and not config.inference_mode:  # as the A of a linear layer
                    draw_as_linear(source.lora_embedding_B.T)
    elif not config.inference_mode and not (group and config.trainable_token_indices):
        reason = "changes nothing: no tied modules are added by target_modules or modules_to_save"
        if not group:
            reason = "but the model does not have tied weights: no tied modules were found in the model"
        warnings.warn(f"ensure_weight_tying=True {reason}", PeftWarning, stacklevel=3)
    replace_modules(model, {module: layer.train(module.training) for module, layer in new.items()})


def _train_rows(model: nn.Module, config: LoraConfig) -> None:
    """Train the rows that ``trainable_token_indices`` names; with the input embedding, those of all that share them.

    A layer that shares the embedding's weight and is named with other tokens keeps to its own.
    """
    wanted, group = token_modules(model, config), tied_group(model)
    tied = [name for name in group if name in wanted]
    together = tied[:1] == group[:1] and all(wanted[name] == wanted[tied[0]] for name in tied)
    for name, tokens in wanted.items():
        if together and name in tied[1:]:
            continue
        module = outer_modules(model)[name]
        rows = wrap_rows(module, tokens)
        replace_modules(model, {module: rows.train(module.training)})
        shared = share_rows(model, rows) if together and name in tied else {}
        for layer in (rows, *shared.values()):
            layer.is_beside = True
        for layer in shared.values():
            layer.written_at = name
