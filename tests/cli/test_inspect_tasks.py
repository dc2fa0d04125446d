"""What ``inspect`` prints of a task that it knows nothing of: it has pictures, labels and facts, and no text."""

from __future__ import annotations

import json
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from rich.console import Console
from taskkit import CASES, PREFERRED
from trainkit import write_recipe

from peftcli.cli import console
from peftcli.data.findings import Finding, Kind
from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.inspection.report import COLOURS, colour
from peftcli.output_schemas import output_schema
from peftcli.tasks import TASKS
from peftcli.tasks.base import Task
from peftcli.tasks.settings import TaskSettings
from peftcli.tasks.shown import Description, Facts, Image, Label, Shown, Text

NAMES = ("cat", "dog")
RARE = Kind("rare_class", "info", "are of a class that hardly any other row is of", "Add rows.")


def png(width: int, height: int) -> bytes:
    """A grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + b"\x80" * width for _ in range(height)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@dataclass(frozen=True, kw_only=True)
class Settings(TaskSettings):
    size: int = 4
    """Edge of a picture."""


class Pictures(Task[Settings]):
    columns: ClassVar = {"path": Column("str"), "pixels": Column("uint8", (None, None)), "label": Column("int64", ())}
    unit = "pictures"
    identity: ClassVar = ("pixels",)

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def read(self, table: Table) -> Reader:
        return table.reader("pictures", image=("image",), label=("label",))

    def encode(self, rows: Sequence[Row], reader: Reader) -> list[Outcome | DataError]:
        return [self._outcome(row.values["image"], row.values["label"]) for row in rows]

    def _outcome(self, name: str, label: str) -> Outcome:
        pixels = np.full((self.settings.size, 3), len(name), np.uint8)
        return Outcome([Example({"path": name, "pixels": pixels, "label": NAMES.index(label)}, 1, 1)], size=1)

    def show(self, example: Example) -> Shown:
        height, width = example.arrays["pixels"].shape
        picture = Image(example.arrays["path"], width, height, "L", png(width, height))
        return Shown([picture, Label(NAMES[int(example.arrays["label"])]), Facts({"taken": "<b>at noon</b>"})])

    def findings(self, view: View) -> list[Finding]:
        stores = [view.locate(at) for at in range(len(view))]
        dogs = [store.place(store.row_of[at]) for store, at in stores if store.value("label", at)]
        return [RARE.finding(len(dogs), len(view), dogs)] if dogs else []

    def describe(self, view: View) -> Description:
        counts = Counter(NAMES[int(example.arrays["label"])] for example in view)
        return Description({"classes": dict(counts)}, {f"class {name}": f"{count:,}" for name, count in counts.items()})

    def collate(self, examples: Any, *, training: bool) -> Any: ...
    def loss(self, model: Any, batch: Any) -> Any: ...
    def metrics(self, sums: Any, outputs: Any, num_targets: int) -> Any: ...


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six pictures, of which one is there twice and one is in the evaluation data, too."""
    monkeypatch.setitem(sys.modules, "peftcli.tasks.pictures", SimpleNamespace(TASK=Pictures))
    row = replace(TASKS["causal_lm"], settings=Settings, module="pictures", processor=None, reads=(("image", "label"),))
    monkeypatch.setitem(TASKS, "pictures", row)
    names = ("a", "bb", "ccc", "dddd", "eeeee", "fff")
    path = write_recipe(tmp_path, rows=[{"image": name, "label": NAMES[name == "eeeee"]} for name in names])
    path.write_text(path.read_text().replace("causal_lm", "pictures").replace(", max_length: 128", ""))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"image": "zz", "label": "cat"}) + "\n")
    return path


def test_in_the_terminal(cli: Callable, recipe: Path) -> None:
    ran = cli("inspect", recipe, "--rows", 1)
    assert ran.code == 0, ran.err
    assert f"=== {recipe.parent}/train.jsonl:1 (example 0)\n" in ran.out
    assert "image: a, 3 x 4, L\nlabel:\n[[cat]]\ntaken: <b>at noon</b>\n" in ran.out
    assert "\n\n\n" not in ran.out, "one blank line between two parts"
    assert "the rest is prompt" not in ran.out
    assert "class dog" in ran.out
    assert "rare_class: 1 of " in ran.out
    assert "exact_duplicates: 1 of " in ran.out
    assert "train_in_eval: 1 of 1 evaluation rows" in ran.out
    assert "token" not in ran.out
    assert "padding" not in ran.out


def test_on_the_page(cli: Callable, recipe: Path) -> None:
    ran = cli("inspect", recipe, "--rows", 9, "--html", recipe.parent / "page.html")
    assert ran.code == 0, ran.err
    page = (recipe.parent / "page.html").read_text(encoding="utf-8")
    assert '<img src="data:image/png;base64,iVBOR' in page
    assert "img-src data:" in page
    assert "<p>Label: <mark>cat</mark></p>" in page
    assert "&lt;b&gt;at noon&lt;/b&gt;" in page
    assert page.count("<svg") == 1  # of the classes; every picture counts 1
    assert "special token" not in page


def test_as_json(cli: Callable, recipe: Path) -> None:
    found = json.loads(cli("inspect", recipe, "--rows", 1, "--json").out)
    assert found["rows"] == [
        {
            "index": 0,
            "image": {"source": "a", "width": 3, "height": 4, "mode": "L"},
            "label": "cat",
            "facts": {"taken": "<b>at noon</b>"},
        }
    ]
    train = found["audit"]["train"]
    assert (train["unit"], train["tokens"]) == ("pictures", train["examples"])
    assert train["classes"] == {"cat": train["examples"] - 1, "dog": 1}
    assert train["duplicates"]["exact"] == 1
    assert train["duplicates"]["near"] == 0
    assert found["audit"]["train_in_eval"] == {"rows": 1}
    assert list(Draft202012Validator(output_schema("inspect")).iter_errors(found)) == []


def test_texts_without_trained_tokens_need_no_legend(cli: Callable, tmp_path: Path) -> None:
    out = cli("inspect", CASES["feature_extraction"].write(tmp_path), "--rows", 1).out
    assert "===" in out
    assert "[[" not in out


def test_labelled_words(cli: Callable, tmp_path: Path) -> None:
    recipe = CASES["token_classification"].write(tmp_path)
    ran = cli("inspect", recipe, "--rows", 9, "--html", tmp_path / "page.html")
    assert "[[...|NAME]] has the label NAME\n" in ran.out
    assert "[[Ada Lovelace|PER]]" in ran.out.replace("##", "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert '<mark class="green">Ada Lovelace</mark><sub class="green">PER</sub>' in page.replace("##", "")
    assert '<mark class="cyan">Turin</mark><sub class="cyan">LOC</sub>' in page


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes stdout a terminal of so many columns."""

    def terminal(width: int) -> None:
        def drawn(stderr: bool = False) -> Console:
            return Console(stderr=stderr, force_terminal=True, color_system="standard", highlight=False, width=width)

        monkeypatch.setattr(console, "is_terminal", lambda stream: stream is sys.stdout)
        monkeypatch.setattr(console, "rich_console", drawn)

    return terminal


@pytest.mark.slow
def test_labels_have_the_same_colours_on_a_terminal(cli: Callable, terminal: Callable, tmp_path: Path) -> None:
    recipe = CASES["token_classification"].write(tmp_path)
    terminal(100)
    out = cli("inspect", recipe, "--rows", 1).out
    assert "\x1b[7;32m PER \x1b[0m" in out
    assert re.search("\x1b\\[36m[^ \x1b]+\x1b\\[0m\x1b\\[7;36m LOC \x1b\\[0m", out)


def test_labels_take_turns_in_the_colours() -> None:
    text = Text([], label_names=[str(number) for number in range(len(COLOURS) + 1)])
    colours = [colour(text, label) for label in text.label_names]
    assert colours == [*COLOURS, COLOURS[0]]
    assert len({*colours}) == len(COLOURS)


@pytest.mark.parametrize("task", ["preference", pytest.param("reward", marks=pytest.mark.slow)])
def test_answers_to_compare_stand_side_by_side_where_there_is_room(
    cli: Callable, terminal: Callable, tmp_path: Path, task: str
) -> None:
    recipe = CASES[task].write(tmp_path)
    chosen, rejected = (PREFERRED[0][name][0]["content"] for name in ("chosen", "rejected"))

    def lines(*options: object) -> list[str]:
        out = cli("inspect", recipe, "--row", 0, "--quiet", *options).out
        return re.sub("\x1b\\[[0-9;]*m", "", out).splitlines()

    def both(found: list[str], one: str, other: str) -> bool:
        """Whether a line holds one and, behind it, the other."""
        return any(re.search(f"{re.escape(one)}.*{re.escape(other)}", line) for line in found)

    page = tmp_path / "page.html"
    for found in (lines("--html", page), terminal(79) or lines()):
        assert found.index("chosen:") < found.index("rejected:")
        assert not both(found, chosen, rejected)
    terminal(80)
    found = lines()
    assert both(found, "chosen:", "rejected:")
    assert both(found, f"{chosen}<|im_end|>", f"{rejected}<|im_end|>")
    assert all(len(line) <= 80 for line in found if "<|im_end|>" in line)
    group = (
        '<div class="beside"><div><h4>Chosen</h4><pre .*?</pre></div><div><h4>Rejected</h4><pre .*?</pre></div></div>'
    )
    assert re.search(group, page.read_text(encoding="utf-8"), re.DOTALL)
