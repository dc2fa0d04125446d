"""``peftcli check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftcli.cli import completion, console
from peftcli.cli.options import Json, not_empty
from peftcli.cli.preview_output import MEMORY_UNKNOWN, memory_in_words
from peftcli.data.rows import count_of
from peftcli.errors import Problem, RecipeError, UsageError


def check(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE... [KEY=VALUE]...",
            parser=not_empty,
            autocompletion=completion.recipes_and_overrides,
            help="YAML recipes, and settings to override.",
            show_default=False,
        ),
    ],
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read data, model config and tokenizer, and check names of metrics.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find every mistake in recipes, without training."""
    from dataclasses import asdict

    from peftcli.recipe import rate_problems, read, recipes_and_overrides

    recipes, overrides = recipes_and_overrides(words)
    if not recipes:
        raise UsageError("names no recipe")
    errors: list[Problem] = []
    warnings: list[Problem] = []
    codes: list[int] = []
    memory = dict[str, Any]()
    for path in dict.fromkeys(recipes):
        reading = read(path, overrides)
        found, noted, code, would = reading.problems, rate_problems(reading), 2, dict[str, Any]()
        if deep and reading.recipe:
            from peftcli.train.preview import deep_check

            opened = deep_check(reading.recipe)
            opened.check_folder(reading.recipe)
            found, code = [reading.locate(each) for each in opened.errors], opened.exit_code
            noted = [*map(reading.locate, opened.warnings), *noted]
            would = opened.would
            memory[str(path)] = would.get("memory")
        errors += found
        warnings += noted
        codes += [code] * bool(found)
        if not as_json:
            _print(path, found, noted, would)
    if as_json:
        found_all = {"errors": [asdict(p) for p in errors], "warnings": [asdict(p) for p in warnings]}
        console.print_json(found_all | ({"memory": memory} if deep else {}))
    raise typer.Exit(codes[0] if codes else 0)


def _print(path: Path, errors: list[Problem], warnings: list[Problem], would: dict[str, Any]) -> None:
    for problem in warnings:
        console.paragraph(f"warning: {problem}")
    for problem in errors:
        console.paragraph(str(problem))
    console.paragraph(f"{path}: {count_of(len(errors), 'problem')}" if errors else f"ok: {path}")
    if errors and (more := console.more_about(RecipeError(errors))):
        console.log(more)
    if names := would.get("training_in_full"):
        console.out(f"training in full: {', '.join(names)}")
    if memory := would.get("memory"):
        console.paragraph(memory_in_words(memory), "memory: ")
    elif "memory" in would:
        console.out(MEMORY_UNKNOWN)
