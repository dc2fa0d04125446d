"""How LoRA's A and B start.

start.py has the starts that need no data: drawn, or computed from the base weight. Each of the others has its own
file, and the settings of all are here. None changes the base weight: where ``B A`` is not zero at the start, the layer
subtracts that product (residual.py). No torch here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from peftcli.guard.ranges import ABOVE_0, AT_LEAST_1, FRACTION
from peftcli.methods._settings import Problems, Section, not_one_of

Name = Literal["gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "mica", "eva", "corda", "lora_ga", "loftq"]
"""PEFT's names. The number of pissa_niter_16 may be another."""
FAST_PISSA = re.compile(r"pissa_niter_(\d{1,4})")


@dataclass
class EvaConfig(Section):
    """Settings of init_lora_weights: eva."""

    key = "eva_config"

    rho: float = field(default=2.0, metadata=AT_LEAST_1)
    """A layer gets at most rho times its r when r moves between layers. 1: every layer keeps its r."""
    tau: float = field(default=0.99, metadata=FRACTION)
    """Stop when the directions of two steps are this similar, by their cosine."""
    use_label_mask: bool = True
    """Look only at positions whose label counts in the loss."""
    label_mask_value: int = -100
    """The label of a position that does not count."""
    whiten: bool = False
    """Divide each direction by the root of its singular value."""
    adjust_scaling_factors: bool = True
    """Let lora_alpha grow and shrink with a layer's r, so that the update keeps its strength."""


@dataclass
class CordaConfig(Section):
    """Settings of init_lora_weights: corda."""

    key = "corda_config"

    cache_file: str | None = field(default=None, metadata={"recipe": False})
    """Where ``preprocess_corda`` keeps the covariances for the next time, in safetensors."""
    covariance_file: str | None = field(default=None, metadata={"recipe": False})
    """The same."""
    corda_method: Literal["ipm", "kpm"] = "ipm"
    """ipm: train the directions that matter most for the data. kpm: those that matter least, which keeps what the
    model knows about it."""
    verbose: bool = field(default=False, metadata={"recipe": False})
    """Changes nothing here."""
    use_float16_for_covariance: bool = field(default=False, metadata={"recipe": False})
    """Not supported: sums of squares overflow in float16."""
    prune_temporary_fields: bool = field(default=True, metadata={"recipe": False})
    """Changes nothing here: nothing temporary is kept."""

    def problems(self) -> Problems:
        wrong = self.use_float16_for_covariance
        return [("use_float16_for_covariance", "is not supported: squares overflow in float16")] * wrong


@dataclass
class LoraGAConfig(Section):
    """Settings of init_lora_weights: lora_ga."""

    key = "lora_ga_config"

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which of the gradient's 2r leading directions A and B get. ArB2r: A the first r, B the others; A2rBr: the
    reverse; ArBr: in turn; random: drawn."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """Size of the start. stable: out_features ** 0.25 / sqrt(stable_gamma); weight_svd: by the weight's singular
    values; gd_scale: 1 / scaling; unit: 1."""
    stable_gamma: int = field(default=16, metadata=ABOVE_0)
    """Larger starts smaller."""


@dataclass
class LoftQConfig(Section):
    """Settings of init_lora_weights: loftq over a base model that is not quantised."""

    key = "loftq_config"

    loftq_bits: int = 4
    """Round the weights to so many bits: 4 as NF4, 8 as integers."""
    loftq_iter: int = field(default=1, metadata=AT_LEAST_1)
    """How often to round the weights and compute B A, each anew from the other."""

    def problems(self) -> Problems:
        return not_one_of(self, "loftq_bits", 4, 8)


SECTIONS = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config", "loftq": "loftq_config"}
"""Initialisation -> the field of its settings."""
FROM_DATA = ("eva", "corda", "lora_ga")
"""The initialisations that read training data."""
ON_EVERY_LAYER = (True, False, "gaussian")
"""The initialisations of every kind of layer, and of fused experts."""


def is_residual(init: bool | str) -> bool:
    """Return whether B A is not zero at the start, so that the layer subtracts that product."""
    return init in ("pissa", "olora", "corda", "lora_ga") or FAST_PISSA.fullmatch(str(init)) is not None
