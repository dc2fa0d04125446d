"""The settings of each task, which a recipe gives under ``task``. Readable without torch.

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
    """Settings of causal_lm. All may stand under ``dataset`` as well."""

    max_length: int = 1024
    """Longest example, in tokens."""
    overlong: Literal["truncate", "drop", "error", "split"] = "truncate"
    """What happens to a longer example: cut at the end, left out, refused, or split into pieces that are trained one by
    one. Always counted."""
    packing: bool = field(default=False, metadata=NOT_ENCODED)
    """Fill each row of a batch with several examples, up to max_length. They do not see each other."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens count in the loss. answers: what the assistant says, and its end-of-turn token."""


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLM:
    """Settings of seq2seq_lm. All may stand under ``dataset`` as well."""

    max_length: int = 1024
    """Longest source and longest target, in tokens."""
    overlong: Literal["truncate", "drop", "error"] = "truncate"
    """What happens to a longer example: cut at the end, left out or refused. Always counted."""
    train_on: Literal["answers", "last_answer"] = "answers"
    """Which tokens count in the loss: the target's, in any case."""
