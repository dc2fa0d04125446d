"""The weight updates in the tensors of a LoRA file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import is_residual
from peftcli.methods.lora.lora import size_of
from peftcli.methods.lora.variants.bdlora import dense_pair
from peftcli.methods.lora.variants.qalora import spread
from peftcli.methods.updates import Update, UpdateUnknown

_ENDS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class PairNames:
    """The names of A and B of one module."""

    a: str
    b: str

    @property
    def bias(self) -> str:
        """The name of B's bias, which need not exist."""
        return self.b.removesuffix("weight") + "bias"


def pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, PairNames]:
    """Return the pairs of A and B in a file, by the path of their module.

    Raises:
        AdapterError: an A has no B.
    """
    found = {}
    for name in tensors:
        for end, other in _ENDS.items():
            if name.endswith(end):
                path = name.removesuffix(end)
                found[path.removeprefix(LoraConfig.file_prefix)] = pair = PairNames(name, path + other)
                if pair.b not in tensors:
                    raise AdapterError(f"missing: {pair.b}")
    return found


def describe(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return the config for a file with these tensors: of twice the r where the layers subtract what they started from.

    Code for PEFT sets ``init_lora_weights`` to true before it saves, so that alone does not tell.
    """
    plain = config.plain()
    sizes = {
        (len(tensors[pair.a]), size_of(plain, path.partition(".base_layer")[0])[0])
        for path, pair in pairs(tensors).items()
    }
    twice = sizes and not plain.target_parameters and all(rows == 2 * r for rows, r in sizes)
    return (plain.doubled() if twice else config).file_dict()


def updates(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, Update]:
    """Return the update of each adapted weight; of fused experts, one for each expert: ``path[3]``.

    Raises:
        UpdateUnknown: they depend on the base model's weights.
        AdapterError: the tensors do not fit the config.
    """
    if config.use_dora:
        raise UpdateUnknown("what DoRA adds depends on the base model's weights")
    if config.kasa_config:
        raise UpdateUnknown("what KaSA takes away is in the base model's weights only")
    found: dict[str, Update] = {}
    plain, patterns = config.plain(), config.rank_pattern or config.alpha_pattern
    for path, pair in pairs(tensors).items():
        name = path.partition(".base_layer")[0]
        r, scaling = size_of(plain, name)
        if min(tensors[name].ndim for name in (pair.a, pair.b)) < 2:
            raise AdapterError(f"{pair.a} and {pair.b} are not matrices")
        right, left = tensors[pair.a].flatten(1), tensors[pair.b].flatten(1)
        if config.use_qalora:
            right = spread(right, config.qalora_group_size)
        if config.use_bdlora:
            right, left = dense_pair(config.use_bdlora, name, right, left)
        rows = right.shape[0]
        if 2 * rows == r and is_residual(config.init_lora_weights):
            raise UpdateUnknown(f"what {config.init_lora_weights} started from is in the base model only")
        experts = rows // r
        if rows != r * experts or experts < 1 or (experts > 1 and (patterns or not config.target_parameters)):
            raise AdapterError(f"{pair.a} has {rows} rows; the config says {r}", key="r")
        groups = 1 if tensors[pair.a].ndim == 2 else rows // max(1, left.shape[1])
        if left.shape[1] * groups != rows or len(left) % groups or groups > right.shape[1]:
            shapes = [tuple(tensors[name].shape) for name in (pair.a, pair.b)]
            raise AdapterError(f"{pair.a} and {pair.b} do not go together: {shapes[0]} and {shapes[1]}")
        if experts > 1:
            split = zip(right.unflatten(0, (experts, r)), left.unflatten(1, (r, experts)).unbind(-1), strict=True)
            found |= {f"{path}[{i}]": Update(b, a, scaling, (pair.a, pair.b)) for i, (a, b) in enumerate(split)}
        else:
            # B (out, r / groups) of a convolution with groups
            whole = left if groups == 1 else torch.block_diag(*left.chunk(groups))
            found[path] = Update(whole, right, scaling, (pair.a, pair.b))
    return found
