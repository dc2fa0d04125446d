"""Columns of files and classes, as datasets writes and names them, for every task that takes such columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from classifierkit import encoded, open_task, write_scene
from PIL import Image
from soundkit import clip, speech_task, tone

from peftcli.data.rows import Row, Table
from peftcli.data.sources import open_source
from peftcli.data.store import Example
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks import TASKS

Write = Callable[[Path, Mapping[str, Sequence[Any]]], Path]


def read(path: Path, task: Any) -> tuple[Any, list[Example]]:
    """The examples of a file or folder, and the task with the settings that its rows complete."""
    opened = open_source(Source(train=str(path)))
    rows = [row for row in opened.rows() if isinstance(row, Row)]
    table = Table(Source(train=str(path)), opened.name, tuple(rows[0].values), opened.class_names, rows[0].values)
    if getattr(task, "needs_scan", False):
        task = TASKS[task.name].open(task.scan([(table, iter(rows))]), task.base)
    outcomes = task.encode(rows, task.read(table))
    assert [str(each) for each in outcomes if isinstance(each, Exception)] == []
    return task, [outcome.examples[0] for outcome in outcomes]


def parquet(folder: Path, features: Mapping[str, Any], columns: Mapping[str, Sequence[Any]]) -> Path:
    """A file as ``Dataset.to_parquet`` writes it, which needs torchcodec for sounds."""
    import datasets
    import pyarrow.parquet

    schema = datasets.Features(features).arrow_schema
    pyarrow.parquet.write_table(pyarrow.table(dict(columns), schema=schema), folder / "a.parquet")
    return folder / "a.parquet"


def files(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Files as datasets holds them, with their bytes."""
    return [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in paths]


def test_features_of_a_parquet_file(tmp_path: Path) -> None:
    import datasets

    scenes = [write_scene(tmp_path, number) for number in range(2)]
    images, masks = files([scene["image"] for scene in scenes]), files([scene["annotation"] for scene in scenes])
    names = datasets.ClassLabel(names=["cat", "dog"])

    path = parquet(tmp_path, {"image": datasets.Image(), "label": names}, {"image": images, "label": [1, 0]})
    task, found = read(path, open_task("image_classification", "vit"))
    assert task.labels == ("cat", "dog")
    assert [example.arrays["label"] for example in found] == [[1.0], [0.0]]
    assert [example.arrays["content"] for example in found] == [image["bytes"] for image in images]
    assert task.collate(found, training=True)["pixel_values"].shape[0] == 2

    several = {"image": datasets.Image(), "labels": datasets.List(names)}
    path = parquet(tmp_path, several, {"image": images, "labels": [[1, 0], []]})
    task, found = read(path, open_task("image_classification", "vit"))
    assert (task.labels, task.settings.problem_type) == (("cat", "dog"), "multi_label")
    assert [example.arrays["label"] for example in found] == [[1.0, 1.0], [0.0, 0.0]]

    both = {"image": datasets.Image(), "annotation": datasets.Image()}
    path = parquet(tmp_path, both, {"image": images, "annotation": masks})
    task, found = read(path, open_task("semantic_segmentation", "segformer", labels=["floor", "red", "blue"]))
    assert [example.arrays["mask_content"] for example in found] == [mask["bytes"] for mask in masks]

    tags = {"tokens": datasets.List(datasets.Value("string")), "ner_tags": datasets.List(names)}
    path = parquet(tmp_path, tags, {"tokens": [["good", "bad"]], "ner_tags": [[1, 0]]})
    task, found = read(path, open_task("token_classification", "bert", scheme="none"))
    assert (task.labels, list(found[0].arrays["tags"])) == (("cat", "dog"), [1, 0])

    sound = clip(tmp_path / "a.wav", tone())
    heard = {"audio": datasets.Audio(sampling_rate=16000), "sentence": datasets.Value("string")}
    path = parquet(tmp_path, heard, {"audio": files([sound]), "sentence": ["one tone"]})
    task, found = read(path, speech_task())
    assert (found[0].arrays["content"], found[0].arrays["text"]) == (Path(sound).read_bytes(), "one tone")
    assert task.collate(found, training=True)["input_features"].shape[0] == 1


def as_csv(folder: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    lines = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def as_jsonl(folder: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def as_parquet(folder: Path, columns: Mapping[str, Sequence[Any]]) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(dict(columns)), folder / "metadata.parquet")
    return folder


@pytest.mark.parametrize("write", [as_csv, as_jsonl, as_parquet])
def test_metadata_of_a_folder(tmp_path: Path, write: Write) -> None:
    """Names are relative to the metadata; a second file of a row has a name before ``_file_name``."""
    train = tmp_path / "two\u3000words" / "train"  # messages escape the blank of Japanese
    (train / "masks").mkdir(parents=True)
    scene = write_scene(train, 0)
    image, mask = Path(scene["image"]), Path(scene["annotation"])
    mask = mask.rename(train / "masks" / mask.name)
    write(train, {"file_name": [image.name], "mask_file_name": [f"masks/{mask.name}"], "label": ["a"]})
    _, (example,) = read(train, open_task("semantic_segmentation", "segformer", labels=["floor", "red", "blue"]))
    assert (example.arrays["path"], example.arrays["mask_path"]) == (str(image), str(mask))
    labelled = open_task("image_classification", "vit", labels=["a", "b"], problem_type="single_label")
    assert read(train, labelled)[1][0].arrays["path"] == str(image)
    clips = tmp_path / "clips"
    sound = clip(clips / "a.wav", tone())
    write(clips, {"file_name": ["a.wav"], "transcription": ["one tone"]})
    assert read(clips, speech_task())[1][0].arrays["path"] == sound


def picture(path: Path, shade: int = 40) -> str:
    Image.new("RGB", (12, 16), (shade, 90, 200)).save(path)
    return str(path)


def sound(path: Path, pitch: float = 440.0) -> str:
    return clip(path, tone(pitch), subtype="FLOAT")


def picture_task() -> Any:
    return open_task("image_classification", "vit", labels=["a", "b"], problem_type="single_label")


OF_FILES = pytest.mark.parametrize(
    ("task", "name", "write", "other", "more"),
    [
        (picture_task, "image", picture, 200, {"label": "a"}),
        (speech_task, "audio", sound, 880.0, {"sentence": "one tone"}),
    ],
    ids=["pictures", "sounds"],
)


@OF_FILES
def test_a_file_comes_as_a_path_as_bytes_or_both(
    tmp_path: Path, task: Any, name: str, write: Any, other: Any, more: dict[str, str]
) -> None:
    path = write(tmp_path / "a.png" if name == "image" else tmp_path / "a.wav")
    content = Path(path).read_bytes()
    values = [path, content, {"bytes": content, "path": Path(path).name}, {"bytes": None, "path": path}]
    values += [{"array": tone().tolist(), "sampling_rate": 16000, "path": None}] if name == "audio" else []
    found = encoded(task(), [{name: value, **more} for value in values])
    batches = [next(iter(task().collate([each], training=True).values())) for each in found]
    assert all(torch.equal(batches[0], batch) for batch in batches)
    assert found[0].arrays["content"] == b""


@OF_FILES
def test_a_file_that_changed_since_is_named(
    tmp_path: Path, task: Any, name: str, write: Any, other: Any, more: dict[str, str]
) -> None:
    file = tmp_path / "a.png" if name == "image" else tmp_path / "a.wav"
    found = encoded(task(), [{name: write(file), **more}])
    write(file, other)
    with pytest.raises(DataError, match="has changed since the rows were read") as caught:
        task().collate(found, training=True)
    assert caught.value.file == str(file)


def test_paths_may_be_relative_to_the_file_of_rows(tmp_path: Path) -> None:
    scene = write_scene(tmp_path / "scenes", 0)
    (tmp_path / "rows.csv").write_text("file_name,mask,label\nscenes/0.png,scenes/0.mask.png,a\n")
    masks = open_task("semantic_segmentation", "segformer", labels=["floor", "red", "blue"])
    for task, columns in ((picture_task(), {"path": "image"}), (masks, {"path": "image", "mask_path": "annotation"})):
        arrays = read(tmp_path / "rows.csv", task)[1][0].arrays
        assert {column: arrays[column] for column in columns} == {key: scene[name] for key, name in columns.items()}
