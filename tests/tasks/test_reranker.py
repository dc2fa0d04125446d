"""Reranker: the losses, mined negatives, rows without one, and a merged folder that CrossEncoder opens."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from classifierkit import encoded, head_model, open_task, table_of
from taskkit import CASES
from trainkit import base_folder, run_recipe, write_rows

from peftcli.adapters.merge import merge_adapter
from peftcli.cli.app import main
from peftcli.errors import DataError, ModelError
from peftcli.recipe import load_recipe
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.mining import Pairs, nearest_negatives

ROWS = [
    {"query": "sun", "positive": "sun tea", "negative": ["moon", "mill"]},
    {"query": "moon", "positive": "moon mill", "negative": "stone"},
]
LABELLED = [
    {"query": "sun", "document": "sun tea", "label": 1},
    {"query": "sun", "document": "moon mill", "label": 0},
    {"query": "moon", "document": "moon mill", "label": 0.25},
]
SCORES = [1.5, 0.5, -1.0, 0.25, 0.75]
LISTS = {"labelled": False}


def told(scores: list[float], *, training: bool = True) -> Any:
    """A model that answers with these scores."""

    class Told(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return SimpleNamespace(logits=torch.tensor(scores)[:, None])

    return Told().train(training)


# of sentence-transformers 6.3: tests/interop/libraries/scores_of_sentence_transformers.py
@pytest.mark.parametrize(
    ("loss", "rows", "expected"),
    [
        ("cross_entropy", ROWS, 0.672808),
        ("bce", ROWS, 0.640312),
        ("bce", LABELLED, 0.579584),
        ("mse", LABELLED, 0.687500),
    ],
)
def test_the_losses(loss: str, rows: list[dict[str, Any]], expected: float) -> None:
    task = open_task("reranker", loss=loss, labelled=rows is LABELLED)
    examples = encoded(task, rows)
    scores = SCORES[: sum(len(each.arrays["sizes"]) for each in examples)]
    found = task.loss(told(scores), task.collate(examples, training=True))
    assert float(found.total) / sum(each.num_targets for each in examples) == pytest.approx(expected, abs=1e-6)


def test_a_perfect_a_constant_and_a_random_predictor() -> None:
    task = open_task("reranker", loss="cross_entropy", **LISTS)
    rows = [{"query": "sun", "positive": "tea", "negative": ["moon", "mill", "stone"]}] * 400
    batch = task.collate(encoded(task, rows), training=False)
    draw = torch.Generator().manual_seed(0)
    random = torch.randn(1600, generator=draw)

    def measured(scores: torch.Tensor) -> dict[str, float]:
        loss = task.loss(told(scores.tolist(), training=False), batch)
        return task.metrics({name: each.numpy() for name, each in loss.sums.items()}, loss.outputs, 400)

    perfect = measured(torch.tensor([9.0, 0, 1, 2] * 400))
    assert [perfect[name] for name in ("mrr", "ndcg_at_10", "recall_at_1")] == [1, 1, 1]
    constant = measured(torch.zeros(1600))  # a document of the positive's score comes before it
    assert [constant[name] for name in ("loss", "mrr", "recall_at_1")] == [pytest.approx(math.log(4)), 0.25, 0]
    assert measured(torch.full((1600,), math.nan))["mrr"] == 0.25
    chance = task.constant_metrics(_view(task, rows))
    found = measured(random)
    assert found["mrr"] == pytest.approx(chance["mrr"], abs=0.05)
    assert found["recall_at_1"] == pytest.approx(chance["recall_at_1"], abs=0.05)


def _view(task: Any, rows: list[dict[str, Any]]) -> Any:
    lengths = np.array([len(each.arrays["sizes"]) for each in encoded(task, rows)])
    store = SimpleNamespace(lengths=lambda name: lengths)
    return SimpleNamespace(parts=[SimpleNamespace(store=store, examples=np.arange(len(lengths)))])


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_a_score_is_that_of_the_pair_alone_whatever_the_batch(kind: str) -> None:
    task = open_task("reranker", kind, loss="cross_entropy", **LISTS)
    model = head_model(task)
    rows = [
        {"query": "sun", "documents": ["tea", "moon mill stone north", "a"]},
        {"query": "north", "document": "sun tea seven"},
    ]
    together, alone = (list(task.predict(model, table_of(rows)[1], PredictOptions(batch_size=size))) for size in (4, 1))
    ranking = together[0]["ranking"]
    assert sorted(each["index"] for each in ranking) == [0, 1, 2]
    assert ranking == sorted(ranking, key=lambda each: -each["score"])
    scores = {each["index"]: each["score"] for each in ranking}
    assert scores == pytest.approx({each["index"]: each["score"] for each in alone[0]["ranking"]}, abs=1e-6)
    ids = task.processor("north", "sun tea seven", return_tensors="pt")
    assert together[1]["score"] == pytest.approx(float(model(**ids).logits.detach().sigmoid()), abs=1e-6)


def test_a_query_without_a_negative() -> None:
    task = open_task("reranker", loss="cross_entropy", **LISTS)
    rows = [*ROWS, {"query": "mill", "positive": "tea", "negative": None}]
    table, read = table_of(rows)
    _, _, error = task.encode(read, task.read(table))
    assert isinstance(error, DataError)
    assert "has no negative: cross_entropy has nothing to compare with" in str(error)
    assert "task: {negatives: mined}" in str(error.hint)
    with pytest.raises(DataError, match="no column 'negative' or 'negative_1'"):
        task.read(table_of([{"query": "mill", "positive": "tea"}])[0])


def test_equal_documents_as_positive_and_negative() -> None:
    task = open_task("reranker", loss="cross_entropy", **LISTS)
    table, rows = table_of([{"query": "sun", "positive": "tea", "negative_1": "moon", "negative_2": "tea"}, *ROWS])
    assert [each.flags for each in task.encode(rows[:1], task.read(table))] == [2]


def test_settings_that_do_not_go_with_the_rows() -> None:
    with pytest.raises(DataError, match="cross_entropy compares"):
        open_task("reranker", loss="cross_entropy", labelled=True)
    with pytest.raises(DataError, match="mse learns the label"):
        open_task("reranker", loss="mse", labelled=False)
    with pytest.raises(ModelError, match="an encoder or a decoder"):
        open_task("reranker", base_folder("t5"))
    task = open_task("reranker", loss="bce", labelled=True)
    table, rows = table_of([{"query": "sun", "document": "tea", "score": 4.5}])
    (error,) = task.encode(rows, task.read(table))
    assert isinstance(error, DataError)
    assert "set task.loss to mse" in str(error.hint)


@pytest.mark.parametrize(
    ("labels", "loss"), [([1, 0, "0.5"], "bce"), ([True, False], "bce"), ([4.5, 0], "mse"), (["true", "false"], "bce")]
)
def test_the_loss_is_found_in_the_labels(labels: list[Any], loss: str) -> None:
    task = open_task("reranker")
    assert task.needs_scan
    table, rows = table_of([{"query": "sun", "document": f"tea {at}", "label": each} for at, each in enumerate(labels)])
    found = task.scan([(table, iter(rows))])
    assert (found.loss, found.labelled) == (loss, True)


def test_mined_negatives_are_near_and_not_right() -> None:
    vectors = {
        **{"q": [1.0, 0.0], "right": [0.9, 0.1], "same": [0.95, 0.0], "near": [0.8, 0.2], "far": [0.0, 1.0]},
        **{"other": [0.1, 0.9], "q2": [0.0, 1.0]},
    }

    def embed(texts: Any) -> np.ndarray:
        return np.array([vectors[text] for text in texts], np.float32)

    pairs = Pairs(["q", "q2", "q"], ["right", "far", "same"], {"near", "other"})
    free = nearest_negatives(pairs, embed, 2, None)
    assert free["q", "right"] == ["near", "other"]  # "same" is right in another row
    assert free["q2", "far"] == ["other", "near"]  # as near as what is right
    guarded = nearest_negatives(pairs, embed, 2, 0.05)
    assert guarded["q2", "far"] == ["near", "right"]  # "other" may be right
    assert guarded["q", "right"] == ["other", "far"]
    spread = nearest_negatives(pairs, embed, 2, None, spread=True)
    assert spread["q2", "far"] == ["other", "same"]  # the nearest and the farthest
    many = {"q": [1.0, 0.0], **{str(at): [1.0, at / 10] for at in range(100)}}
    pairs = Pairs(["q"], ["0"], {*many} - {"q", "0"})
    found = nearest_negatives(pairs, lambda texts: np.array([many[text] for text in texts]), 4, None, spread=True)
    assert found["q", "0"] == ["1", "5", "21", "99"]


@pytest.fixture
def embedder(tmp_path: Path) -> Path:
    """A run of feature_extraction, which is to mine."""
    (tmp_path / "miner").mkdir()
    return run_recipe(CASES["feature_extraction"].write(tmp_path / "miner"), "training.max_steps=1").folder


@pytest.mark.parametrize("by", ["adapter", "base"])
def test_negatives_are_mined_once(
    by: str, tmp_path: Path, embedder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": row["query"], "positive": row["positive"]} for row in CASES["reranker"].rows()]
    recipe = CASES["reranker"].write(tmp_path)
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", rows[:: 1 if name == "train" else 3])
    miner = embedder if by == "adapter" else CASES["feature_extraction"].base()
    mined = {"type": "reranker", "negatives": "mined", "miner": str(miner), "mining_margin": None}
    evaluated = ("training.eval_strategy=steps", "training.eval_steps=6")
    first = run_recipe(recipe, f"task={json.dumps(mined | {'num_negatives': 2})}", *evaluated)
    assert (first.run["data"]["rows"], first.run["data"]["used"]) == (len(rows), len(rows))
    assert first.run["eval"]["last"]["eval_recall_at_1"] <= first.run["eval"]["last"]["eval_mrr"]

    def load(*_: Any) -> Any:
        raise AssertionError("the vectors are in the cache")

    monkeypatch.setattr("peftcli.adapters.other_model.FoundModel.answers", load)
    again = run_recipe(
        recipe, f"task={json.dumps(mined | {'num_negatives': 3})}", f"training.output_dir={tmp_path}/again"
    )
    assert again.run["data"]["tokens"] > first.run["data"]["tokens"]


def test_a_row_of_which_every_document_may_be_right_is_left_out(tmp_path: Path) -> None:
    recipe = CASES["reranker"].write(tmp_path)
    rows = [{"query": f"sun {number % 2}", "positive": f"tea {number}"} for number in range(4)]
    rows += [{"query": "moon", "positive": "mill"}]
    write_rows(tmp_path / "train.jsonl", rows)
    base = CASES["reranker"].base()
    mined = {"type": "reranker", "negatives": "mined", "miner": str(base), "mining_margin": 0.99}
    with pytest.raises(DataError, match="zero trained tokens: all 5 rows are left out \\(5 no negative was mined"):
        run_recipe(recipe, f"task={json.dumps(mined)}")


def test_a_base_model_that_embeds_nothing_is_no_miner() -> None:
    task = open_task("reranker", loss="cross_entropy", labelled=False, negatives="mined")
    with pytest.raises(DataError, match="names no embedding model"):
        task.fingerprint()


@pytest.mark.parametrize(
    ("row", "asked", "task"),
    [
        (lambda number: {"document": f"tea {number % 7}", "label": number % 2}, (), {"type": "reranker"}),
        (
            lambda number: {"positive": f"tea {number % 7}", "negative": f"mill {number % 5}"},
            ("--task", "reranker"),
            {"type": "reranker"},
        ),
    ],
)
def test_init_recognises_the_rows(
    row: Any, asked: tuple[str, ...], task: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"query": f"a sun of {number} moons", **row(number)} for number in range(24)]
    data, recipe = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "recipe.yaml"
    base = str(CASES["reranker"].base())
    command = ["init", str(data), "--base", base, *asked, "--output", str(recipe)]
    assert main(command) == 0, capsys.readouterr().err
    assert load_recipe(recipe).task == task


def test_a_merged_folder_is_a_cross_encoder(tmp_path: Path) -> None:
    """The files that sentence-transformers reads; tests/interop asks it."""
    run = run_recipe(CASES["reranker"].write(tmp_path))
    merge_adapter(str(run.folder), tmp_path / "merged")
    described = {path.name: json.loads(path.read_text()) for path in (tmp_path / "merged").glob("*.json")}
    assert described["config.json"]["architectures"] == ["BertForSequenceClassification"]
    assert described["config.json"]["sentence_transformers"]["activation_fn"].endswith("activation.Sigmoid")
    assert described["config_sentence_transformers.json"]["model_type"] == "CrossEncoder"
    assert described["tokenizer_config.json"]["model_max_length"] == 64
    library = pytest.importorskip("sentence_transformers")
    check = library.CrossEncoder(str(tmp_path / "merged"), device="cpu")
    assert check.max_seq_length == 64
