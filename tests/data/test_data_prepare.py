"""What makes another store, and what does not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import make_tokenizer
from classifierkit import open_task
from PIL import Image
from trainkit import write_rows
from transformers import ByT5Tokenizer

from peftcli.data import prepare as preparing
from peftcli.data.prepare import prepare
from peftcli.data.store import Store
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.system import date
from peftcli.tasks import settings
from peftcli.tasks.base import encoding
from peftcli.tasks.causal_lm import CausalLM
from peftcli.tasks.text.language_model import tokenizer_fingerprint
from peftcli.tasks.text.spans import render, tokenize

CHATS = [
    {"messages": [{"role": "user", "content": f"q{at}"}, {"role": "assistant", "content": f"A{at} " * at}]}
    for at in range(1, 6)
]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    return path


def store(
    path: Path,
    *,
    tokenizer: Any = None,
    task: str = "causal_lm",
    stop: bool = True,
    on_note: Callable[[str], None] = lambda text: None,
    **own: Any,
) -> Store:
    of_source = {key: own.pop(key) for key in ("limit", "format", "columns", "split") if key in own}
    source, opened = Source(train=str(path), **of_source), causal_lm(tokenizer, **own)
    return prepare(source, opened, encoding(task, opened), stop_at_bad=stop, on_note=on_note)


def causal_lm(tokenizer: Any = None, kind: type[CausalLM] = CausalLM, **own: Any) -> CausalLM:
    return kind(settings.CausalLMSettings(**own), tokenizer or make_tokenizer("smollm"), None)


def test_the_same_content_and_settings_are_encoded_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = store(file)
    assert len(first) == 5
    monkeypatch.setattr(preparing, "_encode", lambda *args: pytest.fail("encoded again"))
    assert store(file).folder == first.folder
    assert store(file, packing=True).folder == first.folder


def test_each_other_setting_is_another_store(file: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"max_length": 20},
        {"max_length": 20, "overlong": "split"},
        {"max_length": 20, "overlong": "drop"},
        {"train_on": "all"},
        {"limit": 2},
        {"format": "messages"},
        {"columns": {"messages": "messages"}},
        {"task": "another"},
        {"tokenizer": make_tokenizer("llama3")},
    ]
    assert len({store(file, **changed).folder for changed in kinds}) == len(kinds)


def test_an_edited_file_is_another_store_even_with_its_old_time(file: Path) -> None:
    first, stat = store(file), file.stat()
    file.write_text(file.read_text().replace("q1", "Q1"))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = store(file)
    assert second.folder != first.folder
    assert second.content != first.content


def test_a_file_that_changes_while_it_is_read_is_refused(file: Path) -> None:
    class Editing(CausalLM):
        def encode(self, rows: Any, reader: Any) -> Any:
            file.write_text(file.read_text() + json.dumps(CHATS[0]) + "\n")
            return super().encode(rows, reader)

    task = causal_lm(kind=Editing)
    with pytest.raises(DataError, match="changed"):
        prepare(Source(train=str(file)), task, encoding("causal_lm", task), stop_at_bad=True)


@pytest.mark.parametrize("cached_before", [False, True])
def test_a_bad_row_stops_at_its_line_also_from_the_cache(file: Path, cached_before: bool) -> None:
    file.write_text(file.read_text() + '{"messages": 5}\n{broken\n')
    if cached_before:
        kept = store(file, stop=False)
        assert [(row, error.line) for row, error in kept.bad_rows()] == [(5, 6), (6, 7)]
    with pytest.raises(DataError) as caught:
        store(file)
    assert (caught.value.file, caught.value.line) == (str(file), 6)
    assert "dataset: {on_bad_row: skip}" in (caught.value.hint or "")


@pytest.mark.parametrize("cached_before", [False, True])
def test_where_the_first_rows_all_have_errors_skipping_is_no_advice(file: Path, cached_before: bool) -> None:
    file.write_text('{"messages": 5}\n' * 30 + file.read_text())
    if cached_before:
        store(file, stop=False)
    with pytest.raises(DataError, match="found a number; all of the first 20 rows have errors") as caught:
        store(file)
    assert caught.value.hint == "Look for one cause, in the file or in the recipe."


def test_rows_are_numbered_file_by_file_also_where_some_are_bad(file: Path) -> None:
    folder = file.parent / "rows"
    folder.mkdir()
    for name, rows in {"a": CHATS[:2], "b": [CHATS[2], 3, CHATS[3]]}.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    kept = store(folder, stop=False)
    places = [str(kept.place(row)).removeprefix(f"{folder}/") for row in range(5)]
    assert places == ["a.json:1", "a.json row 2", "b.json:1", "b.json row 2", "b.json row 3"]
    [(_, error)] = kept.bad_rows()
    assert error.message.startswith("row 2: expected a JSON object")


def test_what_is_about_no_row_names_the_source(file: Path) -> None:
    with pytest.raises(DataError, match="no chat template") as caught:
        store(file, tokenizer=make_tokenizer())
    assert caught.value.file == str(file)


def changed(change: Callable[[Any], Any]) -> str:
    tokenizer = make_tokenizer("smollm")
    change(tokenizer)
    return tokenizer_fingerprint(tokenizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "chat_template", tokenizer.chat_template + " "),
        lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lambda tokenizer: setattr(tokenizer, "model_input_names", ["input_ids"]),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|im_end|>"),
        lambda tokenizer: tokenizer.add_tokens(["<new>"]),
    ],
    ids=["template", "split_special_tokens", "truncation_side", "model_input_names", "eos", "token"],
)
def test_another_tokenizer_is_another_fingerprint(change: Callable[[Any], Any]) -> None:
    assert changed(change) != changed(lambda tokenizer: None)


def test_what_a_call_leaves_in_a_tokenizer_does_not_count() -> None:
    assert changed(lambda tokenizer: tokenizer("a b c", truncation=True, max_length=2)) == changed(lambda _: None)


def test_a_slow_tokenizer_has_a_fingerprint() -> None:
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer())
    assert tokenizer_fingerprint(ByT5Tokenizer()) != tokenizer_fingerprint(ByT5Tokenizer(extra_ids=7))


def test_a_template_that_writes_the_date_has_another_fingerprint_each_day() -> None:
    dated, plain = make_tokenizer("{{ strftime_now('%d') }}"), make_tokenizer("smollm")
    assert (date.writes_date(dated.chat_template), date.writes_date(plain.chat_template)) == (True, False)
    before = [tokenizer_fingerprint(each) for each in (dated, plain)]
    with date.fixed_date("2999-01-01"):
        after = [tokenizer_fingerprint(each) for each in (dated, plain)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True]


def test_templates_write_the_day_of_the_run() -> None:
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') if strftime_now is defined else '-' }}")
    messages = CHATS[0]["messages"]
    with date.fixed_date("2024-07-26"):
        assert render(tokenizer, messages) == tokenizer.decode(tokenize(tokenizer, messages, None)) == "26 Jul 2024"
    assert render(tokenizer, messages) == tokenizer.apply_chat_template(messages, tokenize=False)
    own = make_tokenizer("{% set strftime_now = 'never' %}{{ strftime_now }}")
    assert render(own, messages) == "never"


def test_a_row_that_would_take_all_memory_is_refused_at_its_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_LARGEST", 1000)
    huge = {"messages": [{"role": "user", "content": "x" * 1001}, CHATS[0]["messages"][1]]}
    file.write_text(file.read_text() + json.dumps(huge) + "\n")
    with pytest.raises(DataError, match="characters of text, more than 1,000") as caught:
        store(file)
    assert caught.value.line == 6
    assert len(store(file, stop=False)) == 5


@pytest.mark.parametrize("cached_before", [False, True])
def test_a_column_that_begins_late_is_an_error_if_the_task_reads_it(
    file: Path, monkeypatch: pytest.MonkeyPatch, cached_before: bool
) -> None:
    monkeypatch.setattr(preparing, "_BATCH", 2)
    task = open_task("feature_extraction", loss="contrastive")
    rows: list[dict[str, str | None]] = [{"anchor": f"sun {n}", "positive": "tea"} for n in range(6)]
    rows[3] |= {"id": "x", "negative": None}
    rows[4]["negative"] = rows[5]["negative"] = "moon"

    def prepared(*, stop: bool = True) -> Store:
        write_rows(file, rows)
        return prepare(Source(train=str(file)), task, encoding("feature_extraction", task), stop_at_bad=stop)

    if cached_before:
        assert [(row, error.key) for row, error in prepared(stop=False).bad_rows()] == [
            (4, "negative"),
            (5, "negative"),
        ]
    with pytest.raises(DataError, match="the first rows lack it, so it would not be read") as caught:
        prepared()
    assert (caught.value.line, caught.value.key) == (5, "negative")
    del rows[4:], rows[3]["negative"]
    assert prepared().about["columns_not_read"] == ["id"]


def pictures(*, stop: bool = True, on_note: Callable[[str], None] = lambda text: None) -> Store:
    """The store of two rows, each of which names a picture beside them in the working directory."""
    task = open_task("image_classification", "vit", labels=["a", "b"], problem_type="single_label")
    write_rows(Path("rows.jsonl"), [{"image": f"{label}.png", "label": label} for label in "ab"])
    key = encoding("image_classification", task)
    return prepare(Source(train="rows.jsonl"), task, key, stop_at_bad=stop, on_note=on_note)


def test_rows_that_name_files_are_another_store_in_another_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for folder, red in ((file.parent / "one", 0), (file.parent / "two", 99)):
        folder.mkdir()
        monkeypatch.chdir(folder)
        for label in "ab":
            Image.new("RGB", (8, 8), (red, 0, 0)).save(f"{label}.png")
        found.append(pictures().content)
    assert found[0] != found[1]


def test_a_row_may_be_used_once_the_file_that_it_names_is_mended(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    Image.new("RGB", (8, 8)).save("a.png")
    assert [row for row, _ in pictures(stop=False).bad_rows()] == [1]
    with pytest.raises(DataError, match="no such file"):
        pictures()
    Image.new("RGB", (8, 8)).save("b.png")
    assert len(pictures()) == 2
    notes: list[str] = []
    assert len(pictures(stop=False, on_note=notes.append)) == 1
    assert "once a file that they name is mended, run peftcli cache clear" in notes[0]


def test_a_key_of_an_object_is_a_column(file: Path) -> None:
    rows = [{"id": 1, "translation": {"en": "Hi", "fr": "Salut"}}, {"translation": {"en": "Ho"}}]
    write_rows(file, rows)
    found = store(file, stop=False, columns={"prompt": "translation.en", "completion": "translation.fr"})
    assert (found.about["format"], found.about["columns_not_read"]) == ("prompt_completion", ["id"])
    assert [(row, error.key) for row, error in found.bad_rows()] == [(1, "translation.fr")]
    assert len(found) == 1


def test_what_is_not_read_is_said(file: Path) -> None:
    rows = [{**row, "id": 1, "source": "x"} for row in CHATS]
    (file.parent / "folder").mkdir()
    (file.parent / "folder/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (file.parent / "folder/b.jsonlines").write_text("{}")
    notes: list[str] = []
    found = store(file.parent / "folder", on_note=notes.append)
    assert found.about["columns_not_read"] == ["id", "source"]
    assert notes == [f"{file.parent}/folder: left out 1 file of other kinds: b.jsonlines"]
