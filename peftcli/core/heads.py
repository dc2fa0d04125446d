"""The heads of models with a task: new weights, which train in full beside any adapter."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import bare, base_paths, model_ends
from peftcli.core.targets import find_modules

TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""PEFT's names of the tasks whose models have a head of their own."""

_PEFT_GUESSES = ("classifier", "score", "qa_outputs")
"""What PEFT adds to modules_to_save, whether the model has it or not. It takes longer names that end so, too."""


def head_names(model: Any) -> list[str]:
    """Names of the modules that stand beside the model's body: classifier, score, qa_outputs, or called otherwise."""
    if not hasattr(model, "base_model_prefix"):  # no model of transformers
        return []
    ends = [bare(end) for end in model_ends(model) if end is not None]

    def is_head(child: nn.Module) -> bool:
        is_body = hasattr(child, "base_model_prefix") or any(bare(module) in ends for module in child.modules())
        return not is_body and any(True for _ in child.parameters())

    return [name for name, child in model.named_children() if is_head(child)]


def settle_heads(model: nn.Module, config: AdapterConfig) -> None:
    """Complete ``modules_to_save`` of a new adapter by the model's heads; of a loaded one, make it what the file holds.

    Warns when a loaded adapter's file does not hold a head.
    """
    if config.task_type not in TASKS_WITH_HEADS:
        return
    given, heads = config.modules_to_save or [], head_names(model)
    if config.inference_mode:
        names = [name for name in base_paths(model) if name]
        guessed = [name for name in names if any(name.endswith(guess) for guess in _PEFT_GUESSES if guess in given)]
        given = [*dict.fromkeys([*(entry for entry in given if entry not in _PEFT_GUESSES), *guessed])]
    saved = find_modules(model, given, "modules_to_save")
    missing = [head for head in heads if not any(_overlap(head, name) for name in saved)]
    if missing and config.inference_mode:
        warnings.warn(
            f"the adapter was saved without {', '.join(missing)}, which is part of the head and stays as it is in the "
            "base model",
            stacklevel=2,
        )
    elif missing:
        given = [*given, *missing]
    config.modules_to_save = given or None


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
