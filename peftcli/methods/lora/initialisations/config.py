"""The names of LoRA's initialisations, and their settings. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from peftcli.methods.lora.config import LoraConfig

Name = Literal["gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "mica", "eva", "corda", "lora_ga", "loftq"]
"""PEFT's names. The number of pissa_niter_16 may be another."""
FAST_PISSA = re.compile(r"pissa_niter_(\d{1,4})")
_DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
_SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class EvaConfig:
    """Settings of init_lora_weights: eva."""

    rho: float = 2.0
    """A layer gets at most rho times its r when r moves between layers. 1: every layer keeps its r."""
    tau: float = 0.99
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
class CordaConfig:
    """Settings of init_lora_weights: corda."""

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


@dataclass
class LoraGAConfig:
    """Settings of init_lora_weights: lora_ga."""

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    """Which of the gradient's 2r leading directions A and B get. ArB2r: A the first r, B the others; A2rBr: the
    reverse; ArBr: in turn; random: drawn."""
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    """Size of the start. stable: out_features ** 0.25 / sqrt(stable_gamma); weight_svd: by the weight's singular
    values; gd_scale: 1 / scaling; unit: 1."""
    stable_gamma: int = 16
    """Larger starts smaller."""


@dataclass
class LoftQConfig:
    """Settings of init_lora_weights: loftq over a base model that is not quantised."""

    loftq_bits: int = 4
    """Round the weights to so many bits: 4 as NF4, 8 as integers."""
    loftq_iter: int = 1
    """How often to round the weights and compute B A, each anew from the other."""


SECTIONS = {"eva": "eva_config", "corda": "corda_config", "lora_ga": "lora_ga_config", "loftq": "loftq_config"}
"""Initialisation -> the field of its settings."""
FROM_DATA = ("eva", "corda", "lora_ga")
"""The initialisations that read training data."""


def is_residual(init: bool | str) -> bool:
    """Return whether B A is not zero at the start, so that the layer subtracts that product."""
    return init in ("pissa", "olora", "corda", "lora_ga") or FAST_PISSA.fullmatch(str(init)) is not None


def init_problems(config: LoraConfig) -> list[tuple[str, str]]:
    """Return the problems of ``init_lora_weights`` and its settings: ``(key, message)`` each."""
    init, names = config.init_lora_weights, get_args(Name)
    found: list[tuple[str, str]] = []
    if not isinstance(init, bool) and init not in names and not FAST_PISSA.fullmatch(init):
        return [("init_lora_weights", f"{init!r} is not supported; true, false, {', '.join(names)}")]
    for name, section in SECTIONS.items():
        if init != name and getattr(config, section) is not None:
            found.append((section, f"means nothing without init_lora_weights: {name}"))
    if init == "orthogonal" and any(r % 2 for r in (config.r, *config.rank_pattern.values())):
        found.append(("r", "must be even for init_lora_weights: orthogonal"))
    if config.target_parameters and init not in (True, False, "gaussian"):
        found.append(("target_parameters", f"does not go with init_lora_weights: {init}"))
    if config.use_dora and init == "loftq":
        found.append(("use_dora", "does not go with init_lora_weights: loftq"))
    eva = config.eva_config
    if eva and eva.rho < 1:
        found.append(("eva_config.rho", f"must be at least 1, not {eva.rho}"))
    if eva and not 0 <= eva.tau <= 1:
        found.append(("eva_config.tau", f"must be in [0, 1], not {eva.tau}"))
    return found + _choice_problems(config)


def _choice_problems(config: LoraConfig) -> list[tuple[str, str]]:
    found = []
    if corda := config.corda_config:
        found += _one_of("corda_config.corda_method", corda.corda_method, ("ipm", "kpm"))
        if corda.use_float16_for_covariance:
            found.append(("corda_config.use_float16_for_covariance", "is not supported: squares overflow in float16"))
    if ga := config.lora_ga_config:
        found += _one_of("lora_ga_config.direction", ga.direction, _DIRECTIONS)
        found += _one_of("lora_ga_config.scale", ga.scale, _SCALES)
        if ga.stable_gamma <= 0:
            found.append(("lora_ga_config.stable_gamma", f"must be above 0, not {ga.stable_gamma}"))
    return found


def _one_of(key: str, value: object, known: tuple[object, ...]) -> list[tuple[str, str]]:
    names = ", ".join(map(str, known))
    return [] if value in known else [(key, f"must be one of {names}, not {value!r}")]
