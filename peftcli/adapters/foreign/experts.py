"""Experts whose weights are one parameter in the base model, and a LoRA of each expert, or another order, in the file.

transformers 5 holds the experts of a layer as ``gate_up_proj`` (E, 2 I, H) and ``down_proj`` (E, H, I).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch

from peftcli.adapters.foreign.base import EmptyBase
from peftcli.adapters.foreign.pairs import Pair
from peftcli.adapters.foreign.source import Step
from peftcli.errors import AdapterError

_ONE = re.compile(r"(?P<experts>.+\.experts)\.(?P<at>\d+)\.(?P<part>\w+)")
"""The name of a module of one expert."""
_ALL = re.compile(r"(?P<above>.+)\.(switch_mlp|experts)\.(?P<part>\w+)")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def fused(pairs: Mapping[str, Pair], base: EmptyBase) -> tuple[dict[str, Pair], list[Step]]:
    """Return the pairs with those of experts as pairs of the base model's parameters, by full names; and what was done.

    The pairs of gate and up, which are one parameter, become one of both their r: A's rows stand below one another, and
    each part of B has zeros in the columns of the other.

    Raises:
        AdapterError: the base model has other experts, or an expert's pair is not like the others'.
    """
    plain, of_layer = dict[str, Pair](), dict[str, dict[str, Pair]]()
    for path, pair in _stacked(pairs).items():
        found = _ALL.fullmatch(path)
        if pair.is_experts and found and found["part"] in _PARTS:
            of_layer.setdefault(f"{found['above']}.experts", {})[_PARTS[found["part"]]] = pair
        else:
            plain[path] = pair
    for path, parts in of_layer.items():
        plain |= _of_layer(path, parts, base)
    if not of_layer:
        return plain, []
    note = (
        "are of gate_up_proj, with the r of gate and up together, and down_proj; without dropout, which is not for them"
    )
    return plain, [Step("translated", f"the experts' pairs in {len(of_layer)} layers", note)]


def _stacked(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    """Return the pairs with those of single experts put together: (E, r, in) and (E, out, r)."""
    single: dict[str, dict[int, Pair]] = {}
    for path, pair in pairs.items():
        if (found := _ONE.fullmatch(path)) and found["part"] in _PARTS:
            single.setdefault(f"{found['experts']}.{found['part']}", {})[int(found["at"])] = pair
    stacked = {path: pair for path, pair in pairs.items() if not _ONE.fullmatch(path)}
    for path, of_expert in single.items():
        own = [of_expert[at] for at in sorted(of_expert)]
        alike = {(pair.a.shape, pair.b.shape, pair.scaling, pair.magnitude is None) for pair in own}
        if sorted(of_expert) != list(range(len(own))) or len(alike) > 1 or own[0].magnitude is not None:
            raise AdapterError(f"{path}: the experts do not all have a plain pair of one r and one strength")
        a, b = torch.stack([pair.a for pair in own]), torch.stack([pair.b for pair in own])
        stacked[path] = Pair(a, b, own[0].scaling, is_experts=True)
    return stacked


def _of_layer(path: str, parts: Mapping[str, Pair], base: EmptyBase) -> dict[str, Pair]:
    """Return the pairs of the parameters below ``path``."""
    (name,) = base.names([path]).values()
    module = base.module(name)
    shapes = {own: tuple(value.shape) for own, value in module.named_parameters(recurse=False)}
    if shapes.keys() < {"gate_up_proj", "down_proj"} or getattr(module, "is_transposed", False):
        raise AdapterError(
            f"{name} of {base.name} does not store its experts as gate_up_proj and down_proj of (out, in)"
        )
    found = {}
    if "down" in parts:
        found[f"{name}.down_proj"] = parts["down"]
    if halves := {part: parts[part] for part in ("gate", "up") if part in parts}:
        found[f"{name}.gate_up_proj"] = _side_by_side(halves, shapes["gate_up_proj"][1] // 2)
    for own, pair in found.items():
        if (len(pair.a), pair.b.shape[1], pair.a.shape[2]) != shapes[own.rpartition(".")[2]]:
            raise AdapterError(
                f"{own} of {base.name} is {shapes[own.rpartition('.')[2]]}, the file's pair is for another"
            )
    return found


def _side_by_side(halves: Mapping[str, Pair], rows: int) -> Pair:
    """Return the pair that gives each half of the outputs, of this many ``rows``, what its own pair gives it."""
    scaling = next(iter(halves.values())).scaling
    above, columns = {"gate": 0, "up": rows}, 0
    b = torch.zeros(
        len(next(iter(halves.values())).b), 2 * rows, sum(pair.r for pair in halves.values()), dtype=torch.float32
    )
    for part, pair in halves.items():
        if pair.b.shape[1] != rows:
            raise AdapterError(f"a pair of experts gives {pair.b.shape[1]} outputs, where the base model has {rows}")
        b[:, above[part] : above[part] + rows, columns : columns + pair.r] = pair.b * (pair.scaling / scaling)
        columns += pair.r
    first = next(iter(halves.values()))
    return replace(first, a=torch.cat([pair.a for pair in halves.values()], dim=1), b=b.to(first.b.dtype))
