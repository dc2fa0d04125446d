"""``--quiet``, which means the same in every command that has it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Annotated

import typer

from peftcli.cli import console

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress: only warnings, errors and the answer.")]


def teller(quiet: bool) -> Callable[[str], None]:
    """What tells of progress. Of a quiet command it tells nothing, and other libraries draw no bars.

    To be called before these are imported: they look at the environment only then.
    """
    if not quiet:
        return console.log
    os.environ.update(TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    return lambda text: None
