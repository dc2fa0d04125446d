"""PEFT's tables and constants, its class of each method, and ``get_peft_model``.

``LoraModel`` and the other classes are ``Tuner`` here. ``isinstance(model.base_model, LoraModel)`` tells the method of
the model's first adapter, and ``LoraModel(model, config, "default")`` makes a ``Tuner`` of a model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError, PeftWarning
from peftcli.guard.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from peftcli.methods import METHODS
from peftcli.methods._families import IA3_INPUTS, TARGETS
from peftcli.peft_api.adding import check_config, put_new
from peftcli.peft_api.config import PeftType
from peftcli.peft_api.functional import inject_adapter_in_model as inject_adapter_in_model
from peftcli.peft_api.model import PeftMixedModel, PeftModel
from peftcli.peft_api.namespaces import TUNER_MODELS
from peftcli.peft_api.tuner import Tuner


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
        put_new(model, chosen, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        return Tuner(model, {adapter_name: chosen})


TUNER_CLASSES: dict[str, TunerKind] = {
    name: TunerKind(name, (), {"peft_type": METHODS[method].peft_type, "__doc__": f"``Tuner`` of {method}."})
    for name, method in TUNER_MODELS.items()
}
globals().update(TUNER_CLASSES)

CONFIG_NAME = CONFIG_FILE
SAFETENSORS_WEIGHTS_NAME = WEIGHTS_FILE
WEIGHTS_NAME = "adapter_model.bin"
"""The pickle, which is not read here."""
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = TARGETS["lora"]
TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING = {
    name: names for name, names in TARGETS["ia3"].items() if name != "*"
}
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {
    name: IA3_INPUTS.get(name, []) for name in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
}
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


def get_peft_model(
    model: nn.Module,
    peft_config: AdapterConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Put a new adapter into ``model``, in place, and wrap it.

    Args:
        model: the base model.
        peft_config: the adapter's config. It is completed by what is found in the model.
        adapter_name: the adapter's name in the model.
        mixed: PEFT's; every model takes adapters of several methods here. True: the class is ``PeftMixedModel``.
        autocast_adapter_dtype: whether the adapter's weights are float32 over a base model in half precision, or in the
            base model's dtype.
        revision: the base model's revision, to be written into the config.
        low_cpu_mem_usage: whether the adapter's weights stay on the meta device until they are loaded. Those that start
            from the base model or from training data do not.

    Raises:
        AdapterError: the config does not fit the model.
    """
    check_config(peft_config)
    if any(layer.adapter != adapter_name for layer in adapter_layers(model).values()):
        text = (
            "You are trying to modify a model that has an adapter already. It stays, switched off; unload() removes it"
        )
        warnings.warn(text, PeftWarning, stacklevel=2)
    if revision is not None:
        if peft_config.revision not in (None, revision):
            text = f"revision: {peft_config.revision} in the config becomes {revision}"
            warnings.warn(text, PeftWarning, stacklevel=2)
        peft_config.revision = revision
    kind: type[PeftModel] = PeftMixedModel if mixed else PeftModel
    return kind.class_of(peft_config)(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def get_peft_config(config_dict: Mapping[str, Any]) -> AdapterConfig:
    """Make a config as ``PeftConfig.from_peft_type`` does."""
    make: Any = AdapterConfig
    return make.from_peft_type(**config_dict)
