from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import make_tokenizer
from classifierkit import open_task

from peftcli.data.prepare import prepare
from peftcli.data.split import held_out, split_parts
from peftcli.data.store import Selection
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks import settings as task_settings
from peftcli.tasks.base import encoding
from peftcli.tasks.causal_lm import CausalLM


def rows_held_out(count: int, fraction: float, seed: int) -> set[int]:
    return {*np.flatnonzero(held_out(np.arange(count), np.zeros(count), fraction, seed)).tolist()}


def test_held_out_rows_never_change() -> None:
    """The same with every version: a run that is resumed, or evaluated later, needs the same rows."""
    assert rows_held_out(50, 0.2, seed=1) == {27, 29, 30, 33, 35, 38, 39, 42, 44, 49}
    assert rows_held_out(50, 0.2, seed=2) != rows_held_out(50, 0.2, seed=1)


@pytest.mark.parametrize(("count", "fraction", "size"), [(3, 0.001, 1), (3, 0.999, 2), (2, 0.5, 1), (1000, 0.25, 250)])
def test_both_parts_get_something(count: int, fraction: float, size: int) -> None:
    held = rows_held_out(count, fraction, seed=0)
    assert len(held) == size
    assert held < set(range(count))


def test_held_out_rows_are_spread_evenly() -> None:
    held = rows_held_out(10_000, 0.5, seed=3)
    assert 2400 < sum(row < 5000 for row in held) < 2600


def test_whole_groups_are_held_out_and_each_class_keeps_its_share() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 700, 1000)
    classes = np.searchsorted([700, 950], groups * 1000 // 700, side="right")  # 70, 25 and 5 % of the rows
    held = held_out(groups, classes, 0.2, seed=0)
    assert not {*groups[held]} & {*groups[~held]}
    for label in range(3):
        assert held[classes == label].mean() == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize(("groups", "message"), [([0], "one row"), ([0, 0, 0], "all 3 rows belong together")])
def test_one_row_or_group_cannot_be_held_out(groups: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        held_out(np.array(groups), np.zeros(len(groups)), 0.5, seed=0)
    assert caught.value.key == "dataset.eval_fraction"


def words(rng: random.Random, count: int) -> str:
    return " ".join(
        rng.choice(["tea", "mill", "snow", "gold", "fire", "rain", "moss", "lamp", "reed", "coal"])
        for _ in range(count)
    )


def conversations(rng: random.Random) -> list[dict[str, Any]]:
    asked = [words(rng, 6) for _ in range(30)]
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": words(rng, 5)}]}
        for text in asked * 3
    ]


def documents(rng: random.Random) -> list[dict[str, Any]]:
    return [{"about": {"doc": at % 30}, "prompt": words(rng, 6), "completion": words(rng, 3)} for at in range(90)]


def copies(rng: random.Random) -> list[dict[str, Any]]:
    texts = [[f"{rng.getrandbits(32):x}" for _ in range(30)] for _ in range(30)]
    edited = [[*text[:12], "edited", *text[13:]] for text in texts]
    return [{"text": " ".join(text), "number": at % 30} for at, text in enumerate(texts + edited + texts)]


def premises(rng: random.Random) -> list[dict[str, Any]]:
    given = [words(rng, 6) for _ in range(30)]
    return [{"premise": text, "hypothesis": words(rng, 4), "label": "yn"[at % 2]} for at, text in enumerate(given * 3)]


@pytest.mark.parametrize(
    ("rows", "key", "settings"),
    [
        (conversations, lambda row: row["messages"][0]["content"], {}),
        (documents, lambda row: row["about"]["doc"], {"group_by": "about.doc"}),
        (copies, lambda row: row["number"], {}),
        (premises, lambda row: row["premise"], {}),
    ],
    ids=["a question with several answers", "group_by", "equal and nearly equal texts", "premises"],
)
def test_rows_that_belong_together_stay_on_one_side(
    tmp_path: Path, rows: Callable[..., Any], key: Callable[..., Any], settings: dict[str, Any]
) -> None:
    values = rows(random.Random(0))
    random.Random(1).shuffle(values)
    stores, kind = [], "sequence_classification" if rows is premises else "causal_lm"
    text = CausalLM(task_settings.CausalLMSettings(), make_tokenizer("smollm"), None)
    task: Any = open_task(labels=["n", "y"], problem_type="single_label") if rows is premises else text
    for name, some in {"a.jsonl": values[:50], "b.jsonl": values[50:]}.items():  # also those of two sources
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in some))
        source = Source(train=str(tmp_path / name), **settings)
        stores.append(prepare(source, task, encoding(kind, task), stop_at_bad=True))
    trained, held = split_parts(list(map(Selection, stores)), 0.2, 0, task.identity, task.label_columns)
    sides = [
        {key(values[int(row) + 50 * at]) for at, part in enumerate(parts) for row in part.chosen}
        for parts in (trained, held)
    ]
    assert not sides[0] & sides[1]
    assert 15 <= sum(len(part.chosen) for part in held) <= 21
