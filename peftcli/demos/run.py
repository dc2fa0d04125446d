"""Run a demo: data and recipe into a folder, training, and what the model says before and after."""

from __future__ import annotations

import importlib.util
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.data.rows import Place, Row
from peftcli.demos.models import MODELS, fetch_model, folder_of
from peftcli.demos.table import DEMOS, Demo, in_words
from peftcli.errors import AdapterError, UsageError
from peftcli.guard.files import command_word
from peftcli.recipe import load_recipe
from peftcli.system.disk import write_file
from peftcli.tasks import TASKS
from peftcli.train.runs.folder import StartOptions
from peftcli.train.start import start

Tell = Callable[[str], None]
_SHORT = 80
"""Characters of each value of a row of several that a command line repeats."""


@dataclass(frozen=True)
class Asked:
    """One row, and what the model says of it."""

    row: dict[str, str]
    before: str | None
    """None: the base model has no head for the task, so it says nothing."""
    after: str


@dataclass(frozen=True)
class DemoResult:
    """What a demo showed."""

    task: str
    folder: str
    model: str
    metric: str
    """The metric of the recipe's gate, on the evaluation rows."""
    before: float
    after: float
    asked: list[Asked]
    gates: list[dict[str, Any]]
    """As run.json has them."""
    next: list[str]
    """Commands to go on with."""


def require_packages(tasks: list[str]) -> None:
    """Check that the optional packages of demos are installed, before anything is downloaded.

    Raises:
        UsageError: one is not.
    """
    needed = {package: extra for task in tasks for package, extra in DEMOS[task].packages.items()}
    for name in {DEMOS[task].model: None for task in tasks}:
        needed |= {} if folder_of(name).is_dir() else MODELS[name].packages
    missing = {package: extra for package, extra in needed.items() if importlib.util.find_spec(package) is None}
    if missing:
        extras = ",".join(dict.fromkeys(missing.values()))
        raise UsageError(f"needs {', '.join(missing)}", hint=f"pip install 'peftcli[{extras}]'")


def run_demo(task: str, folder: Path, tell: Tell, on_event: Callable[[Any], None]) -> DemoResult:
    """Run the demo of a task in a folder, where its data, its recipe and the adapter remain.

    Raises:
        UsageError: a file of the folder was changed, or belongs to something else.
        PeftcliError: what training and ``predict`` raise.
    """
    demo = DEMOS[task]
    model = fetch_model(demo.model, tell)
    _write(demo, task, model, folder)

    recipe = load_recipe(folder / "recipe.yaml", [])
    recipe = replace(recipe, launch=replace(recipe.launch, num_processes=1))
    run = start(recipe, ["train", str(folder / "recipe.yaml")], StartOptions("auto", (), False), on_event)
    assert run is not None  # of one process
    asked = _ask(demo, folder, recipe.training.output_dir)
    metric, word, place = next(iter(recipe.gates)), command_word(recipe.training.output_dir), command_word(str(folder))
    return DemoResult(
        task=task,
        folder=str(folder),
        model=demo.model,
        metric=metric,
        before=run["eval"]["first"][metric],
        after=run["eval"]["kept"][metric],
        asked=asked,
        gates=run["gates"],
        next=[
            f"peftcli train {place}/recipe.yaml training.output_dir={place}/again",
            f"peftcli inspect {place}/recipe.yaml",
            asking(task, run["task"], word, list(asked[0].row.values())),
        ],
    )


def asking(task: str, settings: Mapping[str, Any], adapter: str, row: Sequence[str]) -> str:
    """Return a command that asks an adapter for a row, or for another one where its values are long."""
    if len(row) == 1 or max(map(len, row)) < _SHORT:
        return f"peftcli predict {adapter} {' '.join(map(shlex.quote, row))}"
    return TASKS[task].filled(settings).command(adapter)


def _write(demo: Demo, task: str, model: Path, folder: Path) -> None:
    """Write data and recipe; leave a folder alone that has them already."""
    content = demo.recipe(task, model, folder).encode()
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        if recipe.read_bytes() == content:
            return
        hint = f"peftcli train {command_word(str(recipe))}, or choose another --output"
        raise UsageError("was changed since the demo wrote it, and is left alone", file=str(recipe), hint=hint)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError("is a folder of something else", file=str(folder), hint="choose another --output")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as scratch:
        made = Path(scratch) / "demo"
        demo.data(made)
        write_file(made / "recipe.yaml", content)
        if folder.exists():
            folder.rmdir()
        made.rename(folder)


def _ask(demo: Demo, folder: Path, adapter: str) -> list[Asked]:
    rows = [{name: value.replace("<folder>", str(folder)) for name, value in row.items()} for row in demo.asks]
    before, after = (_answers(rows, adapter, folder / name, name == "after") for name in ("before", "after"))
    said: Sequence[str | None] = before or [None] * len(rows)
    assert after is not None
    return [Asked(row, first, last) for row, first, last in zip(rows, said, after, strict=True)]


def _answers(rows: list[dict[str, str]], adapter: str, files: Path, with_adapter: bool) -> list[str] | None:
    """What the model says of rows; None: it has no head for the task."""
    from peftcli.adapters.predict import load_predictor

    try:
        predictor = load_predictor(adapter, with_adapter=with_adapter)
    except AdapterError as error:
        if error.key != "--no-adapter":
            raise
        return None
    asked = [Row(dict(row), Place("the demo", number)) for number, row in enumerate(rows, start=1)]
    return in_words(list(predictor.answer(asked, beside=files)))


def lines(result: DemoResult) -> Iterator[str]:
    """Yield what is printed of a demo's result."""
    for asked in result.asked:
        for name, value in asked.row.items():
            yield f"  {name:<9} {_one_line(value)}"
        yield f"    before  {'nothing: its head for this task is new' if asked.before is None else asked.before}"
        yield f"    after   {asked.after}"
    yield f"  {result.metric.removeprefix('eval_')}: {result.before:.3f} before, {result.after:.3f} after"
    for gate in result.gates:
        yield f"  gate {gate['metric']} {gate['gate']}: {'passed' if gate['passed'] else 'FAILED'}"
    yield f"  in {result.folder}: recipe.yaml to change, its data, adapter/"
    yield "next:"
    yield from (f"  {command}" for command in result.next)


def _one_line(text: str) -> str:
    return " / ".join(line.strip() for line in text.splitlines())


def about(task: str) -> Mapping[str, Any]:
    """What ``peftcli demo`` lists of a task."""
    demo = DEMOS[task]
    wheel = MODELS[demo.model].wheel
    size = 0 if wheel is None or folder_of(demo.model).is_dir() else wheel.megabytes
    return {"task": task, "model": demo.model, "learns_to": demo.summary, "seconds": demo.seconds, "download_mb": size}
