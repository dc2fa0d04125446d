"""What other writers' files call things becomes what core calls them, once, as a file is read.

``peftcli.methods`` tells core of this module (``core.protocols.CONVERTERS``): the files that ``load_adapter`` reads in
Python and by PEFT's names come through here too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig, TargetedConfig
from peftcli.core.files import unmatched_targets
from peftcli.core.heads import TASKS_WITH_HEADS
from peftcli.core.layer import AdapterLayer, TrainedBias, base_module, base_modules
from peftcli.core.targets import module_matches, pattern_value, shortest_names

_GUESSES = ("classifier", "score", "qa_outputs")
"""What PEFT adds to modules_to_save, whether the model has it or not. Longer names with these endings match too."""
_BIAS_COPY = re.compile(r"\.(modules_to_save(\.[^.]+)?|original_module)(?=\.([^.]+\.)*bias$)")
"""With bias: all, PEFT writes the biases of saved modules under these names too, beside the true ones."""
_EXPERT = re.compile(r"(.+\.experts\.\d+)\.")
"""The name of a tensor of one expert of several, and in it the expert's path."""


def convert_config(model: nn.Module, config: AdapterConfig, names: Mapping[str, str]) -> None:
    """Make the config of a file name the modules of this model.

    ``names`` are those of the file's tensors: in this model -> in the file. They differ where the file has older names
    of modules.
    """
    if any(new != old for new, old in names.items()):
        _rename_targets(model, config, names)
        _rename_patterns(model, config, names)
    if config.modules_to_save:
        config.modules_to_save = _saved_modules(model, config, names) or None


def convert_tensors(
    model: nn.Module,
    layers: Mapping[str, AdapterLayer],
    tensors: Mapping[str, torch.Tensor],
    known: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file, or of the state of PEFT's model, by our names: those ``known``.

    What the file holds twice is left out. ``layers`` are those of the adapter, by their paths in the file.
    """
    found = _without_adapter_names(tensors, sorted({layer.adapter for layer in layers.values()}), known)
    twice = {f"{layer.file_prefix}{path}.{tensor}" for path, layer in layers.items() for tensor in layer.fixed}
    trained = {base_module(layer).bias: layer for layer in layers.values() if isinstance(layer, TrainedBias)}
    for name, module in base_modules(model).items():  # PEFT writes a bias at all places that hold it
        if (bias := module._parameters.get("bias")) in trained:
            twice.add(trained[bias].file_name(name, "bias"))
    return {
        name: value
        for name, value in found.items()
        if name in known or not (name in twice or _BIAS_COPY.sub("", name) in known)
    }


def explain(model: nn.Module, config: AdapterConfig, names: Collection[str]) -> str | None:
    """Return what to do with a file whose tensors, with these names, belong to modules that the model had once."""
    modules, experts = base_modules(model), (_EXPERT.match(name.removeprefix(config.file_prefix)) for name in names)
    if not any(expert and expert[1] not in modules for expert in experts):
        return None
    return (
        "the file has a LoRA for each expert, as transformers 4 had them, and this model has the weights of "
        "all experts in one parameter; load it with PEFT 0.21.2, which converts it, and save it again"
    )


def _rename_targets(model: nn.Module, config: AdapterConfig, names: Mapping[str, str]) -> None:
    """Put the modules that the file's tensors belong to in the place of ``target_modules`` that the model lacks."""
    if not isinstance(config, TargetedConfig) or not (unmatched := unmatched_targets(model, config)):
        return
    modules, saved, found = base_modules(model), config.modules_to_save or [], set[str]()
    for tensor in names:
        parts = tensor.removeprefix(config.file_prefix).split(".")
        paths = [".".join(parts[:end]) for end in range(1, len(parts))]
        name = next((path for path in reversed(paths) if path in modules), None)
        if name is None or parts[name.count(".") + 1] in modules[name]._parameters:
            continue
        if not any(module_matches(path, entry) for path in paths[: name.count(".") + 1] for entry in saved):
            found.add(name)
    kept = [entry for entry in config.target_modules or () if entry not in unmatched]
    config.target_modules = [*kept, *shortest_names(model, sorted(found))]


def _rename_patterns(model: nn.Module, config: AdapterConfig, names: Mapping[str, str]) -> None:
    """Let ``rank_pattern`` and ``alpha_pattern`` say of this model's modules what they said of the file's."""
    modules, older = base_modules(model), dict[str, str]()
    for new, old in names.items():
        path, parts = new.removeprefix(config.file_prefix), old.removeprefix(config.file_prefix).split(".")
        while path and path not in modules:
            path, _, _ = path.rpartition(".")
            parts.pop()
        older[path] = ".".join(parts)
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, key, None) or {}
        values = {new: pattern_value(patterns, old, 0) for new, old in older.items()}
        if any(pattern_value(patterns, new, 0) != value for new, value in values.items()):
            setattr(config, key, {new: values[new] for new in sorted(values, key=len, reverse=True) if values[new]})


def _saved_modules(model: nn.Module, config: AdapterConfig, names: Mapping[str, str]) -> list[str]:
    """Return the ``modules_to_save`` that this model has, with those that PEFT found by an ending of their names.

    PEFT looks for ``norm`` at the end of a name without regard to dots, and so finds ``post_attention_layernorm``.
    """
    given, modules = config.modules_to_save or [], base_modules(model)
    own = {path: {**module._parameters, **module._buffers} for path, module in modules.items()}
    base = {f"{path}.{name}" for path, tensors in own.items() for name, value in tensors.items() if value is not None}
    held = {name.rpartition(".")[0] for each in names if (name := each.removeprefix(config.file_prefix)) in base}
    inside = tuple(f"{path}." for path in modules if any(module_matches(path, entry) for entry in given))

    def is_more(name: str) -> bool:
        longer = any(name.endswith(entry) for entry in given) and not f"{name}.".startswith(inside)
        return longer and any(f"{each}.".startswith(f"{name}.") for each in held)

    more = [name for name in modules if is_more(name)]
    guesses = [entry for entry in given if entry in _GUESSES and config.task_type in TASKS_WITH_HEADS]
    guessed = [name for name in modules if name and any(name.endswith(guess) for guess in guesses)]
    there = [entry for entry in [*given, *more] if any(module_matches(name, entry) for name in modules if name)]
    return list(dict.fromkeys([*(entry for entry in there if entry not in guesses), *guessed]))


def _without_adapter_names(
    tensors: Mapping[str, torch.Tensor], adapters: Sequence[str], known: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Return the tensors without the adapter's name in theirs, as the states of PEFT's models have it.

    There, and in what diffusers makes of Kohya's files, DoRA's length is a ``weight`` of its own.
    """
    found = dict(tensors)
    for name in (*adapters, "default"):  # the adapter's own first: a state may hold several
        within = re.compile(rf"(\.modules_to_save)?\.{re.escape(name)}(?=\.|$)")
        for given in tensors:
            plain = within.sub("", given)
            plain = plain if plain in known else plain.removesuffix(".weight")
            if given in found and given not in known and plain in known and plain not in found:
                found[plain] = found.pop(given)
    return found
