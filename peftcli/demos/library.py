"""Texts of Python's own standard library (PSF licence), which every Python has: its functions and their docstrings."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

EVAL_SHARE = 0.2
SHORT = 400
"""Characters of the code of a function with a docstring, at most."""
_OTHERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}


def modules() -> Iterator[tuple[str, str, ast.Module]]:
    """Yield the modules of Python's standard library: file, code, and the code parsed, which is empty if unreadable."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if _OTHERS & set(inside.parts):
            continue
        try:
            code = path.read_text(encoding="utf-8")
            tree = ast.parse(code)
        except (SyntaxError, UnicodeDecodeError):
            code, tree = "", ast.Module([], [])
        yield inside.as_posix(), code, tree


def part_of(draw: random.Random) -> str:
    """Draw whether a module is for train or eval."""
    return "eval" if draw.random() < EVAL_SHARE else "train"


def documented(draw: random.Random) -> dict[str, dict[str, str]]:
    """Short functions of Python's standard library: train or eval -> first line of the docstring -> the rest of it."""
    return _split(draw, (pairs for pairs, _ in _texts()))


def messages(draw: random.Random) -> dict[str, dict[str, str]]:
    """Error messages of Python's standard library: train or eval -> message -> the class of the error.

    What the code fills in is ``...``.
    """
    return _split(draw, (errors for _, errors in _texts()))


def _split(draw: random.Random, texts: Iterable[dict[str, str]]) -> dict[str, dict[str, str]]:
    """Split the texts of modules into train and eval; a text of two modules stays in the first one's part."""
    parts = dict[str, dict[str, str]](train={}, eval={})
    for found in texts:
        part, known = parts[part_of(draw)], parts["train"].keys() | parts["eval"].keys()
        part |= {text: value for text, value in found.items() if text not in known}
    return parts


@cache
def _texts() -> list[tuple[dict[str, str], dict[str, str]]]:
    """The docstrings of each module, with their functions, and its error messages; parsing takes some seconds."""
    return [(_documented(code, tree), _messages(tree)) for _, code, tree in modules()]


def _documented(code: str, tree: ast.Module) -> dict[str, str]:
    pairs, lines = dict[str, str](), code.splitlines()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or not function.body[1:]:
            continue
        summary = (ast.get_docstring(function) or "").split("\n")[0]
        if not re.fullmatch(r"[A-Z][ -~]{14,90}\.", summary):
            continue
        kept = (
            lines[function.lineno - 1 : function.body[0].lineno - 1]
            + lines[function.body[0].end_lineno : function.end_lineno]
        )
        short = textwrap.dedent("\n".join(line for line in kept if line.strip()))
        if len(short) <= SHORT and short.isascii():
            pairs.setdefault(summary, short)
    return pairs


def _messages(tree: ast.Module) -> dict[str, str]:
    found = dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            text = _literal(node.exc.args[0]) if node.exc.args else ""
            if len(text) >= 12:
                found.setdefault(text, node.exc.func.id)
    return found


def _literal(node: ast.expr) -> str:
    """The text of a literal, with ``...`` for what is filled in; empty for another expression."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return re.sub(r"%[-\w]", "...", _literal(node.left))
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return " ".join(node.value.split())
    if isinstance(node, ast.JoinedStr):
        parts = (each.value if isinstance(each, ast.Constant) else "..." for each in node.values)
        return " ".join("".join(map(str, parts)).split())
    return ""
