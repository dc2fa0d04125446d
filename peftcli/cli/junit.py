"""``--junit``: JUnit XML for CI servers, also of a failed run: each gate of a recipe is a test case."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from xml.etree import ElementTree

import typer

from peftcli.cli import console
from peftcli.cli.options import path
from peftcli.errors import GateFailed, PeftcliError, Problem, to_peftcli_error
from peftcli.guard.files import escape_char
from peftcli.system.outputs import StdoutClosed, expand_user, write_output
from peftcli.system.secrets import redact_values
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
            _write_run(path, recipe, run, ours.as_dict() if failed else None)
        except PeftcliError as problem:
            console.log(f"warning: {problem}")
        raise
    _write_run(path, recipe, run, None)


def _write_run(path: Path | None, recipe: Path, run: dict[str, Any], error: dict[str, object] | None) -> None:
    if path is None:
        return
    measured = run.get("eval", {})
    metrics = measured.get("kept", measured.get("last", {}))
    facts = flatten({name: run[name] for name in _FACTS if name in run})
    facts = {name: value for name, value in facts.items() if value is not None}
    gates, seconds = run.get("gates", []), run.get("wall_seconds")
    write_junit(path, suite=recipe.stem, gates=gates, metrics={**metrics, **facts}, seconds=seconds, error=error)


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML 1.0 forbids, even escaped."""


def write_junit(
    path: Path,
    *,
    suite: str,
    gates: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
    seconds: float | None,
    error: Mapping[str, Any] | None,
) -> None:
    """Write a report of one test suite, complete or not at all; into a pipe or a device directly.

    Each gate is a test case; a failed one contains the measured value. A failed run adds the test case ``run`` with the
    error. A successful run without gates adds it too, since CI servers reject a report without test cases. ``suite`` is
    the name of the suite and the class of its cases; gates, metrics, seconds and error are as in run.json.

    Raises:
        UsageError: ``path`` is a folder.
        FolderBusy: another process is writing the file.
        StorageError: the file cannot be written.
    """
    suite, gates, metrics, error = redact_values([suite, gates, metrics, error])
    cases = [_gate_case(gate) for gate in gates]
    if error is not None or not cases:
        cases.append(_run_case(error, seconds))
    element = _element(
        "testsuite",
        package="peftcli",
        id=0,
        name=suite,
        hostname="localhost",  # the schema of Ant's reports requires one; the machine's own name stays private
        # in UTC, as XML Schema's dateTime without a zone, the only form that CI servers read
        timestamp=datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00"),
        time=f"{seconds or 0:.3f}",
        tests=len(cases),
        failures=sum(case.find("failure") is not None for case in cases),
        errors=sum(case.find("error") is not None for case in cases),
        skipped=0,
    )
    properties = _element("properties")
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        properties.append(_element("property", name=name, value=shown))
    for case in cases:
        case.set("classname", _clean(suite))
    element.extend([properties, *cases, _element("system-out"), _element("system-err")])
    root = _element("testsuites")
    root.append(element)
    ElementTree.indent(root)
    # with a declaration, and ASCII even if names contain other characters
    write_output(path, ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True) + b"\n")


def _gate_case(gate: Mapping[str, Any]) -> ElementTree.Element:
    case = _element("testcase", name=f"{gate['metric']} {gate['gate']}", time="0.000")
    if not gate["passed"]:
        from peftcli.recipe import why_failed

        message = why_failed(gate)
        case.append(_element("failure", message, message=message, type="GateFailed"))
    return case


def _run_case(error: Mapping[str, Any] | None, seconds: float | None) -> ElementTree.Element:
    case = _element("testcase", name="run", time=f"{seconds or 0:.3f}")
    if error is not None:
        only = {name: error.get(name) for name in ("message", "line", "key")} | {"file": error.get("file") or ""}
        lines = [str(Problem(**each)) for each in error.get("problems") or [only]]
        text = "\n".join(filter(None, [*lines, error.get("hint")]))
        case.append(_element("error", text, message=error["message"], type=error["kind"]))
    return case


def _element(tag: str, text: str | None = None, **attributes: Any) -> ElementTree.Element:
    element = ElementTree.Element(tag, {name: _clean(str(value)) for name, value in attributes.items()})
    element.text = text and _clean(text)
    return element


def _clean(text: str) -> str:
    r"""Escape everything that XML cannot contain, as ``\x1b``."""
    return _NOT_XML.sub(lambda found: escape_char(found[0]), text)
