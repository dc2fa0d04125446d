"""Adapters of mlx-lm: adapters.safetensors and adapter_config.json.

``y = W x + scale * (x lora_a) lora_b``: A and B are stored turned, and ``scale`` is not divided by r. DoRA's lengths
are called ``m``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peftcli.adapters.foreign.experts import fused
from peftcli.adapters.foreign.pairs import Pair, lora
from peftcli.adapters.foreign.source import Converted, Request, Source, Step, carried
from peftcli.core.layer import base_modules
from peftcli.guard.files import first_of, short_name, short_repr
from peftcli.guard.typed_fields import mapping_at
from peftcli.methods._token_rows import tied_group

_TENSORS = {"lora_a", "lora_b", "m"}


def recognises(source: Source) -> bool:
    """Return whether the names are those of mlx-lm."""
    ends = {name.rpartition(".")[2] for name in source.header}
    return "lora_parameters" in source.config or (bool(ends) and ends <= _TENSORS)


def read(request: Request) -> Converted:
    """Turn A and B round, and ``scale`` into ``lora_alpha``."""
    source = request.source
    scale, dropout = _settings(source)
    if strange := [name for name in source.header if name.rpartition(".")[2] not in _TENSORS]:
        listed = ", ".join(first_of(list(map(short_name, strange))))
        raise source.refuse(f"holds tensors that are no lora_a, lora_b or m: {listed}")
    base = request.open_base(source.config.get("model"))
    if hasattr(base.opened.config, "quantization"):
        hint = "give the model that it was made from with --base"
        raise source.refuse(f"{base.name} holds weights that are quantised for mlx, and no other program reads", hint)
    found = dict[str, dict[str, torch.Tensor]]()
    for name, value in source.tensors.items():
        path, _, kind = name.rpartition(".")
        found.setdefault(path, {})[kind] = value
    pairs = {path: _pair(source, path, own, scale) for path, own in found.items()}
    pairs, steps = fused(pairs, base)
    named = base.names(pairs)
    pairs = {named[path]: pair for path, pair in pairs.items()}
    embeddings = [name for name, module in base_modules(base.model).items() if isinstance(module, nn.Embedding)]
    if any(name in embeddings and pair.magnitude is not None for name, pair in pairs.items()):
        raise source.refuse("DoRA of an embedding has a length for each token in mlx-lm, for each output here")
    tied = pairs.keys() & {*tied_group(base.model)[:1]}
    config, tensors = lora(base, pairs, lora_dropout=dropout, ensure_weight_tying=bool(tied))
    return Converted(
        base,
        config,
        tensors,
        [
            carried(len(found), "transposed"),
            Step(
                "translated",
                f"scale {scale:g}",
                f"lora_alpha {config.lora_alpha:g}: mlx-lm does not divide by r, {config.r}",
            ),
            *steps,
            *([Step("translated", "the embedding's pair", "serves the head too, as in mlx-lm")] if tied else []),
            *([Step("carried", "DoRA's lengths m", "as lora_magnitude_vector")] if config.use_dora else []),
        ],
    )


def _settings(source: Source) -> tuple[float, float]:
    """Return scale and dropout."""
    given = mapping_at(source.config, "lora_parameters")
    if source.config.get("fine_tune_type") == "full":
        raise source.refuse("holds the weights of a whole model (fine_tune_type: full), which is no adapter")
    found = []
    for key, value in (("scale", given.get("scale")), ("dropout", given.get("dropout", 0.0))):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            hint = None if source.config else "adapter_config.json of mlx-lm must be beside the file"
            raise source.refuse(f"expected a number, found {short_repr(value)}", hint, f"lora_parameters.{key}")
        found.append(float(value))
    return found[0], found[1]


def _pair(source: Source, path: str, own: Mapping[str, torch.Tensor], scale: float) -> Pair:
    a, b = own.get("lora_a"), own.get("lora_b")
    if a is None or b is None or a.ndim != b.ndim or a.ndim not in (2, 3):
        raise source.refuse("lacks one of lora_a and lora_b, or they do not fit", key=short_name(path))
    if a.ndim == 3:  # of experts, stored as (E, r, in) and (E, out, r)
        return Pair(a, b, scale, is_experts=True)
    return Pair(a.T, b.T, scale, own.get("m"))
