"""PEFT's own folders whose LoRA of experts has the layout of another version, or of Unsloth.

A file has of E experts ``A: (E * r, in)``, an expert's rows together, and ``B: (out, r * E)``, an expert's columns
apart. Three things differ from writer to writer, and no key says the first two:

- PEFT to 0.18 took the second side of a parameter (E, out, in) for ``in``. 0.19.0 turned that round for modules
  that store (E, in, out), by mistake, and 0.19.1 and later for the others.
- Unsloth computed with an expert's columns of B together, until September 2026; ``lora_B_layout`` says it since.
- transformers 4 had a module for each expert, whose files hold a pair each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from peftcli.adapters.foreign.base import EmptyBase
from peftcli.adapters.foreign.experts import fused
from peftcli.adapters.foreign.pairs import Pair, lora
from peftcli.adapters.foreign.source import Converted, Request, Source, Step, carried
from peftcli.core.layer import adapter_layers, path_in_file
from peftcli.data.rows import count_of
from peftcli.guard.files import first_of, short_name, short_repr
from peftcli.guard.typed_fields import mapping_at
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import size_of
from peftcli.methods.lora.parameters import LoraParameter

_GROUPED, _APART = "grouped_by_expert", "rank_major"
_UNSLOTHS = ("lora_B_layout", "unsloth_fused_expert_lora")
"""Keys that Unsloth adds to the config."""
_VERSIONS = {"peft-0.18": (0, 18, 0), "peft-0.19.0": (0, 19, 0), "peft-0.19.1": (0, 19, 1)}
"""What ``--from`` says of the version."""
_PAIR = re.compile(r"base_model\.model\.(.+)\.lora_(A|B)\.weight")


def recognises(source: Source) -> bool:
    """Return whether the config is PEFT's."""
    return isinstance(source.config.get("peft_type"), str)


def read(request: Request) -> Converted:
    """Give the experts' tensors the layout of PEFT since 0.19.1."""
    source = request.source
    values = {key: value for key, value in source.config.items() if key not in _UNSLOTHS}
    config = config_from_dict(values, str(source.file.parent))
    if not isinstance(config, LoraConfig):
        raise source.refuse(f"is an adapter folder of PEFT ({config.peft_type}), which peftcli reads as it is")
    base = request.open_base(config.base_model_name_or_path)
    config.base_model_name_or_path = base.name
    if not config.target_parameters:
        return _one_by_one(source, config, base)
    version, columns = _writer(request)
    layers = _layers(base, config)
    tensors, steps = dict(source.tensors), list[Step]()
    turned = [path for path, layer in layers.items() if _is_turned(source, path, layer, version, tensors)]
    for path, layer in layers.items():
        a, b = (f"base_model.model.{path}.lora_{each}.weight" for each in "AB")
        e, r = layer.experts, layer.r
        if columns == _GROUPED:
            tensors[b] = tensors[b].view(-1, e, r).mT.flatten(1).contiguous()
        if path in turned:
            new_a = tensors[b].view(-1, r, e).permute(2, 1, 0).flatten(0, 1)
            tensors[b] = tensors[a].view(e, r, -1).permute(2, 1, 0).flatten(1).contiguous()
            tensors[a] = new_a.contiguous()
    if not turned and columns == _APART:
        raise source.refuse("has the layout of PEFT since 0.19.1 already, which peftcli reads as it is")
    if turned:
        note = f"A and B changed places in {len(turned)} parameters, as PEFT 0.19 turned them round"
        steps.append(Step("translated", f"the experts' layout of {_name(version)}", note))
    if columns == _GROUPED:
        steps.append(Step("translated", "Unsloth's order of B", "an expert's columns were together, and are apart"))
    if others := len(tensors) - 2 * len(layers):
        steps.append(Step("carried", count_of(others, "other tensor"), "as before"))
    return Converted(base, config, tensors, steps)


def _name(version: tuple[int, ...] | None) -> str:
    return "an older PEFT" if version is None else f"PEFT {'.'.join(map(str, version))}"


def _writer(request: Request) -> tuple[tuple[int, ...] | None, str]:
    """Return the version of PEFT that wrote the file, if it says it, and how an expert's columns of B stand."""
    config = request.source.config
    digits = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", str(config.get("peft_version")))
    version = tuple(int(each or 0) for each in digits.groups()) if digits else None
    version = _VERSIONS.get(request.format, version)
    if version is not None and version < (0, 17, 0):  # older than target_parameters: other tools write these
        version = (0, 19, 1)
    said = {each.get("lora_B_layout") for each in mapping_at(dict(config), _UNSLOTHS[1], "parameters").values()}
    said |= {config["lora_B_layout"]} if "lora_B_layout" in config else set()
    if request.format == "unsloth":
        return version, _GROUPED
    if not said:
        is_theirs = mapping_at(dict(config), "auto_mapping").get("unsloth_fixed") is True and request.format == "peft"
        return version, _GROUPED if is_theirs else _APART
    if len(said) > 1 or not said <= {_GROUPED, _APART}:
        raise request.source.refuse(
            f"the order of B's columns is {short_repr(sorted(map(str, said)))}", key=_UNSLOTHS[0]
        )
    return version, said.pop()


def _layers(base: EmptyBase, config: LoraConfig) -> dict[str, LoraParameter]:
    """Return the layers of parameters with several experts, by their paths in the file."""
    config.inference_mode = True
    model = base.with_layers(config)
    found = {path_in_file(model, path): layer for path, layer in adapter_layers(model).items()}
    return {path: each for path, each in found.items() if isinstance(each, LoraParameter) and each.experts > 1}


def _is_turned(
    source: Source,
    path: str,
    layer: LoraParameter,
    version: tuple[int, ...] | None,
    tensors: Mapping[str, torch.Tensor],
) -> bool:
    """Return whether A reads what B should write.

    Raises:
        AdapterError: sides and version contradict each other, or neither of them shows it.
    """
    names = [f"base_model.model.{path}.lora_{each}.weight" for each in "AB"]
    if lost := [name for name in names if name not in tensors]:
        raise source.refuse("is missing", key=lost[0])
    sides = [tensors[names[0]].shape[-1], len(tensors[names[1]])]
    wanted = [layer.lora_A.in_features, layer.lora_B.out_features]
    if sides not in (wanted, wanted[::-1]):
        message = f"A reads {sides[0]} and B gives {sides[1]}; the base model's are {wanted[0]} and {wanted[1]}"
        raise source.refuse(message, "give the adapter's own base model with --base", names[0])
    by_sides = None if wanted[0] == wanted[1] else sides != wanted
    by_version = None
    if version is not None:
        swaps = False if version < (0, 19, 0) else layer.transposed if version == (0, 19, 0) else not layer.transposed
        by_version = swaps == layer.transposed
    if by_sides is not None and by_version not in (None, by_sides):
        raise source.refuse(f"has sides that {_name(version)} does not write", "say who wrote it with --from", names[0])
    if by_sides is None and by_version is None:
        hint = "name the version that wrote it: --from peft-0.18, peft-0.19.0 or peft-0.19.1"
        raise source.refuse("is square, and the config does not say which version of PEFT wrote it", hint, names[0])
    return bool(by_version if by_sides is None else by_sides)


def _one_by_one(source: Source, config: LoraConfig, base: EmptyBase) -> Converted:
    """Put the pairs of single experts together, as transformers 4 had them."""
    pairs, others = dict[str, dict[str, torch.Tensor]](), list[str]()
    for name, value in source.tensors.items():
        found = _PAIR.fullmatch(name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = value
        else:
            others.append(short_name(name))
    if not any(re.search(r"\.experts\.\d+\.", path) for path in pairs):
        raise source.refuse("is an adapter folder of PEFT, which peftcli reads as it is")
    if others:
        raise source.refuse(f"holds more than pairs of A and B: {', '.join(first_of(others))}")
    given = {path: Pair(own["A"], own["B"], size_of(config, path)[1]) for path, own in pairs.items() if len(own) == 2}
    if len(given) < len(pairs):
        raise source.refuse("lacks one of A and B", key=next(path for path in pairs if path not in given))
    made, steps = fused(given, base)
    named = base.names(made)
    plain: dict[str, Any] = {"lora_dropout": config.lora_dropout, "task_type": config.task_type or base.task_type}
    new, tensors = lora(base, {named[path]: pair for path, pair in made.items()}, **plain)
    return Converted(base, new, tensors, [*steps, carried(len(pairs), "at their strength")])
