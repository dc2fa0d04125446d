"""Write docs/licences.md: the packages that peftcli installs with it, and their licences.

    python docs/licences.py

Names and licences come from the metadata of the packages that are installed here: those of pyproject.toml, with the
extras that `all` names, and what these need in turn. CUDA's libraries, which torch brings on some
machines, are left out.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
_HEAD = """<!-- Written by `make licences` from the metadata of installed packages. Do not edit. -->

# Licences of dependencies

`peftcli` contains no code of these packages: pip installs them beside it. `pip install peftcli` brings those marked
"always", `pip install 'peftcli[all]'` the others too. torch may bring NVIDIA's CUDA libraries besides, under NVIDIA's
licence.

| package | licence | installed |
| --- | --- | --- |
"""


def main() -> None:
    """Write the page."""
    always = closure("peftcli", [])
    rows = [
        f"| {name} | {licence(distribution(name))} | {'always' if name in always else 'with `all`'} |"
        for name in sorted(closure("peftcli", ["audio", "diffusion", "gguf", "metrics", "vision"]))
    ]
    (ROOT / "docs/licences.md").write_text(_HEAD + "\n".join(rows) + "\n", encoding="utf-8")


def closure(root: str, extras: list[str]) -> set[str]:
    """Return the canonical names of the installed packages that ``root`` needs, without itself."""
    seen, todo = set(), [(root, frozenset(extras))]
    while todo:
        name, wanted = todo.pop()
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        seen.add(canonicalize_name(name))
        for need in map(Requirement, needs):
            of = ["", *sorted(wanted)]
            if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in of):
                continue
            if canonicalize_name(need.name) not in seen and not need.name.startswith(("nvidia-", "cuda-")):
                todo.append((need.name, frozenset(need.extras)))
    return seen - {root}


def licence(found: Distribution) -> str:
    """Return a package's licence: its SPDX expression, else its classifiers, else the first line of its field."""
    meta = found.metadata
    if expression := meta.get("License-Expression"):
        return str(expression)
    named = [line.rpartition(":: ")[2] for line in meta.get_all("Classifier") or [] if line.startswith("License ::")]
    if named := [name for name in named if name != "OSI Approved"]:
        return ", ".join(named)
    text = str(meta.get("License") or "").strip().splitlines()
    return re.sub(r"\|", "/", text[0])[:80] if text else "not said in its metadata"


if __name__ == "__main__":
    main()
