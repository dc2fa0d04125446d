"""PEFT's names for classes of the core, for ``isinstance``, and what diffusers takes layers out with."""

from typing import Any

from torch import nn

from peftcli.core.layer import AdapterLayer, TrainedCopy
from peftcli.errors import AdapterError
from peftcli.peft_api.tuner import Tuner

__all__ = ["AuxiliaryTrainingWrapper", "BaseTuner", "BaseTunerLayer", "ModulesToSaveWrapper", "_get_submodules"]

BaseTuner = Tuner
BaseTunerLayer = AdapterLayer
ModulesToSaveWrapper = TrainedCopy


class _Renaming(type):
    def __instancecheck__(cls, module: Any) -> bool:
        if not isinstance(module, AdapterLayer):
            return False
        try:
            return bool(module.adapter_state_dict_load_map(module.adapter))
        except AdapterError:  # it is raised again to whoever asks for the map
            return True


class AuxiliaryTrainingWrapper(metaclass=_Renaming):
    """The layers whose tensors have other names in the file: transformers asks them how to read it."""


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of the module called ``key``, the module, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name
