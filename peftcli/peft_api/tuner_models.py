"""PEFT's class of each method: ``LoraModel``, ``IA3Model`` and so on. All of them are ``Tuner`` here.

``isinstance(model.base_model, LoraModel)`` tells the method of the model's first adapter, and
``LoraModel(model, config, "default")`` makes a ``Tuner`` of a model.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, TUNER_MODELS
from peftcli.peft_api.new_adapter import check_name, set_trainable_as_new, start_adapter
from peftcli.peft_api.replace_adapter import replacing
from peftcli.peft_api.tuner import Tuner

__all__ = list(TUNER_MODELS)


class TunerKind(type):
    """The class of ``LoraModel`` and the others: ``Tuner``, of one method."""

    peft_type: ClassVar[str]

    def __instancecheck__(cls, value: object) -> bool:
        found = [config.peft_type for config in value.peft_config.values()] if isinstance(value, Tuner) else []
        return found[:1] == [cls.peft_type]

    def __call__(
        cls,
        model: nn.Module,
        peft_config: AdapterConfig | dict[str, AdapterConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
    ) -> Tuner:
        """Put a new adapter into ``model``, in place. ``peft_config`` may hold its config under its name.

        For ``low_cpu_mem_usage`` see ``get_peft_model``.

        Raises:
            AdapterError: the config is another method's, or does not fit the model.
        """
        chosen = peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config
        if chosen.peft_type != cls.peft_type:
            raise AdapterError(f"{cls.__name__} takes a config of {cls.peft_type}, not {chosen.peft_type}")
        check_name(adapter_name)
        with replacing(model, adapter_name):
            start_adapter(model, chosen, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        set_trainable_as_new(model, chosen, adapter_name)
        return Tuner(model, {adapter_name: chosen})


def __getattr__(name: str) -> Any:
    if name not in TUNER_MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return TUNER_CLASSES[name]


TUNER_CLASSES: dict[str, TunerKind] = {
    name: TunerKind(name, (), {"peft_type": METHODS[method].peft_type, "__doc__": f"``Tuner`` of {method}."})
    for name, method in TUNER_MODELS.items()
}
