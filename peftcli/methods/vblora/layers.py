"""The layers of VB-LoRA (https://arxiv.org/abs/2405.15179), and the bank that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods._delta import LowRank, factory_kwargs
from peftcli.methods.vblora import VBLoRAConfig

_LOGITS = ("vblora_logits_A", "vblora_logits_B")


class VBLoraLayer(LowRank):
    """``delta = B A``, both put together from pieces that are mixtures of the bank's vectors.

    ``A`` is ``(r, in / length)`` pieces, ``B`` is ``(out / length, r)``; the bank ``(vectors, length)`` belongs to all
    layers. A mixture is ``topk`` vectors and their weights, which sum to one.
    """

    shared = ("vblora_vector_bank",)
    vblora_vector_bank: nn.Parameter

    def __init__(self, module: nn.Module, name: str, config: VBLoRAConfig):
        super().__init__(module, name, "VB-LoRA", config.bias, config.vblora_dropout)
        sides, length = (self.view.in_features, self.view.out_features), config.vector_length
        for side in sides:
            if side % length:
                raise AdapterError(f"{length} does not divide {side}, a side of {name}", key="vector_length")
        shapes = ((config.r, sides[0] // length), (sides[1] // length, config.r))
        self.pieces = dict(zip(_LOGITS, shapes, strict=True))

    def mixture(self, tensor: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and indices of the vectors in the pieces of ``A`` or ``B``: (..., topk) each."""
        raise NotImplementedError

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = (self._mixed(tensor) for tensor in _LOGITS)
        return a.flatten(1), b.transpose(1, 2).flatten(0, 1)

    def _mixed(self, tensor: str) -> torch.Tensor:
        """The pieces of ``A`` or ``B``: (..., length)."""
        weights, indices = self.mixture(tensor)
        # threads would add the gradients of bank[indices] in any order
        chosen = F.embedding(indices, self.vblora_vector_bank.to(weights.device))
        return torch.einsum("abk,abkl->abl", weights, chosen)


class VBLoraLinear(VBLoraLayer):
    """The mixtures are the softmax over the ``topk`` highest of each piece's trained scores, the logits."""

    def __init__(self, module: nn.Module, name: str, config: VBLoRAConfig):
        super().__init__(module, name, config)
        self.topk, self.saves_topk = config.topk, config.save_only_topk_weights
        for tensor, shape in self.pieces.items():
            start = torch.empty(*shape, config.num_vectors, **factory_kwargs(self))
            setattr(self, tensor, nn.Parameter(nn.init.normal_(start, std=config.init_logits_std)))

    def mixture(self, tensor: str) -> tuple[torch.Tensor, torch.Tensor]:
        logits, indices = getattr(self, tensor).topk(self.topk, dim=-1)
        return logits.softmax(-1), indices

    def file_tensors(self) -> dict[str, torch.Tensor]:
        own: dict[str, torch.Tensor] = {**self.own_tensors()}
        if not self.saves_topk:
            return own
        dtype = _index_dtype(own["vblora_logits_A"].shape[-1])
        for tensor in _LOGITS:
            weights, indices = self.mixture(tensor)
            own[f"{tensor}_topk_weights"] = weights[..., :-1]
            own[f"{tensor}_topk_indices"] = indices.to(dtype)
            del own[tensor]
        return own


class VBLoraMixed(VBLoraLayer):
    """The mixtures as a file of ``save_only_topk_weights`` holds them; the last weight is what is missing to one."""

    def __init__(self, module: nn.Module, name: str, config: VBLoRAConfig):
        super().__init__(module, name, config)
        like = factory_kwargs(self)
        for tensor, shape in self.pieces.items():
            weights = torch.full((*shape, config.topk - 1), 1 / config.topk, **like)
            indices = torch.zeros(*shape, config.topk, dtype=_index_dtype(config.num_vectors), device=like["device"])
            setattr(self, f"{tensor}_topk_weights", nn.Parameter(weights))
            setattr(self, f"{tensor}_topk_indices", nn.Parameter(indices, requires_grad=False))
        self.fixed = tuple(f"{tensor}_topk_indices" for tensor in _LOGITS)

    def mixture(self, tensor: str) -> tuple[torch.Tensor, torch.Tensor]:
        weights, indices = getattr(self, f"{tensor}_topk_weights"), getattr(self, f"{tensor}_topk_indices")
        return torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1), indices.long()


def wrap(module: nn.Module, name: str, config: VBLoRAConfig) -> VBLoraLayer:
    """The VB-LoRA layer over ``module``."""
    kind = VBLoraMixed if config.inference_mode and config.save_only_topk_weights else VBLoraLinear
    return kind(module, name, config)


def attach(model: nn.Module, config: VBLoRAConfig, layers: Mapping[str, Any]) -> None:
    """Draw the bank and give it to every layer."""
    own = list(layers.values())
    bank = torch.empty(config.num_vectors, config.vector_length, **factory_kwargs(own[0]))
    bound = config.init_vector_bank_bound
    parameter = nn.Parameter(nn.init.uniform_(bank, -bound, bound))
    for layer in own:
        layer.vblora_vector_bank = parameter


def model_attributes(model: nn.Module, configs: Mapping[str, VBLoRAConfig]) -> dict[str, Any]:
    """Return the methods of a model with VB-LoRA, under PEFT's names."""

    def get_nb_savable_parameters(adapter: str = "default") -> tuple[int, int]:
        """Return how many numbers of VB-LoRA an adapter's file holds, and how many others train.

        An index counts as its share of the four bytes of a float.
        """
        saved = [value for name, value in adapter_state(model, adapter).items() if "vblora_" in name]
        own = sum(value.numel() * (1 if value.is_floating_point() else value.element_size() / 4) for value in saved)
        trained = [value for name, value in model.named_parameters() if value.requires_grad and "vblora_" not in name]
        return int(own), sum(value.numel() for value in trained)

    def print_savable_parameters() -> None:
        own, others = get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )

    return {
        "get_nb_savable_parameters": get_nb_savable_parameters,
        "print_savable_parameters": print_savable_parameters,
    }


def _index_dtype(count: int) -> torch.dtype:
    """The dtype in which PEFT writes indices below ``count``."""
    for dtype, bits in ((torch.uint8, 8), (torch.int16, 15), (torch.int32, 31)):
        if count < 2**bits:
            return dtype
    return torch.int64
