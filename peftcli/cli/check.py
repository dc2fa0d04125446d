"""``peftcli check``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftcli.cli import console

if TYPE_CHECKING:
    from peftcli.errors import Problem
    from peftcli.recipe import Reading


def check(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="YAML recipes.", show_default=False)],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read the data, the model config and the tokenizer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find every mistake in recipes, without training."""
    from dataclasses import asdict

    from peftcli.recipe import rate_problems, read

    errors: list[Problem] = []
    warnings: list[Problem] = []
    codes: list[int] = []
    for path in recipes:
        reading = read(path)
        found, noted, code = _check_deep(reading) if deep and reading.recipe else (reading.problems, [], 2)
        noted += rate_problems(reading)
        errors += found
        warnings += noted
        codes += [code] * bool(found)
        if not as_json:
            _print(path, found, noted)
    if as_json:
        console.print_json({"errors": [asdict(p) for p in errors], "warnings": [asdict(p) for p in warnings]})
    raise typer.Exit(codes[0] if codes else 0)


def _check_deep(reading: Reading) -> tuple[list[Problem], list[Problem], int]:
    from peftcli.train.preview import deep_check

    assert reading.recipe is not None
    found = deep_check(reading.recipe)
    return [reading.locate(p) for p in found.errors], [reading.locate(p) for p in found.warnings], found.exit_code


def _print(path: Path, errors: list[Problem], warnings: list[Problem]) -> None:
    for problem in warnings:
        console.out(f"warning: {problem}")
    for problem in errors:
        console.out(str(problem))
    count = "1 problem" if len(errors) == 1 else f"{len(errors)} problems"
    console.out(f"{path}: {count}" if errors else f"ok: {path}")
