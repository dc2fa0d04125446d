"""Arrow: routing among LoRA adapters, without training (https://arxiv.org/abs/2405.11157).

The router is an adapter of its own, without weights. In each layer it compares every token with the direction that each
expert, another LoRA on the layer, reads most from, and adds up the updates of those that fit best. With GenKnowSub
(https://aclanthology.org/2025.acl-short.54) it takes the average of general adapters away from every expert. The
experts themselves stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peftcli.core.layer import AdapterLayer, adapter_layers, base_module, version_of
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear

_KEY = "arrow_config"
_STEPS, _SMALL = 15, 1e-8
"""Of the power iteration that finds a direction, as PEFT has them: it stops before it has converged."""


class ArrowLayer(AdapterLayer):
    """``y = W x + sum of c_e scaling_e B_e A_e x`` over experts e, with ``c: (tokens, E)`` a softmax of the best k."""

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer)
        assert config.arrow_config
        if not config.arrow_config.task_adapter_names:
            raise AdapterError("routes among adapters that the model holds; create_arrow_model makes it", key=_KEY)
        self.name, self.settings = name, config.arrow_config
        self.experts: dict[str, LoraLinear] = {}
        """The other LoRA layers over the same module, by their adapter, found at each call of the model."""
        self.found: tuple[object, torch.Tensor] | None = None
        """The experts' directions (E, in), and the state of their weights that they belong to."""

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, scaling = self._weights()
        if self.settings.top_k > len(a):
            raise AdapterError(f"{self.settings.top_k} of {len(a)} experts cannot be chosen", key=f"{_KEY}.top_k")
        tokens = x.reshape(-1, x.shape[-1]).to(a.dtype)
        fit = (tokens @ self._directions(a, b).T).abs()
        best, places = fit.topk(self.settings.top_k, dim=1)
        scores = torch.full_like(fit, -torch.inf).scatter(1, places, best)
        shares = (scores / self.settings.router_temperature).softmax(1) * scaling
        z = torch.einsum("ti,eri->ter", tokens, a) * shares.unsqueeze(-1)
        return y + torch.einsum("ter,eor->to", z, b).view(*y.shape).to(y.dtype)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the experts' A (E, r, in) and B (E, out, r), general knowledge taken away, and their scaling (E,)."""
        general = self.settings.gks_adapter_names or []
        tasks = [layer for name, layer in self.experts.items() if name not in general]
        shapes = {(layer.lora_A.weight.shape, layer.lora_B.weight.shape) for layer in self.experts.values()}
        if len(shapes) != 1 or not tasks:
            raise AdapterError(f"the experts on {self.name} must be there and of one r", key=_KEY)
        a = torch.stack([layer.lora_A.weight for layer in tasks])
        b = torch.stack([layer.lora_B.weight for layer in tasks])
        if self.settings.use_gks:
            known = [layer for name, layer in self.experts.items() if name in general]
            a = a - torch.stack([layer.lora_A.weight for layer in known]).mean(0)
            b = b - torch.stack([layer.lora_B.weight for layer in known]).mean(0)
        return a, b, torch.tensor([layer.scaling for layer in tasks], device=a.device, dtype=a.dtype)

    @torch.no_grad()
    def _directions(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return the direction of the inputs that each expert's ``B A`` stretches most: (E, in), of any sign."""
        weights = [part.weight for expert in self.experts.values() for part in (expert.lora_A, expert.lora_B)]
        state = [(id(weight), version_of(weight)) for weight in weights]
        if self.found is None or self.found[0] != state:
            self.found = state, torch.stack([self._strongest(*pair) for pair in zip(a, b, strict=True)])
        return self.found[1]

    def _strongest(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        wide, square = a.float(), b.float().T @ b.float()
        generator = torch.Generator(a.device).manual_seed(self.settings.rng_seed or 0)
        v = torch.randn(wide.shape[1], generator=generator, device=a.device)
        for _ in range(_STEPS + 1):
            v = v / (v.norm() + _SMALL)
            last, v = v, wide.T @ (square @ (wide @ v))
        return last.to(a.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        raise AdapterError("Cannot merge an active Arrow router adapter", key=_KEY)


def find_experts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the routers, before a call of the model, which other LoRA layers are over their modules."""
    layers = list(adapter_layers(model).values())
    experts: dict[nn.Module, dict[str, LoraLinear]] = {}
    for layer in reversed(layers):  # the innermost, which came first, before the others
        if isinstance(layer, LoraLinear):
            experts.setdefault(base_module(layer), {})[layer.adapter] = layer
    for layer in layers:
        if isinstance(layer, ArrowLayer):
            layer.experts = experts.get(base_module(layer), {})
