"""Fine-tune large pretrained models by training few parameters."""

from __future__ import annotations

import importlib
from typing import Any

from peftcli.methods import METHODS

_PLACES = {
    **{row.config_name: f"peftcli.methods.{row.config_place}" for row in METHODS.values()},
    "inject": "peftcli.core.inject",
    "disabled": "peftcli.core.inject",
    "unload": "peftcli.core.inject",
    "adapter_state": "peftcli.core.weights",
    "load_state": "peftcli.core.weights",
    "save_adapter": "peftcli.core.files",
    "load_adapter": "peftcli.core.files",
    **dict.fromkeys(
        (
            "AutoPeftModel",
            "AutoPeftModelForCausalLM",
            "AutoPeftModelForFeatureExtraction",
            "AutoPeftModelForQuestionAnswering",
            "AutoPeftModelForSeq2SeqLM",
            "AutoPeftModelForSequenceClassification",
            "AutoPeftModelForTokenClassification",
            "MultitaskPromptTuningInit",
            "PeftConfig",
            "PeftModel",
            "PeftModelForCausalLM",
            "PeftModelForFeatureExtraction",
            "PeftModelForQuestionAnswering",
            "PeftModelForSeq2SeqLM",
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
            "PeftType",
            "PromptEncoderReparameterizationType",
            "PromptTuningInit",
            "TaskType",
            "create_loraplus_optimizer",
            "get_eva_state_dict",
            "get_layer_status",
            "get_model_status",
            "get_peft_config",
            "get_peft_model",
            "get_peft_model_state_dict",
            "initialize_lora_eva_weights",
            "inject_adapter_in_model",
            "prepare_model_for_gradient_checkpointing",
            "prepare_model_for_kbit_training",
            "preprocess_corda",
            "preprocess_loraga",
            "replace_lora_weights_loftq",
            "set_peft_model_state_dict",
        ),
        "peftcli.peft_api",
    ),
    **dict.fromkeys(
        ("CordaConfig", "EvaConfig", "LoftQConfig", "LoraGAConfig"), "peftcli.methods.lora.initialisations.config"
    ),
}
"""Public name -> the module that holds it; imported when the name is first used, so `import peftcli` loads no torch."""

__all__ = ["__version__", *sorted(_PLACES)]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("peftcli")
    if name not in _PLACES:
        raise AttributeError(f"module 'peftcli' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return __all__
