"""Feature extraction: losses of sentence-transformers, big batches in small memory, metrics over all rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from classifierkit import classifier_base, encoded, open_task, scanned, table_of
from taskkit import CASES
from trainkit import base_folder, write_rows

from peftcli.core.inject import inject
from peftcli.errors import DataError, ModelError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.prompt_tuning import PromptTuningConfig
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.contrastive import Texts, anchor_losses, contrastive_loss

NAME = "feature_extraction"
ROWS = CASES[NAME].rows()[:4]
SCORED = [
    {"sentence1": row["anchor"], "sentence2": row["positive"], "score": score}
    for row, score in zip(ROWS, (0.1, 0.9, -0.5, 0.4), strict=True)
]
LOSSES = {"contrastive": 1.409122, "cosine": 0.758623, "triplet": 0.494834}
"""Those of sentence-transformers 6.2: tests/interop/libraries/embeddings_of_sentence_transformers.py."""


def task_of(kind: str | Path = "bert", **settings: Any) -> Any:
    return open_task(NAME, kind, **{"loss": "contrastive", **settings})


def model_of(task: Any, **options: Any) -> Any:
    return transformers.AutoModel.from_pretrained(task.base.name, **options).train()


def loss_of(task: Any, rows: Any, model: Any = None) -> float:
    batch = task.collate(encoded(task, rows), training=True)
    return float(task.loss(model or model_of(task), batch).total.detach()) / len(rows)


def measured(task: Any, texts: Any, scores: Any = None) -> dict[str, float]:
    """The metrics of rows whose texts have these embeddings, (rows, texts of a row, D)."""
    scores = [[]] * len(texts) if scores is None else [[each] for each in scores]
    keys = [[100 * row + at for at in range(len(each))] for row, each in enumerate(texts)]
    unit = [np.asarray(each) / np.linalg.norm(each, axis=1, keepdims=True) for each in texts]
    return task.metrics({}, list(zip(unit, keys, scores, strict=True)), len(texts))


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_that_of_sentence_transformers(loss: str) -> None:
    assert loss_of(task_of(loss=loss), SCORED if loss == "cosine" else ROWS) == pytest.approx(LOSSES[loss], abs=1e-5)


def gradients(task: Any, rows: Any, size: int | None = None, *, again: bool = False, **options: Any) -> Any:
    model = model_of(task, **options)
    torch.manual_seed(0)
    inject(model, LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False, lora_dropout=0.1))
    batch = task.collate(encoded(task, rows), training=True)
    torch.manual_seed(1)
    if size is None:
        task.loss(model, batch).total.backward()
    else:
        found = torch.nn.functional.normalize(task.embed(model, batch, size, again=again), dim=1)
        contrastive_loss(task_texts(found, batch), task.settings.temperature).backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def task_texts(found: torch.Tensor, batch: Any) -> Any:
    return Texts(found, batch["_keys"], batch["_rows"])


def test_a_batch_in_parts_has_the_gradient_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, each part is computed again with the one that it was computed with."""
    task, drop = task_of(), {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    kept, again = (gradients(task, ROWS, 2, again=again, **drop) for again in (False, True))
    assert len(again) == 8
    torch.testing.assert_close(again, kept, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(task, ROWS, 3, **drop), kept)  # other dropout
    sizes = []
    pooled = type(task)._pooled
    monkeypatch.setattr(type(task), "_pooled", lambda *given: sizes.append(len(given[2])) or pooled(*given))
    task.settings = SimpleNamespace(**{**vars(task.settings), "mini_batch_size": 5})
    gradients(task, ROWS)
    assert sizes == [5, 5, 2, 2, 5, 5], "each part twice, the last one first"


def test_parts_of_a_batch_change_nothing_without_dropout() -> None:
    whole, parts = task_of(), task_of(mini_batch_size=3)
    model = model_of(whole)
    assert loss_of(parts, ROWS, model) == pytest.approx(loss_of(whole, ROWS, model), abs=1e-6)


def test_equal_texts_are_no_negatives() -> None:
    """The positive of another row, the anchor's own text, and what another row pairs with the same anchor.

    The last is no negative where it is a third row's negative either.
    """
    task, (one, other) = task_of(), ({"anchor": row["anchor"], "positive": row["positive"]} for row in ROWS[:2])
    model = model_of(task)

    def of_the_first(rows: Any) -> float:
        batch = task.collate(encoded(task, rows), training=True)
        found = torch.nn.functional.normalize(task.embed(model, batch, 3), dim=1)
        return float(anchor_losses([task_texts(found, batch)], task.settings.temperature)[0].detach())

    alone = of_the_first([one, other])
    assert alone > 0
    for extra in (("moon", one["positive"]), (one["anchor"], "moon"), ("moon", one["anchor"])):
        again = [one, other, dict(zip(one, extra, strict=True))]
        assert of_the_first(again) == pytest.approx(alone, abs=1e-5)
    assert of_the_first([one, other, {"anchor": "moon", "positive": "mill"}]) > alone + 0.001
    hard = {**other, "negative": "mill"}
    assert of_the_first([one, hard]) > alone + 0.001
    assert of_the_first([one, hard, {**one, "positive": "mill"}]) == pytest.approx(alone, abs=1e-5)


def test_metrics_of_a_perfect_and_of_a_random_model() -> None:
    task, random = task_of(), np.random.default_rng(0)
    anchors = np.eye(40)
    perfect = measured(task, np.stack([anchors, anchors], axis=1))
    assert perfect == {"loss": pytest.approx(np.log1p(39 * np.exp(-20))), "mrr": 1, **recalls(1, 1, 1)}
    found = measured(task, random.standard_normal((400, 2, 16)))
    assert found == pytest.approx(
        {**recalls(1 / 400, 5 / 400, 10 / 400), "mrr": 0.016, "loss": found["loss"]}, abs=0.02
    )
    assert measured(task, np.tile(np.eye(8)[0], (40, 2, 1)))["recall_at_10"] == 0, (
        "one embedding for all texts finds nothing"
    )


def recalls(*values: float) -> dict[str, float]:
    return {f"recall_at_{most}": value for most, value in zip((1, 5, 10), values, strict=True)}


def test_metrics_of_scored_pairs_and_triplets() -> None:
    random = np.random.default_rng(0).standard_normal((200, 2, 8))
    cosines = [one @ other / np.linalg.norm(one) / np.linalg.norm(other) for one, other in random]
    perfect = measured(task_of(loss="cosine"), random, cosines)
    assert perfect == pytest.approx({"loss": 0, "spearman": 1, "pearson": 1}, abs=1e-6)
    other = measured(task_of(loss="cosine"), random, cosines[::-1])
    assert abs(other["spearman"]) < 0.15
    constant = measured(task_of(loss="cosine"), np.ones((3, 2, 4)), [0.1, 0.2, 0.3])
    assert constant["spearman"] == 0
    found = measured(task_of(loss="triplet"), [[[1, 0], [1, 0], [0, 1]], [[0, 1], [1, 0], [0, 1], [1, 0]]])
    assert found["loss"] == pytest.approx((0 + (1.5 + 0.5) / 2) / 2)


@pytest.mark.parametrize(("loss", "key"), [("cosine", "temperature"), ("contrastive", "triplet_margin")])
def test_settings_of_another_loss_are_refused(loss: str, key: str) -> None:
    with pytest.raises(DataError, match="is a setting of") as caught:
        task_of(loss=loss, **{key: 0.3})
    assert caught.value.key == f"task.{key}"


def test_embeddings_that_are_no_numbers_find_nothing() -> None:
    found = measured(task_of(), np.full((12, 2, 4), np.nan))
    assert found["recall_at_10"] == 0


def test_evaluation_compares_with_all_rows_whatever_the_batch() -> None:
    task, rows = task_of(), [{name: row[name] for name in ("anchor", "positive")} for row in ROWS]
    model = model_of(task)
    expected = loss_of(task, rows, model)
    found = []
    for size in (1, 3, 4):
        outputs = []
        for start in range(0, len(rows), size):
            batch = task.collate(encoded(task, rows[start : start + size]), training=False)
            outputs += task.loss(model.eval(), batch).outputs
        found.append(task.metrics({}, outputs, len(rows)))
    assert found[1] == pytest.approx(found[0])
    assert found[2] == pytest.approx(found[0])
    assert found[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.grid(each="pooling")
@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_embedding_is_that_of_the_text_alone(kind: str, pooling: str) -> None:
    task = task_of(kind, pooling=pooling)
    model = model_of(task).eval()
    task.fit_model(model, None)
    batch = task.collate(encoded(task, ROWS), training=False)
    found = task.embed(model, batch, 5)
    for ids, mask, vector in zip(batch["input_ids"], batch["attention_mask"], found, strict=True):
        hidden = model(input_ids=ids[mask.bool()][None]).last_hidden_state[0]
        wanted = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1], "max": hidden.amax(0)}[pooling]
        torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=1e-4)


def test_virtual_tokens_are_not_pooled() -> None:
    import peft

    task = task_of()
    model, theirs = model_of(task).eval(), model_of(task).eval()
    inject(model, PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"))
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION")
    other: Any = peft.get_peft_model(theirs, config).eval()
    vectors = next(each for name, each in model.named_parameters() if name.endswith("prompt_embeddings"))
    other.prompt_encoder["default"].embedding.weight.data = vectors.data
    batch = task.collate(encoded(task, ROWS), training=False)
    found = task.embed(model, batch, len(batch["input_ids"]))
    mask = batch["attention_mask"]
    hidden = other(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
    assert hidden.shape[1] == mask.shape[1] + 3, "PEFT gives hidden states of virtual tokens too"
    wanted = (hidden[:, 3:] * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def sentence_model(folder: Path, pooling: Any, *more: str, lower: bool = False) -> Path:
    """The tiny encoder with what sentence-transformers writes beside it."""
    shutil.copytree(classifier_base("bert"), folder)
    kinds = ("Transformer", "Pooling", *more)
    paths = ("", "1_Pooling", "2_Normalize")
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7, "do_lower_case": lower}))
    return folder


def test_texts_are_read_as_the_folder_says_and_as_sentence_transformers_will(tmp_path: Path) -> None:
    plain, lower = (
        sentence_model(tmp_path / f"{lower}", {"pooling_mode": "mean"}, lower=lower) for lower in (False, True)
    )
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (lower / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    rows = [{"anchor": "SUN Tea", "positive": "tea"}]
    wanted = encoded(task_of(plain), [{"anchor": "sun tea", "positive": "tea"}])[0].arrays["input_ids"]
    task = task_of(lower)
    assert list(encoded(task, rows)[0].arrays["input_ids"]) == list(wanted)
    assert list(encoded(task_of(plain), rows)[0].arrays["input_ids"]) != list(wanted)
    assert task.fingerprint() != task_of(plain).fingerprint()
    assert ["('query')" in note for note in task.notes] == [True]
    some = {"prompts": {"query": "query: ", "document": "", "STS": "same: "}, "default_prompt_name": None}
    (plain / "config_sentence_transformers.json").write_text(json.dumps(some))
    assert ["('query')" in note for note in task_of(plain).notes] == [True]
    none = {"prompts": {"query": "", "document": ""}, "default_prompt_name": 5}
    (plain / "config_sentence_transformers.json").write_text(json.dumps(none))
    assert not task_of(plain).notes
    (tmp_path / "merged").mkdir()
    task.export(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/sentence_bert_config.json").read_text())["do_lower_case"] is True
    about = json.loads((tmp_path / "merged/config_sentence_transformers.json").read_text())
    assert about == {"prompts": {"query": "query: "}, "default_prompt_name": None}


def test_pooling_is_the_base_models(tmp_path: Path) -> None:
    old = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    task = task_of(sentence_model(tmp_path / "old", old, "Normalize"))
    assert (task.settings.pooling, task.settings.normalize, task.max_length) == ("cls", True, 7)
    [example] = encoded(task, [{"anchor": "sun " * 9, "positive": "tea"}])
    assert example.arrays["sizes"][0] == 7
    new = sentence_model(tmp_path / "new", {"embedding_dimension": 32, "pooling_mode": "lasttoken"})
    assert (task_of(new).settings.pooling, task_of(new).settings.normalize) == ("last", False)
    assert task_of(new, pooling="mean", normalize=True).settings.pooling == "mean"
    assert (task_of("llama").settings.pooling, task_of("bert").settings.pooling) == ("last", "mean")


@pytest.mark.parametrize(
    ("pooling", "more", "said"),
    [
        ({"pooling_mode": "weightedmean"}, (), "pools by weightedmean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, (), "pools by cls, max"),
        ({"pooling_mode": "mean", "include_prompt": False}, (), "leaves prompts out"),
        ({"pooling_mode": "mean"}, ("Dense",), "Transformer, Pooling, Dense"),
    ],
)
def test_embeddings_that_are_made_otherwise_are_refused(pooling: Any, more: Any, said: str, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "base", pooling, *more)
    with pytest.raises(ModelError, match=said):
        task_of(folder)
    assert task_of(folder, pooling="mean", normalize=False)


@pytest.mark.parametrize("text", ["{", "[1]", '{"0": {}}', "[" * 100_000, "[]"])
def test_a_damaged_list_of_modules_is_refused(text: str, tmp_path: Path) -> None:
    folder = sentence_model(tmp_path / "base", {"pooling_mode": "mean"})
    (folder / "modules.json").write_text(text)
    with pytest.raises(ModelError):
        task_of(folder)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        task_of(base_folder("t5"))


def test_columns_say_what_is_learnt() -> None:
    assert (scanned(ROWS, NAME).settings.loss, scanned(ROWS, NAME).packages) == ("contrastive", {})
    assert (scanned(SCORED, NAME).settings.loss, [*scanned(SCORED, NAME).packages]) == ("cosine", ["sklearn"])
    named = [{"query": row["anchor"], "good": row["positive"], "negative": [row["negative"], "moon"]} for row in ROWS]
    [example, *_] = encoded(task_of(), named, columns={"positive": "good"})
    assert len(example.arrays["sizes"]) == 4
    with pytest.raises(DataError, match="negative"):
        encoded(task_of(loss="triplet"), [{"anchor": "sun", "positive": "tea"}])
    bad = [
        (task_of(loss="cosine"), {**SCORED[0], "score": 4.5}, "score"),
        (task_of(loss="cosine"), {**SCORED[0], "score": float("nan")}, "score"),
        (task_of(), {"anchor": "sun", "positive": " "}, "positive"),
        (task_of(), {"anchor": "sun", "positive": "tea", "negative": [""]}, "negative"),
        (task_of(loss="triplet"), {"anchor": "sun", "positive": "tea", "negative": []}, "negative"),
    ]
    for task, row, key in bad:
        [error] = encoded(task, [row])
        assert (error.key, error.line) == (key, 1)


def test_scores_of_a_range_are_scaled() -> None:
    scored = [{**SCORED[0], "score": score} for score in (1, 2, 5.5)]
    low, _, beyond = encoded(task_of(loss="cosine", score_range=[0, 5]), scored)
    assert low.arrays["score"] == pytest.approx([0.2])
    assert "from 0 to 5, found 5.5" in beyond.message
    with pytest.raises(DataError, match="lower one first"):
        task_of(loss="cosine", score_range=[5, 0])


def test_rows_may_have_several_negatives_or_none() -> None:
    pair = {"anchor": "sun", "positive": "tea"}
    none = [{"negative": value} for value in (None, "", [])]
    rows = [{**pair, **more} for more in ({"negative": "moon"}, *none, {}, {"negative": ["moon", "mill"]})]
    assert [len(each.arrays["sizes"]) for each in encoded(task_of(), rows)] == [3, 2, 2, 2, 2, 4]
    numbered = [
        {**pair, "negative_1": "moon", "negative_2": "mill"},
        {**pair, "negative_1": "moon", "negative_2": None},
    ]
    for loss in ("contrastive", "triplet"):
        assert [len(each.arrays["sizes"]) for each in encoded(task_of(loss=loss), numbered)] == [4, 3]
    model = model_of(task := task_of()).eval()
    answers = task.predict(model, table_of(numbered)[1], PredictOptions())
    assert [len(each["negative_similarities"]) for each in answers] == [2, 1]


def test_inspect_finds_what_is_odd_with_pairs(cli: Any, tmp_path: Path) -> None:
    recipe = CASES[NAME].write(tmp_path)
    rows = [
        {"anchor": "sun", "positive": "tea north", "negative": "moon"},
        {"anchor": "sun", "positive": "stone", "negative": ["mill", "stone"]},
        {"anchor": "seven", "positive": "seven", "negative": "moon"},
        {"anchor": "mill", "positive": "stone", "negative": "moon"},
    ]
    write_rows(tmp_path / "train.jsonl", rows)
    held_out = [rows[0], {"anchor": "mill", "positive": "tea", "negative": "moon"}]
    write_rows(tmp_path / "eval.jsonl", held_out)
    found = cli("inspect", recipe, "--json")
    lines = {each["name"]: [int(row.rpartition(":")[2]) for row in each["rows"]] for each in found["findings"]}
    expected = {"positive_is_anchor": [3], "negative_is_positive": [2], "repeated_texts": [2, 4]}
    assert lines == {**expected, "train_in_eval": [1], "anchors_in_eval": [2]}
    assert found["audit"]["train"]["anchors"] == 3
    page = cli("inspect", recipe)
    assert all(word in page for word in ("anchor", "positive", "negative", "distinct anchors"))


def test_a_batch_of_one_pair_teaches_nothing_and_is_refused(cli: Any, tmp_path: Path) -> None:
    recipe = CASES[NAME].write(tmp_path)
    recipe.write_text(recipe.read_text().replace("train_batch_size: 4", "train_batch_size: 1"))
    cli("check", "--deep", recipe)  # rows have negatives
    write_rows(tmp_path / "train.jsonl", [{"anchor": row["anchor"], "positive": row["positive"]} for row in ROWS])
    said = cli("check", "--deep", recipe, code=3)
    assert "training.per_device_train_batch_size" in said
    assert "no negatives" in said
    cli("train", recipe, code=3)


def test_predict_embeds_texts_and_compares_pairs() -> None:
    task = task_of(normalize=False)
    model = model_of(task).eval()
    texts = [row[name] for row in ROWS for name in ("anchor", "positive", "negative")]

    def predicted(values: Any, **columns: str) -> list[Any]:
        return list(task.predict(model, table_of(values)[1], PredictOptions(columns=columns, batch_size=3)))

    vectors = np.array([each["embedding"] for each in predicted([{"text": text} for text in texts])])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert not np.allclose(unit, vectors)
    for row, answer in enumerate(predicted(ROWS)):
        one, other, third = unit[3 * row : 3 * row + 3]
        assert answer["similarity"] == pytest.approx(one @ other, abs=1e-5)
        assert answer["negative_similarities"] == pytest.approx([one @ third], abs=1e-5)
    [scored] = predicted([{"sentence1": texts[0], "b": texts[1]}], sentence2="b")
    assert scored == {"similarity": pytest.approx(unit[0] @ unit[1], abs=1e-5)}
    [alone] = predicted([{"q": texts[0]}], anchor="q")
    assert alone["embedding"] == pytest.approx(vectors[0].tolist(), abs=1e-5)
    with pytest.raises(DataError, match="expected a text"):
        predicted([{"text": ""}])
