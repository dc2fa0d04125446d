"""``--quiet``, the same in every command."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from peftcli.cli import console

Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress, only warnings, errors and the answer.")]


def progress_log(quiet: bool) -> Callable[[str], None]:
    """Return the function that logs progress. For a quiet command it does nothing, and other libraries draw no bars.

    Call it before these libraries are imported: they read the environment only then.
    """
    if not quiet:
        return console.log
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    return lambda text: None
