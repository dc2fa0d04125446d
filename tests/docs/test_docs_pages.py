from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import PAGES, ROOT, blocks, page_id
from transformers import TrainingArguments

from peftcli.methods import METHODS
from peftcli.recipe.settings import settings
from peftcli.schema import Training
from peftcli.tasks import TASKS
from peftcli.tasks.text.formats import FORMATS, detect_format

sys.path.insert(0, str(ROOT / "docs"))
import generate

LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)")


def test_reference_pages_are_fresh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0, capsys.readouterr().err


def test_a_stale_page_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "docs/reference").mkdir(parents=True)
    (tmp_path / "README.md").write_text("<!-- include: part.yaml -->\nold\n<!-- /include -->\n")
    (tmp_path / "part.yaml").write_text("a: 1\n")
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 1
    stale = capsys.readouterr().err
    assert "README.md is stale" in stale
    assert "docs/reference/recipe.md is stale" in stale
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    assert generate.main() == 0
    assert "```yaml\na: 1\n```" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr(sys, "argv", ["generate.py", "--check"])
    assert generate.main() == 0


def test_generating_them_needs_no_torch() -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import generate as g; [p() for p in g.PAGES.values()]; "
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_page_of_json_says_what_each_field_is() -> None:
    page = generate.json_page()
    assert "|  |" not in page
    assert "| `audit.train.duplicates.pairs[].like` | string | Place of the earlier row. |" in page
    assert "| `eval.kept` | object: name -> number or null | Of the adapter that was written. |" in page
    assert "| `updates.reason` | string | Why. |" in page
    assert "| `gates` | list, each as in [run.json](#runjson) | The recipe's gates. |" in page


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in LINK.findall(text):
        there = page if not target else (page.parent / target).resolve()
        assert there.exists(), f"{page_id(page)}: {target}"
        if anchor:
            assert anchor[1:] in anchors(there), f"{page_id(page)}: {target}{anchor}"


def test_the_conformance_table_has_every_method_and_no_failure() -> None:
    text = (ROOT / "docs/conformance.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", text, re.M) == [row.title for row in METHODS.values()]
    assert "| fail" not in text
    head, _, *rows = re.findall(r"^\|(.+)\|$", (ROOT / "docs/conformance_tasks.md").read_text(encoding="utf-8"), re.M)
    assert [name.strip().replace(" ", "_") for name in head.split("|")[1:]] == [*TASKS]
    assert [row.split("|")[0].strip() for row in rows] == [row.title for row in METHODS.values()]
    assert {cell.strip() for row in rows for cell in row.split("|")[1:]} <= {
        "pass",
        *(f"({each})" for each in "abcdefghij"),
    }


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_data_format_has_an_example_row() -> None:
    text = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in FORMATS)
    rows = [json.loads(block.text) for block in blocks(ROOT / "docs/recipes.md") if block.kind == "json"]
    assert {detect_format(row) for row in rows} == set(FORMATS)


def test_the_settings_of_training_that_transformers_lacks_are_named() -> None:
    named = re.search(r"Its own are (.+?), which", (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), re.DOTALL)
    theirs = {entry.name for entry in dataclasses.fields(TrainingArguments)}
    assert named
    assert set(re.findall(r"`(\w+)`", named[1])) == settings(Training).keys() - theirs


def test_the_package_tree_of_the_readme_is_right() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named, folder = set(), ""
    for line in text.partition("peftcli/\n")[2].partition("```")[0].splitlines():
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        folder = folder if depth > 2 else ""
        named.add(folder + name)
        folder = name if depth == 2 else folder
    package = ROOT / "peftcli"
    found = {f"{path.parent.relative_to(package)}/" for path in package.rglob("*.py") if path.parent != package}
    loose = {path.name for path in package.iterdir() if path.is_file()}
    assert named == {name for name in found if name == "methods/" or not name.startswith("methods/")} | loose


def test_the_messages_of_the_page_of_errors_are_those_of_the_code() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    quoted = [words for line in re.findall(r"^(.+)\n:   ", text, re.M) for words in re.findall(r"`([^`]+)`", line)]
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "peftcli").rglob("*.py"))
    assert len(quoted) > 15
    assert [words for words in quoted if not all(part.strip() in code for part in words.split("..."))] == []
