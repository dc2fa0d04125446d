"""Batches that worker processes make: the same bytes, and a run ends when one of them does."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import trainkit
from PIL import Image
from taskkit import CASES
from trainkit import Trained, at_step, run_recipe, run_until

from peftcli.errors import DataError, ProcessDied

SETTINGS = (
    "training.eval_strategy=steps",
    "training.eval_steps=4",
    "training.save_strategy=steps",
    "training.save_steps=3",
)
TWO = (*SETTINGS, "training.dataloader_num_workers=2")


def recipe(folder: Path, name: str = "image_classification") -> Path:
    return CASES[name].write(folder)


def workers() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def same(one: Trained, other: Trained) -> bool:
    return all((one.folder / name).read_bytes() == (other.folder / name).read_bytes() for name in trainkit.PRODUCT[:3])


@pytest.mark.grid(keep=1)
@pytest.mark.parametrize(
    "name", ["image_classification", "semantic_segmentation", "speech_recognition", "letters of sounds"]
)
def test_the_result_does_not_depend_on_the_number_of_workers(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = recipe(tmp_path, name), tmp_path / "cache"
    monkeypatch.setenv("PEFTCLI_CACHE", str(cache))  # rows are encoded in workers, too
    seen = list[int]()
    one = run_recipe(path, *TWO, on_event=at_step(2, lambda: seen.extend(workers())))
    assert len(seen) == 2
    assert workers() == []
    monkeypatch.setenv("PEFTCLI_CACHE", f"{cache}-2")
    other = run_recipe(path, *SETTINGS, "training.dataloader_num_workers=0", f"training.output_dir={tmp_path}/other")
    assert same(one, other)
    assert one.run["data"]["content"] == other.run["data"]["content"]


@pytest.mark.slow
def test_a_stopped_run_resumes_with_another_number_of_workers(tmp_path: Path) -> None:
    whole = run_recipe(recipe(tmp_path), *SETTINGS, "training.dataloader_num_workers=0")
    stopped = f"training.output_dir={tmp_path}/stopped"
    run_until(2, tmp_path / "recipe.yaml", *TWO, stopped)
    assert workers() == []
    assert same(run_recipe(tmp_path / "recipe.yaml", *SETTINGS, stopped), whole)


def test_a_worker_that_dies_ends_the_run(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    with pytest.raises(ProcessDied, match=r"a worker process ended \(SIGKILL\)"):
        run_recipe(path, *TWO, on_event=at_step(1, lambda: os.kill(workers()[0], signal.SIGKILL)))
    assert workers() == []
    described = json.loads((tmp_path / "out/run.json").read_text())
    assert (described["status"], described["exit_code"]) == ("failed", 10)


def photos(folder: Path) -> Path:
    """The pictures of the image task, a folder for each class, as JPEGs."""
    for number, row in enumerate(CASES["image_classification"].rows()):
        (folder / row["label"]).mkdir(parents=True, exist_ok=True)
        Image.open(row["image"]).save(folder / row["label"] / f"{number}.jpg")
    return folder


def test_a_broken_file_is_found_before_training_and_left_out(tmp_path: Path) -> None:
    train = photos(tmp_path / "photos")
    broken = sorted(train.rglob("*.jpg"))[-2]
    broken.write_bytes(broken.read_bytes()[:-40])  # the end is missing
    settings = (f"dataset={{train: {train}}}", "training.dataloader_num_workers=1", "training.max_steps=1")
    steps = list[int]()
    with pytest.raises(DataError, match=f"row 1: {broken}: the picture cannot be read") as caught:
        run_recipe(recipe(tmp_path), *settings, on_event=at_step(1, lambda: steps.append(1)))
    assert (caught.value.file, steps, workers()) == (str(broken), [], [])
    done = run_recipe(tmp_path / "recipe.yaml", *settings, "dataset.on_bad_row=skip", overwrite=True)
    (skipped,) = map(json.loads, (done.folder / "skipped.jsonl").read_text().splitlines())
    assert (skipped["rows"], skipped["file"]) == ("train", str(broken))
    assert (done.run["data"]["used"], done.run["data"]["skipped"]) == (15, 1)


def test_a_file_that_breaks_later_is_an_error_with_row_and_path(tmp_path: Path) -> None:
    train = photos(tmp_path / "photos")
    broken = sorted(train.rglob("*.jpg"))[4]
    settings = (f"dataset={{train: {train}}}", "training.dataloader_num_workers=1", "training.max_steps=8")
    with pytest.raises(DataError) as caught:
        run_recipe(recipe(tmp_path), *settings, on_event=at_step(1, lambda: broken.write_bytes(b"gone")))
    assert caught.value.file == str(broken)
    assert f"row 1: {broken}: has changed since the rows were read" in caught.value.message
    assert workers() == []
