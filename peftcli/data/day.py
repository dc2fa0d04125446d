"""The day that chat templates write. A run that goes on renders its rows as on the day that it began."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FUNCTION = "strftime_now"
"""The name by which transformers gives templates the date."""
_day: ContextVar[datetime.date | None] = ContextVar("day", default=None)


def today() -> datetime.date:
    """The date here, or the one that ``on`` has set."""
    return _day.get() or datetime.date.today()


@contextmanager
def on(day: str | None) -> Iterator[None]:
    """Inside, ``today`` is this day, as 2026-01-31; None: the day on which this began."""
    before = _day.set(datetime.date.fromisoformat(day) if day else today())
    try:
        yield
    finally:
        _day.reset(before)


def writes_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template can write the date."""
    return FUNCTION in str(tokenizer.chat_template or "")


def strftime_now(form: str) -> str:
    """What templates call to write the date: ``today``, at midnight."""
    return datetime.datetime.combine(today(), datetime.time()).strftime(form)
