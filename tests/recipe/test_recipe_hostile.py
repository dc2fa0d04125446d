"""Malformed and hostile files: one message with a line, in bounded time, and never another exception."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe import load_recipe, read


@pytest.mark.parametrize(
    ("more", "key", "message"),
    [
        ("  seed: 1\n  seed: 2\n", "training.seed", "given twice; first in line 8"),
        ("1: x\n", None, "a key must be a name, found 1"),
        ("null: x\n", None, "a key must be a name, found null"),
        ("? [a]\n: x\n", None, "a key must be a name, not a list"),
        ("  seed: !!python/name:os.system\n", "training.seed", "has a YAML tag"),
        ("  <<: 5\n", None, "<< takes a mapping"),
        ("  <<: {seed: 1}\n  <<: {seed: 2}\n", "training.<<", "given twice; first in line 8"),
        ("!!python/name:os.system x: 1\n", None, "has a YAML tag"),
        ('gates: {"\\ud800": "> 1"}\n', "gates.\ud800", "that is not text"),
        ('  metric_for_best_model: "\\0"\n', "training.metric_for_best_model", "that is not text"),
        ('  metric_for_best_model: "\\ud800"\n', "training.metric_for_best_model", "that is not text"),
        (
            "  metric_for_best_model: " + "${A}" * 200 + "\n",
            "training.metric_for_best_model",
            "more than 100 variables",
        ),
    ],
)
def test_refused_parts(problems, more: str, key: str | None, message: str) -> None:
    found = problems(more)[0]
    assert message in found.message
    assert found.key == key
    assert found.line in (8, 9)


def test_bytes_and_files_that_are_no_recipe(tmp_path: Path, good: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"a: 1\nb: \xe9\n")
    assert [str(p) for p in read(path).problems] == [f"{path}:2: not UTF-8 text"]
    path.write_bytes(good.encode("utf-16"))
    assert "not UTF-8" in read(path).problems[0].message
    path.write_text("#" * 1_000_001)
    assert "at most 1,000,000 are read" in read(path).problems[0].message
    path.write_text("\ufeff" + good, encoding="utf-8")
    assert read(path).problems == []
    assert "is a folder" in read(tmp_path).problems[0].message
    assert "no such file" in read(tmp_path / "x").problems[0].message
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in read(tmp_path / "fifo").problems[0].message
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "cannot be read" in read(tmp_path / "loop").problems[0].message


def test_a_long_path_is_cut(tmp_path: Path) -> None:
    (found,) = read(tmp_path / ("x" * 5000)).problems
    assert len(found.message) < 300
    assert "cannot be read: File name too long" in found.message


def test_a_file_that_becomes_a_pipe_is_not_waited_for(
    tmp_path: Path, good: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "recipe.yaml", tmp_path / "file"
    real.write_text(good)
    os.mkfifo(path)
    found = real.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **options: found)
    (problem,) = read(path).problems
    assert "not a regular file" in problem.message


def test_an_override_whose_key_is_no_text(problem) -> None:
    found = problem("", "gates.\udcff=> 1")
    assert "that is not text" in found.message
    assert found.key == "gates.\udcff"


def test_mutations_raise_nothing_else(tmp_path: Path, good: str) -> None:
    good = good.replace("train: org/data", "mix: [{train: org/a, weight: 2}, {train: org/b, weight: 1e-1}]")
    whole = (good + "gates: {eval_loss: '<= 1.5'}\nlaunch: {num_processes: 2}\n").encode()
    path = tmp_path / "recipe.yaml"
    rng = random.Random(20)
    refused = sum(_is_refused(path, _mutated(whole, rng)) for _ in range(200))
    assert 100 < refused < 200


def _is_refused(path: Path, text: bytes) -> bool:
    path.write_bytes(text)
    try:
        load_recipe(path)
    except RecipeError:
        return True
    return False


def _mutated(text: bytes, rng: random.Random) -> bytes:
    lines = text.splitlines(keepends=True)
    for _ in range(rng.randint(1, 3)):
        at, index = rng.randrange(len(text)), rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0:
            text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + text[at + rng.randint(1, 9) :]
        elif kind == 2:
            text = text[:at] + rng.choice(b"{}[]:,&*!|>'\"%@`#-?\n\t ").to_bytes(1, "big") + text[at:]
        elif kind == 3:
            text = b"".join(lines[:index] + lines[index + 1 :])
        elif kind == 4:
            text = b"".join([*lines, lines[index]])
        elif kind == 5:
            text = text[:at] + text[at : at + 20] * rng.randint(2, 4) + text[at:]
        else:
            text = (
                text[:at]
                + rng.choice([b"null", b"1e999", b".nan", b"${X}", b"*a", b"&a ", b"!!int ", b"<<: "])
                + text[at:]
            )
        text = text or b"\n"
    return text
