"""A LoRA in a .gguf file, as llama.cpp reads it beside its base model.

``lora_a`` is A and ``lora_b`` is B, under llama.cpp's names of tensors; of the token embedding A stands the other way
round. Rows of queries and keys are in the order in which llama.cpp rotates them. An alpha of 0 means one equal to r.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from peftcli.adapters.foreign.base import EmptyBase
from peftcli.adapters.foreign.pairs import Pair, lora
from peftcli.adapters.foreign.source import Converted, Request, Source, Step, carried
from peftcli.core.layer import base_modules
from peftcli.guard.files import first_of, irregular_kind, one_line, short_name, short_repr
from peftcli.methods._token_rows import tied_group
from peftcli.models.gguf_families import gguf_family, name_map, row_order

_ENDS = {".weight.lora_a": "a", ".weight.lora_b": "b"}
_DAMAGED = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
"""What the package gguf raises for a file that is damaged."""


def recognises(source: Source) -> bool:
    """Return whether the file is one of GGUF."""
    return source.is_gguf


def read(request: Request) -> Converted:
    """Find the modules of llama.cpp's names, and put rows back into the order of transformers."""
    source = request.source
    settings, tensors = _content(source)
    if settings.get("general.type") != "adapter" or settings.get("adapter.type") != "lora":
        raise source.refuse("holds no LoRA: it is a model, or an adapter of another kind")
    if "adapter.alora.invocation_tokens" in settings:
        raise source.refuse("is an aLoRA, which begins at some tokens; only plain LoRA is read")
    alpha = settings.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, (int, float)) or alpha < 0:
        raise source.refuse(f"expected a number, found {short_repr(alpha)}", key="adapter.lora.alpha")
    base = request.open_base()
    names, architecture = _names(base), gguf_family(base.opened.config.get_text_config().model_type).architecture
    if settings.get("general.architecture") != architecture:
        found = short_repr(settings.get("general.architecture"))
        hint = "give the adapter's own base model with --base"
        raise source.refuse(f"is for a model of the architecture {found}, and {base.name} is {architecture}", hint)
    halves, unknown = dict[str, dict[str, torch.Tensor]](), list[str]()
    for name, value in tensors.items():
        end = next((end for end in _ENDS if name.endswith(end)), "")
        if end and (module := names.get(name.removesuffix(end))):
            halves.setdefault(module, {})[_ENDS[end]] = value
        else:
            unknown.append(short_name(name))
    if unknown:
        raise source.refuse(f"{len(unknown)} of its tensors are not of {base.name}: {', '.join(first_of(unknown))}")
    pairs = {name: _pair(source, base, name, own, float(alpha)) for name, own in halves.items()}
    config, made = lora(base, pairs)
    strength = f"lora_alpha {config.lora_alpha:g}" + ("" if alpha else ": 0 stands for r")
    rows = Step("translated", "rows of queries and keys", "in the order of transformers, where llama.cpp has another")
    steps = [carried(len(pairs), "in float32"), Step("translated", f"alpha {alpha:g}", strength), rows]
    return Converted(base, config, made, steps)


def _content(source: Source) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the settings and the tensors of the file.

    Raises:
        AdapterError: it is damaged, or the package gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise source.refuse("reading .gguf needs the package gguf", "pip install 'peftcli[gguf]'")
    if wrong := irregular_kind(source.file):
        raise source.refuse(wrong)
    import gguf

    try:
        file = gguf.GGUFReader(source.file)
        settings = {name: field.contents() for name, field in file.fields.items()}
        tensors = {
            each.name: torch.from_numpy(gguf.quants.dequantize(each.data, each.tensor_type).copy())
            for each in file.tensors
        }
    except _DAMAGED as error:
        raise source.refuse(one_line(f"damaged, or no GGUF file: {error}")) from None
    return settings, tensors


def _names(base: EmptyBase) -> dict[str, str]:
    """Return the base model's modules by llama.cpp's names.

    Raises:
        ModelError: peftcli does not know how llama.cpp stores this family.
    """
    config = base.opened.config.get_text_config()
    names = name_map(gguf_family(config.model_type), config.num_hidden_layers)
    return {found: module for module in base_modules(base.model) if (found := names.get_name(module)) is not None}


def _pair(source: Source, base: EmptyBase, name: str, own: Mapping[str, torch.Tensor], alpha: float) -> Pair:
    if len(own) != 2 or any(value.ndim != 2 for value in own.values()):
        raise source.refuse("lacks one of lora_a and lora_b, or they are no matrices", key=name)
    a, b = own["a"], own["b"]
    if isinstance(base.module(name), nn.Embedding):
        if tied_group(base.model):
            raise source.refuse(f"adapts {name}, whose weight the head shares; llama.cpp cannot run it")
        a = a.T
    config = base.opened.config.get_text_config()
    order = row_order(gguf_family(config.model_type), config, f"{name}.weight")
    if order is not None:
        if len(b) != len(order):
            raise source.refuse(f"gives {len(b)} outputs, the base model's has {len(order)}", key=name)
        b = b[order.argsort()]
    return Pair(a, b, alpha / b.shape[1] if alpha else 1.0)
