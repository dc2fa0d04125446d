"""PEFT's modules: ``peftcli.peft_api.utils.save_and_load`` for ``peft.utils.save_and_load``.

Code that was written for PEFT imports names from many modules. Those that are no files here, because their names live
together, are made from the table below. ``config``, ``auto``, ``functional`` and a few others are files.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from peftcli import PEFT_NAMES
from peftcli.methods import METHODS, TUNER_MODELS

_TUNERS = {f"tuners.{name}": (f"methods.{name}.config", "peft_api.config", "peft_api.tuner_models") for name in METHODS}
_LORA = (
    "methods.lora.config",
    "methods.lora.initialisations.config",
    "methods.lora.variant_settings",
    "peft_api.arrow",
    "peft_api.initialisations",
    "peft_api.conversion",
    "peft_api.lora_layers",
    "peft_api.tuner_models",
)

NAMESPACES: dict[str, tuple[str, ...]] = {
    "mapping": ("peft_api.constants", "peft_api.functions", "peft_api.functional"),
    "mapping_func": ("peft_api.functions",),
    "optimizers.lorafa": ("peft_api.optimizers",),
    "optimizers.loraplus": ("peft_api.optimizers",),
    "optimizers.riemannian": ("peft_api.optimizers",),
    "peft_model": (
        "peft_api.model",
        "peft_api.task_models",
        "peft_api.status",
        "peft_api.config",
        "peft_api.constants",
        "peft_api.state_dicts",
        "peft_api.prepare",
    ),
    **_TUNERS,
    **{f"{name}.config": places for name, places in _TUNERS.items()},
    **{f"tuners.{name}.model": ("peft_api.tuner_models",) for name in TUNER_MODELS.values()},
    "tuners.adamss.asa_callback": ("peft_api.asa_callback",),
    "tuners": ("peft_api", "peft_api.constants", "peft_api.initialisations"),
    "tuners.cartridge.utils": ("peft_api.kv_prefix",),
    "tuners.loha.layer": ("peft_api.lycoris_layers",),
    "tuners.lokr.layer": ("peft_api.lycoris_layers",),
    "tuners.lora": _LORA,
    "tuners.lora.arrow": ("peft_api.arrow",),
    "tuners.lora.config": _LORA,
    "tuners.lora.conversion": ("peft_api.conversion",),
    "tuners.lora.corda": ("peft_api.initialisations",),
    "tuners.lora.eva": ("peft_api.initialisations",),
    "tuners.lora.intruders": ("peft_api.conversion",),
    "tuners.lora.layer": ("peft_api.lora_layers",),
    "tuners.lora.loraga": ("peft_api.initialisations",),
    "tuners.lora.model": ("peft_api.tuner_models", "peft_api.constants"),
    "tuners.tuners_utils": ("peft_api.core_classes", "peft_api.functional", "peft_api.status"),
    "utils": (
        "peft_api.constants",
        "peft_api.core_classes",
        "peft_api.prepare",
        "peft_api.config",
        "peft_api.functions",
        "peft_api.state_dicts",
        "peft_api.initialisations",
        "errors",
    ),
    "utils.constants": ("peft_api.constants",),
    "utils.error": ("errors", "peft_api.config"),
    "utils.hotswap": ("peft_api.hotswap",),
    "utils.loftq_utils": ("peft_api.initialisations",),
    "utils.merge_utils": ("peft_api.merge_utils",),
    "utils.other": ("peft_api.constants", "peft_api.core_classes", "peft_api.prepare"),
    "utils.peft_types": ("peft_api.config",),
    "utils.save_and_load": ("peft_api.state_dicts",),
    "utils.transformers_weight_conversion": ("peft_api.weight_mapping",),
    "utils.warning": ("errors",),
}
"""PEFT's module -> modules of peftcli that hold its names; a name is taken from the first that has it."""

_PRIVATE = ("_get_submodules",)
"""Private names that libraries take from PEFT's modules."""

FILES = ("auto", "config", "functional", "helpers", "optimizers")
"""PEFT's modules that are files here."""


def add_namespaces() -> None:
    """Make the modules of the table importable."""
    for path in sorted(NAMESPACES):  # a package before the modules in it
        module = ModuleType(f"{__package__}.{path}", f"The names of PEFT's ``peft.{path}``.")
        module.__path__ = []  # one that others may be in
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        module.__getattr__ = _finder(path)  # type: ignore[method-assign]
        sys.modules[module.__name__] = module
        parent, _, own = module.__name__.rpartition(".")
        if parent in sys.modules:  # else a file that nobody has imported yet
            setattr(sys.modules[parent], own, module)


def _finder(path: str) -> Any:
    def find(name: str) -> Any:
        if name == "__all__":
            modules = [importlib.import_module(f"peftcli.{place}") for place in NAMESPACES[path]]
            found = {each for module in modules for each in getattr(module, "__all__", vars(module)) if each[0] != "_"}
            return sorted(each for each in found if any(_is_own(module, each) for module in modules))
        # inspect asks every module for __file__: no reason to import anything
        for place in () if name.startswith("_") and name not in _PRIVATE else NAMESPACES[path]:
            module = importlib.import_module(f"peftcli.{place}")
            if _is_own(module, name):
                return getattr(module, name)
        raise AttributeError(f"module '{__package__}.{path}' has no attribute {name!r}")

    return find


def _is_own(module: ModuleType, name: str) -> bool:
    """Return whether a name is the module's own or public, and not one that it imports for itself."""
    if PEFT_NAMES.get(name) == module.__name__:
        return True
    if hasattr(module, "__all__"):
        return name in module.__all__
    value = getattr(module, name, None)
    foreign = value is None or isinstance(value, ModuleType)
    return not foreign and getattr(value, "__module__", module.__name__) == module.__name__
