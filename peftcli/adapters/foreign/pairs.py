"""A and B of modules, as other programs name and scale them, become a LoRA adapter.

LoRA: https://arxiv.org/abs/2106.09685.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from peftcli.adapters.foreign.base import EmptyBase
from peftcli.core.layer import AdapterLayer, adapter_layers, base_name, path_in_file
from peftcli.core.targets import as_pattern, shortest_names
from peftcli.errors import AdapterError
from peftcli.guard.patterns import ends_with
from peftcli.methods._token_rows import tied_group
from peftcli.methods.lora import LoraConfig


@dataclass(frozen=True)
class Pair:
    """``y = W x + scaling * B A x`` of one module, or of the E experts of one parameter."""

    a: torch.Tensor
    """(r, in); of a convolution (r, in, k...); of an embedding (r, V); of experts (E, r, in)."""
    b: torch.Tensor
    """(out, r); of a convolution (out, r, 1...); of experts (E, out, r)."""
    scaling: float
    magnitude: torch.Tensor | None = None
    """DoRA's lengths: (out,)."""
    is_experts: bool = False
    """Whether it is that of a parameter, not of a module."""

    @property
    def r(self) -> int:
        """Size of the bottleneck."""
        return self.a.shape[1 if self.is_experts else 0]

    @property
    def turned(self) -> Pair:
        """The pair of a head that shares the weight of an embedding with this pair."""
        return replace(self, a=self.b.T, b=self.a.T)

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the tensors as our file has them, under all the names that a layer may give them."""
        a, b = self.a, self.b
        if self.is_experts:  # an expert's rows of A together, its columns of B apart
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)
        found = dict.fromkeys(("lora_A.weight", "lora_embedding_A"), a) | dict.fromkeys(
            ("lora_B.weight", "lora_embedding_B"), b
        )
        return found | ({} if self.magnitude is None else {"lora_magnitude_vector": self.magnitude})


def lora(base: EmptyBase, pairs: Mapping[str, Pair], **settings: Any) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return the config and the tensors of a LoRA of these pairs, by their names in the base model.

    An embedding's pair also adapts the heads that share its weight, where ``ensure_weight_tying`` is set.

    Raises:
        AdapterError: a pair does not fit its module.
    """
    strengths = {name: pair.scaling * pair.r for name, pair in pairs.items()}
    # every reader takes a whole number
    alphas = {name: int(value) if float(value).is_integer() else value for name, value in strengths.items()}
    sizes = {name: pair.r for name, pair in pairs.items()}
    r, alpha = Counter(sizes.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    modules = [name for name, pair in pairs.items() if not pair.is_experts]
    config = LoraConfig(
        **{"task_type": base.task_type, **settings, **({} if len(modules) == len(pairs) else {"lora_dropout": 0.0})},
        r=r,
        lora_alpha=alpha,
        inference_mode=True,
        base_model_name_or_path=base.name,
        target_modules=shortest_names(base.model, modules) if modules else None,
        target_parameters=_endings(base.model, {*pairs} - {*modules}) or None,
        rank_pattern={name: int(size) for name, size in as_pattern(sizes, r).items()},
        alpha_pattern=as_pattern(alphas, alpha),
        use_dora=any(pair.magnitude is not None for pair in pairs.values()),
    )
    config.note_base_class(base.model)
    model = base.with_layers(config)
    tensors = dict[str, torch.Tensor]()
    for path, layer in adapter_layers(model).items():
        for tensor, value in _stored(model, path, layer, pairs).items():
            tensors[layer.file_name(path_in_file(model, path), tensor)] = value.contiguous()
    return config, tensors


def in_parts(a: torch.Tensor, b: torch.Tensor, scaling: float, wanted: Sequence[bool]) -> Pair:
    """Return the pair of a layer whose outputs are parts of one size, those ``wanted`` with a pair of their own each.

    Args:
        a: (n r, in), the parts' rows below one another.
        b: (n out of a part, r), the same.
        scaling: of all of them.
        wanted: for each part, whether it is one of the n.

    Raises:
        AdapterError: there are not n of them.
    """
    count, r = sum(wanted), b.shape[1]
    if not count or len(a) != count * r or len(b) % count:
        raise AdapterError(f"a pair of {len(a)} x {len(b)} is not one of {count} parts, with an r of {r}")
    rows = len(b) // count
    whole = b.new_zeros(rows * len(wanted), count * r)
    for at, part in enumerate(part for part, is_wanted in enumerate(wanted) if is_wanted):
        whole[part * rows : (part + 1) * rows, at * r : (at + 1) * r] = b[at * rows : (at + 1) * rows]
    return Pair(a, whole, scaling)


def _stored(model: nn.Module, path: str, layer: AdapterLayer, pairs: Mapping[str, Pair]) -> dict[str, torch.Tensor]:
    """Return the tensors of the layer at ``path``, by the names that it gives them."""
    name = ".".join(filter(None, (base_name(model, path), getattr(layer, "parameter", None))))
    if name in pairs:
        values = pairs[name].stored()
    else:
        embedding = pairs[tied_group(model)[0]]
        values = embedding.turned.stored() | {
            tensor: value for tensor, value in embedding.stored().items() if "embedding" in tensor
        }
    if lost := layer.file_tensors().keys() - values.keys():
        raise AdapterError(f"{name} lacks {sorted(lost)[0]}, which other modules of the file have")
    return {tensor: values[tensor] for tensor in layer.file_tensors()}


def _endings(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return short names of parameters that match these and no others; the full names where there are none."""
    wanted = sorted(names)
    short = sorted({".".join(name.split(".")[-3:]) for name in wanted})
    others = dict(model.named_parameters()).keys() - {*wanted}
    return wanted if any(ends_with(name, each) for name in others for each in short) else short
