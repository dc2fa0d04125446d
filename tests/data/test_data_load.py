from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data.load import load_rows, load_splits
from peftcli.errors import DataError, HubError, NetworkError
from peftcli.schema import Dataset

ROWS = [{"prompt": "één", "completion": "x"}, {"prompt": "two\nlines", "completion": "y"}]


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(source: str, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        load_rows(source, **options)
    text = str(caught.value)
    assert len(text.splitlines()) <= 6
    assert len(text) < 1000
    return caught.value


def test_jsonl(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(ROWS[0], ensure_ascii=False) + "\r\n\r\n  \n" + json.dumps(ROWS[1])
    source = write(tmp_path, "a.jsonl", text)
    rows = load_rows(source)
    assert rows.rows == ROWS
    assert rows.lines == [1, 4]
    assert rows.columns == ("prompt", "completion")
    assert rows.source == source
    assert rows.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_limit_reads_no_further(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\nbroken\n')
    assert load_rows(source, limit=1).rows == [{"text": "a"}]


def test_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"a": 1}\n{"b": 1, "a": 2}\n')
    assert load_rows(source).columns == ("a", "b")


def test_json_list_knows_its_lines(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, "a.json", "[\n" + ",\n\n".join(map(json.dumps, ROWS)) + "\n]\n"))
    assert rows.rows == ROWS
    assert rows.lines == [2, 4]


def test_json_file_of_one_object_a_line(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path, "a.json", "\n".join(map(json.dumps, ROWS))))
    assert rows.rows == ROWS
    assert rows.lines == [1, 2]


def test_csv(tmp_path: Path) -> None:
    content = '\ufeffprompt,completion\r\n"one, ""quoted""",x\r\n\r\n"two\nlines",y\r\n'
    rows = load_rows(write(tmp_path, "a.csv", content))
    assert rows.rows == [{"prompt": 'one, "quoted"', "completion": "x"}, {"prompt": "two\nlines", "completion": "y"}]
    assert rows.lines == [2, 4]


def test_csv_takes_long_fields(tmp_path: Path) -> None:
    assert len(load_rows(write(tmp_path, "a.csv", "text\n" + "x" * 300_000)).rows[0]["text"]) == 300_000


def test_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    rows = load_rows(str(path))
    assert rows.rows == ROWS
    assert rows.columns == ("prompt", "completion")
    assert rows.lines is None
    assert rows.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_rows(str(path), limit=1).rows == ROWS[:1]

    cut = write(tmp_path, "cut.parquet", path.read_bytes()[:-20])
    assert "not a readable parquet file" in refused(cut).message


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('{"a": "x"}\n{"a": \n', 2, "is not a JSON object"),
        ('{"a": "x"}\n[1]\n', 2, "expected a JSON object, found a list"),
        ('\n"x"\n', 2, "found a string"),
        ("null\n", 1, "found null"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}\n', 1, "the key 'c' stands twice"),
        ('{"a": NaN}\n', 1, "NaN is not JSON"),
        ('{"a": -Infinity}\n', 1, "-Infinity is not JSON"),
        ('{"a": "x"}\n{"a": "\0"}\n', 2, "NUL"),
        (b'{"a": "x"}\n{"a": "\xe9"}\n', 2, "is not UTF-8: byte 0xe9 at byte 8"),
        ('{"a": "x"}\n'.encode("utf-16"), 1, "UTF-16"),
        ('{"a": "\\ud800"}\n', 1, "surrogate"),
        ("[" * 100_000 + "\n", 1, "nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}\n", 1, "is not a JSON object"),
        ('{"a": "' + "x" * 5_000_000 + "\n", 1, "is not a JSON object"),
        ("", None, "is empty"),
        ("\n\n", None, "holds no rows"),
        ("\x1b[31mred\n", 1, "\\x1b[31mred"),
    ],
)
def test_bad_jsonl(tmp_path: Path, content: str | bytes, line: int | None, message: str) -> None:
    error = refused(source := write(tmp_path, "a.jsonl", content))
    assert (error.file, error.line) == (source, line)
    assert message in error.message
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ('[{"a": 1},\n {"a": }]', 2, "is not JSON"),
        ('[{"a": 1},\n 5]', 2, "expected a JSON object, found a number"),
        ('[{"a": 1}\n {"a": 2}]', 2, "expected ',' or ']'"),
        ('[{"a": 1},\n]', 2, "a comma before the closing ']'"),
        ('[{"a": 1}\n', 2, "expected ',' or ']'"),
        ('[{"a": 1},\n', 2, "is not JSON"),
        ('[{"a": 1}]\nmore', 2, "text after the end of the list: 'more'"),
        ('[\n{"a": 1},\n{"b": 1, "b": 2}]', 3, "stands twice"),
        ('{"data":\n [{"a": 1}]}', 1, "is not a JSON object"),
        ("[]", None, "holds no rows"),
    ],
)
def test_bad_json(tmp_path: Path, content: str, line: int | None, message: str) -> None:
    error = refused(write(tmp_path, "a.json", content))
    assert error.line == line
    assert message in error.message


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a,b\n1,2\n3\n", 3, "1 fields, but the header has 2"),
        ('a,b\n"1\n1",2\n3,4,5\n', 4, "3 fields, but the header has 2"),
        ("a,a\n1,2\n", 1, "the header names 'a' twice"),
        ("a,\n1,2\n", 1, "column 2 of the header has no name"),
        ("a;b\n1;2\n", 1, "separated by commas"),
        ('a,b\n1,2\n"3,4\n', 3, "is not CSV"),
        ("a,b\n1,\0\n", 2, "NUL"),
        (b"a,b\n1,\xe9\n", 2, "is not UTF-8"),
        ("a,b\n", None, "holds no rows"),
        ("", None, "is empty"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str | bytes, line: int | None, message: str) -> None:
    error = refused(write(tmp_path, "a.csv", content))
    assert error.line == line
    assert message in error.message


def test_other_kinds_of_file(tmp_path: Path) -> None:
    error = refused(write(tmp_path, "a.txt", "x"))
    assert ".jsonl, .json, .csv, .parquet" in str(error)
    assert "is a folder" in refused(str(tmp_path)).message
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "not a regular file" in refused(str(tmp_path / "pipe.jsonl")).message
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    assert "No such file" in refused(str(tmp_path / "gone.jsonl")).message
    assert "URL" in refused("https://example.org/a.jsonl").message
    assert "cannot be opened" in refused("x" * 5000 + ".jsonl").message
    assert "cannot be opened" in refused("a\0.jsonl").message


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "{}")
    error = refused(str(tmp_path / "trian.jsonl"))
    assert "train.jsonl" in str(error)
    assert "does not exist either" in str(refused(str(tmp_path / "no" / "train.jsonl")))


def test_settings_of_the_hub_mean_nothing_for_a_file(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n')
    assert refused(source, split="test").key == "dataset.split"
    assert refused(source, name="x").key == "dataset.name"
    assert refused(source, revision="x").key == "dataset.revision"


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(max_size=4), st.text() | st.none() | st.lists(st.text())), min_size=1),
    indent=st.sampled_from([None, 1]),
    escape=st.booleans(),
)
def test_any_rows_come_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None, escape: bool
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    whole = json.dumps(rows, indent=indent, ensure_ascii=escape)
    lines = "\n".join(json.dumps(row, ensure_ascii=escape) for row in rows)
    for name, text in (("a.json", whole), ("a.jsonl", lines)):
        if "\0" not in text:
            assert load_rows(write(folder, name, text)).rows == rows


def test_eval_fraction(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", "".join(f'{{"text": "{index}"}}\n' for index in range(50)))
    train, held = load_splits(Dataset(train=source, eval_fraction=0.2), seed=1)
    assert held is not None
    assert (len(train), len(held)) == (40, 10)
    both = [int(row["text"]) for row in train.rows + held.rows]
    assert sorted(both) == list(range(50))
    assert [int(row["text"]) for row in held.rows] == [line - 1 for line in held.lines or ()]
    assert held.lines == sorted(held.lines or ())
    assert held.lines == [28, 30, 31, 34, 36, 39, 40, 43, 45, 50]  # the same with every version
    again, other = (load_splits(Dataset(train=source, eval_fraction=0.2), seed=seed)[1] for seed in (1, 2))
    assert again is not None
    assert other is not None
    assert again.rows == held.rows != other.rows


@pytest.mark.parametrize(("fraction", "sizes"), [(0.001, (2, 1)), (0.999, (1, 2))])
def test_eval_fraction_leaves_both_parts_something(tmp_path: Path, fraction: float, sizes: tuple[int, int]) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n' * 3)
    train, held = load_splits(Dataset(train=source, eval_fraction=fraction), seed=0)
    assert (len(train), len(held or ())) == sizes


def test_eval_file_and_limit(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n' * 3)
    other = write(tmp_path, "b.jsonl", '{"text": "b"}\n' * 3)
    train, held = load_splits(Dataset(train=source, eval=other, limit=2), seed=0)
    assert (len(train), len(held or ())) == (2, 3)
    assert load_splits(Dataset(train=source), seed=0)[1] is None


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"eval": "x", "eval_fraction": 0.1}, "dataset.eval_fraction"),
        ({"eval_split": "test", "eval_fraction": 0.1}, "dataset.eval_split"),
        ({"eval_split": "test"}, "dataset.eval_split"),
        ({"eval_fraction": 1.0}, "dataset.eval_fraction"),
    ],
)
def test_bad_eval_settings(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n' * 3)
    with pytest.raises(DataError) as caught:
        load_splits(Dataset(train=source, **settings), seed=0)
    assert caught.value.key == key


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n')
    with pytest.raises(DataError, match="one row"):
        load_splits(Dataset(train=source, eval_fraction=0.5), seed=0)


class Hub:
    """Stands in for ``datasets.load_dataset``, and remembers how it was called."""

    def __init__(self, result: Any):
        self.result, self.calls = result, []  # type: ignore[var-annotated]

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = Hub(datasets.Dataset.from_list(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", hub)
    rows = load_rows("owner/name", split="test", name="part", revision="v1", limit=1)
    assert rows.rows == ROWS[:1]
    assert (rows.columns, rows.source, rows.lines, rows.sha256) == (("prompt", "completion"), "owner/name", None, None)
    assert hub.calls == [(("owner/name", "part"), {"split": "test", "revision": "v1"})]

    dataset = Dataset(train="owner/name", name="part", revision="v1", eval_split="valid")
    train, held = load_splits(dataset, seed=0)
    assert train.rows == (held or train).rows == ROWS
    assert [options["split"] for _, options in hub.calls[1:]] == ["train", "valid"]


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def raised(error: Exception) -> Exception:
        monkeypatch.setattr(datasets, "load_dataset", Hub(error))
        with pytest.raises((DataError, HubError, NetworkError)) as caught:
            load_rows("owner/name", split="tset")
        assert len(str(caught.value).splitlines()) <= 6
        return caught.value

    missing = raised(DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub"))
    assert isinstance(missing, DataError)
    assert isinstance(raised(DatasetNotFoundError("Dataset 'owner/name' is a gated dataset")), HubError)
    offline = raised(ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)"))
    assert isinstance(offline, NetworkError)
    assert "HF_HUB_OFFLINE" in str(offline)
    split = raised(ValueError("Unknown split \"tset\". Should be one of ['train', 'test']."))
    assert isinstance(split, DataError)
    assert split.key == "dataset.split"
    assert "['train', 'test']" in split.message
    part = raised(ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"))
    assert isinstance(part, DataError)
    assert part.key == "dataset.name"
    assert "['a', 'b']" in part.message
    assert isinstance(raised(RuntimeError("Dataset scripts are no longer supported, but found name.py")), DataError)


def test_no_network_is_a_network_error() -> None:
    with pytest.raises(NetworkError) as caught:
        load_rows("owner/no-such-dataset")
    assert "no file of that name" in caught.value.message


def test_local_files_need_neither_torch_nor_datasets(tmp_path: Path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a"}\n')
    code = (
        "import sys; from peftcli.data.load import load_rows; from peftcli.data.formats import to_examples;"
        "from peftcli.schema import Dataset; import peftcli.data.encode;"
        f"to_examples(load_rows({source!r}), Dataset(train='x'));"
        "print([name for name in ('torch', 'transformers', 'datasets', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
