"""MonteCLoRA: Monte Carlo Low-Rank Adaptation (https://arxiv.org/abs/2411.04358).

While training, A is the weighted average of samples around it. How far they spread and how much each counts is trained,
under a penalty on the distance from the priors. Afterwards the layer is a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.methods._delta import factory_kwargs
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import LoraLinear
from peftcli.methods.lora.variants import MontecloraConfig

_LEAST_VARIANCE, _LEAST_SHARE = 1e-3, 1e-6


class Sampler(nn.Module):
    """How far the samples of A spread, ``std_prior: (r,)``, and their shares, ``expert_weights_prior: (n,)``.

    Both are logarithms. The file also holds the variances (r, r) and shares (n,) of the last step.
    """

    gaussian_var_prior: torch.Tensor
    expert_weights: torch.Tensor

    def __init__(self, r: int, config: MontecloraConfig, **place: Any):
        super().__init__()
        self.config, count = config, config.num_samples
        self.std_prior = nn.Parameter(torch.rand(r, **place))
        self.expert_weights_prior = nn.Parameter(torch.rand(count, **place))
        self.register_buffer("gaussian_var_prior", torch.eye(r, **place))
        self.register_buffer("expert_weights", torch.full((count,), 1 / count, **place))
        self.drawn: tuple[torch.Tensor, torch.Tensor] | None = None
        """Random numbers of the last step, for its penalty: chi-square (r,) and normal (n,)."""

    def draw(self, inputs: int) -> torch.Tensor:
        """Return noise for A, averaged over the samples: (r, in)."""
        r, count, like = len(self.std_prior), len(self.expert_weights_prior), self.std_prior
        # the diagonal of a Wishart matrix with r degrees of freedom and scale 1
        spread = torch.randn(r, r, device=like.device, dtype=like.dtype).square().sum(0)
        shares = torch.randn(count, device=like.device, dtype=like.dtype)
        noise = torch.randn(count, inputs, r, device=like.device, dtype=like.dtype)
        return self.noise_of(spread, shares, noise)

    def noise_of(self, spread: torch.Tensor, shares: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return the same from the random numbers: chi-square (r,), normal (n,) and normal (n, in, r)."""
        self.drawn = spread, shares
        variance, weights = self._variance(spread), self._weights(shares)
        with torch.no_grad():
            self.gaussian_var_prior.copy_(torch.diag(variance))
            self.expert_weights.copy_(weights)
        return torch.einsum("n,nir->ri", weights, noise) * (self.config.sample_scaler * variance.sqrt()).unsqueeze(1)

    def penalty(self) -> torch.Tensor:
        """Return the distances from the priors at the last step, weighted: a scalar."""
        r, count, log_std = len(self.std_prior), len(self.expert_weights_prior), self.std_prior
        alpha = self.expert_weights_prior.exp()
        prior = torch.full_like(alpha, self.config.dirichlet_prior)
        total = alpha.sum()
        of_shares = total.lgamma() - prior.sum().lgamma() + (alpha.lgamma() - prior.lgamma()).sum()
        of_shares = of_shares + ((alpha - prior) * (alpha.digamma() - total.digamma())).sum()
        of_spread = 0.5 * (r * ((2 * log_std).exp() - 2 * log_std).sum() - r**2)
        variance = self.gaussian_var_prior.diag() if self.drawn is None else self._variance(self.drawn[0])
        of_samples = 0.5 * count * ((variance - variance.log()).sum() - r)
        distance = self.config.kl_loss_weight * (of_shares + of_spread + of_samples)
        if not self.config.use_entropy:
            return distance
        weights = self.expert_weights if self.drawn is None else self._weights(self.drawn[1])
        return distance + weights.square().sum()

    def _variance(self, spread: torch.Tensor) -> torch.Tensor:
        return ((2 * self.std_prior).exp() * spread).clamp(min=_LEAST_VARIANCE)

    def _weights(self, shares: torch.Tensor) -> torch.Tensor:
        """Return the samples' shares (n,): a Dirichlet distribution, as a normal one of the logarithms."""
        count, alpha = len(shares), self.expert_weights_prior.exp().clamp(min=_LEAST_SHARE)
        variance = (1 / alpha * (1 - 2 / count) + (1 / alpha).sum() / count**2).clamp(min=_LEAST_SHARE) + _LEAST_SHARE
        return (variance.sqrt() * shares + alpha.log() - alpha.log().mean()).softmax(-1)


class MontecloraLinear(LoraLinear):
    """A linear layer whose A is sampled while training."""

    fixed = ("lora_monteclora_sampler.gaussian_var_prior", "lora_monteclora_sampler.expert_weights")

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        assert config.monteclora_config
        self.lora_monteclora_sampler = Sampler(self.r, config.monteclora_config, **factory_kwargs(base_layer))

    def update(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().update(x)
        a = self.lora_A.weight + self.lora_monteclora_sampler.draw(self.view.in_features)
        return self.scaling * self.lora_B(F.linear(x, a))


def penalty(layers: Iterable[AdapterLayer]) -> torch.Tensor | None:
    """Return the mean over the MonteCLoRA layers among these that train of what they add to the loss, or None."""
    trained = [layer for layer in layers if isinstance(layer, MontecloraLinear) and layer.training]
    parts = [layer.lora_monteclora_sampler.penalty() for layer in trained]
    return torch.stack(parts).mean() if parts else None
