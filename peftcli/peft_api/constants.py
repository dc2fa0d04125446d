"""PEFT's constants and tables."""

from __future__ import annotations

from peftcli.core.config import FAMILY_TARGETS
from peftcli.guard.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from peftcli.methods import METHODS
from peftcli.methods.ia3.config import TARGETS
from peftcli.peft_api.config import PeftType
from peftcli.peft_api.model import PeftModel
from peftcli.peft_api.tuner import Tuner
from peftcli.peft_api.tuner_models import TUNER_CLASSES

CONFIG_NAME = CONFIG_FILE
SAFETENSORS_WEIGHTS_NAME = WEIGHTS_FILE
WEIGHTS_NAME = "adapter_model.bin"
"""The pickle, which is not read here."""
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = FAMILY_TARGETS
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = {name: [*outer, *inner] for name, (outer, inner) in TARGETS.items()}
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {name: inner for name, (_, inner) in TARGETS.items()}
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, object] = {}
"""Families whose cache has a layout of its own: none, in the versions of transformers that peftcli runs with."""

MODEL_TYPE_TO_PEFT_MODEL_MAPPING = PeftModel.task_classes
PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType(row.peft_type): row.config_class() for row in METHODS.values()}
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type] = {
    **dict.fromkeys(PEFT_TYPE_TO_CONFIG_MAPPING, Tuner),
    **{PeftType(each.peft_type): each for each in TUNER_CLASSES.values()},
}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = PEFT_TYPE_TO_TUNER_MAPPING
"""All methods: adapters of any of them can be in one model."""
