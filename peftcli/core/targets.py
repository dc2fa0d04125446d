"""Which modules of a model a config names."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftcli.core.config import (
    READ_PAST_CALLS,
    AdapterConfig,
    ExcludingConfig,
    LayeredConfig,
    TargetedConfig,
    as_list,
)
from peftcli.core.layer import AdapterLayer, base_module, base_modules, model_ends
from peftcli.core.linear import check_forward, linear_view
from peftcli.core.protocols import FindsTargets, layers_of
from peftcli.errors import AdapterError, NoMatchingPeftModuleError, PeftWarning
from peftcli.guard.patterns import PLAIN_NAME, Pattern, ends_with

_SHOWN = 6
"""How many names a message gives."""
_OTHER_NAME = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_OTHER_NAME |= {name: other for other, name in _OTHER_NAME.items()}
"""Two names of one layer: transformers 5.24 renamed those of ViT, SegFormer and others, and kept BERT's."""


def targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the names of the modules that the config's method adapts, in the model's order.

    Raises:
        AdapterError: the config names what the model lacks.
    """
    layers = layers_of(config)
    if isinstance(layers, FindsTargets):
        return layers.targets(model, config)
    assert isinstance(config, TargetedConfig)
    names = find_targets(model, config)
    for entry in dataclasses.fields(config):
        value = getattr(config, entry.name)
        if entry.name.endswith("_pattern") and isinstance(value, dict) and entry.metadata.get("recipe", True):
            check_pattern_keys(value, names, entry.name, config)
    return names


def wrap(module: nn.Module, name: str, config: AdapterConfig) -> AdapterLayer:
    """Return the adapter layer of the config's method over ``module``, whose name in the model is ``name``.

    Raises:
        AdapterError: the method does not adapt it.
    """
    if not named_parameters(module, name, config):  # whose values are replaced, so that any forward computes with them
        check_forward(module, name)
    return layers_of(config).wrap(module, name, config)


def find_targets(model: nn.Module, config: TargetedConfig) -> list[str]:
    """Return the names of the modules that ``target_modules`` matches, in the model's order.

    Raises:
        AdapterError: an entry matches nothing; the message gives near names.
    """
    modules, unreached = base_modules(model), {*config.unreached}
    names = _named(model, modules, config)
    names = _without_excluded(model, modules, names, config)
    if _is_default(config):
        names = [name for name in names if name not in unreached]
    names = _in_layers(names, config)
    names = _without_read(modules, names, config)
    if still := unreached & {*names}:
        text = f"target_modules also matches modules that the data never reaches, as {min(still)}: they will not train"
        warnings.warn(f"{text}; where it is unset, such modules are left out", PeftWarning, stacklevel=2)
    if not names:
        raise NoMatchingPeftModuleError(f"no module of {type(model).__name__} is left to adapt", key="target_modules")
    return names


def model_type(model: nn.Module) -> str:
    """Return the ``model_type`` of the model's config, by which tables know its family; "" without one."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _is_default(config: TargetedConfig) -> bool:
    return config.target_modules in (None, "all-linear")


def _named(model: nn.Module, modules: Mapping[str, nn.Module], config: TargetedConfig) -> list[str]:
    """Return the names that ``target_modules`` matches, or its default for this model."""
    wanted = config.target_modules
    if wanted is None:
        wanted = list(getattr(model, "usual_targets", ())) or config.usual_targets(model_type(model))
        if isinstance(wanted, list):  # parts of a family's models differ, and modules were renamed
            there = {ending for name in modules for ending in _endings(name)}
            spelled = [(entry, _OTHER_NAME.get(entry, entry)) for entry in wanted]
            wanted = [next(filter(there.__contains__, names)) for names in spelled if there & {*names}] or wanted
    if wanted == "all-linear":
        return _all_linear(model, modules, config)
    experts = expert_parameters(modules) if hasattr(config, "target_parameters") else []
    hint = f"the weights of experts are no layers here: target_parameters: {experts}" if experts else None
    return matching(model, modules, wanted, "target_modules", hint=hint, allow_unmatched=config.inference_mode)


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], config: TargetedConfig) -> list[str]:
    """Return the names of the linear layers outside of the output head and of what trains in full."""
    _, head = model_ends(model)
    saved = config.modules_to_save or ()
    heads = {"classifier", "score", "lm_head", *saved} if head is None else set(saved)

    def is_body(name: str) -> bool:
        inside_head = any(module_matches(name, entry) or f".{entry}." in f".{name}." for entry in heads)
        return modules[name] is not head and not inside_head

    body = [name for name in modules if is_body(name)]
    names = [name for name in body if linear_view(modules[name]) is not None]
    if not names:
        adaptable = list[str]()
        for name in body:
            with contextlib.suppress(AdapterError):
                wrap(modules[name], name, config)
                adaptable.append(name)
        others = shortest_names(model, adaptable)
        more = f", or {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        todo = f"name other layers, as in [{', '.join(others[:_SHOWN])}]{more}"
        todo = todo if others else "choose another method or another base model"
        text = f"no linear layer of {type(model).__name__} is left to adapt"
        raise NoMatchingPeftModuleError(text, key="target_modules", hint=todo)
    if getattr(config, "target_parameters", ()) is None and (experts := expert_parameters(modules)):
        text = f"all-linear adapts layers alone, not weights as those of experts; add target_parameters: {experts}"
        warnings.warn(text, PeftWarning, stacklevel=4)
    return names


def _without_excluded(
    model: nn.Module, modules: Mapping[str, nn.Module], names: list[str], config: TargetedConfig
) -> list[str]:
    """Leave out what ``exclude_modules`` matches. A file's may match nothing, as it lists what was adapted."""
    excluded, wanted = set[str](), config.exclude_modules if isinstance(config, ExcludingConfig) else None
    if wanted is None:
        return names
    try:
        excluded |= set(matching(model, modules, wanted, "exclude_modules"))
    except NoMatchingPeftModuleError:
        if not config.inference_mode:
            raise
    if excluded.isdisjoint(names) and not (excluded and config.inference_mode):
        warnings.warn("exclude_modules excludes none of the modules to adapt", PeftWarning, stacklevel=3)
    return [name for name in names if name not in excluded]


def _endings(name: str) -> set[str]:
    """Return all entries that match the name."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(len(parts))}


def module_matches(name: str, entry: str) -> bool:
    """Return whether ``entry`` is the module's name or an ending of it after a dot."""
    return name == entry or name.endswith(f".{entry}")


def named_parameters(module: nn.Module, name: str, config: AdapterConfig) -> list[str]:
    """Return the parameters of ``module``, whose name in the model is ``name``, that ``target_parameters`` names."""
    entries = getattr(config, "target_parameters", None) or ()
    own = [parameter for parameter, _ in base_module(module).named_parameters(recurse=False)]
    return [parameter for parameter in own if any(module_matches(f"{name}.{parameter}", entry) for entry in entries)]


def find_modules(model: nn.Module, entries: Iterable[str], key: str) -> list[str]:
    """Return the names of the modules that a list of names or name endings matches, in the model's order.

    Raises:
        AdapterError: an entry matches nothing; the message gives near names.
    """
    return matching(model, base_modules(model), list(entries), key)


def shortest_names(model: nn.Module, names: list[str]) -> list[str]:
    """Return the shortest name endings that match these modules and no others, sorted."""
    others = {ending for name in base_modules(model).keys() - set(names) if name for ending in _endings(name)}
    own = (_endings(name) - others for name in names)
    return sorted({min(endings, key=len) for endings in own if endings})


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """Return the value whose key (a name ending or regular expression) matches the module's name, or ``default``."""
    return next((value for key, value in patterns.items() if ends_with(name, key)), default)


def as_pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return a pattern for ``pattern_value`` that gives each of these modules its value, and others ``default``."""
    other = {name for name, value in values.items() if value != default}
    needed = [name for name in values if other & _endings(name)]
    return {name: values[name] for name in sorted(needed, key=len, reverse=True)}  # the first that matches counts


def check_pattern_keys(
    patterns: Mapping[str, float],
    names: Iterable[str],
    key: str,
    config: AdapterConfig,
    expressions: Iterable[str] | None = None,
) -> None:
    """Raise AdapterError for a key of rank_pattern or its like that matches no adapted module.

    A file's may: its tensors say what was adapted. ``expressions`` are what the keys mean where not themselves.
    """
    names = list(names)
    for pattern, expression in () if config.inference_mode else zip(patterns, expressions or patterns, strict=True):
        if not any(ends_with(name, expression) for name in names):
            raise AdapterError(f"no adapted module matches {pattern!r}{_closest(pattern, names)}", key=key)


def expert_parameters(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return the endings of the parameters that hold the weights of several experts: (E, out, in)."""
    found = (
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in modules.items()
        if not type(module).__module__.startswith("torch.")
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and min(weight.shape) > 1
    )
    return list(dict.fromkeys(found))


def matching(
    model: nn.Module,
    names: Iterable[str],
    wanted: Collection[str],
    key: str,
    what: str = "module",
    hint: str | None = None,
    allow_unmatched: bool = False,
) -> list[str]:
    """Return the names that ``wanted``, a regular expression or a list of names or name endings, matches, in order.

    ``key`` is the setting that has ``wanted``, and ``hint`` what to do where it matches nothing. With
    ``allow_unmatched``, one entry with a match is enough: in a file, whose tensors say what was adapted.

    Raises:
        AdapterError: an entry matches nothing; the message gives near names.
    """
    names = [name for name in names if name]
    if isinstance(wanted, str):
        try:
            pattern = Pattern(wanted)
            found = [name for name in names if pattern.fullmatch(name)]
        except AdapterError as error:
            raise AdapterError(error.message, key=key) from None
        unmatched = [] if found else [wanted]
    else:
        entries = set(wanted)
        matched = {name: entries & _endings(name) for name in names}
        found, unmatched = [name for name in names if matched[name]], sorted(entries.difference(*matched.values()))
    if unmatched and not (allow_unmatched and found):
        entry = unmatched[0]
        nothing = f"no {what} of {type(model).__name__} matches {entry!r}"
        if any(entry in _endings(name) for name in names):  # of a list, it would match
            hint = f"a string is a regular expression for whole names; for their endings write a list: [{entry}]"
            raise NoMatchingPeftModuleError(nothing, key=key, hint=hint)
        raise NoMatchingPeftModuleError(nothing + _closest(entry, names), key=key, hint=hint)
    return found


def _without_read(modules: Mapping[str, Any], names: list[str], config: TargetedConfig) -> list[str]:
    """Leave out what the model reads without calling it, or raise AdapterError if the config names it."""
    if config.inference_mode:  # where it was trained, it may have been called
        return names
    readers = {name: kind for name in names if (kind := _reader(modules, name))}
    if not config.adapts_attention:
        projections = [name for name in names if isinstance(modules[name], NonDynamicallyQuantizableLinear)]
        readers = dict.fromkeys(projections, nn.MultiheadAttention.__name__) | readers
    if readers and not _is_default(config):
        name, kind = next(iter(readers.items()))
        message = f"{kind} reads the weight of {name} without calling it, so that an adapter there would do nothing"
        left_out = READ_PAST_CALLS.get(kind)
        hint = f"leave out {', '.join(left_out)}" if left_out else "leave it out, or choose lora, which adapts it"
        raise AdapterError(message, key="target_modules", hint=hint)
    return [name for name in names if name not in readers]


def _reader(modules: Mapping[str, Any], name: str) -> str | None:
    """Return the type of the model, or of the model in it, that reads a module's weight without calling the module."""
    parts = name.split(".")
    outer = (modules.get(".".join(parts[:count])) for count in range(len(parts)))
    kinds = (model_type(module) for module in outer if module is not None)
    return next((kind for kind in kinds if any(module_matches(name, e) for e in READ_PAST_CALLS.get(kind, ()))), None)


def _in_layers(names: list[str], config: TargetedConfig) -> list[str]:
    """Return the names in ``layers_to_transform``, and as PEFT does those that ``target_modules`` gives in full."""
    if not isinstance(config, LayeredConfig) or config.layers_to_transform is None:
        return names
    wanted, lists = set(as_list(config.layers_to_transform)), as_list(config.layers_pattern)
    ranks = {entry: rank for rank, entry in reversed(list(enumerate(lists)))}
    expressions = [entry for entry in ranks if not PLAIN_NAME.fullmatch(entry)]
    try:
        indices = {name: _layer_index(name.split("."), ranks, expressions) for name in names}
    except AdapterError as error:
        raise AdapterError(error.message, key="layers_pattern") from None
    missing = wanted - set(indices.values())
    if missing and not (config.inference_mode and missing < wanted):  # PEFT's file may name more than there are
        there = sorted(index for index in set(indices.values()) if index is not None)
        span = f"layers {there[0]} to {there[-1]}" if there else "no numbered layers"
        raise AdapterError(f"no target module in layer {min(missing)}; there are {span}", key="layers_to_transform")
    given = () if _is_default(config) else config.target_modules or ()
    return [name for name in names if indices[name] in wanted or name in given]


def _layer_index(parts: list[str], ranks: Mapping[str, int], expressions: Iterable[str]) -> int | None:
    """Return the first number in a module's name that follows the name of a list, or without such names the first.

    ``ranks`` are name endings of lists of layers, of which the lowest that there is counts; ``expressions`` are those
    that are regular expressions.
    """
    numbers = [place for place in range(1, len(parts) - 1) if parts[place].isdecimal()]
    if ranks:
        before = ((place, ".".join(parts[start:place])) for place in numbers for start in range(place))
        found = [(ranks[ending], place) for place, ending in before if ending in ranks]
        for entry in expressions:
            found += [(ranks[entry], place) for place in numbers if ends_with(".".join(parts[:place]), entry)]
        numbers = [min(found)[1]] if found else []
    return int(parts[numbers[0]]) if numbers else None


def _closest(entry: str, names: Iterable[str]) -> str:
    """Return the end of a message: the names that are like the entry, or else those that there are."""
    dots = entry.count(".")
    found = {".".join(name.split(".")[-1 - dots :]) for name in names if name}  # of as many parts as the entry
    endings = sorted({ending for ending in found if not ending.isdecimal()} or found)
    other = _OTHER_NAME.get(entry, "")
    near = [other] if other in endings else difflib.get_close_matches(entry, endings, n=3, cutoff=0.5)
    hint = f"closest: {', '.join(near)}" if near else f"there are: {', '.join(endings[:12])}"
    return f"; {hint}" if endings else ""
