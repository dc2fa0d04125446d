"""The table of methods. Readable without torch: a method's config module is imported on demand.

A new method is one folder (``config.py`` without torch, ``layers.py`` with it), one row here and one recipe.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

from peftcli.core import config_classes
from peftcli.core.config import FAMILY_TARGETS, AdapterConfig
from peftcli.core.protocols import LAYERS
from peftcli.methods._families import FAMILIES


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    config: str
    """Config class, as ``module:Class`` below peftcli.methods."""
    layers: str
    """Layers module below peftcli.methods: see ``core.protocols``. Imported when the first model is adapted."""
    peft_type: str
    """The method's name in adapter_config.json."""
    title: str
    """The method's name in a sentence."""
    summary: str
    paper: str
    peft_generates: bool = True
    """Whether PEFT, too, generates the right text with such an adapter."""

    def config_class(self) -> type[AdapterConfig]:
        """The method's config class. Imports no torch."""
        return getattr(importlib.import_module(f"peftcli.methods.{self.config_place}"), self.config_name)

    @property
    def config_place(self) -> str:
        """The config class's module below peftcli.methods."""
        return self.config.partition(":")[0]

    @property
    def config_name(self) -> str:
        """The config class's name."""
        return self.config.partition(":")[2]


METHODS: dict[str, Method] = {
    "lora": Method(
        "lora.config:LoraConfig",
        "lora.layers",
        "LORA",
        "LoRA",
        "a low-rank update beside chosen layers",
        "https://arxiv.org/abs/2106.09685",
    ),
    "adalora": Method(
        "adalora.config:AdaLoraConfig",
        "adalora.layers",
        "ADALORA",
        "AdaLoRA",
        "LoRA that moves its budget to the layers that need it",
        "https://arxiv.org/abs/2303.10512",
    ),
    "vera": Method(
        "vera.config:VeraConfig",
        "vera.layers",
        "VERA",
        "VeRA",
        "trained vectors around two random matrices that all layers share",
        "https://arxiv.org/abs/2310.11454",
    ),
    "randlora": Method(
        "randlora.config:RandLoraConfig",
        "randlora.layers",
        "RANDLORA",
        "RandLoRA",
        "a full-rank update from random bases that all layers share",
        "https://arxiv.org/abs/2502.00987",
    ),
    "vblora": Method(
        "vblora.config:VBLoRAConfig",
        "vblora.layers",
        "VBLORA",
        "VB-LoRA",
        "LoRA put together from a bank of vectors that all layers share",
        "https://arxiv.org/abs/2405.15179",
    ),
    "unilora": Method(
        "unilora.config:UniLoraConfig",
        "unilora.layers",
        "UNILORA",
        "Uni-LoRA",
        "LoRA whose every number is one of a single trained vector",
        "https://arxiv.org/abs/2506.00799",
    ),
    "fourierft": Method(
        "fourierft.config:FourierFTConfig",
        "fourierft.layers",
        "FOURIERFT",
        "FourierFT",
        "a few trained places in the update's Fourier spectrum",
        "https://arxiv.org/abs/2405.03003",
    ),
    "waveft": Method(
        "waveft.config:WaveFTConfig",
        "waveft.layers",
        "WAVEFT",
        "WaveFT",
        "a few trained wavelet coefficients of the update",
        "https://arxiv.org/abs/2505.12532",
    ),
    "c3a": Method(
        "c3a.config:C3AConfig",
        "c3a.layers",
        "C3A",
        "C3A",
        "an update of circulant blocks",
        "https://arxiv.org/abs/2407.19342",
    ),
    "miss": Method(
        "miss.config:MissConfig",
        "miss.layers",
        "MISS",
        "MiSS",
        "one block that is repeated along a layer's inputs",
        "https://arxiv.org/abs/2409.15371",
    ),
    "shira": Method(
        "shira.config:ShiraConfig",
        "shira.layers",
        "SHIRA",
        "SHiRA",
        "a few numbers of each weight, at random places",
        "https://arxiv.org/abs/2406.13175",
    ),
    "hira": Method(
        "hira.config:HiraConfig",
        "hira.layers",
        "HIRA",
        "HiRA",
        "the base weight times a low-rank factor, number by number",
        "https://openreview.net/forum?id=TwJrTz9cRS",
    ),
    "delora": Method(
        "delora.config:DeloraConfig",
        "delora.layers",
        "DELORA",
        "DeLoRA",
        "LoRA whose directions and strength train apart",
        "https://arxiv.org/abs/2503.18225",
    ),
    "gralora": Method(
        "gralora.config:GraloraConfig",
        "gralora.layers",
        "GRALORA",
        "GraLoRA",
        "a LoRA for each block of a weight",
        "https://arxiv.org/abs/2505.20355",
    ),
    "ia3": Method(
        "ia3.config:IA3Config",
        "ia3.layers",
        "IA3",
        "(IA)^3",
        "a trained factor for each output or input of chosen layers",
        "https://arxiv.org/abs/2205.05638",
    ),
    "loha": Method(
        "loha.config:LoHaConfig",
        "loha.layers",
        "LOHA",
        "LoHa",
        "an update that is two low-rank ones multiplied number by number",
        "https://arxiv.org/abs/2108.06098",
    ),
    "lokr": Method(
        "lokr.config:LoKrConfig",
        "lokr.layers",
        "LOKR",
        "LoKr",
        "an update that is the Kronecker product of two small matrices",
        "https://arxiv.org/abs/2309.14859",
    ),
    "ln_tuning": Method(
        "ln_tuning.config:LNTuningConfig",
        "ln_tuning.layers",
        "LN_TUNING",
        "LN tuning",
        "the norms trained in full, and nothing else",
        "https://arxiv.org/abs/2312.11420",
    ),
    "oft": Method(
        "oft.config:OFTConfig",
        "oft.layers",
        "OFT",
        "OFT",
        "a rotation of blocks of each layer's inputs",
        "https://arxiv.org/abs/2306.07280",
    ),
    "boft": Method(
        "boft.config:BOFTConfig",
        "boft.layers",
        "BOFT",
        "BOFT",
        "a rotation of each layer's inputs, in butterfly factors",
        "https://arxiv.org/abs/2311.06243",
    ),
    "hra": Method(
        "hra.config:HRAConfig",
        "hra.layers",
        "HRA",
        "HRA",
        "a few reflections of each layer's inputs",
        "https://arxiv.org/abs/2405.17484",
    ),
    "psoft": Method(
        "psoft.config:PsoftConfig",
        "psoft.layers",
        "PSOFT",
        "PSOFT",
        "a rotation of each weight's principal directions",
        "https://arxiv.org/abs/2505.11235",
    ),
    "lily": Method(
        "lily.config:LilyConfig",
        "lily.layers",
        "LILY",
        "Lily",
        "LoRA whose matrices layers share and mix as the input asks",
        "https://arxiv.org/abs/2407.09946",
    ),
    "tinylora": Method(
        "tinylora.config:TinyLoraConfig",
        "tinylora.layers",
        "TINYLORA",
        "TinyLoRA",
        "a handful of numbers that mix each weight's principal directions",
        "https://arxiv.org/abs/2602.04118",
    ),
    "pvera": Method(
        "pvera.config:PveraConfig",
        "pvera.layers",
        "PVERA",
        "PVeRA",
        "VeRA whose bottleneck is drawn at random in training",
        "https://arxiv.org/abs/2512.07703",
    ),
    "frod": Method(
        "frod.config:FrodConfig",
        "frod.layers",
        "FROD",
        "FRoD",
        "scales and sparse rotations in a basis that layers share",
        "https://arxiv.org/abs/2512.23485",
    ),
    "peanut": Method(
        "peanut.config:PeanutConfig",
        "peanut.layers",
        "PEANUT",
        "PEANuT",
        "a small network that makes the update from the base weight",
        "https://arxiv.org/abs/2410.01870",
    ),
    "deft": Method(
        "deft.config:DeftConfig",
        "deft.layers",
        "DEFT",
        "DEFT",
        "a few directions taken from the weight and given back new",
        "https://arxiv.org/abs/2509.22793",
    ),
    "supertuning": Method(
        "supertuning.config:SupertuningConfig",
        "supertuning.layers",
        "SUPERTUNING",
        "Super-Tuning",
        "the largest numbers of each weight",
        "https://arxiv.org/abs/2607.09287",
    ),
    "adamss": Method(
        "adamss.config:AdamssConfig",
        "adamss.layers",
        "ADAMSS",
        "AdaMSS",
        "a small update for each group of outputs, through each weight's principal directions",
        "https://neurips.cc/virtual/2025/poster/119606",
    ),
    "poly": Method(
        "poly.config:PolyConfig",
        "poly.layers",
        "POLY",
        "Poly",
        "a few low-rank updates that tasks mix in shares of their own",
        "https://arxiv.org/abs/2202.13914",
    ),
    "trainable_tokens": Method(
        "trainable_tokens.config:TrainableTokensConfig",
        "trainable_tokens.layers",
        "TRAINABLE_TOKENS",
        "trainable tokens",
        "chosen rows of the embedding, and of a head that shares them",
        "https://huggingface.co/docs/peft/package_reference/trainable_tokens",
    ),
    "beft": Method(
        "beft.config:BeftConfig",
        "beft.layers",
        "BEFT",
        "BEFT",
        "a trained bias for the attention's values",
        "https://arxiv.org/abs/2509.15974",
    ),
    "road": Method(
        "road.config:RoadConfig",
        "road.layers",
        "ROAD",
        "RoAd",
        "pairs of each layer's outputs turned and scaled",
        "https://arxiv.org/abs/2409.00119",
    ),
    "glora": Method(
        "glora.config:GloraConfig",
        "glora.layers",
        "GLORA",
        "GLoRA",
        "weights and biases, each scaled and shifted by small trained parts",
        "https://arxiv.org/abs/2306.07967",
    ),
    "osf": Method(
        "osf.config:OSFConfig",
        "osf.layers",
        "OSF",
        "OSF",
        "the weaker singular directions of each weight, trained apart from the stronger",
        "https://arxiv.org/abs/2504.07097",
    ),
    "adaption_prompt": Method(
        "adaption_prompt.config:AdaptionPromptConfig",
        "adaption_prompt.layers",
        "ADAPTION_PROMPT",
        "LLaMA-Adapter",
        "trained vectors that the last layers attend to, through a gate that starts closed",
        "https://arxiv.org/abs/2303.16199",
    ),
    "prompt_tuning": Method(
        "prompt_tuning.config:PromptTuningConfig",
        "prompt_tuning.layers",
        "PROMPT_TUNING",
        "prompt tuning",
        "trained virtual tokens before the input",
        "https://arxiv.org/abs/2104.08691",
        peft_generates=False,  # on transformers 5 it repeats the virtual tokens at each generated token
    ),
    "multitask_prompt_tuning": Method(
        "multitask_prompt_tuning.config:MultitaskPromptTuningConfig",
        "multitask_prompt_tuning.layers",
        "MULTITASK_PROMPT_TUNING",
        "multitask prompt tuning",
        "virtual tokens that tasks share, with a factor for each task",
        "https://arxiv.org/abs/2303.02861",
        peft_generates=False,
    ),
    "p_tuning": Method(
        "p_tuning.config:PromptEncoderConfig",
        "p_tuning.layers",
        "P_TUNING",
        "p-tuning",
        "virtual tokens that a small network makes while they train",
        "https://arxiv.org/abs/2103.10385",
        peft_generates=False,
    ),
    "prefix_tuning": Method(
        "prefix_tuning.config:PrefixTuningConfig",
        "prefix_tuning.layers",
        "PREFIX_TUNING",
        "prefix tuning",
        "trained keys and values before those of every attention layer",
        "https://arxiv.org/abs/2101.00190",
        peft_generates=False,
    ),
    "cpt": Method(
        "cpt.config:CPTConfig",
        "cpt.layers",
        "CPT",
        "CPT",
        "example tokens before the input, whose vectors train within a bound",
        "https://arxiv.org/abs/2410.17222",
        peft_generates=False,
    ),
    "cartridge": Method(
        "cartridge.config:CartridgeConfig",
        "cartridge.layers",
        "CARTRIDGE",
        "cartridge",
        "keys and values of a document, trained on, before those of every attention layer",
        "https://arxiv.org/abs/2506.06266",
        peft_generates=False,
    ),
    "xlora": Method(
        "xlora.config:XLoraConfig",
        "xlora.layers",
        "XLORA",
        "X-LoRA",
        "several trained LoRA adapters, mixed for each token by a classifier",
        "https://arxiv.org/abs/2402.07148",
    ),
}


NOT_HERE: dict[str, str] = {
    "SHADOW": "it trains a second model beside the base model",
}
"""PEFT's methods that peftcli does not have: name in adapter_config.json -> why."""


PeftType: Any = cast("Any", config_classes.NameEnum)(
    "PeftType", {row.peft_type: row.peft_type for row in METHODS.values()}
)
"""PEFT's names of the methods."""

_PROMPTS = ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "cartridge")

TUNER_MODELS = {
    row.config_name.replace("Config", "Model"): name for name, row in METHODS.items() if name not in _PROMPTS
}
"""PEFT's name of the class that holds a model with adapters of a method -> the method. Soft prompts have none."""

FAMILY_TARGETS.update(FAMILIES)
LAYERS.update({row.peft_type: f"{__name__}.{row.layers}" for row in METHODS.values()})
config_classes.CONFIGS.update({PeftType[row.peft_type]: row.config_class for row in METHODS.values()})
config_classes.NOT_HERE.update(NOT_HERE)


def config_from_dict(values: dict[str, Any], file: str | None = None) -> AdapterConfig:
    """The config that an ``adapter_config.json`` object describes.

    Raises:
        AdapterError: no such method, or its settings cannot be read.
    """
    return config_classes.config_class(values, file).from_dict(values, file)
