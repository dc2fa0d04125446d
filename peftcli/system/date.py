"""The date that chat templates write. A resumed run renders its rows as on the day on which it began."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_date: ContextVar[datetime.date | None] = ContextVar("date", default=None)


def today() -> datetime.date:
    """Return today's date here, or the one that ``fixed_date`` has set."""
    return _date.get() or datetime.date.today()


@contextmanager
def fixed_date(day: str | None) -> Iterator[None]:
    """Let ``today`` return this day, as 2026-01-31, in the block; None: the day on which the block began."""
    before = _date.set(datetime.date.fromisoformat(day) if day else today())
    try:
        yield
    finally:
        _date.reset(before)


def strftime_now(form: str) -> str:
    """Format ``today`` at midnight. transformers gives templates a function of this name."""
    return datetime.datetime.combine(today(), datetime.time()).strftime(form)


def writes_date(chat_template: object) -> bool:
    """Return whether the chat template, or one of several, can write the date."""
    return strftime_now.__name__ in str(chat_template or "")
