from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from classifierkit import classifier_base
from taskkit import PREFERRED
from trainkit import MESSAGES, PROMPTS, base_folder, write_recipe, write_rows

from peftcli.inspection.report import COLOURS


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> \"'& \u202eevil\u202c \x1b[31m\x00 \u2028"
ROWS = [
    chat(HOSTILE, f"caf\u00e9 \U0001f389\n{HOSTILE}"),
    chat("Tell.", "winter tea " * 300),
    {"messages": "nothing"},
    *MESSAGES[:4],
    MESSAGES[0],
    *MESSAGES[4:],
]
# trained text and the paper behind it, in either scheme
TRAINED_PAPER = {"light": (0xD8, 0xF3, 0xDD), "dark": (0x12, 0x3A, 0x1D)}
PAPER = {"light": (0xFF, 0xFF, 0xFF), "dark": (0x14, 0x17, 0x1B)}


@pytest.fixture
def write(cli: Callable, tmp_path: Path) -> Callable[..., str]:
    """Writes a page, and gives its text."""

    def write(*args: object, rows: list[Any] = ROWS, base: Path | None = None, task: str = "causal_lm") -> str:
        recipe = write_recipe(tmp_path, base, rows)
        recipe.write_text(recipe.read_text().replace("causal_lm", task).replace("max_length: 128", "max_length: 500"))
        write_rows(tmp_path / "train.jsonl", rows[:-3])
        write_rows(tmp_path / "eval.jsonl", rows[-3:])
        ran = cli("inspect", recipe, "dataset.on_bad_row=skip", *args, "--html", tmp_path / "page.html", "--quiet")
        assert ran.code == 0, ran.err
        assert ran.err == ""
        return (tmp_path / "page.html").read_text(encoding="utf-8")

    return write


class _Reader(HTMLParser):
    """Checks that tags are closed in order, and keeps what a test asks for."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.trained: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "rect"):
            self.open.append((tag, dict(attrs)))
        if tag == "pre":
            self.texts.append("")
            self.trained.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        if "pre" in inside and "n" not in (self.open[-1][1].get("class") or "").split():
            self.texts[-1] += data
            self.trained[-1] += data if "mark" in inside else ""


def visible(text: str) -> str:
    return re.sub("[\x00\x1b\u2028\u202c\u202e]", lambda char: ascii(char[0])[1:-1], text)


def test_foreign_text_is_text(write: Callable) -> None:
    page = write("--rows", 99)
    read = _Reader(page)
    question, answer = (visible(turn["content"]) for turn in ROWS[0]["messages"])
    first = next(at for at, text in enumerate(read.texts) if "evil" in text)
    assert question in read.texts[first]
    assert read.trained[first] == f"{answer}<|im_end|>"
    assert page.count("<script") == 1
    assert {tag for tag, _ in read.tags} & {"img", "iframe", "object", "embed", "base", "form"} == set()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029]", page)


def test_all_of_a_row_is_there_and_what_is_trained_is_marked(write: Callable) -> None:
    read = _Reader(write("--rows", 99, rows=MESSAGES))
    for at, row in enumerate(MESSAGES[:10]):
        question, answer = (turn["content"] for turn in row["messages"])
        assert read.texts[at] == (
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        )
        assert read.trained[at] == f"{answer}<|im_end|>"


def test_the_page_needs_nothing_else(write: Callable) -> None:
    page = write()
    for _, attributes in _Reader(page).tags:
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    assert "url(" not in page
    assert "@import" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy
    assert policy[1].startswith("default-src 'none'; ")
    assert "unsafe" not in policy[1]


def test_findings_lead_to_their_rows(write: Callable) -> None:
    page = write("--rows", 1)
    read = _Reader(page)
    ids = [attributes["id"] for _, attributes in read.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    links = [(attributes["href"] or "")[1:] for tag, attributes in read.tags if tag == "a"]
    assert set(links) <= set(ids)
    assert "train-1" in links  # the row that is cut, which is not of the sample
    assert '<span class="level">warning</span> answers_cut' in page
    assert "1 of 14 rows cannot be used" in page
    assert "expected a list of turns, found a string" in page


def test_evaluation_rows_have_links_and_reasons_of_their_own(cli: Callable, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, rows=MESSAGES[:4])
    file = write_rows(tmp_path / "eval.jsonl", [MESSAGES[0], {"messages": 4}])
    cli("inspect", recipe, f"dataset.train={file}", "dataset.on_bad_row=skip", "--html", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f'<a href="#eval-0">{file}:1</a>' in page.partition("train_in_eval")[2]
    assert page.count("expected a list of turns") == 2
    assert "Evaluation rows that cannot be used" in page


def test_it_is_a_document_with_a_language_and_headings(write: Callable) -> None:
    page = write()
    read = _Reader(page)
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">')
    levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(deeper - level <= 1 for level, deeper in pairwise(levels))
    assert all(attributes.get("scope") for tag, attributes in read.tags if tag == "th")
    assert any(tag == "svg" and attributes.get("aria-label") for tag, attributes in read.tags)


def test_a_row_that_is_cut_says_so(write: Callable) -> None:
    assert re.search(
        r'<p class="cut">Cut here: 1,625 tokens are missing, 1,624 of them trained.</p>', write("--rows", 99)
    )


def test_borders_of_tokens_on_request(write: Callable) -> None:
    plain, bordered = write("--rows", 2, rows=MESSAGES), write("--rows", 2, "--tokens", rows=MESSAGES)
    assert 'class="p b"' not in plain
    pieces = re.findall(r'<(?:mark|span) class="(?:s )?(?:p )?b" title="([\d ]+)">', bordered)
    assert len(pieces) > 20
    assert _Reader(plain).texts == _Reader(bordered).texts


def test_an_encoder_decoder(write: Callable) -> None:
    page = write("--rows", 2, rows=PROMPTS, base=base_folder("t5", chat=False), task="seq2seq_lm")
    read = _Reader(page)
    assert read.texts[0].startswith(PROMPTS[0]["prompt"])
    assert read.trained[:2] == ["", read.texts[1]]
    assert read.texts[1].startswith(PROMPTS[0]["completion"])
    assert page.count("<h4>Answer</h4>") == 2


def test_the_page_stays_small(write: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.inspection.page._MAX_CHARACTERS", 2000)
    monkeypatch.setattr("peftcli.inspection.page._MAX_TOKENS", 20)
    page = write("--rows", 99, rows=MESSAGES)
    left_out = re.search(
        r"Examples here: (\d+), of 10 that are trained and 3 that are evaluated. (\d+) more are left out", page
    )
    assert left_out
    assert int(left_out[1]) + int(left_out[2]) == 10
    assert int(left_out[1]) == page.count('<article class="row"') < 10
    assert re.search(r"\d+ tokens are not shown here", page)


def test_a_page_that_cannot_be_written_is_an_error_and_leaves_the_old_one(
    cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    assert cli("inspect", recipe).code == 0  # its tokens are in the cache now
    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    ran = cli("inspect", recipe, "--html", tmp_path / "page.html")
    assert ran.code == 7
    assert "page.html: cannot write: No space left on device" in ran.err
    assert (tmp_path / "page.html").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if "page" in path.name] == ["page.html"]


# --- in a browser ---------------------------------------------------------------------------------------------------

LOOK_AT_ALL = """
  const shown = () => [...page.querySelectorAll("article.row")].filter((row) => row.offsetParent).map((row) => row.id);
  found.wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  found.contrast = Object.fromEntries(["body", "mark", "pre .p", ".s", ".level", ".cut", "a", "tbody th", "caption",
    "button", "header p"].map((selector) => [selector, Math.min(...all(selector).map(contrast))]));
  found.underlined = all("mark").every((each) =>
    frame.contentWindow.getComputedStyle(each).textDecorationLine.includes("underline"));
  const text = (row) => [...row.querySelectorAll("mark")].map((each) => each.textContent).join("");
  found.trained = all("article.row").map(text);
  found.scripts = page.scripts.length;
  found.first = shown();
  page.getElementById("on").click();
  found.second = shown();
  const filter = page.getElementById("filter");
  filter.value = "EVIL";
  filter.dispatchEvent(new Event("input"));
  found.filtered = shown();
  found.where = page.getElementById("where").textContent;
  frame.contentWindow.location.hash = "#train-1";
  frame.contentWindow.addEventListener("hashchange", () => {
    found.jumped = shown();
    tell();
  });
"""
LOOK_AT_LABELS = """
  for (const element of all("pre mark, pre sub")) {
    const style = frame.contentWindow.getComputedStyle(element);
    found[element.tagName + element.className] = [style.color, behind(element).join(), contrast(element)];
  }
  tell();
"""
LOOK_AT_ANSWERS = """
  found.places = all(".beside")[0].querySelectorAll("pre");
  found.places = [...found.places].map((each) => each.getBoundingClientRect()).map(({x, y}) => [x, y]);
  found.wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  tell();
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_the_page_works_and_can_be_read(write: Callable, look: Callable, scheme: str) -> None:
    write("--rows", 99)
    found = look(LOOK_AT_ALL, scheme)
    assert found["wide"] <= 0
    assert {name: ratio for name, ratio in found["contrast"].items() if ratio < 4.5} == {}
    assert found["underlined"]
    assert found["scripts"] == 1
    assert len(found["first"]) == 10
    assert found["second"]
    assert not set(found["first"]) & set(found["second"])
    assert found["filtered"] == ["train-0"]
    assert found["where"] == "1 to 1 of 1"
    assert "train-1" in found["jumped"]
    answer = visible(ROWS[0]["messages"][1]["content"]).replace("\n", "\u23ce\n") + "<|im_end|>"
    assert answer in found["trained"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser_each_label_has_a_colour_that_can_be_read(write: Callable, look: Callable, scheme: str) -> None:
    tags = [f"B-{name}" for name in ("PER", "LOC", "ORG", "MISC", "DATE", "WORK")]
    rows = [{"tokens": ["tea", word, "tea"], "ner_tags": ["O", tag, "O"]} for word in ("Ada", "Oslo") for tag in tags]
    write("--rows", 99, rows=rows, base=classifier_base("bert"), task="token_classification")
    found = look(LOOK_AT_LABELS, scheme)
    assert {*found} == {f"{tag}{colour}" for tag in ("MARK", "SUB") for colour in COLOURS}
    assert {name: contrast for name, (*_, contrast) in found.items() if contrast < 4.5} == {}
    inks, papers = ({found[f"MARK{colour}"][at] for colour in COLOURS} for at in (0, 1))
    assert len(inks) == len(papers) == len(COLOURS)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "beside"), [(1000, True), (400, False)])
def test_in_a_browser_answers_stand_side_by_side_where_there_is_room(
    write: Callable, look: Callable, width: int, beside: bool
) -> None:
    write("--rows", 3, rows=PREFERRED, task="preference")
    found = look(LOOK_AT_ANSWERS, width=width)
    (x, y), (other_x, other_y) = found["places"]
    assert (x < other_x, y < other_y) == (beside, not beside)
    assert found["wide"] <= 0


@pytest.mark.slow
def test_in_a_browser_trained_text_has_its_colour_in_light_and_dark(
    write: Callable, browse: Callable, tmp_path: Path
) -> None:
    from matplotlib.image import imread

    write("--rows", 5)
    for width, height in ((1280, 4000), (400, 12_000)):
        for scheme in ("light", "dark"):
            picture = tmp_path / f"{scheme}-{width}.png"
            browse("page.html", scheme, f"--screenshot={picture}", f"--window-size={width},{height}")
            pixels = (imread(picture)[:, :, :3] * 255).round().astype(int)
            assert pixels.shape == (height, width, 3)
            share = {
                name: float((np.abs(pixels - np.array(color)).max(axis=2) <= 2).mean())
                for name, color in {"paper": PAPER[scheme], "trained": TRAINED_PAPER[scheme]}.items()
            }
            assert share["paper"] > 0.3
            assert share["trained"] > 0.005
            other = TRAINED_PAPER["dark" if scheme == "light" else "light"]
            assert not (np.abs(pixels - np.array(other)).max(axis=2) <= 2).any()


def test_pictures_stand_in_a_grid_before_the_findings_and_classes_have_a_chart(cli: Callable, tmp_path: Path) -> None:
    from classifierkit import write_pictures

    for split in ("train", "eval"):
        write_pictures(tmp_path / split)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"base_model: {classifier_base('vit')}\ntask: image_classification\nmethod: {{type: lora}}\n"
        f"dataset: {{train: {tmp_path}/train, eval: {tmp_path}/eval}}\ntraining: {{output_dir: {tmp_path}/out}}\n"
    )
    ran = cli("inspect", recipe, "--html", tmp_path / "page.html", "--quiet")
    assert ran.code == 0, ran.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.index('<div class="grid">') < page.index('id="findings"') < page.index('id="audit"')
    assert "Classes of the training rows</figcaption>" in page
    assert 'class="grid"' not in page[page.index('id="findings"') :]


@pytest.mark.parametrize("option", [[], ["--tokens"]])
def test_secrets_are_not_on_it(write: Callable, monkeypatch: pytest.MonkeyPatch, option: list[str]) -> None:
    monkeypatch.setenv("APP_PASSWORD", "sun & moon <7>")
    rows = [
        {"messages": [{"role": "user", "content": f"say sun & moon <7> {number}"}, MESSAGES[number]["messages"][1]]}
        for number in range(9)
    ]
    text = re.sub(r"<[^>]+>", "", write(*option, "--rows", 9, rows=rows))
    assert "say *** 3" in text
    assert "sun &amp; moon" not in text
