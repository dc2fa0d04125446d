"""``peftcli trace``: gradients of rows, their index, and the rows that taught an answer."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trainkit
from taskkit import CASES

from peftcli.adapters.proof.gradient_index import open_index
from peftcli.adapters.proof.influence import agreement
from peftcli.adapters.proof.row_gradients import Sketcher
from peftcli.errors import DataError, UsageError
from peftcli.train.events import Message
from peftcli.train.trace import TracedRun, index_of, influence, open_run
from peftcli.train.trace_answer import Question, rank_rows


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt its 13 rows."""
    recipe = trainkit.write_recipe(tmp_path_factory.mktemp("traced"))
    options = ("training.max_steps=60", "training.learning_rate=2e-2", "training.save_strategy=steps")
    return trainkit.run_recipe(recipe, *options, "training.save_steps=20").folder


def test_sketches_keep_dot_products() -> None:
    generator, sizes = torch.Generator().manual_seed(0), {"a": 50_000, "b": 300_000, "c": 7, "d": 90_001}
    sketcher = Sketcher(sizes)
    rows = {name: torch.randn(2, size, generator=generator) for name, size in sizes.items()}
    rows["b"][1] += rows["b"][0]
    sketches = torch.zeros(2, sketcher.width)
    for name, values in rows.items():
        sketcher.add(sketches, name, values)
    exact = torch.cat(list(rows.values()), dim=1)
    assert sketcher.width * 2 + 4 <= 4096
    assert torch.allclose(sketches @ sketches.T, exact @ exact.T, rtol=0.1)
    c = sketcher.blocks[2]
    assert torch.equal(sketches[:, c], rows["c"]), "a small block is kept whole"


@pytest.mark.parametrize("by", ["datainf", "tracin"])
def test_row_that_taught_an_answer_is_first(run_folder: Path, by: str) -> None:
    prompt, answer = trainkit.PAIRS[4]
    found = rank_rows(str(run_folder), Question(prompt=prompt, answer=answer), by, 3)
    assert found["taught"][0]["row"].endswith(":5")
    assert found["taught"][0]["influence"] > 0
    assert found["rows"] == 10


def test_command(cli: Callable, run_folder: Path) -> None:
    prompt, _ = trainkit.PAIRS[2]
    ran = cli("trace", run_folder, "--prompt", prompt)
    assert ran.code == 0, ran.err
    assert "taught it" in ran.out
    assert "train.jsonl:3 " in ran.out
    assert all(len(line) <= 80 for line in ran.out.splitlines()[1:])


def test_index_is_kept_resumed_and_made_again(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, computed = tmp_path / "run", list[int]()
    shutil.copytree(run_folder, folder, ignore=shutil.ignore_patterns("trace"))
    run, sketches = open_run(str(folder)), TracedRun.sketches
    monkeypatch.setattr(TracedRun, "sketches", lambda self, rows: computed.append(len(rows)) or sketches(self, rows))

    def rows() -> np.ndarray:
        computed.clear()
        return index_of(run, run.data.train).rows(np.arange(10))

    whole = rows()
    assert sum(computed) == 10
    assert np.array_equal(rows(), whole)
    assert computed == []
    (path,) = (folder / "trace").glob("*.bin")
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    assert np.array_equal(rows(), whole)
    assert sum(computed) == 10, "a damaged index is made again"
    path.unlink()
    path.with_suffix(".part").write_bytes(content[: len(content) // 2])
    assert np.allclose(rows(), whole, rtol=1e-3, atol=1e-5)
    assert sum(computed) == 5, "what a killed process has written is kept"


def test_errors(cli: Callable, run_folder: Path, tmp_path: Path) -> None:
    assert cli("trace", run_folder, "--answer", "x").code == UsageError.exit_code
    assert cli("trace", run_folder, "--prompt", "x", "--row", "a.jsonl:1").code == UsageError.exit_code
    recipe = trainkit.write_recipe(tmp_path)
    folder = trainkit.run_recipe(recipe, "training.max_steps=1").folder
    train = tmp_path / "train.jsonl"
    train.write_text(train.read_text().replace("sun", "moon"))
    with pytest.raises(DataError, match="not those that the run was trained on"):
        open_run(str(folder))
    (folder / "recipe.yaml").unlink()
    with pytest.raises(UsageError, match=r"recipe\.yaml"):
        open_run(str(folder))


OF_TASKS = [pytest.param(name, marks=[pytest.mark.slow] * case.slow) for name, case in CASES.items()]


@pytest.mark.parametrize("name", OF_TASKS)
def test_rows_of_every_task(name: str, tmp_path: Path) -> None:
    """The gradient of a row in a batch is that of the row alone, and a row's influence on itself is its length."""
    path = CASES[name].write(tmp_path)
    folder = trainkit.run_recipe(path, "training.max_steps=2").folder
    said = list[Message]()
    if CASES[name].task["type"] in ("feature_extraction", "grpo"):
        with pytest.raises(UsageError, match="compares the rows of a batch"):
            open_run(str(folder))
        return
    run = open_run(str(folder), lambda event: said.append(event) if isinstance(event, Message) else None)
    index = index_of(run, run.data.train)
    rows = index.rows(np.arange(len(index)))
    assert np.isfinite(rows).all()
    assert (np.linalg.norm(rows, axis=1) > 0).all()
    some = [run.data.train[at] for at in range(3)]
    alone = np.concatenate([run.sketches([[each]]) for each in some])
    if len(run.data.train) == len(index):
        assert np.allclose(alone, rows[:3], rtol=1e-2, atol=1e-3 * np.abs(alone).max())
    together = alone.sum(0)
    assert np.allclose(run.sketches([some])[0], together, rtol=1e-3, atol=1e-3 * np.abs(together).max())
    itself = influence(run, partial(run.sketches, [some[:1]]), "tracin", normalised=False)
    assert itself[0] == pytest.approx((rows[0] ** 2).sum(), rel=0.01)


def test_rows_against_their_neighbours_look_mislabelled(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    inputs = np.repeat(draw.standard_normal((4, 50)), 30, axis=0) + 0.3 * draw.standard_normal((120, 50))
    residuals = -np.abs(draw.standard_normal(120)) - 0.1
    flipped = np.arange(0, 120, 20)
    residuals[flipped] *= -1
    sketches = (inputs * residuals[:, None]).astype(np.float32)
    index = open_index(tmp_path, "key", 50, np.arange(120), lambda start: iter([sketches]))
    assert (agreement(index)[flipped] < 0).all()
    assert (np.delete(agreement(index), flipped) > 0).all()


def test_inspect_adds_findings_of_a_run(cli: Callable, tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path)
    folder = trainkit.run_recipe(recipe, "training.max_steps=2").folder
    ran = cli("inspect", recipe, "--adapter", folder, "--json")
    assert ran.code == 0, ran.err
    assert len(list((folder / "trace").glob("*.bin"))) == 2, "of training and of evaluation rows"
    assert cli("inspect", recipe, "dataset.limit=5", "--adapter", folder).code == UsageError.exit_code
