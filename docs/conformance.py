"""Write docs/conformance.md, every method x base model x promise, and docs/conformance_tasks.md, every method x task.

    .venv/bin/python docs/conformance.py            both
    .venv/bin/python docs/conformance.py tasks      the second one alone; or: models

Takes some minutes. Ends with status 1, and does not write a page of which a promise is broken.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests")]

import task_methods  # noqa: E402
from promises import MODELS, PROMISES, NotApplicable, is_refused, why_not  # noqa: E402

from peftcli.methods import METHODS  # noqa: E402
from peftcli.tasks import TASKS  # noqa: E402

PAGE = ROOT / "docs/conformance.md"
PAGE_OF_TASKS = ROOT / "docs/conformance_tasks.md"


def main() -> int:
    """Run what is asked for, write the pages, and say how it went."""
    asked = sys.argv[1:] or ["models", "tasks"]
    wrote = [of_models() if which == "models" else of_tasks() for which in asked]
    return 0 if all(wrote) else 1


def of_models() -> bool:
    """Run every method x base model x promise, and write their page if none is broken."""
    cells: dict[tuple[str, ...], str] = {}
    for number, method in enumerate(METHODS, 1):
        print(f"{number} of {len(METHODS)}: {method}", flush=True)
        for kind in MODELS:
            for promise in PROMISES:
                cells[method, kind, promise] = cell(method, kind, promise)
                if cells[method, kind, promise].startswith("fail"):
                    print(f"  {kind}: {promise}: {cells[method, kind, promise]}", flush=True)
    return write(PAGE, cells, page(cells))


def of_tasks() -> bool:
    """Run every method x task, and write their page if none fails."""
    cells: dict[tuple[str, ...], str] = {}
    for number, method in enumerate(METHODS, 1):
        print(f"{number} of {len(METHODS)}: {method}", flush=True)
        for task in TASKS:
            cells[method, task] = cell_of_task(method, task)
            if cells[method, task].startswith("fail"):
                print(f"  {task}: {cells[method, task]}", flush=True)
    return write(PAGE_OF_TASKS, cells, page_of_tasks(cells))


def write(path: Path, cells: dict[tuple[str, ...], str], lines: Iterator[str]) -> bool:
    """Say how it went, and write a page if nothing fails."""
    failed = sum(text.startswith("fail") for text in cells.values())
    passed = sum(text == "pass" for text in cells.values())
    print(f"{passed} pass, {failed} fail, {len(cells) - passed - failed} not applicable")
    if not failed:
        path.write_text("\n".join(lines) + "\n")
        print(f"wrote {path.relative_to(ROOT)}")
    return not failed


def cell(method: str, kind: str, promise: str) -> str:
    """``pass``, ``fail: why`` or the reason why the promise does not apply."""

    def check(folder: Path) -> None:
        if reason := why_not(method, kind):
            is_refused(method, kind)
            raise NotApplicable(reason)
        PROMISES[promise](method, kind, folder)

    return outcome(check)


def cell_of_task(method: str, task: str) -> str:
    """``pass``, ``fail: why`` or the reason why the method does not go with the task."""

    def check(folder: Path) -> None:
        if reason := task_methods.why_not(method, task):
            task_methods.is_refused(method, task, folder)
            raise NotApplicable(reason)
        task_methods.trains(method, task, folder)

    return outcome(check)


def outcome(check: Callable[[Path], None]) -> str:
    """What a check says, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(Path(folder))
        except NotApplicable as reason:
            return str(reason)
        except BaseException as error:  # pytest.fail raises no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"fail: {type(error).__name__}: {error}".splitlines()[0][:200]
    return "pass"


def page(cells: dict[tuple[str, ...], str]) -> Iterator[str]:
    """The lines of the page."""
    passed = sum(text == "pass" for text in cells.values())
    yield "# Conformance"
    yield ""
    yield (
        f"What each method promises on each shape of base model, as `python docs/conformance.py` found it with peft "
        f"{version('peft')}, transformers {version('transformers')} and torch {version('torch').partition('+')[0]} on "
        f"the CPU: {passed} of {len(cells)} checks pass, none fails, and {len(cells) - passed} mean nothing where they "
        "stand, for the reason that is given. The models are tiny and random; their layers and tensor names are those "
        "of the real families. `tests/promises.py` says what each promise means, to the line. "
        "[Methods by task](conformance_tasks.md) has what each method does on each task."
    )
    yield ""
    yield "Promises:"
    yield ""
    yield from (f"{number}. {promise}" for number, promise in enumerate(PROMISES, 1))
    for method, row in METHODS.items():
        reasons: list[str] = []
        yield from ("", f"## {row.title}", "")
        yield f"| | {' | '.join(str(number) for number in range(1, len(PROMISES) + 1))} |"
        yield f"|---|{'---|' * len(PROMISES)}"
        for kind, title in MODELS.items():
            marks = [_mark(cells[method, kind, promise], reasons) for promise in PROMISES]
            yield f"| {title} | {' | '.join(marks)} |"
        if reasons:
            yield ""
            yield from (f"{_letter(number)}: {reason}  " for number, reason in enumerate(reasons))


def page_of_tasks(cells: dict[tuple[str, ...], str]) -> Iterator[str]:
    """The lines of the page of methods x tasks."""
    passed, reasons = sum(text == "pass" for text in cells.values()), list[str]()
    yield "# Methods by task"
    yield ""
    yield (
        "Which methods train on which tasks, as `python docs/conformance.py tasks` found it with transformers "
        f"{version('transformers')} and torch {version('torch').partition('+')[0]} on the CPU: {passed} of "
        f"{len(cells)} pairs pass, none fails, and {len(cells) - passed} are refused before the first step, for the "
        "reason that is given. To pass, three steps of `peftcli train` on a tiny model (with a task's new head, where "
        "it has one) change the loss of rows that are not trained on, and the folder that is saved says the same as "
        "the trained model ([the folder is the model](recipes.md#the-folder-is-the-model)). `tests/task_methods.py` "
        "has the settings. What each method promises on each shape of base model is on the page "
        "[Conformance](conformance.md)."
    )
    yield ""
    yield f"| | {' | '.join(task.replace('_', ' ') for task in TASKS)} |"
    yield f"|---|{'---|' * len(TASKS)}"
    for method, row in METHODS.items():
        yield f"| {row.title} | {' | '.join(_mark(cells[method, task], reasons) for task in TASKS)} |"
    yield ""
    yield from (f"{_letter(number)}: {reason}  " for number, reason in enumerate(reasons))


def _mark(text: str, reasons: list[str]) -> str:
    if text == "pass":
        return "pass"
    if text not in reasons:
        reasons.append(text)
    return f"({_letter(reasons.index(text))})"


def _letter(number: int) -> str:
    return chr(ord("a") + number)


if __name__ == "__main__":
    raise SystemExit(main())
