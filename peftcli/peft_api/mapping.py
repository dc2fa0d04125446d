"""PEFT's tables and constants, its class of each method, ``get_peft_model``, and its functions for plain models.

``LoraModel`` and the other classes are ``Tuner`` here. ``isinstance(model.base_model, LoraModel)`` tells the method of
the model's first adapter, and ``LoraModel(model, config, "default")`` makes a ``Tuner`` of a model.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn

from peftcli.core.config import TARGETING, AdapterConfig
from peftcli.core.inject import set_active, set_trainable
from peftcli.core.layer import adapter_layers, base_modules
from peftcli.core.prompts.config import SoftPromptConfig
from peftcli.core.targets import find_modules, module_matches, targets
from peftcli.errors import AdapterError, PeftWarning
from peftcli.guard.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from peftcli.methods import METHODS
from peftcli.methods._families import IA3_INPUTS, TARGETS
from peftcli.peft_api.adding import add_new, check_config, start_adapter
from peftcli.peft_api.config import PeftType
from peftcli.peft_api.layers import cast_weights
from peftcli.peft_api.model import PeftMixedModel, PeftModel
from peftcli.peft_api.namespaces import TUNER_MODELS
from peftcli.peft_api.tuner import Tuner, check_name, check_names_in


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
        add_new(model, chosen, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
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


def inject_adapter_in_model(
    peft_config: AdapterConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Iterable[str] | None = None,
) -> nn.Module:
    """Put a new adapter into ``model``, in place, and return the model. The new adapter is the active one.

    Args:
        peft_config: the adapter's.
        model: the model, maybe with other adapters in it.
        adapter_name: the adapter's name in the model.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device; ``set_peft_model_state_dict`` fills them.
        state_dict: tensors of an adapter, by the names that ``get_peft_model_state_dict`` gives them. The modules that
            they belong to are adapted, whatever ``target_modules`` says; their values are not read.

    Raises:
        AdapterError: the config does not fit the model, or is that of a soft prompt: use ``get_peft_model``.
    """
    check_config(peft_config)
    if isinstance(peft_config, SoftPromptConfig):
        raise AdapterError(f"{peft_config.peft_type} puts no layers into a model; use get_peft_model", key="peft_type")
    check_name(adapter_name)
    if state_dict is not None:
        peft_config = _with_targets_of(model, peft_config, state_dict)
    start_adapter(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    configs: Any = getattr(model, "peft_config", {})
    model.peft_config = configs | {adapter_name: peft_config}  # libraries that use PEFT read it
    set_active(model, [adapter_name])
    set_trainable(model, not peft_config.inference_mode, adapter_name)
    return model


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None) -> list[str]:
    """Remove an adapter and return the active ones. If it was the only active one, the first of those left is that.

    That one then trains, with a warning. PEFT's ``prefix`` is not needed.

    Raises:
        AdapterError: an unknown name.
    """
    check_names_in(model, adapter_name)
    layers = adapter_layers(model).values()
    tuner = Tuner(model, dict.fromkeys(layer.adapter for layer in layers))
    tuner.active_adapters = list(dict.fromkeys(layer.adapter for layer in layers if layer.enabled))
    tuner.delete_adapter(adapter_name)
    getattr(model, "peft_config", {}).pop(adapter_name, None)
    return tuner.active_adapters


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Hold an adapter's weights in float32 where they are in a smaller dtype, unless ``autocast_adapter_dtype`` is off.

    New and loaded adapters are in float32 already.
    """
    check_names_in(model, adapter_name)
    if autocast_adapter_dtype:
        cast_weights(model, adapter_name)


def _with_targets_of(model: nn.Module, config: AdapterConfig, names: Iterable[str]) -> AdapterConfig:
    """Return a copy of the config that adapts the modules that the tensors of these names belong to.

    Warns where the config says otherwise.
    """
    if getattr(config, "target_parameters", None):
        raise AdapterError("cannot be found from a state_dict; leave one of them out", key="target_parameters")
    modules = base_modules(model)
    saved = tuple(f"{name}." for name in find_modules(model, config.modules_to_save or (), "modules_to_save"))
    plain = [name.removeprefix(config.file_prefix).removeprefix("_orig_mod.") for name in names]
    owners = set()
    for parts in (name.split(".") for name in plain if not name.endswith(".bias") and ".token_adapter." not in name):
        paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
        owners.add(next((path for path in paths if path in modules), ""))  # the innermost module
    found = sorted(owner for owner in owners if owner and not f"{owner}.".startswith(saved))
    if not found:
        raise AdapterError(f"holds no tensor of a module of {type(model).__name__}", key="state_dict")
    completed = copy.deepcopy(config)
    named = targets(model, completed)
    for others, what in ((set(named).difference(found), "config"), (set(found).difference(named), "state_dict")):
        if others:
            warnings.warn(f"only the {what} adapts {', '.join(sorted(others))}", RuntimeWarning, stacklevel=3)
    narrowed = copy.deepcopy(config)
    if (inner := getattr(completed, "feedforward_modules", None)) is not None:  # (IA)^3's, some of the targets
        narrowed.feedforward_modules = [name for name in found if any(module_matches(name, each) for each in inner)]  # type: ignore[attr-defined]
    for key in TARGETING:
        if hasattr(narrowed, key):
            setattr(narrowed, key, found if key == "target_modules" else None)
    return narrowed
