"""PEFT's names of tasks, methods and settings, and its reader of configs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

from peftcli.adapters.load import find_adapter
from peftcli.core.config import AdapterConfig
from peftcli.methods import METHODS, config_from_dict


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


class _AnyConfig(type):
    """``isinstance`` takes every method's config for one."""

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, AdapterConfig)


class PeftConfig(metaclass=_AnyConfig):
    """Any method's config: reads it from an adapter folder, or makes it from its keys."""

    @staticmethod
    def from_pretrained(adapter: str | Path, revision: str | None = None) -> AdapterConfig:
        """The config in a folder or hub repository.

        Raises:
            AdapterError: it cannot be read, or names a method or setting that is not supported.
        """
        return find_adapter(str(adapter), revision=revision).config

    @staticmethod
    def from_peft_type(**values: Any) -> AdapterConfig:
        """The config of the method that ``peft_type`` names, from the keys of ``adapter_config.json``.

        Sets and PEFT's enums are taken too: ``to_dict`` of a PEFT config gives them.

        Raises:
            AdapterError: there is no such method, or a key or value that it does not know.
        """
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
        return config_from_dict({name: each.value if isinstance(each, Enum) else each for name, each in plain.items()})
