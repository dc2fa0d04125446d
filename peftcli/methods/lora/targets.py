"""The modules of a model that LoRA's settings name, checked before the model is changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Literal

from torch import nn

from peftcli.core.layer import base_module, base_modules, model_ends, name_in
from peftcli.core.targets import (
    check_pattern_keys,
    find_modules,
    find_targets,
    matching,
    module_matches,
    shortest_names,
)
from peftcli.errors import AdapterError
from peftcli.methods._token_rows import check_tokens, tied_group
from peftcli.methods.lora import LoraConfig

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
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
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
