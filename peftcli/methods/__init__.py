"""The table of methods. Readable without torch: a method's module is imported on demand.

A new method is one folder (``__init__.py``: its settings, without torch; ``layers.py``), one line of the table here
and one recipe.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, cast

from peftcli.core import config as core_config
from peftcli.core.config import COUNT_AFTER_PADDING, READ_PAST_CALLS, USUAL_TARGETS, AdapterConfig
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


_SOFT_PROMPTS = {"prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "cartridge"}
_TABLE = """
lora LoraConfig 2106.09685 LoRA: a low-rank update beside chosen layers
adalora AdaLoraConfig 2303.10512 AdaLoRA: LoRA that moves its budget to the layers that need it
vera VeraConfig 2310.11454 VeRA: trained vectors around two random matrices that all layers share
randlora RandLoraConfig 2502.00987 RandLoRA: a full-rank update from random bases that all layers share
vblora VBLoRAConfig 2405.15179 VB-LoRA: LoRA put together from a bank of vectors that all layers share
unilora UniLoraConfig 2506.00799 Uni-LoRA: LoRA whose every number is one of a single trained vector
fourierft FourierFTConfig 2405.03003 FourierFT: a few trained places in the update's Fourier spectrum
waveft WaveFTConfig 2505.12532 WaveFT: a few trained wavelet coefficients of the update
c3a C3AConfig 2407.19342 C3A: an update of circulant blocks
miss MissConfig 2409.15371 MiSS: one block that is repeated along a layer's inputs
shira ShiraConfig 2406.13175 SHiRA: a few numbers of each weight, at random places
hira HiraConfig https://openreview.net/forum?id=TwJrTz9cRS HiRA: the base weight times a low-rank factor, number by \
number
delora DeloraConfig 2503.18225 DeLoRA: LoRA whose directions and strength train apart
gralora GraloraConfig 2505.20355 GraLoRA: a LoRA for each block of a weight
ia3 IA3Config 2205.05638 (IA)^3: a trained factor for each output or input of chosen layers
loha LoHaConfig 2108.06098 LoHa: an update that is two low-rank ones multiplied number by number
lokr LoKrConfig 2309.14859 LoKr: an update that is the Kronecker product of two small matrices
ln_tuning LNTuningConfig 2312.11420 LN tuning: the norms trained in full, and nothing else
oft OFTConfig 2306.07280 OFT: a rotation of blocks of each layer's inputs
boft BOFTConfig 2311.06243 BOFT: a rotation of each layer's inputs, in butterfly factors
hra HRAConfig 2405.17484 HRA: a few reflections of each layer's inputs
psoft PsoftConfig 2505.11235 PSOFT: a rotation of each weight's principal directions
lily LilyConfig 2407.09946 Lily: LoRA whose matrices layers share and mix as the input asks
tinylora TinyLoraConfig 2602.04118 TinyLoRA: a handful of numbers that mix each weight's principal directions
pvera PveraConfig 2512.07703 PVeRA: VeRA whose bottleneck is drawn at random in training
frod FrodConfig 2512.23485 FRoD: scales and sparse rotations in a basis that layers share
peanut PeanutConfig 2410.01870 PEANuT: a small network that makes the update from the base weight
deft DeftConfig 2509.22793 DEFT: a few directions taken from the weight and given back new
supertuning SupertuningConfig 2607.09287 Super-Tuning: the largest numbers of each weight
adamss AdamssConfig https://neurips.cc/virtual/2025/poster/119606 AdaMSS: a small update for each group of outputs, \
through each weight's principal directions
poly PolyConfig 2202.13914 Poly: a few low-rank updates that tasks mix in shares of their own
trainable_tokens TrainableTokensConfig https://huggingface.co/docs/peft/package_reference/trainable_tokens trainable \
tokens: chosen rows of the embedding, and of a head that shares them
beft BeftConfig 2509.15974 BEFT: a trained bias for the attention's values
road RoadConfig 2409.00119 RoAd: pairs of each layer's outputs turned and scaled
glora GloraConfig 2306.07967 GLoRA: weights and biases, each scaled and shifted by small trained parts
osf OSFConfig 2504.07097 OSF: the weaker singular directions of each weight, trained apart from the stronger
adaption_prompt AdaptionPromptConfig 2303.16199 LLaMA-Adapter: trained vectors that the last layers attend to, \
through a gate that starts closed
prompt_tuning PromptTuningConfig 2104.08691 prompt tuning: trained virtual tokens before the input
multitask_prompt_tuning MultitaskPromptTuningConfig 2303.02861 multitask prompt tuning: virtual tokens that tasks \
share, with a factor for each task
p_tuning PromptEncoderConfig 2103.10385 p-tuning: virtual tokens that a small network makes while they train
prefix_tuning PrefixTuningConfig 2101.00190 prefix tuning: trained keys and values before those of every attention layer
cpt CPTConfig 2410.17222 CPT: example tokens before the input, whose vectors train within a bound
cartridge CartridgeConfig 2506.06266 cartridge: keys and values of a document, trained on, before those of every \
attention layer
xlora XLoraConfig 2402.07148 X-LoRA: several trained LoRA adapters, mixed for each token by a classifier
"""
"""A method a line: its folder, its config class, the paper, and ``title: summary``."""


def read_row(line: str) -> Method:
    """Return the method that a line of the table describes."""
    name, config_name, source, about = line.split(" ", 3)
    title, summary = about.split(": ", 1)
    return Method(name, config_name, title, summary, source, name in _SOFT_PROMPTS)


METHODS = {row.name: row for row in map(read_row, _TABLE.strip().splitlines())}


NOT_HERE: dict[str, str] = {
    "SHADOW": "it trains a second model beside the base model",
}
"""PEFT's methods that peftcli does not have: name in adapter_config.json -> why."""


PeftType: Any = cast("Any", core_config.NameEnum)(
    "PeftType", {row.peft_type: row.peft_type for row in METHODS.values()}
)
"""PEFT's names of the methods."""

USUAL_TARGETS.update(_families.TARGETS)
READ_PAST_CALLS.update(_families.READ_PAST_CALLS)
COUNT_AFTER_PADDING.update(_families.COUNT_AFTER_PADDING)
LAYERS.update({row.peft_type: f"{__name__}.{row.name}.layers" for row in METHODS.values()})
core_config.CONFIGS.update({PeftType[row.peft_type]: row.config_class for row in METHODS.values()})
core_config.NOT_HERE.update(NOT_HERE)
CONVERTERS[:] = ["peftcli.adapters.convert"]


def config_from_dict(values: dict[str, Any], file: str | None = None) -> AdapterConfig:
    """The config that an ``adapter_config.json`` object describes.

    Raises:
        AdapterError: no such method, or its settings cannot be read.
    """
    return core_config.config_class(values, file).from_dict(values, file)
