"""X-LoRA's classifier, and the scalings that it gives the adapters for each token."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import nn

from peftcli.core.layer import first_parameter
from peftcli.core.prompts.inputs import cached_length, tokens_of
from peftcli.errors import AdapterError
from peftcli.methods.xlora import XLoraConfig

_NOT_READ = ("labels", "use_cache", "past_key_values", "cache", "output_hidden_states", "return_dict", "logits_to_keep")
"""Arguments of the model that the pass for the classifier does without."""


class Mixture(nn.Module):
    """The last hidden states (B, T, D) -> scalings (B, T, L, E) of E adapters in L layers, which share this module.

    Its methods with PEFT's names are those of PEFT's X-LoRA model.
    """

    def __init__(self, config: XLoraConfig, num_layers: int, **like: Any):
        super().__init__()
        assert config.hidden_size is not None
        assert config.adapters is not None
        self.config, self.num_layers, self.num_experts = config, num_layers, len(config.adapters)
        classes = self.num_experts * (num_layers if config.layerwise_scalings else 1)
        self.layers = _classifier(config, config.hidden_size, classes, **like)
        self.scalings: torch.Tensor | None = None
        """Of the forward pass that runs; kept for activations that are computed again in the backward pass."""
        self.reads_base = False
        """Whether the base model reads the input for the classifier."""
        self.latest: torch.Tensor | None = None
        self.logs = False
        self.log: list[torch.Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy of the model has: no forward pass that runs, and of past ones no gradients."""
        latest = None if self.latest is None else self.latest.detach()
        return {**vars(self), "scalings": None, "latest": latest, "log": [each.detach() for each in self.log]}

    def read(self, model: Any, inputs: dict[str, Any]) -> None:
        """Find the scalings for the inputs of a forward call.

        Raises:
            AdapterError: a cache holds a part of them, or the model returns no hidden states.
        """
        if cached_length(inputs):
            raise AdapterError("X-LoRA reads whole sequences; set use_cache=False", key="use_cache")
        given, value = tokens_of(inputs), self.config.scaling_pass_value
        shape = (*given.shape[:2], self.num_layers, self.num_experts)
        self.reads_base, self.scalings = value == 0, torch.full(shape, float(value), device=given.device)
        read = {name: value for name, value in inputs.items() if name not in _NOT_READ}
        try:
            with torch.no_grad():
                output = model.forward(**read, output_hidden_states=True, return_dict=True)
        finally:
            self.reads_base, self.scalings = False, None
        if not output.get("hidden_states"):
            raise AdapterError(f"X-LoRA needs hidden states, which {type(model).__name__} does not return")
        self.scalings = self.latest = self(output["hidden_states"][-1])
        if self.logs:
            self.log.append(self.scalings)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first = first_parameter(self)
        scalings = self.layers(hidden.to(first)).unflatten(-1, (-1, self.num_experts))
        scalings = scalings.expand(-1, -1, self.num_layers, -1)
        return (scalings / self.config.softmax_temperature).softmax(-1) if self.config.enable_softmax else scalings

    def scalings_at(self, layer: int) -> torch.Tensor:
        """Return a layer's scalings (B, T, E).

        Raises:
            AdapterError: no forward call of the model runs.
        """
        if self.scalings is None:
            raise AdapterError("X-LoRA needs the whole model's forward pass; do not call a part of the model")
        if self.training and self.scalings.requires_grad and not torch.is_grad_enabled():
            raise AdapterError(
                "X-LoRA's classifier cannot train with reentrant checkpointing; set use_reentrant=False",
                key="use_reentrant",
            )
        scalings, config = self.scalings[:, :, layer], self.config
        if config.top_k_lora is not None:
            chosen = scalings.topk(config.top_k_lora, dim=-1).indices
            scalings = scalings * torch.zeros_like(scalings).scatter(-1, chosen, 1.0)
        if config.enable_softmax_topk:
            left_out = scalings == 0
            scalings = scalings.masked_fill(left_out, -torch.inf).softmax(-1).masked_fill(left_out, 0.0)
        return scalings * config.global_scaling_weight

    @property
    def override_scaling_pass_value(self) -> float:
        """PEFT's name of the config's ``scaling_pass_value``."""
        return self.config.scaling_pass_value

    def set_topk_lora(self, value: int | None) -> None:
        """Set the number of adapters that each token uses; None: all."""
        self.config.top_k_lora = value

    def set_global_scaling_weight(self, weight: float) -> None:
        """Multiply every adapter's update by this, besides its scaling."""
        self.config.global_scaling_weight = weight

    def get_global_scaling_weight(self) -> float:
        """Return what every adapter's update is multiplied by."""
        return self.config.global_scaling_weight

    def set_scaling_pass_value(self, value: float | None) -> None:
        """Scale the adapters by this while the model reads for the classifier; None: by one share each."""
        self.config.scaling_pass_value = 1 / self.num_experts if value is None else value

    def get_latest_scalings(self) -> torch.Tensor | None:
        """Return the scalings (B, T, L, E) of the last forward pass, if there was one."""
        return self.latest

    def enable_scalings_logging(self) -> None:
        """Keep the scalings of every forward pass from now on."""
        self.logs = True

    def disable_scalings_logging(self) -> None:
        """Keep no more scalings; those that are kept stay."""
        self.logs = False

    def clear_scalings_log(self) -> None:
        """Forget the scalings that were kept."""
        self.log.clear()

    def get_scalings_log(self) -> list[torch.Tensor]:
        """Return the scalings that were kept, a tensor for each forward pass."""
        return list(self.log)

    def get_bucketed_scalings_log(self) -> dict[int, tuple[list[int], list[torch.Tensor]]]:
        """Return the scalings that were kept, by length T: their places in the log, and the tensors."""
        found: dict[int, tuple[list[int], list[torch.Tensor]]] = {}
        for place, scalings in enumerate(self.log):
            places, tensors = found.setdefault(scalings.shape[1], ([], []))
            places.append(place)
            tensors.append(scalings)
        return found


def _classifier(config: XLoraConfig, width: int, classes: int, **like: Any) -> nn.Sequential:
    widths = [width, *[config.xlora_size] * (config.xlora_depth - 1)]
    parts: list[nn.Module] = []
    for inner, outer in pairwise(widths):
        parts += [nn.Linear(inner, outer, **like), nn.ReLU()]
        if config.xlora_dropout_p > 0:
            parts.append(nn.Dropout(config.xlora_dropout_p))
    return nn.Sequential(*parts, nn.Linear(widths[-1], classes, **like))
