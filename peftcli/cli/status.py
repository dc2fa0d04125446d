"""``peftcli status``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json, path
from peftcli.data.rows import count_of


def status(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", parser=path, help="Run folder: a recipe's training.output_dir.")
    ],
    as_json: Json = False,
) -> None:
    """Show whether a run is running, complete, interrupted or failed."""
    from peftcli.train.runs.status import status as read_status

    found = read_status(folder)
    if as_json:
        console.print_json(found)
        return
    console.out(f"{folder}: {_state(found)}")
    for line in _lines(found):
        console.out(f"  {line}")


def _state(found: dict[str, Any]) -> str:
    state, error = found["status"], found["error"]
    if state == "running":
        return f"running, process {found['pid']}"
    if state == "interrupted" and found["exit_code"] == 137:
        return "interrupted: the process ended without recording a reason"
    if state in ("interrupted", "failed") and error:
        return f"{state}, exit code {found['exit_code']}: {error['message']}"
    return f"{state}, exit code {found['exit_code']}" if found["exit_code"] else str(state)


def _lines(found: dict[str, Any]) -> list[str]:
    steps, last, attempts = found["steps"], found["last"], count_of(len(found["attempts"]), "attempt")
    lines = [f"steps        {steps['done']} of {steps['total'] or '?'}, in {attempts}"]
    if last and "loss" in last:
        lines.append(f"loss         {last['loss']:.4f} after step {last['step']}")
    lines += [f"{name:<12} {value:.4f}" for name, value in sorted((found["eval"] or {}).items())]
    for gate in found["gates"]:
        lines.append(f"gate         {gate['metric']} {gate['gate']}: {'passed' if gate['passed'] else 'FAILED'}")
    if found["checkpoints"]:
        lines.append(f"checkpoints  {', '.join(found['checkpoints'])}")
    for change in found["changes"]:
        lines.append(f"changed      {change['key']}: {change['before']!r} -> {change['now']!r}, step {change['step']}")
    if found["replacement"]:
        lines.append(f"replacement  a run that will replace it is {found['replacement']}")
    if found["resumable"] and found["status"] != "running":
        lines.append("next         run the same `peftcli train` again to resume")
    return lines
