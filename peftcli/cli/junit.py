"""JUnit XML for CI servers: each gate of a recipe is a test case. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from peftcli.errors import Problem
from peftcli.guard.files import escape_char
from peftcli.system.outputs import write_output
from peftcli.system.secrets import redact_values

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
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds").removesuffix("+00:00"),
        time=f"{seconds or 0:.3f}",
        tests=len(cases),
        failures=sum(case.find("failure") is not None for case in cases),
        errors=sum(case.find("error") is not None for case in cases),
        skipped=0,
    )
    properties = _element("properties")
    properties.extend(_element("property", name=name, value=_format(value)) for name, value in metrics.items())
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
        value = "was not measured, or is not finite" if gate["value"] is None else f"is {_format(gate['value'])}"
        message = f"{gate['metric']} {value}, expected {gate['gate']}"
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


def _format(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _clean(text: str) -> str:
    r"""Escape everything that XML cannot contain, as ``\x1b``."""
    return _NOT_XML.sub(lambda found: escape_char(found[0]), text)
