"""Adapters of the library ``adapters`` (AdapterHub): adapter.safetensors and adapter_config.json.

Its LoRA and (IA)^3 are ours under other names. (IA)^3 scales outputs everywhere, also of the MLP. A layer that holds
queries, keys and values together has a pair for each that ``attn_matrices`` names. Its other methods compute what no
method here does: a prefix has no positions there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from peftcli.adapters.foreign.base import EmptyBase
from peftcli.adapters.foreign.pairs import Pair, in_parts, lora
from peftcli.adapters.foreign.source import Converted, Request, Source, Step, carried
from peftcli.core.linear import linear_view
from peftcli.data.rows import count_of
from peftcli.errors import AdapterError
from peftcli.guard.files import first_of, short_name, short_repr
from peftcli.guard.typed_fields import mapping_at
from peftcli.methods.ia3 import IA3Config

_NAME = re.compile(r"(?P<module>.+)\.loras\.[^.]+\.(?P<tensor>lora_[AB])")
_TOGETHER = "qkv"
"""The parts of a layer that holds them together, in their order."""
_OFF: dict[str, tuple[object, ...]] = {
    "use_gating": (False, None),
    "use_dora": (False, None),
    "vera_d": (None,),
    "vera_b": (None,),
    "task_names": (None,),
}
"""Settings of its LoRA that change what is computed, and their values where they do not."""


def recognises(source: Source) -> bool:
    """Return whether the config is that library's."""
    return isinstance(source.config.get("config"), dict) and "model_type" in source.config


def read(request: Request) -> Converted:
    """Rename the tensors, and give layers that hold several projections one pair for all of them."""
    source, given = request.source, mapping_at(dict(request.source.config), "config")
    kind, mode = given.get("architecture"), given.get("composition_mode")
    if kind != "lora" or mode not in ("add", "scale"):
        what = f"{short_repr(kind)} computes what no method here does; LoRA and (IA)^3 are read"
        raise source.refuse(what, key="config.architecture")
    for key, off in _OFF.items():
        if given.get(key) not in off:
            raise source.refuse(f"{short_repr(given[key])} computes what no LoRA here does", key=f"config.{key}")
    alpha, r, parts = given.get("alpha"), given.get("r"), given.get("attn_matrices", [])
    if not isinstance(alpha, (int, float)) or not isinstance(r, int) or r < 1 or not isinstance(parts, list):
        raise source.refuse("alpha, r or attn_matrices are missing", key="config")
    found, others = dict[str, dict[str, torch.Tensor]](), list[str]()
    for name, value in source.tensors.items():
        if match := _NAME.fullmatch(name):
            found.setdefault(match["module"], {})[match["tensor"]] = value
        else:
            others.append(short_name(name))
    if others:
        raise source.refuse(f"holds tensors that are not of its LoRA: {', '.join(first_of(others))}")
    base = request.open_base(source.config.get("model_name"))
    named = base.names(found)
    own = {named[path]: tensors for path, tensors in found.items()}
    wanted = [part in parts for part in _TOGETHER]
    made = _scales(base, own, float(alpha), wanted) if mode == "scale" else _lora(base, own, alpha / r, r, wanted)
    made.steps.extend(_beside(source))
    return made


def _lora(
    base: EmptyBase, found: Mapping[str, Mapping[str, torch.Tensor]], scaling: float, r: int, wanted: Sequence[bool]
) -> Converted:
    pairs = dict[str, Pair]()
    for name, own in found.items():
        if len(own) != 2:
            raise AdapterError(f"{name} lacks one of lora_A and lora_B")
        a, b = own["lora_A"], own["lora_B"]
        pairs[name] = (
            Pair(a, b, scaling) if len(b) == _outputs(base, name) and len(a) == r else in_parts(a, b, scaling, wanted)
        )
    config, tensors = lora(base, pairs)
    steps = [
        carried(len(pairs), "as they are"),
        Step("translated", "alpha / r", f"lora_alpha {config.lora_alpha:g} and r {config.r}"),
    ]
    return Converted(base, config, tensors, steps)


def _scales(
    base: EmptyBase, found: Mapping[str, Mapping[str, torch.Tensor]], alpha: float, wanted: Sequence[bool]
) -> Converted:
    tensors = dict[str, torch.Tensor]()
    for name, own in found.items():
        factors = own["lora_B"] * alpha
        if len(factors) != (outputs := _outputs(base, name)):
            rows = torch.tensor(wanted).repeat_interleave(outputs // len(wanted))
            factors = torch.ones(outputs, 1).masked_scatter(rows[:, None], factors)
        tensors[f"{IA3Config.file_prefix}{name}.ia3_l"] = factors
    config = IA3Config(
        target_modules=sorted(found),
        feedforward_modules=[],
        base_model_name_or_path=base.name,
        task_type=base.task_type,
        inference_mode=True,
    )
    config.note_base_class(base.model)
    base.with_layers(config)
    return Converted(
        base, config, tensors, [Step("carried", count_of(len(found), "scale"), "as ia3_l, all of outputs")]
    )


def _outputs(base: EmptyBase, name: str) -> int:
    view = linear_view(base.module(name))
    if view is None:
        raise AdapterError(f"{name} of {base.name} is not a linear layer")
    return view.out_features


def _beside(source: Source) -> list[Step]:
    """Say what of a head beside the adapter becomes: nothing."""
    heads = sorted(path.name for path in source.file.parent.glob("*_head.*"))
    return [Step("left out", name, "a head of that library; the base model's own is used") for name in heads]
