"""PEFT's names over the core, so that code written for PEFT runs with its import changed."""

from peftcli.peft_api.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from peftcli.peft_api.config import (
    MultitaskPromptTuningInit,
    PeftConfig,
    PeftType,
    PromptEncoderReparameterizationType,
    PromptTuningInit,
    TaskType,
)
from peftcli.peft_api.functional import inject_adapter_in_model
from peftcli.peft_api.functions import (
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_gradient_checkpointing,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from peftcli.peft_api.initialisations import (
    create_loraplus_optimizer,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from peftcli.peft_api.model import PeftModel
from peftcli.peft_api.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from peftcli.peft_api.task_models import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

__all__ = [
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
    "TunerLayerStatus",
    "TunerModelStatus",
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
]
