"""PEFT's names for the classes of LoRA's layers, for ``isinstance``."""

from peftcli.methods.lora.lora import LoraConv, LoraEmbedding, LoraLayer, LoraLinear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer"]

Conv1d = Conv2d = Conv3d = LoraConv
Embedding = LoraEmbedding
Linear = LoraLinear
