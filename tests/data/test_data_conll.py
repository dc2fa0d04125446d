"""CoNLL files: sentences, columns, comments, and what is wrong with them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from peftcli.data import conll
from peftcli.data.readers import read_file
from peftcli.errors import DataError


def read(folder: Path, text: str, name: str = "a.conll") -> list[dict[str, list[str]] | DataError]:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return [row if isinstance(row, DataError) else row.values for row in read_file(path, name)]


def test_words_tags_and_the_columns_between(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O\n\nAda NNP B-PER\nsaw VBD O\n\n\nTurin NNP B-LOC\n"
    rows = [
        {"tokens": ["Ada", "saw"], "column_2": ["NNP", "VBD"], "tags": ["B-PER", "O"]},
        {"tokens": ["Turin"], "column_2": ["NNP"], "tags": ["B-LOC"]},
    ]
    assert read(tmp_path, text) == rows
    assert read(tmp_path, text.replace("\n", "\r\n"), "a.conll.gz") == rows
    assert read(tmp_path, text.replace(" ", "\t")) == rows


def test_a_comment_is_no_word_and_a_hash_is_one(tmp_path: Path) -> None:
    assert read(tmp_path, "# id 7\nAda B-PER\n\n# O\n1 O\n") == [
        {"tokens": ["Ada"], "tags": ["B-PER"]},
        {"tokens": ["#", "1"], "tags": ["O", "O"]},
    ]
    for first, words in (("# id 7", ["Ada"]), ("# id 7\n# of Ada", ["Ada"]), ("# _ O", ["#", "Ada"])):
        [row] = read(tmp_path, f"{first}\nAda _ B-PER\n")
        assert isinstance(row, dict)
        assert row["tokens"] == words
    words = {"tokens": ["#", "1"], "column_2": ["SYM", "CD"], "tags": ["SYM", "CD"]}
    assert read(tmp_path, "# SYM SYM\n1 CD CD\n") == [words]


@pytest.mark.parametrize("end", ["#end document", "# of a file\n# the end"])
def test_comments_between_empty_lines_are_no_sentence(tmp_path: Path, end: str) -> None:
    rows = [{"tokens": ["Ada"], "tags": ["B-PER"]}, {"tokens": ["#1843"], "tags": ["O"]}]
    assert read(tmp_path, f"#begin document (a)\nAda B-PER\n\n#1843 O\n\n{end}\n") == rows


def test_a_word_may_contain_a_blank_that_separates_no_columns(tmp_path: Path) -> None:
    assert read(tmp_path, " 10\u00a0000  O \n\u3000 O\n") == [{"tokens": ["10\u00a0000", "\u3000"], "tags": ["O", "O"]}]


def test_words_alone(tmp_path: Path) -> None:
    assert read(tmp_path, "Ada\nsaw\n") == [{"tokens": ["Ada", "saw"]}]


def test_universal_dependencies(tmp_path: Path) -> None:
    word = "{}\t{}\tl\t{}\tx\t_\t0\troot\t_\t_\n"
    text = "# text = du sol\n" + "".join(
        word.format(*each)
        for each in [("1-2", "du", "_"), ("1", "de", "ADP"), ("2", "le", "DET"), ("3", "sol", "NOUN")]
    )
    [row] = read(tmp_path, text, "a.conllu")
    assert isinstance(row, dict)
    assert (row["tokens"], row["upos"]) == (["de", "le", "sol"], ["ADP", "DET", "NOUN"])


def test_a_line_of_other_columns_is_an_error_with_its_line(tmp_path: Path) -> None:
    good, bad, last = read(tmp_path, "Ada B-PER\n\nsaw\nTurin B-LOC\n\nOslo B-LOC\n")
    assert isinstance(bad, DataError)
    assert (bad.line, bad.message) == (3, "expected 2 columns, found 1: 'saw'")
    assert [good, last] == [{"tokens": [word], "tags": [tag]} for word, tag in (("Ada", "B-PER"), ("Oslo", "B-LOC"))]
    [bad] = read(tmp_path, "1\tAda\n", "a.conllu")
    assert isinstance(bad, DataError)
    assert "expected 10 columns, found 2" in bad.message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_bytes("Adé B-PER\n\n? O\n\nOslo B-LOC\n".encode().replace(b"?", b"\xff"))
    _, bad, last = read_file(path, "a.conll")
    assert isinstance(bad, DataError)
    assert (bad.line, "is not UTF-8" in bad.message) == (3, True)
    assert not isinstance(last, DataError)


def test_a_file_without_empty_lines_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conll, "MAX_ROW", 100)
    bad, good = read(tmp_path, "Ada B-PER\n" * 50 + "\nOslo B-LOC\n")
    assert isinstance(bad, DataError)
    assert (bad.line, "too long" in bad.message) == (11, True)
    assert not isinstance(good, DataError)
