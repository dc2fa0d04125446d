"""The table of methods. Readable without torch: a method's module is imported on demand.

A new method is one folder (``__init__.py``: its settings, without torch; ``layers.py``), one row here and one recipe.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from peftcli.core import config as core_config
from peftcli.core.config import FAMILY_TARGETS, AdapterConfig
from peftcli.core.prompts.config import AFTER_PADDING
from peftcli.core.protocols import CONVERTERS, LAYERS
from peftcli.methods import _families


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    """In recipes, and of its folder below peftcli.methods; in capitals, in adapter_config.json."""
    config_name: str
    """The name of its config class."""
    title: str
    """The method's name in a sentence."""
    summary: str
    source: str
    """The paper: its number in arXiv, or the address of another one."""
    soft_prompt: bool = False
    """Whether it puts virtual tokens, or keys and values, before the input's. With such an adapter PEFT generates
    wrong text on transformers 5: it repeats them at each generated token."""

    @property
    def peft_type(self) -> str:
        """The method's name in adapter_config.json."""
        return self.name.upper()

    @property
    def paper(self) -> str:
        """The address of the paper."""
        return self.source if ":" in self.source else f"https://arxiv.org/abs/{self.source}"

    def config_class(self) -> type[AdapterConfig]:
        """The method's config class. Imports no torch."""
        return getattr(importlib.import_module(f"peftcli.methods.{self.name}"), self.config_name)


_soft_prompt = partial(Method, soft_prompt=True)

_ROWS = (
    Method("lora", "LoraConfig", "LoRA", "a low-rank update beside chosen layers", "2106.09685"),
    Method(
        "adalora", "AdaLoraConfig", "AdaLoRA", "LoRA that moves its budget to the layers that need it", "2303.10512"
    ),
    Method(
        "vera", "VeraConfig", "VeRA", "trained vectors around two random matrices that all layers share", "2310.11454"
    ),
    Method(
        "randlora",
        "RandLoraConfig",
        "RandLoRA",
        "a full-rank update from random bases that all layers share",
        "2502.00987",
    ),
    Method(
        "vblora",
        "VBLoRAConfig",
        "VB-LoRA",
        "LoRA put together from a bank of vectors that all layers share",
        "2405.15179",
    ),
    Method(
        "unilora",
        "UniLoraConfig",
        "Uni-LoRA",
        "LoRA whose every number is one of a single trained vector",
        "2506.00799",
    ),
    Method(
        "fourierft",
        "FourierFTConfig",
        "FourierFT",
        "a few trained places in the update's Fourier spectrum",
        "2405.03003",
    ),
    Method("waveft", "WaveFTConfig", "WaveFT", "a few trained wavelet coefficients of the update", "2505.12532"),
    Method("c3a", "C3AConfig", "C3A", "an update of circulant blocks", "2407.19342"),
    Method("miss", "MissConfig", "MiSS", "one block that is repeated along a layer's inputs", "2409.15371"),
    Method("shira", "ShiraConfig", "SHiRA", "a few numbers of each weight, at random places", "2406.13175"),
    Method(
        "hira",
        "HiraConfig",
        "HiRA",
        "the base weight times a low-rank factor, number by number",
        "https://openreview.net/forum?id=TwJrTz9cRS",
    ),
    Method("delora", "DeloraConfig", "DeLoRA", "LoRA whose directions and strength train apart", "2503.18225"),
    Method("gralora", "GraloraConfig", "GraLoRA", "a LoRA for each block of a weight", "2505.20355"),
    Method("ia3", "IA3Config", "(IA)^3", "a trained factor for each output or input of chosen layers", "2205.05638"),
    Method(
        "loha", "LoHaConfig", "LoHa", "an update that is two low-rank ones multiplied number by number", "2108.06098"
    ),
    Method("lokr", "LoKrConfig", "LoKr", "an update that is the Kronecker product of two small matrices", "2309.14859"),
    Method("ln_tuning", "LNTuningConfig", "LN tuning", "the norms trained in full, and nothing else", "2312.11420"),
    Method("oft", "OFTConfig", "OFT", "a rotation of blocks of each layer's inputs", "2306.07280"),
    Method("boft", "BOFTConfig", "BOFT", "a rotation of each layer's inputs, in butterfly factors", "2311.06243"),
    Method("hra", "HRAConfig", "HRA", "a few reflections of each layer's inputs", "2405.17484"),
    Method("psoft", "PsoftConfig", "PSOFT", "a rotation of each weight's principal directions", "2505.11235"),
    Method("lily", "LilyConfig", "Lily", "LoRA whose matrices layers share and mix as the input asks", "2407.09946"),
    Method(
        "tinylora",
        "TinyLoraConfig",
        "TinyLoRA",
        "a handful of numbers that mix each weight's principal directions",
        "2602.04118",
    ),
    Method("pvera", "PveraConfig", "PVeRA", "VeRA whose bottleneck is drawn at random in training", "2512.07703"),
    Method("frod", "FrodConfig", "FRoD", "scales and sparse rotations in a basis that layers share", "2512.23485"),
    Method(
        "peanut", "PeanutConfig", "PEANuT", "a small network that makes the update from the base weight", "2410.01870"
    ),
    Method("deft", "DeftConfig", "DEFT", "a few directions taken from the weight and given back new", "2509.22793"),
    Method("supertuning", "SupertuningConfig", "Super-Tuning", "the largest numbers of each weight", "2607.09287"),
    Method(
        "adamss",
        "AdamssConfig",
        "AdaMSS",
        "a small update for each group of outputs, through each weight's principal directions",
        "https://neurips.cc/virtual/2025/poster/119606",
    ),
    Method("poly", "PolyConfig", "Poly", "a few low-rank updates that tasks mix in shares of their own", "2202.13914"),
    Method(
        "trainable_tokens",
        "TrainableTokensConfig",
        "trainable tokens",
        "chosen rows of the embedding, and of a head that shares them",
        "https://huggingface.co/docs/peft/package_reference/trainable_tokens",
    ),
    Method("beft", "BeftConfig", "BEFT", "a trained bias for the attention's values", "2509.15974"),
    Method("road", "RoadConfig", "RoAd", "pairs of each layer's outputs turned and scaled", "2409.00119"),
    Method(
        "glora",
        "GloraConfig",
        "GLoRA",
        "weights and biases, each scaled and shifted by small trained parts",
        "2306.07967",
    ),
    Method(
        "osf",
        "OSFConfig",
        "OSF",
        "the weaker singular directions of each weight, trained apart from the stronger",
        "2504.07097",
    ),
    Method(
        "adaption_prompt",
        "AdaptionPromptConfig",
        "LLaMA-Adapter",
        "trained vectors that the last layers attend to, through a gate that starts closed",
        "2303.16199",
    ),
    _soft_prompt(
        "prompt_tuning", "PromptTuningConfig", "prompt tuning", "trained virtual tokens before the input", "2104.08691"
    ),
    _soft_prompt(
        "multitask_prompt_tuning",
        "MultitaskPromptTuningConfig",
        "multitask prompt tuning",
        "virtual tokens that tasks share, with a factor for each task",
        "2303.02861",
    ),
    _soft_prompt(
        "p_tuning",
        "PromptEncoderConfig",
        "p-tuning",
        "virtual tokens that a small network makes while they train",
        "2103.10385",
    ),
    _soft_prompt(
        "prefix_tuning",
        "PrefixTuningConfig",
        "prefix tuning",
        "trained keys and values before those of every attention layer",
        "2101.00190",
    ),
    _soft_prompt(
        "cpt", "CPTConfig", "CPT", "example tokens before the input, whose vectors train within a bound", "2410.17222"
    ),
    _soft_prompt(
        "cartridge",
        "CartridgeConfig",
        "cartridge",
        "keys and values of a document, trained on, before those of every attention layer",
        "2506.06266",
    ),
    Method(
        "xlora",
        "XLoraConfig",
        "X-LoRA",
        "several trained LoRA adapters, mixed for each token by a classifier",
        "2402.07148",
    ),
)
METHODS = {row.name: row for row in _ROWS}


NOT_HERE: dict[str, str] = {
    "SHADOW": "it trains a second model beside the base model",
}
"""PEFT's methods that peftcli does not have: name in adapter_config.json -> why."""


PeftType: Any = cast("Any", core_config.NameEnum)("PeftType", {row.peft_type: row.peft_type for row in _ROWS})
"""PEFT's names of the methods."""

FAMILY_TARGETS.update(_families.FAMILIES)
AFTER_PADDING.update(_families.AFTER_PADDING)
LAYERS.update({row.peft_type: f"{__name__}.{row.name}.layers" for row in _ROWS})
core_config.CONFIGS.update({PeftType[row.peft_type]: row.config_class for row in _ROWS})
core_config.NOT_HERE.update(NOT_HERE)
CONVERTERS[:] = ["peftcli.adapters.convert"]


def config_from_dict(values: dict[str, Any], file: str | None = None) -> AdapterConfig:
    """The config that an ``adapter_config.json`` object describes.

    Raises:
        AdapterError: no such method, or its settings cannot be read.
    """
    return core_config.config_class(values, file).from_dict(values, file)
