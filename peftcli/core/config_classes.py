"""PEFT's names of methods and tasks, and the config class of each method. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from enum import Enum
from pathlib import PurePath
from typing import Any

from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.guard.files import short_repr

CONFIGS: dict[str, Callable[[], Any]] = {}
"""PEFT's name of a method, a ``PeftType`` -> how to import its config class. ``peftcli.methods`` fills it."""
NOT_HERE: dict[str, str] = {}
"""PEFT's methods that peftcli does not have: name in adapter_config.json -> why. ``peftcli.methods`` fills it."""


class NameEnum(str, Enum):
    """A text with a ``value``, and shown as that."""

    __str__ = str.__str__


class TaskType(NameEnum):
    """PEFT's names of the tasks."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


def extend(kind: type, methods: type) -> None:
    """Give a class the attributes and methods of another, which a layer above brings, as if it were a base class."""
    for name, value in vars(methods).items():
        if not name.startswith("__") and name not in vars(kind):
            setattr(kind, name, value)


def config_class(values: dict[str, Any], file: str | None = None) -> Any:
    """Return the config class of the method that an ``adapter_config.json`` object names.

    Raises:
        AdapterError: there is no such method.
    """
    name = values.get("peft_type")
    if isinstance(name, str) and name in CONFIGS:
        return CONFIGS[name]()
    if isinstance(name, str) and name in NOT_HERE:
        raise AdapterError(f"{name} is not supported: {NOT_HERE[name]}", key="peft_type", file=file)
    problem = "no method is named" if name is None else f"no method is called {short_repr(name)}"
    kind = AdapterTypeError if name is None else AdapterError
    raise kind(f"{problem}; known: {', '.join(CONFIGS)}", key="peft_type", file=file)


def plain(value: Any) -> Any:
    """Return a setting as JSON has it: the value of an enum, the text of a path, the sorted list of a set.

    Mappings and sequences of other kinds become dicts and lists, and what numpy and PyTorch have, numbers and lists.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, Set):
        value = sorted(value, key=lambda one: (type(one).__name__, one))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, PurePath) else value
