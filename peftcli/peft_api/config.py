"""PEFT's names of tasks, methods, settings and configs."""

from __future__ import annotations

from enum import Enum

from peftcli.core.config import AdapterConfig
from peftcli.core.config_classes import TaskType as TaskType
from peftcli.core.peft_names.config import PeftConfigMixin as PeftConfigMixin
from peftcli.core.prompts.config import SoftPromptConfig
from peftcli.errors import AdapterError
from peftcli.methods import PeftType as PeftType

PeftConfig = AdapterConfig
PromptLearningConfig = SoftPromptConfig
PeftError = AdapterError


class PromptTuningInit(str, Enum):
    """How virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(str, Enum):
    """How the virtual tokens of several tasks start."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(str, Enum):
    """What makes p-tuning's virtual tokens while they train."""

    MLP = "MLP"
    LSTM = "LSTM"
