"""``generate`` and a chat with pictures: what ``predict`` answers for the same row, and one clear error elsewhere."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from trainkit import run_recipe, write_recipe, write_rows
from visionkit import llava_base, picture_rows

from peftcli.adapters.generate import load_generator
from peftcli.cli.chat import chat
from peftcli.output_schemas import output_schema
from peftcli.tasks.text.generation import GenerationSettings

_ASKED = "Which colour?"
_LIMIT = ("--max-new-tokens", 64)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = write_recipe(tmp_path_factory.mktemp("pictures"), llava_base(), picture_rows())
    recipe.write_text(recipe.read_text().replace("causal_lm", "{type: image_text_to_text, max_new_tokens: 64}"))
    return run_recipe(recipe, "training.max_steps=30", "training.learning_rate=2e-2", "method.r=8").folder


@pytest.fixture(scope="module")
def pictures() -> list[str]:
    return [path for row in picture_rows() for path in row["images"][:1]]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_answer_is_that_of_predict(
    cli: Callable, adapter: Path, pictures: list[str], tmp_path: Path, count: int
) -> None:
    images = [word for path in pictures[:count] for word in ("--image", path)]
    ran = cli("generate", adapter, "--prompt", _ASKED, *images, "--json", *_LIMIT)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    Draft202012Validator(output_schema("generate")).validate(found)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": _ASKED, "images": pictures[:count]}])
    predicted = json.loads(cli("predict", adapter, "--input", rows, "--json").out)["rows"]
    assert [{"text": found["text"]}] == predicted
    assert found["text"]
    assert found["prompt"] == _ASKED


def test_rows_of_a_file_may_have_pictures(cli: Callable, adapter: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", picture_rows()[:6])
    assert cli("generate", adapter, "--input", rows, "--output", tmp_path / "said.jsonl", *_LIMIT).code == 0
    assert cli("predict", adapter, "--input", rows, "--output", tmp_path / "predicted.jsonl").code == 0
    said, predicted = (
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("said", "predicted")
    )
    assert said == predicted


def test_a_system_prompt_is_asked_first(adapter: Path, cli: Callable, pictures: list[str], tmp_path: Path) -> None:
    words = ("--prompt", _ASKED, "--image", pictures[0], "--system", "Say moon.")
    found = json.loads(cli("generate", adapter, *words, "--json", *_LIMIT).out)
    row = {"prompt": _ASKED, "image": pictures[0], "system": "Say moon."}
    predicted = json.loads(cli("predict", adapter, "--input", write_rows(tmp_path / "r.jsonl", [row]), "--json").out)
    assert [{"text": found["text"]}] == predicted["rows"]


def test_pictures_for_a_model_of_texts_are_refused(cli: Callable, tmp_path: Path, pictures: list[str]) -> None:
    texts = run_recipe(write_recipe(tmp_path), "training.max_steps=1").folder
    ran = cli("generate", texts, "--prompt", "sun", "--image", pictures[0])
    assert ran.code == 2
    assert "is an adapter of causal_lm, which reads no pictures" in ran.err
    assert len(ran.err.splitlines()) <= 6


@pytest.mark.parametrize(
    ("image", "code", "says"),
    [("none.png", 3, "no such file"), ("text.png", 3, "is not a picture"), ("", 2, "--image")],
)
def test_a_picture_that_cannot_be_read_is_named(
    cli: Callable, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, code: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("text")
    ran = cli("generate", adapter, "--prompt", "sun", "--image", image)
    assert (ran.code, says in ran.err) == (code, True), ran.err


def test_pictures_are_not_for_rows_of_a_file(cli: Callable, adapter: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", picture_rows()[:1])
    ran = cli("generate", adapter, "--input", rows, "--output", tmp_path / "out.jsonl", "--image", "a.png")
    assert (ran.code, "rows of --input name their pictures" in ran.err) == (2, True)


def test_a_chat_takes_pictures(
    adapter: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator, settings = load_generator(str(adapter)), GenerationSettings(max_new_tokens=64)
    one, two = pictures[:2]
    lines = iter(["<image> or <image>?", _ASKED, "/image none.png", f"/image {two}", "Or?", ""])
    asked = list[dict]()
    read = generator.read_rows

    def listen(rows: list) -> object:
        asked.extend(row.values for row in rows)
        return read(rows)

    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    object.__setattr__(generator, "read_rows", listen)
    chat(generator, settings, None, [Path(one)])
    captured = capsys.readouterr()
    first, second, third = _turns(asked)
    assert first == (["<image> or <image>?"], [one])
    assert second == ([f"<image>{_ASKED}"], [one])
    (answer, _) = captured.out.splitlines()
    assert third == ([f"<image>{_ASKED}", answer, "<image>Or?"], [one, two])
    assert "chat: has 2 marks <image> and 1 pictures" in captured.err
    assert "none.png: no such file" in captured.err
    assert f"{two}: added to the next question" in captured.err


def _turns(asked: list[dict]) -> Iterator[tuple[list[str], list[str]]]:
    for row in asked:
        yield [turn["content"] for turn in row["messages"]], row["images"]
