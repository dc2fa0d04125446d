"""The virtual tokens and the loss of context-aware prompt tuning (https://arxiv.org/abs/2410.17222)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_dtype
from peftcli.core.prompts import virtual_tokens
from peftcli.core.prompts.inputs import IGNORED, active_at, bound, cached_length, hook_once
from peftcli.core.prompts.virtual_tokens import VirtualTokens, insert_virtual_tokens
from peftcli.errors import AdapterError
from peftcli.methods.cpt import INPUT, OUTPUT, CPTConfig


class ContextTokens(VirtualTokens):
    """The context's token embeddings (n, D), each moved by a trained ``delta`` that is no longer than its bound."""

    fixed = ("prompt_embeddings",)

    def __init__(self, base_layer: nn.Module, vectors: torch.Tensor, config: CPTConfig):
        super().__init__(base_layer, len(vectors))
        self.config = config
        vectors = vectors.to(adapter_dtype(self.base_layer.weight))
        self.prompt_embeddings = nn.Parameter(vectors, requires_grad=False)
        self.delta = nn.Parameter(torch.zeros_like(vectors))
        self.counted: tuple[torch.Tensor, torch.Tensor] | None = None
        """Inside a forward call with labels: labels and types (B, n + T)."""

    @torch.no_grad()
    def bounded(self) -> torch.Tensor:
        """Return delta, each row cut to its bound; zero where the token does not train."""
        kinds = self._kinds()
        form, own = self.config.opt_projection_format_epsilon, self.config.opt_projection_epsilon
        bound = torch.where(kinds == INPUT, own, form) * (self.delta.shape[1] / 2048) ** 0.5
        norm = self.delta.norm(dim=1, keepdim=True)
        return torch.where(norm > bound, self.delta * (bound / norm), self.delta) * (kinds > 0)

    def table(self) -> torch.Tensor:
        bounded = self.bounded()
        if self.training and self.delta.requires_grad:
            self.delta.data.copy_(bounded)
        # the gradient is that of delta, past the bound
        return self.prompt_embeddings + bounded + (self.delta - self.delta.detach()) * (self._kinds() > 0)

    def _kinds(self) -> torch.Tensor:
        """Return 1, 2 or 3 for the tokens that train, by their type, and 0 for the others: (n, 1)."""
        return torch.tensor(self.config.cpt_tokens_type_mask, device=self.delta.device)[:, None] % OUTPUT

    def file_tensors(self) -> dict[str, torch.Tensor]:
        # as they are while nothing is learned, so that a file can fill them
        learned = not self.delta.is_meta and bool(self.delta.any())
        return {"prompt_embeddings": self.prompt_embeddings + self.bounded() if learned else self.prompt_embeddings}


@torch.no_grad()
def wrap(module: Any, name: str, config: CPTConfig) -> ContextTokens:
    """Return the context over the input embedding ``module``."""
    config.fit(module)
    weight = module.weight
    if config.cpt_token_ids is None:
        raise AdapterError("the text was not turned into token ids; call prepare() first", key="context")
    if (largest := max(config.cpt_token_ids)) >= len(weight):
        raise AdapterError(f"{largest} is not in the vocabulary of {len(weight):,} tokens", key="cpt_token_ids")
    return ContextTokens(module, module(torch.tensor(config.cpt_token_ids, device=weight.device)), config)


def targets(model: Any, config: CPTConfig) -> list[str]:
    """Return the name of the model's input embedding."""
    names = virtual_tokens.targets(model, config)
    if not hasattr(model, "prepare_inputs_for_generation") or model.config.is_encoder_decoder:
        raise AdapterError(f"CPT's loss is that of a causal language model; {type(model).__name__} is not one")
    return names


def attach(model: nn.Module, config: CPTConfig, layers: Mapping[str, AdapterLayer]) -> None:
    """Start the model's inputs with the context, and let the labels' loss count the context's outputs too."""
    for path, layer in layers.items():
        hook = _Counted(path)
        if hook not in model._forward_pre_hooks.values():  # before the hook that inserts the tokens
            model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
        insert_virtual_tokens(model, cast("VirtualTokens", layer))
        hook_once(model, _Weighted(path), after=True)


@dataclass(frozen=True)
class _Counted:
    """The model's forward pre-hook: takes the labels out of the inputs, and lays them out with the context's."""

    path: str

    def __call__(self, model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]] | None:
        layer = active_at(model.get_submodule(self.path), ContextTokens)
        if layer is None:
            return None
        layer.counted, kwargs = None, dict(kwargs)
        kinds = kwargs.pop("input_type_mask", None)
        inputs = bound(model.forward, args, kwargs)
        labels = inputs.get("labels")
        if labels is None or cached_length(inputs):
            return (), inputs
        del inputs["labels"]
        insertion, config = layer.insertion(inputs), layer.config
        ids, context = (
            torch.tensor(values, device=labels.device)[insertion.number.clamp(0, layer.count - 1)]
            for values in (config.cpt_token_ids, config.cpt_tokens_type_mask)
        )
        # the input is the next example of the context
        last = -(-max(config.cpt_tokens_type_mask) // OUTPUT) * OUTPUT
        kinds = torch.full_like(labels, OUTPUT) if kinds is None else kinds.to(labels.device)
        kinds = insertion.spread(torch.where(kinds > 0, kinds + last, kinds), context)
        counts = (kinds > 0) & (kinds % OUTPUT == 0)
        layer.counted = insertion.spread(labels, ids).masked_fill(~counts, IGNORED), kinds
        return (), inputs


@dataclass(frozen=True)
class _Weighted:
    """The model's forward hook: the mean cross-entropy of the outputs' tokens, the context's included, by weight."""

    path: str

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        layer = active_at(model.get_submodule(self.path), ContextTokens)
        if layer is None or layer.counted is None:
            return output
        (labels, kinds), layer.counted = layer.counted, None
        if not isinstance(output, dict):
            raise AdapterError("virtual tokens need return_dict=True", key="return_dict")
        logits = output["logits"]
        if logits.shape[1] != labels.shape[1]:
            raise AdapterError("the loss needs the logits of all tokens; leave it out", key="logits_to_keep")
        labels, kinds = labels[:, 1:].to(logits.device), kinds[:, 1:].to(logits.device)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none")
        weights = _weights(kinds, layer.config)
        loss = (losses * weights)[labels != IGNORED].mean()
        return type(output)(**{**output, "loss": loss})


def _weights(kinds: torch.Tensor, config: CPTConfig) -> torch.Tensor:
    """Return the weight of each token (B, T) in the loss: that of its example, of which the last has 1."""
    weights = torch.ones(kinds.shape, device=kinds.device)
    if config.opt_weighted_loss_type == "decay":
        for row, weight in zip(kinds, weights, strict=True):
            outputs = row[(row > 0) & (row % OUTPUT == 0)].unique()
            for age, kind in enumerate(reversed(outputs.tolist())):
                weight[row == kind] = config.opt_loss_decay_factor**age
    return weights
