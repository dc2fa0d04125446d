"""What the tests that follow PEFT's guides share: quiet trainers, rows of tokens, and comparisons."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from models_tiny import ids
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

QUIET: dict[str, Any] = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False}


def close(found: torch.Tensor, expected: torch.Tensor, within: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=within, rtol=within)


def part(lib: ModuleType, name: str) -> Any:
    """A module of PEFT, or ours of that name."""
    return importlib.import_module(f"{lib.__name__}.{name}")


def token_rows(count: int = 8, length: int = 6, **settings: Any) -> list[dict[str, Any]]:
    return [{"input_ids": one, "labels": one} for one in ids(count, length, **settings)]


def trainer_of(
    model: Any,
    folder: Path,
    rows: Sequence[Any] | None = None,
    more: dict[str, Any] | None = None,
    kind: Any = Trainer,
    **options: Any,
) -> Trainer:
    """A trainer of ``rows``; ``options`` are those of its arguments, and ``more`` its own."""
    arguments = Seq2SeqTrainingArguments if issubclass(kind, Seq2SeqTrainer) else TrainingArguments
    given: dict[str, Any] = {"train_dataset": rows or token_rows(), **(more or {})}
    return kind(model=model, args=arguments(str(folder), **{**QUIET, **options}), **given)


def logged(trainer: Trainer, key: str = "loss") -> list[float]:
    """What it has logged under this key."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
