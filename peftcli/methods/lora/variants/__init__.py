"""LoRA's variants, one file for each, and the settings of all. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1
from peftcli.methods._settings import Problems, Section

VARIANTS = (
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "loftq_config",
)
"""The fields that switch a variant on. They adapt linear layers only, and one layer has one variant."""


@dataclass
class ArrowConfig(Section):
    """Settings of Arrow's router, for ``create_arrow_model``."""

    key = "arrow_config"

    top_k: int = field(default=3, metadata=ABOVE_0)
    """Experts that a token is routed to."""
    router_temperature: float = field(default=1.0, metadata=ABOVE_0)
    """Higher shares a token out more evenly among them."""
    use_gks: bool = False
    """Take the average of general adapters away from every expert (GenKnowSub)."""
    task_adapter_names: list[str] | None = field(default=None, init=False)
    """The experts; ``create_arrow_model`` sets it."""
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    """The general adapters; ``create_arrow_model`` sets it."""
    rng_seed: int | None = None
    """Seed of the search for an expert's direction. None: one that is always the same."""


@dataclass
class BdLoraConfig(Section):
    """Settings of BD-LoRA."""

    key = "use_bdlora"

    target_modules_bd_a: list[str] | None = None
    """Parts of names of modules whose A is block-diagonal: those that the server splits by rows, such as down_proj."""
    target_modules_bd_b: list[str] | None = None
    """Parts of names of modules whose B is block-diagonal: those that the server splits by columns, such as q_proj."""
    nblocks: int = field(default=1, metadata=AT_LEAST_1)
    """Number of blocks: on how many devices the server splits a layer."""
    match_strict: bool = True
    """Refuse modules that neither list names. false: they get a plain LoRA."""

    def problems(self) -> Problems:
        both = sorted({*(self.target_modules_bd_a or ())} & {*(self.target_modules_bd_b or ())})
        return [("target_modules_bd_b", f"{name} is in both lists; block-diagonal are A or B") for name in both[:1]]


@dataclass
class KasaConfig(Section):
    """Settings of KaSA."""

    key = "kasa_config"

    beta: float = field(default=1e-4, metadata=AT_LEAST_0)
    """Weight in the loss of the squared singular values of the update."""
    gamma: float = field(default=1e-3, metadata=AT_LEAST_0)
    """Weight in the loss of how far A's rows and B's columns are from orthonormal."""


@dataclass
class MontecloraConfig(Section):
    """Settings of MonteCLoRA."""

    key = "monteclora_config"

    num_samples: int = field(default=8, metadata=AT_LEAST_1 | {"most": 1024})
    """Samples of A that are drawn and averaged at each step."""
    use_entropy: bool = False
    """Add the sum of the squared weights of the samples to the loss, which keeps one sample from taking over."""
    dirichlet_prior: float = field(default=0.1, metadata=ABOVE_0)
    """Prior of the weights of the samples: larger pulls them together."""
    sample_scaler: float = field(default=1e-4, metadata=AT_LEAST_0)
    """Size of the noise on A. Near 0, training is that of a plain LoRA."""
    kl_loss_weight: float = field(default=1e-5, metadata=AT_LEAST_0)
    """Weight in the loss of the distance from the priors."""
    buffer_size: int = field(default=150, metadata=ABOVE_0)
    """Changes nothing here: noise is drawn when it is needed."""


@dataclass
class VeloraConfig(Section):
    """Settings of VeLoRA."""

    key = "velora_config"

    num_groups: int = field(default=64, metadata=ABOVE_0)
    """Groups that an input is cut into; one number of each is kept for the backward pass. More: a better gradient, and
    more memory."""
    scale: float = field(default=1.0, metadata=ABOVE_0)
    """Factor on the inputs that the backward pass rebuilds."""
    init_type: Literal["batch_average", "batch_average_once", "random"] = "batch_average"
    """The direction that groups are projected on: the average of each batch, that of the first batch, or a random one.
    """
