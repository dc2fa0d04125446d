from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import pytest
from dataset_hub import DatasetHub
from PIL import Image

from peftcli.data import sources
from peftcli.data.rows import Place, Row
from peftcli.data.sources import eval_source, open_source
from peftcli.errors import DataError, HubError, NetworkError, PeftcliError
from peftcli.schema import Dataset, Source


def write(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts(source: Source) -> list[str]:
    return [row.values["text"] for row in open_source(source).rows() if isinstance(row, Row)]


def refused(source: str | Path, **settings: Any) -> PeftcliError:
    """The error that opening or reading a source ends in."""
    with pytest.raises(PeftcliError) as caught:
        list(open_source(Source(train=str(source), **settings)).rows())
    text = str(caught.value)
    assert len(text.splitlines()) <= 6
    assert len(text) < 1000
    assert "\x1b" not in text
    return caught.value


def test_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "x", "y")
    opened = open_source(Source(train=str(path)))
    assert opened.name == str(path)
    assert [*opened.files.values()] == [path]
    assert list(opened.rows()) == [Row({"text": t}, Place(str(path), n, n)) for n, t in enumerate("xy", start=1)]
    assert list(opened.rows()) == list(opened.rows())


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "x")
    path.write_text(path.read_text() + 'broken\n{"text": "y"}\n')
    assert texts(Source(train=str(path), limit=1)) == ["x"]
    assert texts(Source(train=str(path), limit=2)) == ["x"]  # the bad row is one of two
    assert texts(Source(train=str(path), limit=3)) == ["x", "y"]


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "b1", "b2")
    write(tmp_path / "a" / "z.json", "z")
    write(tmp_path / "c.csv").write_text("text\nc\n")
    write(tmp_path / ".hidden.jsonl", "no")
    write(tmp_path / ".git" / "d.jsonl", "no")
    write(tmp_path / "README.md").write_text("no")
    opened = open_source(Source(train=f"{tmp_path}/"))
    assert texts(Source(train=str(tmp_path))) == ["z", "b1", "b2", "c"]
    assert [str(path.relative_to(tmp_path)) for path in opened.files.values()] == ["a/z.json", "b.jsonl", "c.csv"]
    places = [row.place for row in opened.rows() if isinstance(row, Row)]
    assert [place.number for place in places] == [1, 1, 2, 1]  # in the file
    assert [place.line for place in places] == [1, 1, 2, 2]
    assert [place.source for place in places] == [
        f"{tmp_path}/{name}" for name in ("a/z.json", *["b.jsonl"] * 2, "c.csv")
    ]
    assert list(opened.fingerprint()) == [f"{tmp_path}/{name}" for name in ("a/z.json", "b.jsonl", "c.csv")]
    assert texts(Source(train=str(tmp_path), limit=2)) == ["z", "b1"]
    assert opened.left_out == ["README.md"]


def test_links_to_folders_are_read_once_and_a_loop_is_refused(tmp_path: Path) -> None:
    """Also where links double the folders at each level."""
    for level in range(40):
        (tmp_path / f"{level}").mkdir()
        for name in "ab":
            (tmp_path / f"{level}" / name).symlink_to(tmp_path / f"{level + 1}")
    write(tmp_path / "40" / "a.jsonl", "x")
    assert texts(Source(train=str(tmp_path / "0"), streaming=True)) == ["x"]
    (tmp_path / "data" / "again").parent.mkdir()
    for name in ("again", "once more"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "40")
    [found] = open_source(Source(train=str(tmp_path / "data"))).files.values()
    assert found == tmp_path / "data" / "again" / "a.jsonl"
    (tmp_path / "40" / "back").symlink_to(tmp_path / "data")
    assert "is a link to a folder above itself" in refused(tmp_path / "data").message


def test_a_folder_that_is_very_deep_or_holds_very_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path.joinpath("deep", *["d"] * 100, "a.jsonl"), "x")
    assert texts(Source(train=str(tmp_path / "deep"))) == ["x"]
    write(tmp_path.joinpath("deeper", *["d"] * 101, "a.jsonl"), "x")
    error = refused(tmp_path / "deeper")
    assert (error.message, error.file) == (
        "the folder contains more than 100 levels of folders",
        str(tmp_path / "deeper"),
    )
    assert error.hint
    for name in "ab":
        write(tmp_path / "wide" / name / "a.jsonl", "x")
    monkeypatch.setattr(sources, "_MAX_FILES", 4)
    assert len(texts(Source(train=str(tmp_path / "wide")))) == 2
    monkeypatch.setattr(sources, "_MAX_FILES", 3)
    assert refused(tmp_path / "wide").message == "the folder contains more than 3 files"


def test_a_folder_without_data_says_what_it_holds(tmp_path: Path) -> None:
    assert "it contains: nothing" in refused(tmp_path).message
    (tmp_path / "notes.md").write_text("x")
    error = refused(tmp_path)
    assert "it contains: notes.md" in error.message
    assert ".jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet" in (error.hint or "")


@pytest.mark.parametrize(
    ("names", "refused_as"),
    [
        (["train.jsonl", "test.jsonl"], "several splits: train.jsonl and test.jsonl"),
        (["data/train-00000-of-00002.jsonl", "data/validation-00000.jsonl"], "several splits"),
        (["train/0.jsonl", "dev/0.jsonl"], "several splits"),
        (["a_training_1.jsonl", "a.evaluation.jsonl"], "several splits"),
        (["data.jsonl", "test.jsonl"], "several splits: data.jsonl and test.jsonl"),
        (["test.jsonl", "eval.jsonl"], "several splits: eval.jsonl and test.jsonl"),
        (["train/cat/0.png", "test/cat/0.png"], "several splits"),
        (["training_set/cat/0.png", "test_set/cat/0.png"], "several splits"),
        (["train2017/0.png", "val2017/0.png"], "several splits"),
        (["faq.jsonl", "dev-docs.jsonl", "eval-harness/questions.jsonl"], None),
        (["train-1.jsonl", "train-2.jsonl", "training.jsonl", "tested.jsonl", "latest.jsonl"], None),
        (["bullet_train/0.jsonl", "x.jsonl"], None),
        (["train.jsonl", "test.txt"], None),
    ],
)
def test_a_folder_with_several_splits_is_not_trained_on(
    tmp_path: Path, names: list[str], refused_as: str | None
) -> None:
    for name in names:
        write(tmp_path / name, "x")
    if refused_as:
        assert refused_as in refused(tmp_path).message
    else:
        assert set(texts(Source(train=str(tmp_path)))) == {"x"}


def test_a_folder_of_save_to_disk_is_read_split_by_split(tmp_path: Path) -> None:
    import datasets

    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {
        split: datasets.Dataset.from_list([{"text": split, "label": 1}], features=names) for split in ("train", "test")
    }
    parts["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "several")
    one = open_source(Source(train=str(tmp_path / "one")))
    assert (texts(Source(train=str(tmp_path / "one"))), one.class_names()) == (["train"], {"label": ("no", "yes")})
    dataset = Dataset(train=str(tmp_path / "several"), eval=str(tmp_path / "several"))
    [train], evaluated = dataset.sources(), eval_source(dataset)
    assert evaluated is not None
    assert (texts(train), texts(evaluated)) == (["train"], ["test"])
    assert open_source(train).notes() == [f"{tmp_path / 'several'}: the split train of train, test"]
    error = refused(tmp_path / "several", split="validation")
    assert error.message == "has no split 'validation'; it has: train, test"


def test_a_file_that_only_describes_datasets_is_left_out(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "x")
    (tmp_path / "dataset_info.json").write_text('{\n  "a": {"file_name": "a.jsonl"}\n}')
    opened = open_source(Source(train=str(tmp_path)))
    assert ([*opened.files.values()], opened.left_out) == ([tmp_path / "a.jsonl"], ["dataset_info.json"])


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "d" / "a.jsonl", "x")
    assert [*open_source(Source(train="~/d/a.jsonl")).files.values()] == [path]
    assert [*open_source(Source(train="~/d")).files.values()] == [path]
    found = eval_source(Dataset(train="a", eval="~/d"))
    assert found is not None
    assert [row.place.source for row in open_source(found).rows() if isinstance(row, Row)] == [str(path)]


def test_a_folder_with_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", "x")
    write(tmp_path / "b.jsonl")
    error = refused(tmp_path)
    assert (error.file, error.message) == (f"{tmp_path}/b.jsonl", "is empty")
    (tmp_path / "b.jsonl").write_text('["x"]')
    _, row = open_source(Source(train=str(tmp_path))).rows()
    assert isinstance(row, DataError)
    assert "one object per line" in (row.hint or "")  # also in the second file


@pytest.mark.parametrize("name", ["a\nb.jsonl", "a\x1b[31m.jsonl", b"\xe9.jsonl".decode("utf-8", "surrogateescape")])
def test_odd_names_of_files_are_escaped(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, "x")
    opened = open_source(Source(train=str(tmp_path)))
    [shown] = opened.fingerprint()
    assert shown.isprintable()
    assert json.dumps(shown, ensure_ascii=False).encode()
    (tmp_path / name).write_text("")
    assert "is empty" in refused(tmp_path).message


def test_the_fingerprint_is_of_the_bytes_each_time(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "x")
    opened = open_source(Source(train=str(path)))
    before = opened.state()
    assert opened.fingerprint() == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    list(opened.rows())
    opened.check_unchanged(before)
    state = path.stat()
    write(path, "y")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # same size, same time
    assert opened.state() != before
    with pytest.raises(DataError, match="changed while it was read") as caught:
        opened.check_unchanged(before)
    assert caught.value.file == str(path)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        opened.check_unchanged(before)


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl.gz", "x")
    assert f"Similar names in {tmp_path}: train.jsonl.gz" in str(refused(tmp_path / "trian.jsonl"))
    assert f"Files of data in {tmp_path}: train.jsonl.gz" in str(refused(tmp_path / "0"))
    assert "does not exist either" in str(refused(tmp_path / "no" / "train.jsonl"))
    (tmp_path / "train.jsonl.gz").rename(tmp_path / "x")
    assert "contains no file of that kind" in str(refused(tmp_path / "trian.jsonl"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.org/a.jsonl", "is a URL"),
        ("a\0.jsonl", "cannot be opened"),
        ("a\nb", "no such file"),
        ("owner/data.csv", "no such file"),
        ("owner/some--data", "no such file, and no hub id"),
        ("", "is empty; name a file"),  # and not the working folder, as to pathlib
    ],
)
def test_names_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(name).message


# --- evaluation rows


@pytest.mark.parametrize(
    ("settings", "source"),
    [
        ({}, None),
        ({"eval": "b.jsonl"}, Source(train="b.jsonl")),
        ({"eval": "b.jsonl", "limit": 2, "streaming": True}, Source(train="b.jsonl", streaming=True)),
        ({"eval": "other/set", "eval_split": "valid"}, Source(train="other/set", split="valid")),
        ({"format": "text", "columns": {"text": "t"}, "eval": "b.jsonl"},
         Source(train="b.jsonl", format="text", columns={"text": "t"})),
    ],
)  # fmt: skip
def test_the_source_of_evaluation_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], source: Source | None
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "b.jsonl", "x")
    assert eval_source(Dataset(train="a.jsonl", **settings)) == source


def test_a_split_of_the_same_hub_dataset() -> None:
    dataset = Dataset(train="owner/name", name="part", revision="v1", split="train", eval_split="valid")
    assert eval_source(dataset) == Source(train="owner/name", name="part", revision="v1", split="valid")
    one = Source(train="owner/name", name="part", revision="v1", weight=2, limit=9)
    mix = [Source(train="owner/other", revision="v2", weight=1), one]
    assert eval_source(Dataset(mix=mix, eval="owner/name", eval_split="valid")) == eval_source(dataset)


# --- the hub

NAME = "owner/name"
FILES = {"train.jsonl": b'{"text": "a"}\n{"text": "b"}\n', "test.jsonl": b'{"text": "c"}\n'}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[DatasetHub]:
    import datasets
    from huggingface_hub import constants

    server = DatasetHub()
    for module, name, value in (
        (constants, "ENDPOINT", server.url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "HF_HUB_CACHE", str(tmp_path / "hub")),
        (datasets.config, "HF_ENDPOINT", server.url),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets"),
        (datasets.config, "HUB_DATASETS_URL", server.url + "/datasets/{repo_id}/resolve/{revision}/{path}"),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.close()


@pytest.fixture
def offline(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cuts the hub off."""
    import datasets
    from huggingface_hub import constants

    def cut() -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    return cut


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_at_its_newest_commit_or_another(hub: DatasetHub, streaming: bool) -> None:
    first = hub.commit(NAME, FILES)
    second = hub.commit(NAME, {**FILES, "train.jsonl": b'{"text": "new"}\n'})
    source = Source(train=NAME, streaming=streaming)
    opened = open_source(source)
    assert (opened.name, opened.files) == (NAME, {})
    assert opened.fingerprint() == {f"{NAME}@{second}": second}
    assert hub.sent == [], "the commit needs no file"
    assert list(opened.rows()) == [Row({"text": "new"}, Place(NAME, 1))]
    before = opened.state()
    hub.commit(NAME, FILES)
    assert list(opened.rows()) == [Row({"text": "new"}, Place(NAME, 1))]
    opened.check_unchanged(before)
    assert texts(Source(train=NAME, streaming=streaming, revision=first)) == ["a", "b"]
    assert texts(Source(train=NAME, streaming=streaming, revision=first, limit=1)) == ["a"]
    assert texts(Source(train=NAME, streaming=streaming, split="test")) == ["c"]


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_mixed_kinds_are_those_of_the_file(hub: DatasetHub, streaming: bool) -> None:
    rows = [{"a": "x", "b": [{"c": 1}]}, {"a": {"n": None}, "b": [{"c": "z"}]}]
    hub.commit(NAME, {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    found = open_source(Source(train=NAME, streaming=streaming)).rows()
    assert [row.values for row in found if isinstance(row, Row)] == rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves metadata open
def test_images_and_sounds_of_the_hub_are_the_bytes_of_their_files(hub: DatasetHub, streaming: bool) -> None:
    """Also without torchcodec, and not decoded and encoded again."""
    made = io.BytesIO()
    Image.linear_gradient("L").save(made, "JPEG", quality=30)
    image, sound = made.getvalue(), b"RIFF, not read here"
    hub.commit(NAME, {"a.jpg": image, "b.jpg": image, "metadata.csv": b"file_name,mask_file_name\na.jpg,b.jpg\n"})
    hub.commit("org/sounds", {"a.wav": sound, "metadata.csv": b"file_name,text\na.wav,x\n"})
    for name, columns in ((NAME, {"image": image, "mask": image}), ("org/sounds", {"audio": sound})):
        (row,) = open_source(Source(train=name, streaming=streaming)).rows()
        assert isinstance(row, Row)
        for column, content in columns.items():
            held = row.values[column]
            assert (held.get("bytes") or Path(held["path"]).read_bytes()) == content


def test_streaming_with_a_limit_fetches_no_more(hub: DatasetHub) -> None:
    shards = {f"train-{n}.jsonl": b'{"text": "x"}\n' * 10 for n in range(5)}
    hub.commit(NAME, shards)
    assert len(texts(Source(train=NAME, streaming=True, limit=15))) == 15
    assert {name for name in hub.sent if name in shards} == {"train-0.jsonl", "train-1.jsonl"}


def test_the_log_of_datasets_is_told_where_all_went_well(hub: DatasetHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub.commit(NAME, FILES)
    told = list[str]()
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: told.append(record.getMessage()))
    monkeypatch.setattr(datasets.logging.get_logger(), "handlers", [handler])
    source, load = Source(train=NAME), datasets.load_dataset_builder

    def log_and_load(*args: Any, **options: Any) -> Any:
        datasets.logging.get_logger().warning("odd")
        return load(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", log_and_load)
    assert texts(source) == ["a", "b"]
    assert told == ["odd"]
    refused(NAME, split="other")
    assert told == ["odd"]


def test_the_cache_of_the_hub_stays_whole(hub: DatasetHub, tmp_path: Path) -> None:
    """Its branches are those whose files it has."""
    from huggingface_hub import scan_cache_dir

    old = hub.commit(NAME, FILES)
    assert texts(Source(train=NAME)) == ["a", "b"]
    hub.commit(NAME, {"train.jsonl": b'{"text": "new"}\n'})
    open_source(Source(train=NAME)).fingerprint()
    found = scan_cache_dir(tmp_path / "hub")
    assert (found.warnings, [*next(iter(found.repos)).refs]) == ([], ["main"])
    assert next(iter(found.repos)).refs["main"].commit_hash == old


def test_without_the_hub_the_cache_is_used(hub: DatasetHub, offline: Any) -> None:
    commit = hub.commit(NAME, FILES)
    assert texts(Source(train=NAME)) == ["a", "b"]
    offline()
    for revision in (None, commit, commit[:10]):
        opened = open_source(Source(train=NAME, revision=revision))
        assert opened.fingerprint() == {f"{NAME}@{commit}": commit}
        assert texts(Source(train=NAME, revision=revision)) == ["a", "b"]


def test_the_cache_knows_branches_and_older_commits(hub: DatasetHub, offline: Any) -> None:
    old = hub.commit(NAME, FILES)
    assert texts(Source(train=NAME, revision="main")) == ["a", "b"]
    new = hub.commit(NAME, {**FILES, "train.jsonl": b'{"text": "new"}\n'})
    assert texts(Source(train=NAME, revision=new)) == ["new"]
    offline()
    for revision in ("main", old, None):  # the newest commit in the cache is not the one that main was
        assert open_source(Source(train=NAME, revision=revision)).fingerprint() == {f"{NAME}@{old}": old}
        assert texts(Source(train=NAME, revision=revision)) == ["a", "b"]
    assert texts(Source(train=NAME, revision=new)) == ["new"]


def test_another_commit_in_the_cache_is_not_taken(hub: DatasetHub, offline: Any) -> None:
    old = hub.commit(NAME, FILES)
    new = hub.commit(NAME, {**FILES, "train.jsonl": b'{"text": "new"}\n'})
    assert texts(Source(train=NAME)) == ["new"]
    offline()
    error = refused(NAME, revision=old)
    assert isinstance(error, NetworkError)
    assert f"the cache contains commit {new[:12]}" in error.message
    assert isinstance(refused(NAME, revision="v1"), NetworkError)


@pytest.mark.slow  # the hub client tries again for 15 seconds
def test_the_hub_goes_away_between_commit_and_rows(hub: DatasetHub, offline: Any) -> None:
    """The library would take what it has, which is another commit."""
    hub.commit(NAME, FILES)
    assert texts(Source(train=NAME)) == ["a", "b"]
    hub.commit(NAME, {**FILES, "train.jsonl": b'{"text": "new"}\n'})
    opened = open_source(Source(train=NAME))
    opened.fingerprint()
    offline()
    with pytest.raises(NetworkError):
        list(opened.rows())


@pytest.mark.parametrize(
    ("settings", "kind", "key", "message"),
    [
        ({"train": "owner/other"}, HubError, None, "no such dataset on the hub, and no such file"),
        ({"train": "json"}, HubError, None, "no such dataset on the hub"),
        ({"revision": "v9"}, HubError, "dataset.revision", "no revision 'v9'"),
        ({"split": "tset"}, DataError, "dataset.split", "no split 'tset'"),
        ({"split": "tset", "streaming": True}, DataError, "dataset.split", "no split 'tset'"),
        ({"name": "part"}, DataError, "dataset.name", "part"),
        ({"train": "owner/broken"}, DataError, None, "owner/broken/train.jsonl: cannot be loaded: JSON parse error"),
        (
            {"train": "owner/broken", "streaming": True},
            DataError,
            None,
            "owner/broken/train.jsonl: cannot be loaded: JSON",
        ),
        ({"train": "owner/mixed"}, DataError, None, "because column names don't match\nThe files of a split need"),
        ({"train": "owner/code"}, DataError, None, "has a loading script; datasets with one cannot be loaded"),
        ({"train": "owner/nothing"}, DataError, None, "cannot be loaded"),
        ({"train": "owner/empty"}, DataError, None, "the split 'train' contains no rows"),
        ({"train": "owner/empty", "streaming": True}, DataError, None, "the split 'train' contains no rows"),
    ],
)
def test_what_a_hub_dataset_has_not(
    hub: DatasetHub, settings: dict[str, Any], kind: type[PeftcliError], key: str | None, message: str
) -> None:
    hub.commit(NAME, FILES)
    hub.commit("owner/broken", {"train.jsonl": b'{"text": "a"}\n{"text": \n'})
    hub.commit("owner/mixed", {"a.jsonl": b'{"text": "a"}\n', "b.jsonl": b'{"text": "a", "n": 1}\n'})
    hub.commit("owner/code", {"code.py": b"import os\n"})
    hub.commit("owner/nothing", {"notes.md": b"\n"})
    hub.commit("owner/empty", {"train.jsonl": b"", "notes.md": b"\n"})
    train = settings.pop("train", NAME)
    logged = BufferingHandler(100)
    logging.getLogger("datasets").addHandler(logged)
    error = refused(train, **settings)
    logging.getLogger("datasets").removeHandler(logged)
    assert logged.buffer == []
    assert type(error) is kind
    assert error.key == key
    assert ("revision: refs/convert/parquet" in (error.hint or "")) == (train == "owner/code")
    assert message in str(error)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, HubError), (403, HubError), (429, NetworkError), (500, NetworkError)],
)
def test_what_the_hub_answers_instead(
    hub: DatasetHub, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[PeftcliError]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.status = status
    assert type(refused("owner/other")) is kind
    hub.headers = {"X-Error-Code": "GatedRepo"}
    assert status != 403 or "is gated" in refused(NAME).message


@pytest.mark.parametrize("name", ["owner/no-such-dataset", "json"])
def test_no_network_is_a_network_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """``json`` is a kind of file to datasets, which would read the JSON files of the working folder."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.json", "x")
    error = refused(name)
    assert isinstance(error, NetworkError)
    assert "no file of that name" in error.message


def test_local_files_need_neither_torch_nor_datasets(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "x")
    code = (
        "import sys; from peftcli.data.rows import Table; from peftcli.data.sources import open_source;"
        "from peftcli.tasks.text.formats import example_reader;"
        f"from peftcli.schema import Source; source = Source(train={str(path)!r});"
        "[row] = open_source(source).rows(); example_reader(Table(source, 'a', tuple(row.values)))(row);"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
