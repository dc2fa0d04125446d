"""Calls into transformers: its errors become one line of ours, and its log is held back until the call succeeds."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from peftcli.errors import ModelError, NetworkError, OutOfMemory, PeftcliError, causes, to_peftcli_error
from peftcli.guard.files import one_line, short_name

_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}
"""Errors of a missing network."""
_MAX_LOG_LINES = 16


@contextmanager
def translated_errors(name: str) -> Iterator[None]:
    """Raise in one line whatever transformers raises while it loads the base model ``name``.

    Raises:
        ModelError: transformers cannot load it.
        NetworkError: the model's own code needs the hub, which cannot be reached.
        OutOfMemory: the machine's memory does not hold it.
    """
    try:
        with quiet():
            yield
    except PeftcliError:
        raise
    except BaseException as error:
        if isinstance(to_peftcli_error(error), OutOfMemory):
            raise OutOfMemory(f"the memory does not hold {name}") from None
        # a panic of a library in Rust is no Exception, and no request to stop either
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        name = short_name(name)
        if any(type(cause).__name__ in _UNREACHABLE for cause in causes(error)):
            raise NetworkError(
                f"cannot load {name}: the hub cannot be reached", key="base_model", hint="try again with a network"
            ) from error
        text = " ".join(str(error).split()) or type(error).__name__
        if found := _NO_FORM.match(text):
            text = f"transformers has no {found['form']} for a model with {found['config']}"
        hint = ALLOW_CODE if _OWN_CODE in text else None
        if hint:
            text = "it needs Python code that comes with the model"
        elif needs := _NEEDS.search(text):
            package = next(filter(None, needs.groups())).lower()
            text, hint = f"it needs the package {package}", f"pip install {package}"
        raise ModelError(f"cannot load {name}: {one_line(text)}", key="base_model", hint=hint) from error


ALLOW_CODE = (
    "only a recipe can allow code that you have read: base_model.trust_remote_code; "
    "`peftcli evaluate RECIPE --adapter ADAPTER` runs it, too"
)
_OWN_CODE = "contains custom code which must be executed"
"""In transformers' message that it must not run a model's code."""
_NEEDS = re.compile(
    r"requires the (Torchvision|timm) library but it was not found|Missing optional dependencies: ([\w-]+)|"
    r"Package `([\w-]+)` is required"
)
"""In transformers' messages that a package is not installed, which a processor of pictures or videos asks for."""
_NO_FORM = re.compile(r"Unrecognized configuration class <class '[\w.]*?(?P<config>\w+)'> .*?: (?P<form>\w+)\.")
"""The beginning of transformers' message that an auto class has no model for a config. A list of all follows."""
_OF_NEW_HEADS = re.compile(r"LOAD REPORT from|^You passed `num_labels=")
"""Messages of transformers about weights that the checkpoint lacks. ``find_initialised`` checks and reports those."""


@contextmanager
def quiet() -> Iterator[None]:
    """Draw no progress bars of transformers, and log the first lines of its messages, escaped, only on success."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    handlers = logging.getLogger("transformers").handlers
    for handler in handlers:
        handler.addFilter(hold)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(hold)
        if bars:
            transformers_logging.enable_progress_bar()
    for record in held:
        lines = re.sub(r"\x1b\[[\d;]*m", "", record.getMessage()).splitlines()  # transformers' own bold letters
        more = [f"and {len(lines) - _MAX_LOG_LINES} lines more"] if len(lines) > _MAX_LOG_LINES else []
        record.msg, record.args = "\n".join([*map(one_line, lines[:_MAX_LOG_LINES]), *more]), None
        if not _OF_NEW_HEADS.search(record.msg):
            logging.getLogger(record.name).handle(record)
