"""``peftcli predict``: rows as in training, less the label; one JSON object a row, in order."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainkit
from classifierkit import ROWS, write_classifier_recipe
from jsonschema import Draft202012Validator
from trainkit import run_recipe, write_rows

from peftcli.adapters.answer_file import csv_table
from peftcli.adapters.predict import kept_of
from peftcli.data.rows import Place, Row
from peftcli.output_schemas import output_schema


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(write_classifier_recipe(tmp_path_factory.mktemp("texts"))).folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_recipe(write_classifier_recipe(tmp_path_factory.mktemp("pictures"), "vit")).folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    brief = ("dataset.limit=1", "training.max_steps=30", "training.learning_rate=1e-2")  # its answers end soon
    return run_recipe(trainkit.write_recipe(tmp_path_factory.mktemp("words")), *brief).folder


@pytest.fixture(scope="module")
def implied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"question": f"sun {at}", "answer": "tea"} for at in range(12)]
    recipe = trainkit.write_recipe(tmp_path_factory.mktemp("implied"), rows=rows)
    return run_recipe(recipe, "training.max_steps=30", "training.learning_rate=1e-2").folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_as_arguments(cli: Callable, texts: Path) -> None:
    ran = cli("predict", texts, "sun tea", "moon")
    assert ran.code == 0, ran.err
    first, second = map(json.loads, ran.out.splitlines())
    assert first["label"] in ("good", "bad")
    assert first["score"] == first["scores"][first["label"]] == max(first["scores"].values())
    assert list(second["scores"]) == ["good", "bad"]
    whole = json.loads(cli("predict", texts, "sun tea", "moon", "--json").out)
    assert [row["scores"] for row in whole["rows"]] == [pytest.approx(each["scores"]) for each in (first, second)]
    Draft202012Validator(output_schema("predict")).validate(whole)


def test_pictures_as_arguments(cli: Callable, pictures: Path) -> None:
    files = sorted((pictures.parent / "held_out").rglob("*.png"))
    ran = cli("predict", pictures, *files)
    assert ran.code == 0, ran.err
    assert [json.loads(line)["label"] for line in ran.out.splitlines()] == [file.parent.name for file in files]
    missing = cli("predict", pictures, "missing.png")
    assert missing.code == 3
    assert "missing.png: no such file" in missing.err


@pytest.mark.grid
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_file_of_rows(cli: Callable, texts: Path, tmp_path: Path, batch_size: int) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"text": row["text"]} for row in ROWS])
    target = tmp_path / "new" / "out.jsonl"
    ran = cli("predict", texts, "--input", source, "--output", target, "--batch-size", batch_size, "--json")
    assert json.loads(ran.out) == {"output": str(target), "rows": len(ROWS)}
    found = lines(target)
    alone = json.loads(cli("predict", texts, *(row["text"] for row in ROWS), "--json").out)["rows"]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in alone], abs=1e-5)


def test_rows_on_stdin_and_answers_on_stdout(
    cli: Callable, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"text": row["text"]} for row in ROWS])
    asked = ("predict", texts, "--batch-size", 1, "--input")
    assert cli(*asked, source, "--output", tmp_path / "out.jsonl").code == 0
    assert [json.loads(line) for line in cli(*asked, source).out.splitlines()] == lines(tmp_path / "out.jsonl")

    for stdout in ("-", "/dev/stdout"):
        ran = cli(*asked, source, "--output", stdout, "--json")
        assert (ran.code, "is standard output" in ran.err) == (2, True)

    def answer_stdin(text: str, *options: str) -> Any:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        return cli(*asked, "-", *options)

    whole = json.loads(answer_stdin(source.read_text(), "--json").out)
    assert whole == {"rows": lines(tmp_path / "out.jsonl")}
    for text, problem in (("", "contains no rows"), ('{"text": "sun"}\n{broken\n', "is not a JSON object")):
        ran = answer_stdin(text)
        assert (ran.code, ran.out) == (3, "")
        assert "standard input" in ran.err
        assert problem in ran.err


def test_a_folder_of_pictures(cli: Callable, pictures: Path, tmp_path: Path) -> None:
    ran = cli("predict", pictures, "--input", pictures.parent / "held_out", "--output", tmp_path / "out.jsonl")
    assert ran.out == f"{tmp_path}/out.jsonl: 6 answers\n"
    assert [each["label"] for each in lines(tmp_path / "out.jsonl")] == ["blue"] * 3 + ["red"] * 3


def test_columns_of_other_names(cli: Callable, tmp_path: Path) -> None:
    recipe = write_classifier_recipe(tmp_path)
    rows = [{"mail": row["text"], "kind": row["label"]} for row in ROWS]
    for name in ("train", "eval"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    folder = run_recipe(recipe, "dataset.columns={text: mail, label: kind}").folder
    source = write_rows(tmp_path / "in.jsonl", [{"mail": "sun"}])
    assert cli("predict", folder, "--input", source, "--output", tmp_path / "a.jsonl").code == 0
    assert lines(tmp_path / "a.jsonl")[0]["label"] in ("good", "bad")
    assert cli("predict", folder, "sun").code == 0


def test_a_stopped_file_goes_on(cli: Callable, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peftcli.tasks.sequence_classification import SequenceClassification

    source = write_rows(tmp_path / "in.jsonl", [{"text": row["text"]} for row in ROWS])
    args = ("predict", texts, "--input", source, "--batch-size", 1)
    assert cli(*args, "--output", tmp_path / "whole.jsonl").code == 0
    asked: list[int] = []
    predict = SequenceClassification.predict

    def stopped(self: Any, model: Any, rows: Any, options: Any) -> Any:
        asked.append(len(rows))
        if len(asked) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, model, rows, options)

    monkeypatch.setattr(SequenceClassification, "predict", stopped)
    ran = cli(*args, "--output", tmp_path / "out.jsonl")
    assert ran.code == 75
    assert not (tmp_path / "out.jsonl").exists()
    ran = cli(*args, "--output", tmp_path / "out.jsonl")
    assert ran.code == 0
    assert ran.err.startswith(f"8/{len(ROWS)}\n")
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_language_models_answer_as_generate(cli: Callable, words: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "What follows tea?"}, trainkit.MESSAGES[0]])
    for command in ("predict", "generate"):
        assert cli(command, words, "--input", source, "--output", tmp_path / f"{command}.jsonl").code == 0
    assert lines(tmp_path / "predict.jsonl") == lines(tmp_path / "generate.jsonl")
    whole = json.loads(cli("predict", words, "What follows tea?", "--json").out)
    assert whole["rows"] == lines(tmp_path / "generate.jsonl")[:1]
    Draft202012Validator(output_schema("predict")).validate(whole)


def test_without_the_adapter_there_is_no_head(cli: Callable, texts: Path) -> None:
    ran = cli("predict", texts, "sun", "--no-adapter")
    assert ran.code == 4
    assert "answers would be random" in ran.err


def test_what_would_be_lost_or_meant_otherwise_is_refused(
    cli: Callable, texts: Path, words: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "sun tea"}])
    before = rows.read_bytes()
    ran = cli("predict", texts, "--input", rows, "--output", tmp_path / ".." / tmp_path.name / "rows.jsonl")
    assert (ran.code, rows.read_bytes()) == (2, before)
    assert "is the input too" in ran.err
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": "sun"}])
    assert cli("generate", words, "--input", prompts, "--output", prompts).code == 2
    ran = cli("predict", texts, rows)
    assert (ran.code, "give it as --input" in ran.err) == (2, True)
    ran = cli("generate", texts, "--prompt", "sun")
    assert (ran.code, "which answers no prompts" in ran.err, "peftcli predict" in ran.err) == (2, True, True)


def test_a_row_that_cannot_be_answered(cli: Callable, texts: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", [{"text": "sun"}, {"text": None}])
    ran = cli("predict", texts, "--input", source, "--output", tmp_path / "out.jsonl")
    assert ran.code == 3
    assert f"{source}:2" in ran.err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.grid
@pytest.mark.parametrize(
    ("kind", "task", "words"), [("gpt2", "causal_lm", "256 positions"), ("bart", "seq2seq_lm", "64 positions")]
)
def test_a_row_that_the_model_has_too_few_positions_for(
    cli: Callable, tmp_path: Path, kind: str, task: str, words: str
) -> None:
    recipe = trainkit.write_recipe(tmp_path, trainkit.base_folder(kind, chat=False), trainkit.PROMPTS)
    settings = (f"task={{type: {task}, max_new_tokens: 8}}", "dataset.max_length=60", "training.max_steps=1")
    folder = run_recipe(recipe, *settings).folder
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "sun"}] * 40 + [{"prompt": "sun moon " * 200}])
    target = tmp_path / "out.jsonl"
    for args in ((), ("--max-new-tokens", 8)):
        ran = cli("generate" if args else "predict", folder, "--input", source, "--output", target, *args)
        assert (ran.code, target.exists()) == (3, False)
        assert f"{source}:41" in ran.err
        assert words in ran.err
        assert "merged" not in ran.err, "nothing was computed before"
    ran = cli("generate", folder, "--prompt", "sun moon " * 200)
    assert (ran.code, words in ran.err) == (3, True)
    assert cli("predict", folder, "sun").code == 0


@pytest.mark.parametrize("args", [(), ("sun", "--input", "a.jsonl"), ("sun", "--output", "b.jsonl")])
def test_wrong_arguments(cli: Callable, texts: Path, args: tuple[str, ...]) -> None:
    assert cli("predict", texts, *args).code == 2


def test_an_id_is_kept_and_with_keep_the_rows(cli: Callable, texts: Path, tmp_path: Path) -> None:
    rows = [{"id": f"r{at}", "text": row["text"], "label": row["label"]} for at, row in enumerate(ROWS[:5])]
    source = write_rows(tmp_path / "in.jsonl", rows)
    asked = ("predict", texts, "--batch-size", 2, "--input", source)
    whole = json.loads(cli(*asked, "--keep", "--json").out)
    Draft202012Validator(output_schema("predict")).validate(whole)
    assert [(row["id"], row["input"]) for row in whole["rows"]] == [(row["id"], row) for row in rows]
    answers = [json.loads(line) for line in cli(*asked).out.splitlines()]
    assert [list(each) for each in answers] == [["id", "label", "score", "scores"]] * 5
    assert json.loads(cli(*asked, "--id", "text").out.splitlines()[0])["id"] == rows[0]["text"]
    lacks = cli(*asked, "--id", "name", "--json")
    assert (lacks.code, json.loads(lacks.out)["error"]["key"]) == (2, "--id")
    assert "is for the rows of --input" in cli("predict", texts, "sun", "--keep").err


def test_a_table_of_answers(cli: Callable, texts: Path, tmp_path: Path) -> None:
    rows = [{"id": at, "text": f'{row["text"]}, "so"'} for at, row in enumerate(ROWS[:5])]
    source, target = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.csv"
    assert cli("predict", texts, "--input", source, "--output", target, "--keep").code == 0
    with target.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == ["id", "input.id", "input.text", "label", "score", "scores.good", "scores.bad"]
    assert [(row["id"], row["input.text"]) for row in found] == [(str(row["id"]), row["text"]) for row in rows]
    assert all(float(row["score"]) == float(row[f"scores.{row['label']}"]) for row in found)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl", "out.csv"]


def test_lists_and_bytes_of_a_row_become_texts_of_a_table() -> None:
    kept = kept_of([Row({"id": 1, "a": b"xy", "b": [float("nan"), 2]}, Place("f", 1))], None, True)
    table = csv_table([json.dumps(each).encode() for each in kept]).decode().splitlines()
    assert table == ["id,input.id,input.a,input.b", '1,1,2 bytes,"[""nan"", 2]"']


@pytest.mark.parametrize("asked", ["question", "prompt", "nothing"])
def test_columns_that_training_read_under_other_names(cli: Callable, implied: Path, tmp_path: Path, asked: str) -> None:
    source, target = write_rows(tmp_path / "in.jsonl", [{asked: "sun tea"}]), tmp_path / "out.jsonl"
    ran = cli("predict", implied, "--input", source, "--output", target)
    assert (ran.code, target.exists()) == ((3, False) if asked == "nothing" else (0, True)), ran.err


def test_generate_says_which_column_to_rename(cli: Callable, implied: Path, tmp_path: Path) -> None:
    ran = cli("generate", implied, "--input", write_rows(tmp_path / "in.jsonl", [{"question": "tea"}]), "--output", "-")
    assert ran.code == 3
    assert "If 'question' is what is asked, call it \"prompt\"." in ran.err
