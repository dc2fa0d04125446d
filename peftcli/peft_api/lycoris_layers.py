"""PEFT's names for what makes LoHa's and LoKr's layers. diffusers asks for them."""

from peftcli.methods.loha.layers import LoHaLayer
from peftcli.methods.lokr.layers import LoKrLayer, factors

__all__ = ["LoHaLayer", "LoKrLayer", "factorization"]

factorization = factors
