"""The layers of trainable tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

from torch import nn

from peftcli.core.layer import AdapterLayer, base_module, base_modules, model_ends, name_in
from peftcli.core.targets import find_targets, shortest_names
from peftcli.errors import AdapterError
from peftcli.methods._token_rows import TrainedRows, check_tokens, share_rows, tied_group, wrap_rows
from peftcli.methods.trainable_tokens import TrainableTokensConfig


def wrap(module: nn.Module, name: str, config: TrainableTokensConfig) -> AdapterLayer:
    """The layer that trains rows of ``module``."""
    check_tokens(module, name, config.token_indices, "token_indices")
    return wrap_rows(module, config.token_indices, start_from_base=config.init_weights)


def targets(model: nn.Module, config: TrainableTokensConfig) -> list[str]:
    """Return the names of the modules whose rows train: of those that share a weight the input embedding or the first.

    With the input embedding PEFT, too, ties what shares its weight, and goes wrong where another of these is named.
    """
    if config.target_modules is None:
        embedding = base_module(model_ends(model)[0])
        if not isinstance(embedding, nn.Embedding):
            raise AdapterError(f"{type(model).__name__} has no input embedding; name the module", key="target_modules")
        config.target_modules = [name_in(model, embedding)]
    names, modules, first = find_targets(model, config), base_modules(model), dict[int, str]()
    if not config.tied:
        return names
    weights = {name: getattr(modules[name], "weight", None) for name in names}  # some are computed at each read
    for name, weight in weights.items():
        first.setdefault(id(weight), name)
    group = tied_group(model)
    kept = [group[0] if name in group else name for name in first.values()]
    if kept != names:
        config.target_modules = shortest_names(model, kept)
    return kept


def read_names(model: nn.Module, config: TrainableTokensConfig, names: Collection[str]) -> None:
    """Let each layer have its own rows, for a file without those of the input embedding that the others share.

    PEFT ties them to the input embedding alone: of T5's encoder and decoder, named by themselves, each has its own.
    """
    group = tied_group(model)
    held = [name for name in group if f"{config.file_prefix}{name}.trainable_tokens_delta" in names]
    config.tied = not held or group[0] in held


def attach(model: nn.Module, config: TrainableTokensConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Let each layer speak for the modules that share its weight. All are in the file, as PEFT reads it."""
    for layer in layers.values() if config.tied else ():
        share_rows(model, cast("TrainedRows", layer))
