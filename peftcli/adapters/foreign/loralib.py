"""Checkpoints of loralib (microsoft/LoRA): what ``lora_state_dict`` returns, saved as safetensors.

``y = W x + lora_alpha / r * B A x``, and the file does not hold ``lora_alpha``. A ``MergedLinear`` has a pair for each
part of its outputs that is adapted; the file does not say which parts these are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from peftcli.adapters.foreign.base import EmptyBase
from peftcli.adapters.foreign.pairs import Pair, in_parts, lora
from peftcli.adapters.foreign.source import Converted, Request, Source, Step, carried
from peftcli.core.linear import linear_view
from peftcli.guard.files import first_of, short_name

_ENDS = ("lora_A", "lora_B")


def recognises(source: Source) -> bool:
    """Return whether there are pairs as loralib names them."""
    ends = {name.rpartition(".")[2] for name in source.header}
    return ends >= {*_ENDS} and not any(".loras." in name for name in source.header)


def read(request: Request) -> Converted:
    """Give each pair the strength of ``--alpha``."""
    source = request.source
    if request.alpha is None:
        hint = "add --alpha with the lora_alpha that it was trained with; loralib's default is 1"
        raise source.refuse("loralib's files do not hold lora_alpha", hint)
    found, others = dict[str, dict[str, torch.Tensor]](), list[str]()
    for name, value in source.tensors.items():
        path, _, end = name.rpartition(".")
        if end in _ENDS and value.ndim == 2:
            found.setdefault(path, {})[end] = value
        else:
            others.append(short_name(name))
    if others:
        hint = "save with lora_state_dict(model, bias='none') what it has besides"
        raise source.refuse(f"holds more than matrices lora_A and lora_B: {', '.join(first_of(others))}", hint)
    base = request.open_base()
    named = base.names(found)
    pairs = {named[path]: _pair(source, base, named[path], own, request.alpha) for path, own in found.items()}
    config, tensors = lora(base, pairs)
    strength = Step("translated", f"--alpha {request.alpha:g}", "is lora_alpha of every module, as you say")
    return Converted(base, config, tensors, [carried(len(pairs), "as they are"), strength])


def _pair(source: Source, base: EmptyBase, name: str, own: Mapping[str, torch.Tensor], alpha: float) -> Pair:
    if len(own) < len(_ENDS):
        raise source.refuse("lacks one of lora_A and lora_B", key=name)
    a, b = (own[end] for end in _ENDS)
    r, view = b.shape[1], linear_view(base.module(name))
    if len(a) == r:
        return Pair(a, b, alpha / r)
    if view is None or len(a) % r or len(b) != view.out_features:
        message = "has pairs for some parts of its outputs alone, and the file does not say which"
        raise source.refuse(message, "convolutions and such a MergedLinear are not read", key=name)
    return in_parts(a, b, alpha / r, [True] * (len(a) // r))
