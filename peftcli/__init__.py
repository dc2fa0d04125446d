"""Fine-tune large pretrained models by training few parameters."""

from __future__ import annotations

import importlib
from typing import Any

from peftcli.methods import METHODS, TUNER_MODELS

_CORE = {
    "peftcli.core.files": ("load_adapter", "save_adapter"),
    "peftcli.core.inject": ("disabled", "inject", "unload"),
    "peftcli.core.weights": ("adapter_state", "load_state"),
}
"""Module -> the public names that it holds."""

_PEFT = {
    "peftcli.errors": ("NoMatchingPeftModuleError", "PeftWarning"),
    "peftcli.methods.lora.config": ("LoraRuntimeConfig",),
    "peftcli.methods.lora.initialisations.config": ("CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig"),
    "peftcli.methods.lora.variant_settings": (
        "ArrowConfig",
        "BdLoraConfig",
        "KasaConfig",
        "MontecloraConfig",
        "VeloraConfig",
    ),
    "peftcli.peft_api.arrow": ("create_arrow_model",),
    "peftcli.peft_api.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "peftcli.peft_api.config": (
        "MultitaskPromptTuningInit",
        "PeftConfig",
        "PeftConfigMixin",
        "PeftError",
        "PeftType",
        "PromptEncoderReparameterizationType",
        "PromptLearningConfig",
        "PromptTuningInit",
        "TaskType",
    ),
    "peftcli.peft_api.constants": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    ),
    "peftcli.peft_api.conversion": ("convert_to_lora", "save_as_lora"),
    "peftcli.peft_api.functional": ("inject_adapter_in_model",),
    "peftcli.peft_api.functions": ("get_peft_config", "get_peft_model"),
    "peftcli.peft_api.helpers": ("find_kappa_target_modules",),
    "peftcli.peft_api.initialisations": (
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "preprocess_corda",
        "preprocess_loraga",
        "replace_lora_weights_loftq",
    ),
    "peftcli.peft_api.kv_prefix": (
        "compose_cartridge_adapters",
        "initialize_kv_prefix_from_past_key_values",
        "initialize_kv_prefix_from_text",
        "prompt_embeddings_from_past_key_values",
    ),
    "peftcli.peft_api.mixed_model": ("PeftMixedModel",),
    "peftcli.peft_api.model": ("PeftModel",),
    "peftcli.peft_api.optimizers": (
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "create_riemannian_optimizer",
    ),
    "peftcli.peft_api.prepare": (
        "cast_mixed_precision_params",
        "prepare_model_for_gradient_checkpointing",
        "prepare_model_for_kbit_training",
        "shift_tokens_right",
    ),
    "peftcli.peft_api.state_dicts": (
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ),
    "peftcli.peft_api.status": ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"),
    "peftcli.peft_api.task_models": (
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
}
"""The same for PEFT's names, but for the config classes of the methods."""

PEFT_NAMES = {
    **{row.config_name: f"peftcli.methods.{row.name}.config" for row in METHODS.values()},
    **dict.fromkeys(TUNER_MODELS, "peftcli.peft_api.tuner_models"),
    **{name: module for module, names in _PEFT.items() for name in names},
}
"""PEFT's public names -> the module that holds it; ``peftcli.peft_api`` has these too."""

_PLACES = {**PEFT_NAMES, **{name: module for module, names in _CORE.items() for name in names}}

__all__ = ["__version__", *sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    """Import a name's module when the name is first used, so that ``import peftcli`` loads no torch."""
    if name == "__version__":
        from importlib.metadata import version

        return version("peftcli")
    if name not in _PLACES:
        raise AttributeError(f"module 'peftcli' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
