"""PEFT's names of tasks, methods and settings, and its reader of configs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from peftcli.adapters.load import find_adapter
from peftcli.core.config import AdapterConfig
from peftcli.methods import METHODS


class TaskType(str, Enum):
    """PEFT's names of the tasks."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


PeftType = Enum("PeftType", {method.peft_type: method.peft_type for method in METHODS.values()}, type=str)  # type: ignore[misc]
"""PEFT's names of the methods."""


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


class PeftConfig:
    """Reads any method's config from an adapter folder."""

    @staticmethod
    def from_pretrained(adapter: str | Path, revision: str | None = None) -> AdapterConfig:
        """The config in a folder or hub repository.

        Raises:
            AdapterError: it cannot be read, or names a method or setting that is not supported.
        """
        return find_adapter(str(adapter), revision=revision).config
