"""Files as people have them: ``init`` names the task and the columns that a person would, or asks."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bases import write_config
from layouts import ASKS, LAYOUTS, REFUSES, SOME
from learn import LEARNT, SETTINGS, learn
from score import ASKED, BROKEN, LEAST, REFUSED, RIGHT, WRONG, Answer, draft, judge, score

from peftcli.cli.app import main
from peftcli.recipe import load_recipe

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", SOME)
def test_init_says_what_a_person_would(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> Answer:
        code = main([str(each) for each in arguments])
        return (code, *capsys.readouterr())

    layout = LAYOUTS[name]
    verdict = judge(layout, draft(layout, tmp_path, write_config(layout.base, tmp_path / "base"), run))
    assert verdict.verdict == RIGHT, verdict.said
    if layout.tasks[0] not in (ASKS, REFUSES):
        assert load_recipe(tmp_path / "recipe.yaml").task["type"] == layout.tasks[0]


@pytest.mark.parametrize(
    ("name", "code", "out", "verdict"),
    [
        (
            "imdb_csv",
            0,
            '{"task": "sequence_classification", "columns": {"text": "review", "label": "sentiment"}',
            RIGHT,
        ),
        (
            "imdb_csv",
            0,
            '{"task": "sequence_classification", "columns": {"text": "sentiment", "label": "review"}',
            WRONG,
        ),
        ("imdb_csv", 0, '{"task": "causal_lm", "columns": {"text": "review"}', WRONG),
        ("two_texts_csv", 0, '{"task": "causal_lm", "columns": {"prompt": "col_a", "completion": "col_b"}', WRONG),
        ("iris_csv", 0, '{"task": "sequence_classification", "columns": {}', WRONG),
        ("imdb_csv", 2, "peftcli init a --task b\npeftcli init a --task c", ASKED),
        ("two_texts_csv", 2, "peftcli init a --task b\npeftcli init a --task c", RIGHT),
        ("imdb_csv", 3, "", REFUSED),
        ("iris_csv", 3, "", RIGHT),
        ("imdb_csv", 1, "", BROKEN),
    ],
)
def test_a_wrong_reading_is_found(name: str, code: int, out: str, verdict: str) -> None:
    answer = (code, f"{out}}}" if code == 0 else out, "error: it failed")
    assert judge(LAYOUTS[name], answer).verdict == verdict


def test_the_files_of_a_layout_are_the_same_each_time(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        command = [sys.executable, HERE / "write.py", tmp_path / folder, "toxic_csv", "nli_triplets", "ljspeech"]
        subprocess.run(command, check=True, capture_output=True)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 40
    for path in files:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "other" / path).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_init_is_right_on_nearly_all_and_wrong_on_none_without_asking() -> None:
    pytest.importorskip("openpyxl")
    verdicts = score(list(LAYOUTS))
    totals = Counter(each.verdict for each in verdicts)
    assert [each for each in verdicts if each.verdict in (WRONG, BROKEN)] == []
    assert totals[RIGHT] >= LEAST * len(LAYOUTS), [each for each in verdicts if each.verdict != RIGHT]


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_what_init_wrote_learns_in_sixty_steps(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    names = [name for name, each in LAYOUTS.items() if each.tasks[0] not in (ASKS, REFUSES)]
    results = [learn(name, tmp_path / name, SETTINGS) for name in names]
    record_property("learnt", sum(each.learnt for each in results))
    assert sum(each.learnt for each in results) >= LEARNT, [each for each in results if not each.learnt]
