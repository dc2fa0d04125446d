"""The files of a report: report.html and report.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from peftcli.errors import PeftcliError
from peftcli.guard.files import read_small
from peftcli.reporting.blocks import Section
from peftcli.reporting.comparing import compared_sections
from peftcli.reporting.html import report_page
from peftcli.reporting.markdown import report_text
from peftcli.reporting.run import RunFiles, about, sections
from peftcli.system.secrets import redact, redact_values

REPORT_FILES = ("report.html", "report.md")
_MAX_RECIPE = 50_000
"""Bytes of recipe.yaml; a longer one is not shown, so that the page stays small."""


def run_files(
    folder: Path, values: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], moves_to: Path | None = None
) -> RunFiles:
    """Return what a folder says of its run, without secrets: ``values`` of run.json, ``metrics`` its lines.

    ``moves_to`` is the folder that this one becomes, if it does not stay.
    """
    recipe = ""
    with suppress(PeftcliError, OSError, ValueError):
        recipe = read_small(folder / "recipe.yaml", _MAX_RECIPE).decode()
    return RunFiles(folder, redact_values(values), metrics, recipe, moves_to)


def render(runs: Sequence[RunFiles]) -> dict[str, bytes]:
    """Return the report of one run, or of several compared, by the suffix of its file."""
    if len(runs) == 1:
        title, line, found = f"Report of {runs[0].name}", about(runs[0]), sections(runs[0])
    else:
        title, found = f"{len(runs)} runs compared", compared_sections(runs)
        line = "; ".join(dict.fromkeys(f"{run.method} on {run.base}, task {run.task}" for run in runs))
    page = redact(report_page(title, line, found))
    return {".html": page.encode(), ".md": redact(report_text(title, line, _without_curves(found))).encode()}


def _without_curves(found: Sequence[Section]) -> list[Section]:
    return [section for section in found if section.title != "Curves"]
