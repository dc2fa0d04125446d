"""What can be known of a run before it starts. Imports torch only where that is not known from the last time."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peftcli.errors import RecipeError
from peftcli.schema import Recipe
from peftcli.train import checked
from peftcli.train.checked import DeepCheck


def preview(recipe: Recipe) -> dict[str, Any]:
    """What a run of the recipe would do: its data, its parameters, its steps.

    Raises:
        RecipeError: it would fail. Its exit code is that of the first error.
    """
    found = deep_check(recipe)
    if found.errors:
        error = RecipeError(found.errors)
        error.exit_code = found.exit_code
        raise error
    return found.would


def deep_check(recipe: Recipe) -> DeepCheck:
    """Every error and every warning that opening the recipe's data and model brings up, and what the disk lacks."""
    found = _found(recipe)
    found.check_disk(recipe)
    return found


def _found(recipe: Recipe) -> DeepCheck:
    state = checked.state_of(recipe)
    debugs = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)  # what is kept has no log
    if state is not None and not debugs and (known := checked.read(recipe, state)) is not None:
        return known

    from peftcli.train.examine import examine

    with warnings.catch_warnings(record=True) as shown, _logged_warnings() as logged:
        found = examine(recipe)
    for each in shown:
        warnings.showwarning(each.message, each.category, each.filename, each.lineno)
    if state is not None and not (found.errors or shown or logged):
        checked.keep(recipe, state, found)
    return found


@contextmanager
def _logged_warnings() -> Iterator[list[logging.LogRecord]]:
    """Yield a list that gets what is logged meanwhile, warnings and worse."""
    make, found = logging.getLogRecordFactory(), list[logging.LogRecord]()

    def note(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        if record.levelno >= logging.WARNING:
            found.append(record)
        return record

    logging.setLogRecordFactory(note)
    try:
        yield found
    finally:
        logging.setLogRecordFactory(make)
