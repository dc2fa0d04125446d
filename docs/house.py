"""Measure the structure of the package: how much there is to read, and how often it asks what a thing is.

``python docs/house.py`` prints the figures of this checkout, ``--list`` also the names behind the counts.
``tests/test_house.py`` keeps an upper bound of each figure in ``tests/house.json``; ``--write`` writes that file.
Lines are counted as ``wc -l`` does. Only the reading paths import the package: ``tests/reading_paths.py`` runs them.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
BOUNDS = "tests/house.json"
LONG = 50
"""A function with more lines is long."""
SHARED = ("core", "train", "data", "adapters", "peft_api")
"""Folders that name no model family."""
MODEL_TYPES = frozenset((ROOT / "docs/model_types.txt").read_text(encoding="utf-8").split())
"""The ``model_type`` of each family in transformers 5.24, sorted: the keys of its ``CONFIG_MAPPING_NAMES``. A list of
our own, since the figures must not depend on the installed version."""


@dataclass(frozen=True)
class Module:
    """One file of the package, parsed."""

    name: str
    tree: ast.Module
    nodes: list[ast.AST]
    """All of the tree's nodes, walked once."""


Modules = Mapping[Path, Module]


@dataclass(frozen=True)
class Figure:
    """One figure, and the names behind it."""

    value: float
    names: Collection[str] = ()


def main() -> None:
    """Print the figures, or write them as bounds."""
    parser = argparse.ArgumentParser(description="Measure the structure of the package.")
    parser.add_argument("--list", action="store_true", help="print the names behind the counts, too")
    parser.add_argument("--write", action="store_true", help=f"write the figures as bounds into {BOUNDS}")
    options = parser.parse_args()
    found = figures(ROOT) | reading_figures()
    if options.write:
        bounds = {name: bound_of(figure.value) for name, figure in found.items()}
        (ROOT / BOUNDS).write_text(json.dumps(bounds, indent=2) + "\n", encoding="utf-8")
    print("| figure | value |\n|---|---|")
    for name, figure in found.items():
        print(f"| {name} | {figure.value:,} |")
    for name, figure in found.items() if options.list else ():
        if figure.names:
            print(f"\n{name}:\n  " + "\n  ".join(sorted(figure.names)))


def bound_of(value: float) -> float:
    """Return the bound for a figure: it rounded up to three digits or a tenth, so that few changes move it."""
    if isinstance(value, float):
        return math.ceil(value * 10) / 10
    step: int = 10 ** max(len(str(value)) - 3, 0)
    return -(-value // step) * step


def figures(root: Path, modules: Modules | None = None) -> dict[str, Figure]:
    """Return the figures of the checkout at ``root``, by name."""
    package, modules = root / "peftcli", modules or parsed(root)
    lines = {path.relative_to(package).as_posix(): count_lines(path) for path in modules}
    core = {name: size for name, size in lines.items() if name.startswith("core/")}
    prompts = {name: size for name, size in core.items() if name.startswith("core/prompts/")}
    layers = [name for name in lines if name.startswith(("core/", "methods/"))]
    total, of_layers = sum(lines.values()), sum(lines[name] for name in layers)
    named = {
        path.relative_to(package).as_posix(): [node for node in module.nodes if isinstance(node, ast.Name)]
        for path, module in modules.items()
    }
    circles = cycles(imports(modules, type_checking=True))
    found = {
        "lines of the package": Figure(total),
        "files of the package": Figure(len(lines)),
        "lines of core, without core/prompts": Figure(sum(core.values()) - sum(prompts.values())),
        "lines of core/prompts": Figure(sum(prompts.values())),
        f"functions of more than {LONG} lines": _counted(_long_functions(modules, package)),
        "private functions of a module that are used once": _counted(_used_once(modules)),
        "lines that name Any": Figure(
            sum(len({node.lineno for node in nodes if node.id == "Any"}) for nodes in named.values())
        ),
        "modules in import cycles, TYPE_CHECKING included": _counted(name for group in circles for name in group),
        f"names of model families in {', '.join(SHARED)}": _counted(
            f"{file}: {name}" for file, names in names_in(modules, package, is_model_type).items() for name in names
        ),
    }
    for each in ("isinstance", "getattr and hasattr"):
        words = each.split(" and ")
        for where, files, size in (("core and methods", layers, of_layers), ("the package", list(lines), total)):
            count = sum(node.id in words for name in files for node in named[name])
            found[f"{each} in 1,000 lines of {where}"] = Figure(round(count / size * 1000, 2))
    found["lines of tests"] = Figure(sum(map(count_lines, (root / "tests").rglob("*.py"))))
    return found


def reading_figures() -> dict[str, Figure]:
    """Return the files and the lines of the functions that run on each reading path, by name."""
    printed = subprocess.check_output([sys.executable, str(ROOT / "tests/reading_paths.py")], stderr=subprocess.DEVNULL)
    found = {}
    for name, lines in json.loads(printed).items():
        found[f"files to read: {name}"] = Figure(len(lines), [f"{file} ({count})" for file, count in lines.items()])
        found[f"lines to read: {name}"] = Figure(sum(lines.values()))
    return found


def _counted(names: Iterator[str]) -> Figure:
    listed = list(names)
    return Figure(len(listed), listed)


def count_lines(path: Path) -> int:
    """Return the number of line ends of a file."""
    return path.read_bytes().count(b"\n")


def parsed(root: Path) -> Modules:
    """Return the package's files, parsed."""
    found = {}
    for path in sorted((root / "peftcli").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path] = Module(name, tree, list(ast.walk(tree)))
    return found


def _long_functions(modules: Modules, package: Path) -> Iterator[str]:
    for path, module in modules.items():
        for node in module.nodes:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                if (size := node.end_lineno - node.lineno + 1) > LONG:
                    yield f"{path.relative_to(package).as_posix()}: {node.name} ({size})"


def _used_once(modules: Modules) -> Iterator[str]:
    imported: Counter[tuple[str, str]] = Counter()
    for module in modules.values():
        for node in module.nodes:
            if isinstance(node, ast.ImportFrom) and node.module:
                imported.update((node.module, alias.name) for alias in node.names)
    for module in modules.values():
        used = Counter(node.id for node in module.nodes if isinstance(node, ast.Name))
        for node in module.tree.body:
            private = isinstance(node, ast.FunctionDef) and re.match("_[^_]", node.name)
            if private and used[node.name] + imported[module.name, node.name] == 1:
                yield f"{module.name}.{node.name}"


def is_model_type(word: str, _: Collection[str] = ()) -> bool:
    """Return whether a text or an identifier is a ``model_type``. A short one such as "led" is no other word there."""
    return word in MODEL_TYPES or word.replace("_", "-") in MODEL_TYPES


def is_foreign_class(word: str, own: Collection[str]) -> bool:
    """Return whether a text has the form of a class's name, and the package has no class of that name."""
    return bool(re.fullmatch(r"[A-Z][a-z]+\d*[a-z]*([A-Z]\w*|\d+\w*)", word)) and word not in own


def names_in(
    modules: Modules, package: Path, is_wanted: Callable[[str, Collection[str]], bool], *, texts_only: bool = False
) -> dict[str, list[str]]:
    """Return file -> wanted words that are a whole text or, unless ``texts_only``, an identifier, in SHARED.

    Docstrings and comments may say what they like.
    """
    own = {node.name for module in modules.values() for node in module.nodes if isinstance(node, ast.ClassDef)}
    found = {}
    for path, module in modules.items():
        file = path.relative_to(package)
        if file.parts[0] in SHARED:
            words = [word for word in _words(module.nodes, texts_only) if is_wanted(word, own)]
            found |= {file.as_posix(): sorted(words)} if words else {}
    return found


def _words(nodes: list[ast.AST], texts_only: bool) -> Iterator[str]:
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif not texts_only and isinstance(node, (ast.Name, ast.Attribute, ast.arg, ast.FunctionDef, ast.ClassDef)):
            yield next(getattr(node, key) for key in ("id", "attr", "arg", "name") if hasattr(node, key))


def imports(modules: Modules, *, type_checking: bool = False) -> dict[str, set[str]]:
    """Return module -> modules of the package that it imports anywhere; if asked, also for type checkers only."""
    names = {module.name for module in modules.values()}
    found: dict[str, set[str]] = {name: set() for name in names}
    for module in modules.values():
        skipped = {
            inner
            for node in module.nodes
            if not type_checking and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        for node in module.nodes:
            if node in skipped:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [f"{node.module}.{alias.name}" for alias in node.names]
                found[module.name] |= {full if full in names else node.module for full in wanted} & names
            elif isinstance(node, ast.Import):
                found[module.name] |= {alias.name for alias in node.names} & names
    return {name: wanted - {name} for name, wanted in found.items()}


def cycles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import one another (strongly connected components of more than one), by Tarjan."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(imported[name]):
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(imported):
        if name not in index:
            visit(name)
    return found


def inner_imports(modules: Modules) -> Counter[str]:
    """Return module -> how many of its imports of the package are inside functions."""
    found: Counter[str] = Counter()
    for module in modules.values():
        functions = [node for node in module.nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {node for function in functions for node in ast.walk(function) if isinstance(node, ast.ImportFrom)}
        found += Counter({module.name: sum((node.module or "").startswith("peftcli") for node in inside)})
    return found


if __name__ == "__main__":
    main()
