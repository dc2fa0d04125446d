"""Every example of the documentation. A page's blocks run in order, in one folder, like a session of its reader.

python   is executed; the blocks of a page share their names.
yaml     must pass ``peftcli check``. A first line ``# NAME.yaml`` saves it under that name for the commands below it.
         One without a task is part of a recipe: it is read as a change of ``configs/quickstart.yaml``.
bash     ``peftcli`` commands run, others must be known; a block that is not run must still parse.
console  a command after ``$``, and exactly what it prints.
json     one row of a dataset a line.
text     an example of a layout: not checked.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
from accelerate.state import AcceleratorState
from docs_pages import PAGES, ROOT, Block, blocks, page_id
from typer.main import get_command

from peftcli.cli import app
from peftcli.data.rows import Row, Table
from peftcli.data.sources import open_source
from peftcli.recipe import read
from peftcli.schema import Source
from peftcli.tasks import TASKS
from peftcli.tasks.text.formats import example_reader

KINDS = {"python", "yaml", "bash", "console", "json", "text"}
EXAMPLES = [page for page in PAGES if any(True for _ in blocks(page))]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # Trainer's default, without a GPU
@pytest.mark.parametrize("page", EXAMPLES, ids=page_id)
@mock.patch.dict(TASKS)  # a page adds one
def test_examples(
    page: Path, workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look their module up
    for block in blocks(page):
        AcceleratorState._reset_state(True)
        print(block.place)
        if block.file and block.file.startswith("docs/ci/"):
            continue  # tests/docs/test_ci_examples.py
        if block.kind == "python":
            code = compile("\n" * (block.line - 1) + block.text, page, "exec")
            if block.reason is None:
                exec(code, vars(module))
        elif block.kind == "bash":
            for line in block.lines:
                check_line(line, block, run=block.reason is None)
        elif block.kind == "yaml":
            check_yaml(block, save_recipe(block))
        elif block.kind == "json":
            check_json(block)
        elif block.kind == "console":
            check_console(block, capsys)


def test_every_block_says_what_it_is() -> None:
    unknown = [block.place for page in PAGES for block in blocks(page) if block.kind not in KINDS]
    assert unknown == []


def save_recipe(block: Block) -> Path:
    named = re.match(r"# ([\w.-]+\.yaml)\n", block.text)
    path = Path(named[1] if named else "example.yaml")
    whole = re.search(r"^extends:", block.text, re.MULTILINE) or re.search(
        r"^base_model:[^$]*^training:", block.text, re.M
    )
    path.write_text(block.text if whole else f"extends: configs/quickstart.yaml\n{block.text}", encoding="utf-8")
    return path


def check_yaml(block: Block, path: Path) -> None:
    if block.reason is None:
        assert [str(problem) for problem in read(path).problems] == [], block.place


def check_json(block: Block) -> None:
    for line in block.text.splitlines():
        path = Path("row.jsonl")
        path.write_text(line, encoding="utf-8")
        source = Source(train=str(path))
        [row] = open_source(source).rows()
        assert isinstance(row, Row), block.place
        example_reader(Table(source, str(path), tuple(row.values)))(row)


def check_console(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    parts = re.split(r"^\$ (.+)\n", block.text, flags=re.M)
    assert len(parts) > 1, f"{block.place}: no line begins with $"
    for line, printed in zip(parts[1::2], parts[2::2], strict=True):
        capsys.readouterr()
        command(line)
        captured = capsys.readouterr()
        wanted = ".*".join(map(re.escape, printed.split("...")))  # what differs between machines
        assert re.fullmatch(wanted, captured.out + captured.err), f"{block.place}: {captured}"


def check_line(line: str, block: Block, *, run: bool) -> None:
    """One line of a shell block: a command of ours parses and, unless the block is not run, succeeds."""
    words = [word for word in shlex.split(line, comments=True) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(words[1:]) - {word for word in words if "=" in word} <= set(targets), block.place
    elif words[0] in ("peftcli", "srun") or "-m" in words:
        ours = words[words.index("peftcli") + 1 :]
        parse(ours, block)
        if run:
            assert words[0] == "peftcli", f"{block.place}: {words[0]} cannot be run here"
            # 12: trained, but the tiny model misses the recipe's gate
            assert command(line) in ((0, 12) if ours[0] in ("train", "evaluate") else (0,)), f"{block.place}: {line}"
    else:
        assert words[0] in ("pip", "export", "source", ".venv/bin/python"), f"{block.place}: {line}"


def parse(words: list[str], block: Block) -> None:
    """Raises unless the command and its options exist."""
    words = [word for word in words if word != "--debug"]
    group = get_command(app.app)
    with group.make_context("peftcli", [words[0]] if words[0].startswith("--") else words, resilient_parsing=True):
        if words[0].startswith("--"):
            assert words[0] in ("--help", "--version"), block.place
            return
        found = group.commands.get(words[0])
        assert found is not None, f"{block.place}: no command {words[0]}"
        with found.make_context(words[0], list(words[1:])):
            pass


def command(line: str) -> int:
    """Runs a command line of ours in this process."""
    return app.main(shlex.split(line, comments=True)[1:])


def test_commands_named_in_the_text_exist() -> None:
    known = set(get_command(app.app).commands)
    named = {name for page in PAGES for name in re.findall(r"`peftcli ([a-z]+)", page.read_text(encoding="utf-8"))}
    assert named <= known


@pytest.mark.parametrize("line", ["peftcli trian r.yaml", "peftcli train r.yaml --nope", "make nothing", "curl x"])
def test_a_line_that_does_not_exist_is_found(line: str) -> None:
    with pytest.raises(Exception, match=r"No such|README"):
        check_line(line, Block(ROOT / "README.md", 1, "bash", line, "not run"), run=False)
