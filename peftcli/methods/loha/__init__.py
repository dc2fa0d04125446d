"""LoHa: FedPara: Low-Rank Hadamard Product (https://arxiv.org/abs/2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass

from peftcli.methods._lycoris_settings import LycorisConfig


@dataclass(kw_only=True)
class LoHaConfig(LycorisConfig):
    """Settings of LoHa, under PEFT's names."""

    peft_type = "LOHA"
    learning_rate = 5e-3

    init_weights: bool = True
    """Start from no update at all; false starts at random, for tests."""
