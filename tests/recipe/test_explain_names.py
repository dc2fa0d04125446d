"""What ``peftcli explain`` knows besides settings, and what errors point at."""

from __future__ import annotations

import ast
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import taskkit

import peftcli
from peftcli.errors import DataError, Interrupted, PeftcliError, Problem, RecipeError, UsageError, exit_codes
from peftcli.recipe import explain, help_on
from peftcli.recipe.messages import FOREIGN, MESSAGES
from peftcli.tasks import TASKS
from peftcli.tasks.findings import FINDINGS
from peftcli.tasks.metrics import METRICS, find_metric

ROOT = Path(peftcli.__file__).parent
DOCS = ROOT.parent / "docs"


@pytest.mark.parametrize(
    ("name", "key", "kind"),
    [
        ("answers_cut", "answers_cut", "finding"),
        ("75", "75", "exit code"),
        ("exit code 12", "12", "exit code"),
        ("eval_macro_f1", "eval_macro_f1", "metric"),
        ("macro_f1", "eval_macro_f1", "metric"),
        ("eval_f1_PER", "eval_f1_*", "metric"),
        ("padding_in_targets", "padding_in_targets", "message"),
        ("training.seed", "training.seed", "setting"),
        ("error: r.yaml:3:1: method.target_modules: no module of X matches 'q'", "no_such_module", "message"),
        ("warning: answers_cut: 4 of 9 rows lose trained tokens at max_length", "answers_cut", "finding"),
        ("recipe.yaml:3:9: training.seed: expected an integer, found 'x'", "training.seed", "setting"),
        ("eval_accuracy is 0.2, expected >= 0.9", "eval_accuracy", "metric"),
        ("the command ended with exit code 9", "9", "exit code"),
    ],
)
def test_what_a_name_is(name: str, key: str, kind: str) -> None:
    found = explain(name)
    assert (found.key, found.kind) == (key, kind)
    assert found.help.endswith(".")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("answers_kut", "answers_cut"), ("eval_acuracy", "eval_accuracy"), ("no_format_fit", "no_format_fits")],
)
def test_a_near_name_of_any_kind_is_suggested(typed: str, meant: str) -> None:
    with pytest.raises(UsageError) as caught:
        explain(typed)
    assert caught.value.hint == f"did you mean {meant!r}?"


def test_every_finding_code_metric_and_message_is_explained() -> None:
    for name in [*FINDINGS, *map(str, exit_codes()), *(f"eval_{name}" for name in METRICS), *MESSAGES]:
        assert explain(name).key == name


@cache
def texts() -> list[str]:
    """Every text in the package, but for the table itself."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py") if path.name != "messages.py"]
    found = (node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [value for value in found if isinstance(value, str)]


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_one_of_ours_and_has_its_page(name: str) -> None:
    row = MESSAGES[name]
    for part in row.parts:
        assert name in FOREIGN or any(part in text for text in texts()), part
        assert explain(f"error: something {part} and more").key == name
    page, _, place = row.page.partition("#")
    headings = [line.lstrip("# ") for line in (DOCS / page).read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    assert not place or place in [heading.lower().replace(",", "").replace(" ", "-") for heading in headings]


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (UsageError("expected an integer", key="training.seed"), "training.seed"),
        (UsageError("is 0", key="target_modules"), "method.target_modules"),
        (DataError("the data has problems:\n  answers_cut: 6 of 9 rows (a.jsonl:1)", key="dataset"), "answers_cut"),
        (DataError("no format fits the columns: a, b", key="dataset.format", hint="one\ntwo"), "no_format_fits"),
        (UsageError("x", key="training.seed", hint="see `peftcli explain training.seed`"), None),
        (UsageError("x", key="training.seed", hint="1\n2\n3\n4\n5"), None),
        (UsageError("is standard output", key="--output"), None),
        (Interrupted("stopped (SIGINT)", exit_code=130), None),
        (RecipeError([Problem("x", "r.yaml", 1, 1, "training.seed")] * 2), "training.seed"),
        (RecipeError([Problem("x", "r.yaml", 1, 1, "training.seed")] * 6), None),
    ],
)
def test_an_error_names_what_says_more_in_at_most_six_lines(error: PeftcliError, name: str | None) -> None:
    assert help_on(error) == name


@pytest.mark.parametrize("name", taskkit.CASES)
def test_every_metric_of_a_task_is_in_words(name: str) -> None:
    case = taskkit.CASES[name]
    task = import_module(f"peftcli.tasks.{TASKS[case.task['type']].module}").TASK
    assert case.metrics
    for metric in case.metrics:
        found = find_metric(metric)
        assert found is not None, metric
        lower = any(fnmatchcase(metric, known) for known in task.lower_is_better)
        assert "near" in found.scale or lower == ("less is better" in found.scale), metric
