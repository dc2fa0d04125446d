"""What people have: other encodings and delimiters, plain text, Arrow, Excel, folders of texts, files named in part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hostile_data import write

from peftcli.data import readers
from peftcli.data.rows import Row
from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.schema import Source


def read(path: Path, **settings: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of a source, and what is said of it without its name."""
    opened = open_source(Source(train=str(path), **settings))
    rows = []
    for row in opened.rows():
        assert isinstance(row, Row), row
        rows.append(row.values)
    return rows, [note.removeprefix(f"{path}: ") for note in opened.notes()]


def tree(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder, name, content)
    return folder


MEETING = [{"id": "1", "text": "Schön, gut"}, {"id": "2", "text": "Mäßig; na ja"}]
EXCEL = 'id;text\r\n1;Schön, gut\r\n2;"Mäßig; na ja"\r\n'
WESTERN, SEMICOLONS, TABS = "the encoding cp1252", "fields separated by ';'", "fields separated by tabs"
SPEECH = [{"path": "a.mp3", "sentence": '"Hello" he said'}, {"path": "b.mp3", "sentence": '"So what'}]
SMS = [{"label": "ham" if n % 3 else "spam", "text": f"text {n}"} for n in range(20)]
NEWS = "".join(f'"{n % 4 + 1}","Title {n}","A, b {n}"\n' for n in range(20))

AV = {"a": "u", "b": "v"}
AB = [{"a": "x,y", "b": "z"}, {"a": "u", "b": "v,w"}]
LABELLED = [{"label": "a", "text": "x y"}, {"label": "b", "text": "z"}]

TEXTS: dict[str, tuple[str, bytes, list[dict[str, Any]], list[str]]] = {
    "Excel's CSV in cp1252": ("a.csv", EXCEL.encode("cp1252"), MEETING, [f"found {WESTERN} and {SEMICOLONS}"]),
    "Excel's text in UTF-16": (
        "a.txt.csv",
        EXCEL.replace(";", "\t", 2).replace('2;"Mäßig; na ja"', "2\tMäßig; na ja").encode("utf-16"),
        MEETING,
        [f"found the encoding utf-16 and {TABS}"],
    ),
    "UTF-16 without its mark": ("a.csv", "a,b\n1,é\n".encode("utf-16-le"), [{"a": "1", "b": "é"}], ["utf-16-le"]),
    "JSON lines of PowerShell": ("a.jsonl", '{"a": "é"}\r\n'.encode("utf-16"), [{"a": "é"}], ["utf-16"]),
    "UTF-8 with semicolons in texts": ("a.csv", b"a,b\nx;y,z;u\n", [{"a": "x;y", "b": "z;u"}], []),
    "commas in texts between bars": (
        "a.csv",
        b"a|b\nx,y|z\nu|v,w\n",
        [{"a": "x,y", "b": "z"}, {"a": "u", "b": "v,w"}],
        ["'|'"],
    ),
    "quotes that close no field": (
        "a.tsv",
        b'path\tsentence\na.mp3\t"Hello" he said\nb.mp3\t"So what\n',
        SPEECH,
        [f"found {TABS}"],
    ),
    "a field of two lines": (
        "a.tsv",
        b'a\tb\n"x\ny"\tz\nu\tv\n',
        [{"a": "x\ny", "b": "z"}, {"a": "u", "b": "v"}],
        [TABS],
    ),
    "no header, two columns": (
        "a.tsv",
        "".join(f"{row['label']}\t{row['text']}\n" for row in SMS).encode(),
        SMS,
        [f"found {TABS} and no header: the columns are called label, text"],
    ),
    "no header": (
        "a.csv",
        NEWS.encode(),
        [{"column_1": f"{n % 4 + 1}", "column_2": f"Title {n}", "column_3": f"A, b {n}"} for n in range(20)],
        ["found no header: the columns are called column_1, column_2, column_3"],
    ),
    "pandas' numbers as the header": (
        "a.csv",
        b",0,1\n" + b"0,good,1\n" * 3 + b"1,bad,0\n" * 3,
        [{"0": "good", "1": "1"}] * 3 + [{"0": "bad", "1": "0"}] * 3,
        [],
    ),
    "a line is a text": ("a.txt", b"One, two.\n\nThree.\n", [{"text": "One, two."}, {"text": "Three."}], []),
    "FastText": (
        "a.txt",
        b"__label__a x y\n__label__b z\n",
        [{"label": "a", "text": "x y"}, {"label": "b", "text": "z"}],
        ["found FastText's label and text a line"],
    ),
    "FastText, several labels": (
        "a.txt",
        b"__label__a __label__b x\n__label__b z\n",
        [{"label": ["a", "b"], "text": "x"}, {"label": ["b"], "text": "z"}],
        ["found FastText's classes and text a line"],
    ),
    "tags in a .txt file": (
        "a.txt",
        b"Ada B-PER\nis O\n",
        [{"tokens": ["Ada", "is"], "tags": ["B-PER", "O"]}],
        ["found a word and its tags a line"],
    ),
    "tags in a .bio file": ("a.bio", b"Ada\tB-PER\n", [{"tokens": ["Ada"], "tags": ["B-PER"]}], []),
    "CoNLL-2002 in Latin-1": ("a.conll", b"Espa\xf1a B-LOC\n", [{"tokens": ["España"], "tags": ["B-LOC"]}], [WESTERN]),
    "labels before a tab": (
        "SMS.txt",
        "".join(f"{row['label']}\t{row['text']}\n" for row in SMS).encode(),
        SMS,
        ["found a label, a tab and a text a line"],
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_text_as_people_have_it(tmp_path: Path, case: str) -> None:
    name, content, expected, notes = TEXTS[case]
    rows, said = read(write(tmp_path, name, content))
    assert rows == expected
    assert len(said) == len(notes)
    assert all(note in line for note, line in zip(notes, said, strict=True))


def test_delimiter_and_encoding_can_be_given(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "a,b:c\nß,1:2\n".encode("cp437"))
    assert read(path, delimiter=":", encoding="cp437")[0] == [{"a,b": "ß,1", "c": "2"}]
    rows = list(open_source(Source(train=str(path), encoding="utf-8")).rows())
    assert isinstance(rows[0], DataError)
    assert "is not UTF-8: byte 0xe1" in str(rows[0])
    assert "dataset: {encoding: cp1252}" in str(rows[0])


def test_damaged_utf8_is_not_another_encoding(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "a\nschön\nübel\n?\n".encode().replace(b"?", b"\xe9t"))
    assert [isinstance(row, Row) for row in open_source(Source(train=str(path))).rows()] == [True, True, False]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("form", ["new_file", "new_stream"])
def test_a_record_batch_that_unpacks_to_too_much_is_refused(
    form: str, compression: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    table, path = pa.table({"text": ["a" * 1000] * 100}), tmp_path / "a.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with getattr(pa.ipc, form)(path, table.schema, options=options) as writer:
        writer.write_table(table)
    assert path.stat().st_size < 5000
    monkeypatch.setattr(readers, "_MAX_ARROW_BATCH", 101_000)
    assert len(read(path)[0]) == 100
    monkeypatch.setattr(readers, "_MAX_ARROW_BATCH", 99_000)
    with pytest.raises(DataError, match="record batch 1 unpacks to 100,404 bytes, more than 99,000"):
        list(open_source(Source(train=str(path))).rows())


@pytest.mark.parametrize("kind", ["file", "stream", "feather"])
def test_arrow(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.feather

    rows = [{"text": f"t{n}", "tags": [n]} for n in range(200)]
    table, path = pa.Table.from_pylist(rows), tmp_path / ("a.feather" if kind == "feather" else "a.arrow")
    if kind == "feather":
        pyarrow.feather.write_feather(table, path)
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    assert read(path)[0] == rows
    content = path.read_bytes()
    write(tmp_path, "cut.arrow", content[: len(content) // 2])
    with pytest.raises(DataError, match="Arrow file"):
        list(open_source(Source(train=str(tmp_path / "cut.arrow"))).rows())


def test_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "empty"
    sheet = book.create_sheet("data")
    for cells in (["text", "label", "n"], ["Schön, gut", "pos", 3], [], ["none", None, 0.5]):
        sheet.append(cells)
    book.save(tmp_path / "a.xlsx")
    expected = [{"text": "Schön, gut", "label": "pos", "n": 3}, {"text": "none", "label": None, "n": 0.5}]
    assert read(tmp_path / "a.xlsx")[0] == expected
    write(tmp_path, "b.xlsx", b"PK\x03\x04 damaged")
    with pytest.raises(DataError, match="is damaged"):
        list(open_source(Source(train=str(tmp_path / "b.xlsx"))).rows())


def test_excel_needs_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(DataError) as caught:
        list(open_source(Source(train=str(write(tmp_path, "a.xlsx", b"PK\x03\x04")))).rows())
    assert "peftcli[excel]" in (caught.value.hint or "")


FOLDERS: dict[str, tuple[dict[str, bytes | str], list[dict[str, Any]], str]] = {
    "a class a folder": (
        {"pos/1.txt": "good\r\nfilm\n", "pos/2.txt": "great", "neg/1.txt": "bad"},
        [
            {"text": "bad", "label": "neg"},
            {"text": "good\nfilm", "label": "pos"},
            {"text": "great", "label": "pos"},
        ],
        "3 texts, a row each, labelled by 2 folders",
    ),
    "a document a file": (
        {"1.txt": "a\n\nb", "2.txt": "c"},
        [{"text": "a\n\nb"}, {"text": "c"}],
        "2 texts, a row each",
    ),
    "Common Voice": (
        {"train.tsv": "path\tsentence\na.mp3\tx\nb.mp3\ty\n", "clips/a.mp3": "", "clips/b.mp3": ""},
        [{"path": "clips/a.mp3", "sentence": "x"}, {"path": "clips/b.mp3", "sentence": "y"}],
        "the files that path names are clips/...",
    ),
    "Kaggle": (
        {"train.csv": "id,breed\n0a,pug\n1b,boxer\n", "train/0a.jpg": "", "train/1b.jpg": "", "test/2c.jpg": ""},
        [
            {"id": "0a", "breed": "pug", "image": "train/0a.jpg"},
            {"id": "1b", "breed": "boxer", "image": "train/1b.jpg"},
        ],
        "the files that id names are train/....jpg, as the column image",
    ),
    "another name for files": (
        {"a.csv": "filepath,label\nx/1.png,cat\nx/2.png,dog\n", "x/1.png": "", "x/2.png": ""},
        [
            {"filepath": "x/1.png", "label": "cat", "image": "x/1.png"},
            {"filepath": "x/2.png", "label": "dog", "image": "x/2.png"},
        ],
        "the files that filepath names are ..., as the column image",
    ),
    "labels that are called like files": (
        {"a.csv": "image,label\n0.png,1\n1.png,0\n", "0.png": "", "1.png": ""},
        [{"image": "0.png", "label": "1"}, {"image": "1.png", "label": "0"}],
        "",
    ),
    "LJSpeech": (
        {"metadata.csv": 'L-1|Dr. "A|Doctor "A\nL-2|b, "c"|b, "c"\n', "wavs/L-1.wav": "", "wavs/L-2.wav": ""},
        [
            {"id": "L-1", "raw_text": 'Dr. "A', "text": 'Doctor "A', "audio": "wavs/L-1.wav"},
            {"id": "L-2", "raw_text": 'b, "c"', "text": 'b, "c"', "audio": "wavs/L-2.wav"},
        ],
        "the files that id names are wavs/....wav, as the column audio",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_as_people_have_them(tmp_path: Path, case: str) -> None:
    files, expected, note = FOLDERS[case]
    folder = tree(tmp_path / "data", files)
    table = next((name for name in files if name.endswith((".csv", ".tsv"))), "")
    rows, said = read(folder / table)
    assert rows == expected
    assert said == ([note] if note else []) or note in said[1:]


def test_images_and_masks_are_joined_by_name(tmp_path: Path) -> None:
    files = {"images/1.jpg": "", "images/2.jpg": "", "images/3.jpg": "", "masks/1.png": "", "masks/2_mask.png": ""}
    opened = open_source(Source(train=str(tree(tmp_path, files))))
    *rows, missing = opened.rows()
    assert [row.values for row in rows if isinstance(row, Row)] == [
        {"image": f"{tmp_path}/images/{n}.jpg", "annotation": f"{tmp_path}/masks/{n}{end}.png"}
        for n, end in ((1, ""), (2, "_mask"))
    ]
    assert isinstance(missing, DataError)
    assert "has no mask" in missing.message
    assert opened.notes() == [f"{tmp_path}: 3 images and 2 masks joined by the names of their files"]


def test_texts_beside_images_are_captions(tmp_path: Path) -> None:
    folder = tree(tmp_path, {"1.jpg": "", "1.txt": "a dog\n", "2.jpg": "", "2.txt": "a cat"})
    rows, said = read(folder)
    assert [row["text"] for row in rows] == ["a dog", "a cat"]
    assert said == ["the texts beside 2 files are their captions"]
    before = open_source(Source(train=str(folder))).state()
    write(folder, "2.txt", "a car, red")
    assert open_source(Source(train=str(folder))).state() != before


def test_boxes_beside_images_are_no_captions(tmp_path: Path) -> None:
    folder = tree(tmp_path, {"1.jpg": "", "1.txt": "0 0.5 0.5 0.1 0.2\n1 0.1 0.2 0.3 0.4\n"})
    [bad] = open_source(Source(train=str(folder))).rows()
    assert isinstance(bad, DataError)
    assert bad.message.endswith("the text beside it is numbers, no caption")


def test_media_root(tmp_path: Path) -> None:
    tree(tmp_path, {"a.csv": "image,label\n1.png,x\n", "pictures/1.png": ""})
    [row] = open_source(Source(train=str(tmp_path / "a.csv"), media_root=str(tmp_path / "pictures"))).rows()
    assert isinstance(row, Row)
    assert (row.folder / row.values["image"]).is_file()


ENTITY = {"text": "Ada lives", "entities": [{"start": 0, "end": 3, "label": "PER"}]}
CLASS = {"text": "Good", "label": "pos"}


def _task(data: dict[str, str], *results: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"id": 1, "data": data, "annotations": [{"result": list(results), **more}]}


_PERSON = {"type": "labels", "from_name": "l", "value": {"start": 0, "end": 3, "text": "Ada", "labels": ["PER"]}}
_CHOICE = {"type": "choices", "from_name": "c", "value": {"choices": ["pos"]}}
EXPORTS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "Label Studio, entities": (_task({"text": "Ada lives"}, _PERSON), ENTITY, "Label Studio"),
    "Label Studio, another name": (
        _task({"body": "Ada lives"}, _PERSON),
        {"body": "Ada lives", **ENTITY},
        "Label Studio",
    ),
    "Label Studio, choices": (_task({"text": "Good"}, _CHOICE), CLASS, "Label Studio"),
    "Label Studio, cancelled": (
        _task({"text": "Good"}, _CHOICE, was_cancelled=True),
        {"text": "Good", "answer": "ignore"},
        "Label Studio",
    ),
    "Label Studio, JSON-MIN": ({"text": "Ada lives", "label": [_PERSON["value"]]}, ENTITY, "Label Studio"),
    "doccano": ({"text": "Ada lives", "label": [[0, 3, "PER"]]}, ENTITY, "doccano"),
    "doccano, relations": (
        {"text": "Ada lives", "entities": [{"id": 7, "label": "PER", "start_offset": 0, "end_offset": 3}]},
        ENTITY,
        "doccano",
    ),
    "spaCy": ({"text": "Ada lives", "ents": ENTITY["entities"]}, ENTITY, "spaCy"),
    "spaCy, classes": ({"text": "Good", "cats": {"pos": 1.0, "neg": 0.0}}, CLASS, "spaCy"),
    "spaCy, a pair": (
        ["Ada lives", {"entities": [[0, 3, "PER"]]}],
        ENTITY,
        "doccano",
    ),
    "Prodigy, a choice": (
        {"text": "Good", "options": [], "accept": ["pos"]},
        {**CLASS, "options": [], "accept": ["pos"]},
        "Prodigy",
    ),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_exports_of_annotation_tools(tmp_path: Path, case: str) -> None:
    exported, expected, tool = EXPORTS[case]
    for name, content in (("a.jsonl", json.dumps(exported)), ("a.json", json.dumps([exported], indent=1))):
        rows, said = read(write(tmp_path, name, content))
        assert rows == [expected]
        assert said == [f"an export of {tool}, read as its texts with entities or classes"]
