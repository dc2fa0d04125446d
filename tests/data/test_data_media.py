"""Folders of pictures and sounds as rows."""

import gzip
import os
import shutil

import pyarrow as pa
import pytest
from pyarrow import parquet

from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.schema import Source


@pytest.fixture
def photos(tmp_path):
    for name in ("dog/a.jpg", "cat/b.PNG", "cat/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def rows(folder, **source):
    return list(open_source(Source(train=str(folder), **source)).rows())


def test_each_file_is_a_row_labelled_by_its_folder(photos):
    found = rows(photos)
    assert [row.values for row in found] == [
        {"image": f"{photos}/cat/a.png", "label": "cat"},
        {"image": f"{photos}/cat/b.PNG", "label": "cat"},
        {"image": f"{photos}/dog/a.jpg", "label": "dog"},
    ]
    assert [(row.place.source, row.place.number) for row in found][2] == (f"{photos}/dog/a.jpg", 1)
    assert len(rows(photos, limit=2)) == 2


def test_files_directly_in_the_folder_have_no_label(photos):
    assert [row.values for row in rows(photos / "cat")] == [
        {"image": f"{photos}/cat/a.png"},
        {"image": f"{photos}/cat/b.PNG"},
    ]


def test_a_file_of_rows_comes_before_the_pictures_beside_it(photos):
    (photos / "metadata.jsonl").write_text('{"file_name": "cat/a.png", "label": "tabby"}\n')
    opened = open_source(Source(train=str(photos)))
    assert [row.values["label"] for row in opened.rows()] == ["tabby"]
    assert opened.left_out == []


def test_folders_of_one_split_at_most_are_classes(tmp_path):
    for label in ("control", "test", "train_station"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.wav").write_bytes(b"RIFF")
    assert [row.values["label"] for row in rows(tmp_path)] == ["control", "test", "train_station"]
    assert rows(tmp_path)[0].values["audio"] == f"{tmp_path}/control/a.wav"


def test_names_that_are_no_extension_or_not_utf8(photos):
    (photos / "cat" / "png").write_bytes(b"not a picture")
    (photos / os.fsdecode(b"caf\xe9")).mkdir()
    (photos / os.fsdecode(b"caf\xe9") / "a.png").write_bytes(b"")
    opened = open_source(Source(train=str(photos)))
    assert opened.left_out == ["cat/png"]
    [error] = [row for row in opened.rows() if isinstance(row, DataError)]
    assert (error.key, error.message) == ("label", "row 1: the name of its folder is not UTF-8")


def test_a_folder_is_known_by_names_and_sizes_and_on_this_disk_by_times(photos, tmp_path_factory):
    opened, copy = open_source(Source(train=str(photos))), tmp_path_factory.mktemp("copy")
    before = fingerprint, times = opened.state()
    assert list(fingerprint) == [str(photos)]
    opened.check_unchanged(before)
    file = photos / "cat" / "a.png"
    os.utime(file, ns=(1, 1))
    assert (opened.fingerprint(), opened.state()[1] == times) == (fingerprint, False)
    with pytest.raises(DataError, match="changed while it was read"):
        opened.check_unchanged(before)
    shutil.copytree(photos, copy, dirs_exist_ok=True)
    assert open_source(Source(train=str(copy))).fingerprint() == {str(copy): fingerprint[str(photos)]}
    file.write_bytes(b"another")
    assert opened.fingerprint() != fingerprint


def test_media_beside_a_file_of_rows_are_known_too(photos):
    (photos / "metadata.jsonl").write_text('{"file_name": "cat/a.png", "label": "tabby"}\n')
    opened = open_source(Source(train=str(photos)))
    fingerprint, times = opened.state()
    assert list(fingerprint) == [f"{photos}/metadata.jsonl", str(photos)]
    os.utime(photos / "cat" / "a.png", ns=(1, 1))
    assert opened.state()[1] != times


def test_class_labels_of_a_parquet_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["ham", "spam"]),
        topics=datasets.List(datasets.ClassLabel(names=["a", "b"])),
    )
    made = datasets.Dataset.from_dict({"text": ["x"], "label": [1], "topics": [[0]]}, features)
    made.to_parquet(tmp_path / "a.parquet")
    opened = open_source(Source(train=str(tmp_path / "a.parquet")))
    assert opened.class_names() == {"label": ("ham", "spam"), "topics": ("a", "b")}
    for name in ("b.parquet.gz", "c.PARQUET"):
        content = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert open_source(Source(train=str(tmp_path / name))).class_names() == opened.class_names()
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n')
    assert open_source(Source(train=str(tmp_path / "a.jsonl"))).class_names() == {}


def test_files_of_a_folder_may_number_their_classes_differently(tmp_path):
    datasets = pytest.importorskip("datasets")
    for file, names in (("a", ["neg", "pos"]), ("b", ["mixed", "pos"]), ("c", ["neg"])):
        of_class = datasets.ClassLabel(names=names)
        features = datasets.Features(label=of_class, tags=datasets.List(of_class))
        made = datasets.Dataset.from_dict({"label": [0], "tags": [[0, -100]]}, features)
        made.to_parquet(tmp_path / f"{file}.parquet")
    opened = open_source(Source(train=str(tmp_path)))
    names = opened.class_names()["label"]
    assert names == ("neg", "pos", "mixed")
    found = [(row.values["label"], row.values["tags"]) for row in opened.rows()]
    assert found == [("neg", ["neg", -100]), ("mixed", ["mixed", -100]), ("neg", ["neg", -100])]
    one = parquet.read_table(tmp_path / "c.parquet")  # of one class, numbered 0
    parquet.write_table(pa.table([pa.array([1]), one["tags"]], schema=one.schema), tmp_path / "c.parquet")
    *_, last = opened.rows()
    assert isinstance(last, DataError)
    assert (last.key, last.message) == ("label", "row 1: a number that its file has no class for")
