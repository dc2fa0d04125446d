"""P-tuning: GPT Understands, Too (https://arxiv.org/abs/2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peftcli.core.prompts.config import EmbeddedPromptConfig
from peftcli.methods._settings import outside_unit_interval, too_small


@dataclass(kw_only=True)
class PromptEncoderConfig(EmbeddedPromptConfig):
    """Settings of p-tuning, under PEFT's names."""

    peft_type = "P_TUNING"
    learning_rate = 1e-3

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network that makes the vectors while they train. The adapter file holds the vectors alone."""
    encoder_hidden_size: int | None = None
    """Width of that network. Unset: the size of the base model's input embedding."""
    encoder_num_layers: int = 2
    """Number of the LSTM's layers. The MLP always has two hidden ones."""
    encoder_dropout: float = 0.0
    """Dropout between the LSTM's layers."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems() + too_small(self, encoder_hidden_size=1, encoder_num_layers=1)
        found += outside_unit_interval(self, "encoder_dropout")
        if self.inference_mode:  # a file's settings of a network that it does not hold change nothing
            return found
        if self.encoder_reparameterization_type == "MLP":
            changed = {"encoder_num_layers": self.encoder_num_layers != 2, "encoder_dropout": self.encoder_dropout > 0}
            found += [(key, "is for encoder_reparameterization_type: LSTM") for key, given in changed.items() if given]
        elif self.encoder_dropout and self.encoder_num_layers == 1:
            found.append(("encoder_dropout", "stands between the LSTM's layers; with one layer it does nothing"))
        return found
