"""Replace an adapter of a model by one in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from peftcli.adapters.load import AdapterSource
from peftcli.core.config import AdapterConfig
from peftcli.core.files import load_adapter, read_tensors
from peftcli.core.inject import inject, set_active, set_trainable, unload
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import (
    adapter_state,
    holds_its_file,
    load_state,
    load_training_state,
    named_tensors,
    training_state,
)
from peftcli.errors import AdapterError, PeftWarning
from peftcli.guard.adapter_folder import WEIGHTS_FILE
from peftcli.peft_api.tuner import Tuner

_NAMED = ("target_modules", "modules_to_save", "layers_pattern", "ensure_weight_tying")
"""Settings that name modules, which two configs of the same modules may do otherwise."""


def replace_adapter(
    model: nn.Module,
    name: str,
    old: AdapterConfig,
    source: AdapterSource,
    *,
    trainable: bool,
    rename: Callable[[str], str] | None = None,
) -> bool:
    """Replace the weights of the adapter called ``name``, or its layers where the configs ``old`` and new differ.

    ``rename`` translates the names of the new tensors into those of this model.

    Returns:
        Whether the layers are new ones, of the new config.

    Raises:
        AdapterError: it does not fit. The model is as it was then.
    """
    config, folder = source.config, source.folder
    new_content, old_content = _content(config), _content(old)
    names = {rename(each) if rename else each for each in source.header}
    if names == adapter_state(model, name).keys():  # so its modules are the same, whatever names them
        new_content, old_content = ({**each, **dict.fromkeys(_NAMED)} for each in (new_content, old_content))
    if new_content == old_content and holds_its_file(model, name):
        # an optimizer may hold the weights: they stay the same objects
        load_state(model, read_tensors(folder, rename), str(folder / WEIGHTS_FILE), name)
        set_trainable(model, trainable, name)
        return False
    kept, mode = training_state(model, name), old.inference_mode
    trained = any(value.requires_grad for _, _, value in named_tensors(model, name).values())
    old.inference_mode = holds_its_file(model, name)  # what its layers were made for, should they be made again
    unload(model, name)
    try:
        load_adapter(model, config, folder, trainable=trainable, adapter=name, rename=rename)
    except AdapterError:
        inject(model, old, name)
        load_training_state(model, kept, name)
        set_trainable(model, trained, name)
        raise
    finally:
        old.inference_mode = mode
    return True


@contextmanager
def replacing(model: nn.Module, name: str) -> Iterator[None]:
    """Once a new adapter is in the model: remove an old one of its name, and switch others off. Nothing if that fails.

    An adapter of a ``PeftModel`` stays: only the ``PeftModel`` itself can replace it.
    """
    others = {layer.adapter for layer in adapter_layers(model).values()} - {name}
    is_held = any(isinstance(module, Tuner) for module in model.modules())
    old = [] if is_held else list(adapter_layers(model, name).values())
    if old:
        text = f"{name!r} is replaced; a new name keeps both"
        text = f"You are trying to modify a model that has an adapter already. {text}"
        warnings.warn(text, PeftWarning, stacklevel=3)
    for layer in old:
        layer.adapter = f"{name} (replaced)"  # no name of an adapter has brackets
    try:
        yield
    except BaseException:
        for layer in old:
            layer.adapter = name
        raise
    if old:
        unload(model, f"{name} (replaced)")
    if others:
        set_active(model, [name])
        for other in others:
            set_trainable(model, False, other)


def _content(config: AdapterConfig) -> dict[str, Any]:
    """The config without what says where the adapter belongs."""
    place = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode")
    return {key: value for key, value in config.file_dict().items() if key not in place}
