"""Tasks for lm-eval: those that it knows by name, a task file of its own form, and rows of the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from peftcli.data.rows import Row
from peftcli.data.sources import read_rows
from peftcli.errors import DataError, NetworkError, UsageError, to_peftcli_error
from peftcli.guard.files import one_line, read_errors, read_small

_MAX_TASK_BYTES = 1 << 20
_TASK_FILES, _ROW_FILES = (".yaml", ".yml"), (".jsonl", ".json")
_FEWSHOT_SEED = 1234
"""lm-eval's own."""


def load_tasks(names: str) -> dict[str, Any]:
    """Load tasks for ``lm_eval.evaluator.evaluate``.

    ``names`` has commas between names that lm-eval knows, task files (.yaml), and files of rows (.jsonl).

    Raises:
        UsageError: lm-eval knows no task of a name.
        DataError: a file cannot be read, or a task has no dataset.
        NetworkError: the hub, which has the dataset, cannot be reached.
    """
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

    manager, found = None, {"tasks": dict[str, Any](), "groups": dict[str, Any]()}
    for name in filter(None, map(str.strip, names.split(","))):
        ending = Path(name).suffix.lower()
        if ending in (*_TASK_FILES, *_ROW_FILES):
            config = _read_task(Path(name)) if ending in _TASK_FILES else _task_of_rows(Path(name))
            with harness_errors(name):
                found["tasks"][config["task"]] = ConfigurableTask(config=config)
            continue
        manager = manager or TaskManager()
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"closest: {', '.join(near)}" if near else "give a task of lm-eval, a task file, or a file of rows"
            raise UsageError(f"lm-eval has no task {name!r}", key="--lm-eval", hint=hint)
        with harness_errors(name):
            loaded = manager.load([name])
        for kind, each in found.items():
            each.update(loaded.get(kind, {}))
    if not found["tasks"]:
        raise UsageError("names no task", key="--lm-eval")
    for task in found["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return found


@contextmanager
def harness_errors(what: str) -> Iterator[None]:
    """Inside runs lm-eval: what it raises is an error about the task ``what``.

    Templates of tasks run in jinja's sandbox.
    """
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    utils.env = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    utils.env.filters.update(own.filters)
    try:
        yield
    except Exception as error:
        if (known := to_peftcli_error(error)) is not None and not isinstance(error, OSError):
            raise known from error
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        hint = "a dataset that is not on this machine comes from the hub; a task file can name a local one"
        kind = NetworkError if isinstance(error, ConnectionError) else DataError
        raise kind(f"lm-eval cannot run the task: {reason}", file=what, hint=hint) from error
    finally:
        utils.env = own


def _read_task(path: Path) -> dict[str, Any]:
    """Read a task file. What runs code (``!function``) or names other files (``include``) is refused."""
    with read_errors(path, DataError):
        text = read_small(path, _MAX_TASK_BYTES).decode("utf-8-sig")
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or error)
        hint = "a task file holds values and templates, and no code" if "!function" in problem else None
        line = mark.line + 1 if mark else None
        raise DataError(f"not a task file: {one_line(problem)[:200]}", file=str(path), line=line, hint=hint) from None
    if not isinstance(config, dict) or "include" in config:
        raise DataError("not a task file: expected one mapping, without include", file=str(path))
    return {"task": path.stem, **config}


def _task_of_rows(path: Path) -> dict[str, Any]:
    """Make the task of a file of rows: ``{"prompt", "choices", "answer"}``, or ``{"prompt", "completion"}``."""
    from datasets import Dataset

    rows = read_rows(path)
    if not rows:
        raise DataError("holds no rows", file=str(path))
    has_choices = "choices" in rows[0].values
    documents = [_choice(row) if has_choices else _pair(row) for row in rows]
    if has_choices:
        own: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    else:
        own = {"output_type": "loglikelihood", "doc_to_target": "{{completion}}", "process_results": _pair_results}
    metrics = ("acc", "acc_norm") if has_choices else ("acc", "log_probability")
    return {
        "task": path.stem,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(documents)},
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "target_delimiter": "",  # prompt and answer are joined as they are, as in training
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        **own,
    }


def _pair_results(_: Any, results: Any) -> dict[str, float]:
    """Return whether a completion is what the model would say, and its log-probability in nats."""
    ((log_probability, is_greedy),) = results
    return {"acc": float(is_greedy), "log_probability": log_probability}


def _pair(row: Row) -> dict[str, Any]:
    return {name: _text(row, row.values.get(name), name) for name in ("prompt", "completion")}


def _choice(row: Row) -> dict[str, Any]:
    choices, answer = row.values.get("choices"), row.values.get("answer")
    if not isinstance(choices, list) or len(choices) < 2:
        raise row.place.error("must be a list of two texts or more", key="choices")
    texts = [_text(row, each, "choices") for each in choices]
    if answer in texts:
        answer = texts.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(texts):
        hint = "give the text of the right choice, or its number, counted from 0"
        raise row.place.error("is not one of the choices", key="answer", hint=hint)
    return {"prompt": _text(row, row.values.get("prompt"), "prompt"), "choices": texts, "answer": answer}


def _text(row: Row, value: Any, key: str) -> str:
    if not isinstance(value, str) or not value.strip():
        hint = 'rows have "prompt", "choices" and "answer", or "prompt" and "completion"'
        raise row.place.error("must be a text", key=key, hint=hint)
    return value
