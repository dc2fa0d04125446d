"""PEFT's names for classes of the core, for ``isinstance``."""

from typing import Any

from peftcli.core.layer import AdapterLayer, TrainedCopy
from peftcli.errors import AdapterError
from peftcli.peft_api.tuner import Tuner

__all__ = ["AuxiliaryTrainingWrapper", "BaseTuner", "BaseTunerLayer", "ModulesToSaveWrapper"]

BaseTuner = Tuner
BaseTunerLayer = AdapterLayer
ModulesToSaveWrapper = TrainedCopy


class _Renaming(type):
    def __instancecheck__(cls, module: Any) -> bool:
        if not isinstance(module, AdapterLayer):
            return False
        try:
            return bool(module.adapter_state_dict_load_map(module.adapter))
        except AdapterError:  # which whoever asks for the map shall get
            return True


class AuxiliaryTrainingWrapper(metaclass=_Renaming):
    """The layers whose tensors have other names in the file: transformers asks them how to read it."""
