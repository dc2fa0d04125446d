"""``--junit``: a report for a CI server, also of a failed run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import path
from peftcli.errors import GateFailed, PeftcliError, to_peftcli_error
from peftcli.system.outputs import StdoutClosed, expand_user
from peftcli.train.devices.launch import started_by_peftcli
from peftcli.train.runs.typed_json import flatten

Junit = Annotated[
    Path | None,
    typer.Option(
        "--junit",
        metavar="FILE",
        parser=lambda text: expand_user(path(text)),
        help="Write a JUnit report: each gate is a test case.",
    ),
]

_FACTS = (
    "adapter",
    "base_model",
    "device",
    "parameters",
    "peak_memory_bytes",
    "processes",
    "recipe_sha256",
    "steps",
    "tokens_per_second",
    "train_loss",
    "versions",
)
"""What the report contains of run.json besides metrics and gates."""


@contextmanager
def junit_report(path: Path | None, recipe: Path) -> Iterator[dict[str, Any]]:
    """Yield a dict to fill with the content of run.json; write the report when the block ends.

    An error in the block goes into the report and is raised again. Without a path nothing is written.

    Raises:
        PeftcliError: the report cannot be written, and no other error occurred.
    """
    run: dict[str, Any] = {}
    try:
        yield run
    except (typer.Exit, StdoutClosed):  # another process ran and wrote the report, or nothing ran
        raise
    except Exception as error:
        failed = getattr(error, "exit_code", 1) != GateFailed.exit_code  # the report contains the gates
        if not failed and not run:
            raise  # another process measured and wrote the report
        if failed and (started_by_peftcli() or getattr(error, "file", None) == str(path)):
            raise  # the launcher writes the report, or it cannot be written
        try:
            ours = to_peftcli_error(error) or PeftcliError(f"{type(error).__name__}: {error}")
            _write(path, recipe, run, ours.as_dict() if failed else None)
        except PeftcliError as problem:
            console.log(f"warning: {problem}")
        raise
    _write(path, recipe, run, None)


def _write(path: Path | None, recipe: Path, run: dict[str, Any], error: dict[str, object] | None) -> None:
    if path is None:
        return
    from peftcli.cli.junit import write_junit

    measured = run.get("eval", {})
    metrics = measured.get("kept", measured.get("last", {}))
    facts = flatten({name: run[name] for name in _FACTS if name in run})
    facts = {name: value for name, value in facts.items() if value is not None}
    gates, seconds = run.get("gates", []), run.get("wall_seconds")
    write_junit(path, suite=recipe.stem, gates=gates, metrics={**metrics, **facts}, seconds=seconds, error=error)
