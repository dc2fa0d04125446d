"""P-tuning: GPT Understands, Too (https://arxiv.org/abs/2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from peftcli.core.prompts.config import EmbeddedPromptConfig
from peftcli.guard.ranges import AT_LEAST_1, SHARE


@dataclass(kw_only=True)
class PromptEncoderConfig(EmbeddedPromptConfig):
    """Settings of p-tuning, under PEFT's names."""

    peft_type = "P_TUNING"
    learning_rate = 1e-3

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network that makes the vectors while they train. The adapter file holds the vectors alone."""
    encoder_hidden_size: int | None = field(default=None, metadata=AT_LEAST_1)
    """Width of that network. Unset: the size of the base model's input embedding."""
    encoder_num_layers: int = field(default=2, metadata=AT_LEAST_1)
    """Number of the LSTM's layers. The MLP always has two hidden ones."""
    encoder_dropout: float = field(default=0.0, metadata=SHARE)
    """Dropout between the LSTM's layers."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.inference_mode:  # a file's settings of a network that it does not hold change nothing
            return found
        if self.encoder_reparameterization_type == "MLP":
            changed = {"encoder_num_layers": self.encoder_num_layers != 2, "encoder_dropout": self.encoder_dropout > 0}
            found += [(key, "is for encoder_reparameterization_type: LSTM") for key, given in changed.items() if given]
        elif self.encoder_dropout and self.encoder_num_layers == 1:
            found.append(("encoder_dropout", "stands between the LSTM's layers; with one layer it does nothing"))
        return found
