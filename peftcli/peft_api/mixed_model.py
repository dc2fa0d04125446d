"""PEFT's class of models with adapters of several methods."""

from __future__ import annotations

from peftcli.core.config import AdapterConfig
from peftcli.peft_api.model import PeftModel


class PeftMixedModel(PeftModel):
    """A model with adapters of any methods, whatever their task types.

    Every ``PeftModel`` takes adapters of several methods. This class calls the model with what it is given, and unlike
    PEFT's it is saved, and has a status, as any other.
    """

    @classmethod
    def class_of(cls, config: AdapterConfig) -> type[PeftModel]:
        """This class."""
        return cls
