"""The packages that are installed: extras of peftcli, and whether the versions fit together. Imports none of them."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_PEFTCLI = "peftcli"
_EXTRA = re.compile(r"extra == ['\"]([^'\"]+)")
_DEVELOPERS = ("dev",)
"""Extras that are not for users."""


@dataclass(frozen=True)
class Misfit:
    """A package that demands a version of another one which is not installed in that version."""

    by: str
    """The package that demands it, with its version."""
    package: str
    wanted: str
    """As ``>=0.22.0``."""
    installed: str


def installed_version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def extras() -> dict[str, list[str]]:
    """Return the extras of peftcli, each with what it lacks: packages that are not installed, or are too old."""
    out: dict[str, list[str]] = {}
    for needed in _requirements(_PEFTCLI):
        for name in _EXTRA.findall(str(needed.marker or "")):
            if needed.name != _PEFTCLI and name not in _DEVELOPERS:
                out.setdefault(name, []).extend([] if _fits(needed) else [f"{needed.name}{needed.specifier}"])
    return out


def misfits(packages: Iterable[str]) -> list[Misfit]:
    """Return what the packages demand of one another, and of others, in another version than is installed."""
    found = list[Misfit]()
    for package in packages:
        if (own := installed_version(package)) is None:
            continue
        for needed in (*_requirements(package), *_demanded_in_code(package)):
            is_needed = needed.marker is None or needed.marker.evaluate({"extra": ""})
            there = installed_version(needed.name)
            if is_needed and there is not None and not _fits(needed):
                found.append(Misfit(f"{package} {own}", needed.name, str(needed.specifier), there))
    return found


def _fits(needed: Requirement) -> bool:
    there = installed_version(needed.name)
    return there is not None and needed.specifier.contains(there, prereleases=True)


def _requirements(package: str) -> list[Requirement]:
    """Return what a package demands, as its metadata says it; nothing of one that is not installed."""
    from packaging.requirements import Requirement  # it takes a while, and every command imports this module

    try:
        return list(map(Requirement, requires(package) or ()))
    except PackageNotFoundError:
        return []


_IN_CODE = {"transformers": ("integrations/peft.py", "MIN_PEFT_VERSION", "peft")}
"""Package -> file, name in it and package whose oldest version it holds: such a demand is in no metadata."""


def _demanded_in_code(package: str) -> list[Requirement]:
    """Return what a package checks when it runs, as the file that is installed says it."""
    from packaging.requirements import Requirement

    file, name, other = _IN_CODE.get(package, ("", "", ""))
    spec = importlib.util.find_spec(package) if file else None
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        return []
    found = re.search(rf"^{name} = ['\"]([0-9.]+)['\"]", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [Requirement(f"{other}>={found[1]}")] if found else []
