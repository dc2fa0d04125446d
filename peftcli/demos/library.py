"""Texts of Python's own standard library (PSF licence), which every Python has: its functions and their docstrings."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path

EVAL_SHARE = 0.2
SHORT = 400
"""Characters of the code of a function with a docstring, at most."""
_OTHERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}


def functions(draw: random.Random) -> Iterator[tuple[str, str, str, ast.FunctionDef]]:
    """Yield the functions of Python's standard library: train or eval, the module's file, its code, the function."""
    for part, inside, code, tree in modules(draw):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield part, inside, code, node


def modules(draw: random.Random) -> Iterator[tuple[str, str, str, ast.Module]]:
    """Yield the modules of Python's standard library: train or eval, the file, its code, the code parsed."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if _OTHERS & set(inside.parts):
            continue
        part = "eval" if draw.random() < EVAL_SHARE else "train"
        try:
            code = path.read_text(encoding="utf-8")
            yield part, inside.as_posix(), code, ast.parse(code)
        except (SyntaxError, UnicodeDecodeError):
            continue


def documented(draw: random.Random) -> dict[str, dict[str, str]]:
    """Short functions of Python's standard library: train or eval -> first line of the docstring -> the rest of it."""
    pairs = dict[str, dict[str, str]](train={}, eval={})
    for part, _, code, function in functions(draw):
        summary, body = (ast.get_docstring(function) or "").split("\n")[0], function.body[1:]
        if (
            not re.fullmatch(r"[A-Z][ -~]{14,90}\.", summary)
            or not body
            or any(summary in each for each in pairs.values())
        ):
            continue
        lines = code.splitlines()
        kept = (
            lines[function.lineno - 1 : function.body[0].lineno - 1]
            + lines[function.body[0].end_lineno : function.end_lineno]
        )
        short = textwrap.dedent("\n".join(line for line in kept if line.strip()))
        if len(short) <= SHORT and short.isascii():
            pairs[part].setdefault(summary, short)
    return pairs


def messages(draw: random.Random) -> dict[str, dict[str, str]]:
    """Error messages of Python's standard library: train or eval -> message -> the class of the error.

    What the code fills in is ``...``.
    """
    found = dict[str, dict[str, str]](train={}, eval={})
    for part, _, _, tree in modules(draw):
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
                text = _literal(node.exc.args[0]) if node.exc.args else ""
                if len(text) >= 12 and not any(text in each for each in found.values()):
                    found[part][text] = node.exc.func.id
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
