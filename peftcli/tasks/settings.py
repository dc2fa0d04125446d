"""The settings of each task, which recipes give under ``task``. Imported without torch.

``NOT_ENCODED`` marks a setting that does not change how rows are encoded: the cache's key leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

NOT_ENCODED = {"encodes": False}

UNDER_DATASET = ("max_length", "overlong", "packing", "train_on")
"""Settings that recipes may also give under ``dataset``."""


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Settings of causal_lm. Recipes may also give them under ``dataset``."""

    max_length: int = 1024
    """Maximum length of an example, in tokens."""
    overlong: Literal["truncate", "drop", "error", "split"] = "truncate"
    """What to do with longer examples: truncate them at the end, drop them, stop with an error, or split them into
    pieces that are separate examples. They are counted in any case."""
    packing: bool = field(default=False, metadata=NOT_ENCODED)
    """Put several examples into each row of a batch, up to max_length. Attention stays within an example."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens count in the loss. answers: the text of each assistant turn and its end-of-turn token; last_answer:
    the same of the last assistant turn; all: every token."""


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLM:
    """Settings of seq2seq_lm. Recipes may also give them under ``dataset``."""

    max_length: int = 1024
    """Maximum length of the source and of the target, in tokens."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What to do with longer examples: truncate them at the end, drop them, or stop with an error. They are counted in
    any case."""
    train_on: Literal["answers", "last_answer"] = "answers"
    """Which tokens count in the loss: those of the target, with either value."""
