"""PEFT's names for classes of the core, for ``isinstance``."""

from peftcli.core.layer import AdapterLayer, TrainedCopy
from peftcli.peft_api.tuner import Tuner

__all__ = ["AuxiliaryTrainingWrapper", "BaseTuner", "BaseTunerLayer", "ModulesToSaveWrapper"]

BaseTuner = Tuner
BaseTunerLayer = AdapterLayer
AuxiliaryTrainingWrapper = AdapterLayer  # of such a module transformers asks how to read the tensors of a file
ModulesToSaveWrapper = TrainedCopy
