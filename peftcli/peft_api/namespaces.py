"""PEFT's public names and modules: ``peftcli.peft_api.utils.save_and_load`` for ``peft.utils.save_and_load``.

Code that was written for PEFT imports names from many modules. Those that are no files here, because their names live
together, are made from the table below. ``stand_in_for_peft`` gives all of them the name ``peft``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from peftcli.errors import AdapterError
from peftcli.methods import METHODS

TUNER_MODELS = {row.config_name.replace("Config", "Model"): row.name for row in METHODS.values() if not row.soft_prompt}
"""PEFT's name of the class that holds a model with adapters of a method -> the method. Soft prompts have none."""

_TASKS = "CausalLM FeatureExtraction QuestionAnswering Seq2SeqLM SequenceClassification TokenClassification"
_PEFT = {
    "errors": "NoMatchingPeftModuleError PeftWarning",
    "methods.lora": "LoraRuntimeConfig",
    "methods.lora.initialisations": "CordaConfig EvaConfig LoftQConfig LoraGAConfig",
    "methods.lora.variants": "ArrowConfig BdLoraConfig KasaConfig MontecloraConfig VeloraConfig",
    "peft_api.auto": " ".join(["AutoPeftModel", *(f"AutoPeftModelFor{task}" for task in _TASKS.split())]),
    "peft_api.config": """
        MultitaskPromptTuningInit PeftConfig PeftConfigMixin PeftError PeftType PromptEncoderReparameterizationType
        PromptLearningConfig PromptTuningInit TaskType
    """,
    "peft_api.initialisations": """
        get_eva_state_dict initialize_lora_eva_weights preprocess_corda preprocess_loraga replace_lora_weights_loftq
    """,
    "peft_api.helpers": "find_kappa_target_modules",
    "peft_api.layers": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "peft_api.lora": "convert_to_lora create_arrow_model save_as_lora",
    "peft_api.mapping": """
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING
        PEFT_TYPE_TO_TUNER_MAPPING TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING
        get_peft_config get_peft_model inject_adapter_in_model
    """,
    "peft_api.model": " ".join(["PeftMixedModel", "PeftModel", *(f"PeftModelFor{task}" for task in _TASKS.split())]),
    "peft_api.soft_prompts": """
        compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text
        prompt_embeddings_from_past_key_values
    """,
    "peft_api.state_dicts": """
        get_base_model_state_dict get_peft_model_state_dict load_peft_weights
        set_base_model_state_dict set_peft_model_state_dict
    """,
    "peft_api.training": """
        cast_mixed_precision_params create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer
        prepare_model_for_gradient_checkpointing prepare_model_for_kbit_training shift_tokens_right
    """,
}
"""Module of peftcli -> PEFT's public names that it holds, but for the classes of the methods."""

PEFT_NAMES = {
    **{row.config_name: f"peftcli.methods.{row.name}" for row in METHODS.values()},
    **dict.fromkeys(TUNER_MODELS, "peftcli.peft_api.mapping"),
    **{name: f"peftcli.{module}" for module, names in _PEFT.items() for name in names.split()},
}
"""PEFT's public names -> the module that holds it; ``peftcli.peft_api`` has these too."""

_LORA = """
    methods.lora methods.lora.initialisations methods.lora.variants methods.lora.lora
    peft_api.lora peft_api.initialisations peft_api.mapping
"""
_TUNERS = {**{name: f"methods.{name} peft_api.config peft_api.mapping" for name in METHODS}, "lora": _LORA}
_PLACES = {
    "functional": "peft_api.mapping peft_api.tuner peft_api.state_dicts",
    "mapping_func": "peft_api.mapping",
    "optimizers": "peft_api.training",
    "optimizers.lorafa": "peft_api.training",
    "optimizers.loraplus": "peft_api.training",
    "optimizers.riemannian": "peft_api.training",
    "peft_model": """
        peft_api.model peft_api.layers peft_api.config peft_api.mapping peft_api.state_dicts peft_api.training
    """,
    **{f"tuners.{name}": places for name, places in _TUNERS.items()},
    **{f"tuners.{name}.config": places for name, places in _TUNERS.items()},
    **{f"tuners.{name}.model": "peft_api.mapping" for name in TUNER_MODELS.values()},
    "tuners.adamss.asa_callback": "peft_api.for_libraries",
    "tuners": "peft_api peft_api.mapping peft_api.initialisations",
    "tuners.cartridge.utils": "peft_api.soft_prompts",
    "tuners.loha.layer": "methods.loha.layers peft_api.for_libraries",
    "tuners.lokr.layer": "methods.lokr.layers peft_api.for_libraries",
    "tuners.lora.arrow": "peft_api.lora",
    "tuners.lora.conversion": "peft_api.lora",
    "tuners.lora.corda": "peft_api.initialisations",
    "tuners.lora.eva": "peft_api.initialisations",
    "tuners.lora.intruders": "peft_api.lora",
    "tuners.lora.layer": "peft_api.lora methods.lora.lora",
    "tuners.lora.loraga": "peft_api.initialisations",
    "tuners.tuners_utils": "peft_api.tuner peft_api.layers peft_api.mapping peft_api.for_libraries",
    "utils": """
        peft_api.mapping peft_api.layers peft_api.training peft_api.config peft_api.state_dicts
        peft_api.initialisations peft_api.for_libraries errors
    """,
    "utils.constants": "peft_api.mapping",
    "utils.error": "errors peft_api.config",
    "utils.hotswap": "peft_api.hotswap",
    "utils.loftq_utils": "peft_api.initialisations",
    "utils.merge_utils": "peft_api.helpers",
    "utils.other": "peft_api.mapping peft_api.layers peft_api.training peft_api.for_libraries",
    "utils.peft_types": "peft_api.config",
    "utils.save_and_load": "peft_api.state_dicts",
    "utils.transformers_weight_conversion": "peft_api.for_libraries",
    "utils.warning": "errors",
}
NAMESPACES: dict[str, tuple[str, ...]] = {name: tuple(places.split()) for name, places in _PLACES.items()}
"""PEFT's module -> modules of peftcli that hold its names; a name is taken from the first that has it."""

_PRIVATE = ("_get_submodules",)
"""Private names that libraries take from PEFT's modules."""

_LOOK_ONCE = ("transformers.trainer_utils", "diffusers.utils.import_utils")
"""Modules that look for peft when they are imported, and remember the answer."""
_FIRST = "call peftcli.peft_api.install() at the start, before other libraries are imported"

FILES = ("auto", "config", "helpers", "mapping")
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
    """Return whether a name is the module's own, a second one for what it imports, or public."""
    if PEFT_NAMES.get(name) == module.__name__:
        return True
    if hasattr(module, "__all__"):
        return name in module.__all__
    value = getattr(module, name, None)
    if value is None or isinstance(value, ModuleType):
        return False
    return getattr(value, "__module__", None) in (None, module.__name__) or getattr(value, "__name__", name) != name


class _Peft(ModuleType):
    """The module ``peft``: the public names of ``peftcli.peft_api``, and those of PEFT's modules that are there."""

    def __init__(self, api: ModuleType):
        super().__init__("peft", api.__doc__)
        self.__file__, self.__all__ = api.__file__, api.__all__
        self.__path__: list[str] = []  # a package in which nothing is searched for
        self.__spec__ = ModuleSpec("peft", None, origin=api.__file__, is_package=True)
        self._api = api

    def __getattr__(self, name: str) -> Any:
        if name in self.__all__:
            return getattr(self._api, name)
        if f"peft.{name}" in sys.modules:
            return sys.modules[f"peft.{name}"]
        raise AttributeError(f"module 'peft', for which peftcli stands in, has no attribute {name!r}")

    def __dir__(self) -> list[str]:
        return list(self.__all__)


class _Distribution(importlib.metadata.Distribution):
    """What ``importlib.metadata`` says of peft: the version that the caller of ``install`` claims."""

    def __init__(self, version: str):
        self._text = f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\nSummary: PEFT's names, by peftcli\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: peft is not installed; peftcli stands in for it")


class _Distributions(importlib.metadata.DistributionFinder):
    """Answers questions for peft by name. Lists of what is installed stay as they are."""

    version = ""

    def find_spec(self, *args: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Any]:
        if context is not None and context.name == "peft":
            yield _Distribution(self.version)


_distributions = _Distributions()


def stand_in_for_peft(api: ModuleType, version: str | None) -> None:
    """Do what ``peftcli.peft_api.install`` says, for ``api``, which is ``peftcli.peft_api``."""
    if not isinstance(sys.modules.get("peft"), _Peft):
        if "peft" in sys.modules:
            where = getattr(sys.modules["peft"], "__file__", None)
            raise AdapterError(f"peft has been imported already, from {where}", hint=_FIRST)
        looked = [name for name in _LOOK_ONCE if name in sys.modules]
        available = getattr(sys.modules.get("transformers.utils.import_utils"), "is_peft_available", None)
        if available is not None and available.cache_info().currsize and not available():
            looked.append("transformers")
        if looked:
            raise AdapterError(f"{looked[0]} has looked for peft already", hint=_FIRST)
        sys.modules["peft"] = _Peft(api)
        for path in (*FILES, *NAMESPACES):
            sys.modules[f"peft.{path}"] = importlib.import_module(f"{api.__name__}.{path}")
    if version is not None:
        _distributions.version = version
        if _distributions not in sys.meta_path:
            sys.meta_path.insert(0, _distributions)
