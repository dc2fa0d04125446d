"""``init`` and training read conversations about pictures in the forms that people have them, and all say the same."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from visionkit import llava_base

_COLOURS = ("red", "green", "blue", "white")
_COUNT = 40
_Row = dict[str, Any]
_TURNS = {"messages": "messages", "images": "images"}


def _name(at: int) -> str:
    return f"pictures/{at}.png"


def _asked(at: int) -> str:
    return f"Which colour has the picture of number {at}?"


def _answer(at: int) -> str:
    return f"Number {at} is {_COLOURS[at % 4]}."


def _messages(at: int, content: Any) -> list[_Row]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": _answer(at)}]


def _parts(at: int, **picture: Any) -> _Row:
    return {"messages": _messages(at, [picture, {"type": "text", "text": _asked(at)}])}


def _url(folder: Path, at: int) -> str:
    return "data:image/png;base64," + base64.b64encode((folder / _name(at)).read_bytes()).decode()


FORMS: dict[str, tuple[Callable[[int, Path], _Row], dict[str, str]]] = {
    "parts": (lambda at, _: _parts(at, type="image", image=_name(at)), {"messages": "messages"}),
    "marks": (
        lambda at, _: {"messages": _messages(at, f"<image>{_asked(at)}"), "images": [_name(at)], "id": at},
        _TURNS,
    ),
    "parts without names": (lambda at, _: {**_parts(at, type="image"), "images": [_name(at)]}, _TURNS),
    "LLaVA": (
        lambda at, _: {
            "id": f"{at:012}",
            "image": _name(at),
            "conversations": [
                {"from": "human", "value": f"<image>{_asked(at)}"},
                {"from": "gpt", "value": _answer(at)},
            ],
        },
        {"messages": "conversations", "images": "image"},
    ),
    "OpenAI": (
        lambda at, _: _parts(at, type="image_url", image_url={"url": _name(at), "detail": "low"}),
        {"messages": "messages"},
    ),
    "OpenAI with the picture": (
        lambda at, folder: _parts(at, type="image_url", image_url={"url": _url(folder, at)}),
        {"messages": "messages"},
    ),
    "columns": (
        lambda at, _: {"image": _name(at), "prompt": _asked(at), "completion": _answer(at)},
        {"images": "image", "prompt": "prompt", "completion": "completion"},
    ),
    "other names.csv": (
        lambda at, _: {"photo": _name(at), "question": _asked(at), "response": _answer(at)},
        {
            "images": "image",
            "prompt": "question",
            "completion": "response",
        },  # a table's one column of pictures is image
    ),
    "bytes.parquet": (
        lambda at, folder: {
            "image": {"bytes": (folder / _name(at)).read_bytes(), "path": None},
            "question": _asked(at),
            "answer": _answer(at),
        },
        {"images": "image", "prompt": "question", "completion": "answer"},
    ),
    "lists.parquet": (
        lambda at, folder: {
            "images": [{"bytes": (folder / _name(at)).read_bytes(), "path": None}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": _asked(at)}]},
                {"role": "assistant", "content": [{"type": "text", "text": _answer(at)}]},
            ],
        },
        _TURNS,
    ),
    "turns in a text.csv": (
        lambda at, _: {
            "messages": json.dumps(_messages(at, f"<image>{_asked(at)}")),
            "images": json.dumps([_name(at)]),
        },
        _TURNS,
    ),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes rows of a form, beside their pictures."""
    (tmp_path / "pictures").mkdir()
    for at in range(_COUNT):
        Image.new("RGB", (20, 30 + at), _COLOURS[at % 4]).save(tmp_path / _name(at))

    def write(form: str) -> Path:
        rows = [FORMS[form][0](at, tmp_path) for at in range(_COUNT)]
        path = tmp_path / (form if "." in form else f"{form}.jsonl").replace(" ", "-")
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_and_says_the_same(form: str, write: Callable, tmp_path: Path, cli: Callable) -> None:
    data, recipe = write(form), tmp_path / "recipe.yaml"
    ran = cli("init", data, "--output", recipe, "--json", "--base", llava_base())
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert (made["task"], made["columns"]) == ("image_text_to_text", FORMS[form][1])
    assert "picture" in str(made["reasons"])
    all_rows = ("dataset.eval_fraction=null", "training.load_best_model_at_end=false")
    ran = cli("inspect", recipe, "--json", "--row", 0, "--quiet", *all_rows)
    assert ran.code == 0, ran.err
    (row,) = json.loads(ran.out)["rows"]
    assert (
        row["text"]
        == f"""<|im_start|>user
{"<image>" * 4}{_asked(0)}<|im_end|>
<|im_start|>assistant
{_answer(0)}<|im_end|>
"""
    )
    (picture,) = row["images"]
    assert (picture["width"], picture["height"]) == (20, 30)


@pytest.mark.parametrize("form", ["parts", "LLaVA", "columns"])
def test_without_a_base_one_is_proposed(form: str, write: Callable, tmp_path: Path, cli: Callable) -> None:
    recipe = tmp_path / "recipe.yaml"
    ran = cli("init", write(form), "--output", recipe, "--json")
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert (made["task"], made["base_model"]) == ("image_text_to_text", "HuggingFaceTB/SmolVLM-256M-Instruct")
    assert yaml.safe_load(recipe.read_text())["dataset"]["max_length"] == 2048


def test_all_pictures_may_have_one_question(write: Callable, tmp_path: Path, cli: Callable) -> None:
    write("columns")
    rows = [{"image": _name(at), "prompt": "Which colour?", "completion": _COLOURS[at % 4]} for at in range(_COUNT)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = cli("init", tmp_path / "one.jsonl", "--output", tmp_path / "recipe.yaml", "--json")
    assert json.loads(ran.out)["task"] == "image_text_to_text"


def test_texts_alone_are_for_such_a_base_too(tmp_path: Path, cli: Callable) -> None:
    rows = [{"prompt": _asked(at), "completion": _answer(at)} for at in range(_COUNT)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = cli("init", data, "--output", tmp_path / "recipe.yaml", "--json", "--base", llava_base())
    assert json.loads(ran.out)["task"] == "image_text_to_text"
    ran = cli("init", data, "--output", tmp_path / "text.yaml", "--json")
    assert json.loads(ran.out)["task"] == "causal_lm"


def test_an_address_is_not_read(write: Callable, tmp_path: Path, cli: Callable) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert cli("init", write("OpenAI"), "--output", recipe, "--base", llava_base()).code == 0
    row = _parts(0, type="image_url", image_url={"url": "https://example.org/a.png"})
    (tmp_path / "OpenAI.jsonl").write_text(json.dumps(row) + "\n")
    ran = cli("inspect", recipe)
    assert ran.code == 3
    assert "https://example.org/a.png: is an address, and only files are read" in ran.err
