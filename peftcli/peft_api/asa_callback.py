"""PEFT's callback that lets AdaMSS choose its subspaces under ``transformers.Trainer``."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcli.peft_api.tuner import Tuner


class AdamssAsaCallback(TrainerCallback):
    """Calls ``update_and_allocate`` of the model after each optimizer step; the config says the schedule."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        for module in () if model is None else model.modules():
            if isinstance(module, Tuner):
                module.update_and_allocate(state.global_step)
