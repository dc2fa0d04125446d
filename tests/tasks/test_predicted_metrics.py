"""The metrics of the rows of ``predict`` are those of ``evaluate``, for the kinds of rows that CASES has no run of."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from taskkit import CASES, Case, of_classes
from trainkit import run_recipe, write_rows

Rows = Sequence[dict[str, Any]]
NAMES = ["sun", "moon", "tea", "mill", "fox", "river", "winter"]


def _several(rows: Rows, answers: Rows) -> dict[str, float]:
    """Of rows that have several labels."""
    from sklearn import metrics

    names = list(answers[0]["scores"])
    wanted, found = (
        np.array([[name in labels for name in names] for labels in each])
        for each in ([row["label"] for row in rows], [answer["labels"] for answer in answers])
    )
    scores = [[answer["scores"][name] for name in names] for answer in answers]
    return {
        "accuracy": metrics.accuracy_score(wanted, found),
        "macro_f1": metrics.f1_score(wanted, found, average="macro", zero_division=0),
        "micro_f1": metrics.f1_score(wanted, found, average="micro", zero_division=0),
        "auc": metrics.roc_auc_score(wanted, scores),
    }


def _correlated(wanted: Sequence[float], found: Sequence[float]) -> dict[str, float]:
    from scipy import stats

    return {
        "pearson": stats.pearsonr(wanted, found).statistic,
        "spearman": stats.spearmanr(wanted, found).statistic,
    }


def _numbers(rows: Rows, answers: Rows) -> dict[str, float]:
    from sklearn.metrics import mean_squared_error

    wanted, found = [row["label"] for row in rows], [answer["value"] for answer in answers]
    return {"mse": mean_squared_error(wanted, found), **_correlated(wanted, found)}


def _similarities(rows: Rows, answers: Rows) -> dict[str, float]:
    return _correlated([row["score"] for row in rows], [answer["similarity"] for answer in answers])


def _parts_of_speech(rows: Rows, answers: Rows) -> dict[str, float]:
    from sklearn import metrics

    wanted, found = [tag for row in rows for tag in row["upos"]], [tag for answer in answers for tag in answer["tags"]]
    return {
        "accuracy": metrics.accuracy_score(wanted, found),
        "macro_f1": metrics.f1_score(wanted, found, average="macro", zero_division=0),
    }


def _texts(label: Callable[[int], Any]) -> Rows:
    return [{"text": f"{NAMES[at % 7]} {NAMES[at % 5]} {at}", "label": label(at)} for at in range(42)]


def _case(task: str, rows: Rows, recompute: Any, **more: Any) -> Case:
    return replace(CASES[task], rows=lambda: rows, recompute=recompute, **more)


MORE = {
    "several labels": _case(
        "sequence_classification",
        _texts(lambda at: [name for name, step in {"a": 2, "b": 5}.items() if at % step]),
        _several,
    ),
    "numbers": _case("sequence_classification", _texts(lambda at: at % 7 + 0.5), _numbers),
    "many classes": _case("sequence_classification", _texts(lambda at: NAMES[at % 7]), of_classes),
    "parts of speech": _case(
        "token_classification",
        [
            {"tokens": ["the", NAMES[at % 7], "follows", str(at)], "upos": ["DET", "NOUN", "VERB", "NUM"]}
            for at in range(12)
        ],
        _parts_of_speech,
    ),
    "scored pairs": _case(
        "feature_extraction",
        [
            {
                "sentence1": f"{NAMES[at % 7]} {at}",
                "sentence2": f"{at} {NAMES[at % 5]}",
                "score": float(at % 7 == at % 5),
            }
            for at in range(42)
        ],
        _similarities,
        asked=lambda rows: [{name: row[name] for name in ("sentence1", "sentence2")} for row in rows],
    ),
    "recall at 10": _case(
        "feature_extraction",
        [
            {"anchor": f"{NAMES[at % 7]} {at}", "positive": f"{at} {NAMES[at % 5]}", "negative": f"no {at}"}
            for at in range(36)
        ],
        CASES["feature_extraction"].recompute,
    ),
}


@pytest.mark.grid
@pytest.mark.parametrize("name", MORE)
def test_the_metrics_of_predicted_rows_are_those_of_evaluate(cli: Callable, tmp_path: Path, name: str) -> None:
    case = MORE[name]
    often = ("training.eval_strategy=steps", "training.eval_steps=20")
    run = run_recipe(case.write(tmp_path), "training.max_steps=20", *often)
    asked = write_rows(tmp_path / "asked.jsonl", case.asked(case.held_out))
    cli("predict", run.folder, "--input", asked, "--output", tmp_path / "answers.jsonl")
    answers = list(map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines()))
    found = {f"eval_{metric}": value for metric, value in case.recompute(case.held_out, answers).items()}
    measured = run.run["eval"]["last"]
    # a batch of another size rounds otherwise, by which a correlation of numbers that hardly differ moves more
    assert {metric: measured[metric] for metric in found} == pytest.approx(found, rel=1e-3)
