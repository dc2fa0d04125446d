"""``peftcli cache``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trainkit
from examplekit import COLUMNS, outcome

from peftcli.data import cache
from peftcli.data.rows import Place
from peftcli.data.store import Writer

Cli = Callable[..., Any]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def fill(source: str, count: int = 3, days: float = 0.0) -> str:
    """An entry of ``count`` rows of 2 tokens, last used so many days ago. Gives its key."""

    def build(folder: Path) -> None:
        with Writer(folder, COLUMNS) as writer:
            for number in range(1, count + 1):
                feature = {"input_ids": [1, 2], "labels": [1, 2]}
                writer.add([Place(source, number)], [outcome([feature], [2], tokens=2)])
            writer.finish(source=source)

    folder = cache.cached({"source": source, "count": count}, build).folder
    then = time.time() - days * 86400
    os.utime(folder / "key.json", (then, then))
    return folder.name


def test_an_empty_cache(cli: Cli, root: Path) -> None:
    for args in (["cache"], ["cache", "list"]):
        ran = cli(*args)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out == f"0 entries, 0 bytes, in {root}; only `peftcli cache clear` removes entries\n"
    assert cli("cache", "clear").out == "removed 0 entries, 0 bytes\n"
    assert not root.exists()


def test_the_list(cli: Cli, root: Path) -> None:
    old, new = fill("data/old.jsonl", 1234, days=3.5), fill("new \x1b[31m.jsonl")
    lines = cli("cache").out.splitlines()
    assert lines[0].split() == ["key", "source", "rows", "features", "tokens", "size", "last", "used"]
    assert lines[1].split("  ")[:2] == [new[:12], "new \\x1b[31m.jsonl"]
    assert lines[1].endswith("just now")
    assert lines[2].split()[:5] == [old[:12], "data/old.jsonl", "1,234", "1,234", "2,468"]
    assert lines[2].endswith(" kB  3 days ago")
    assert lines[3].startswith("2 entries, ")
    assert len(lines) == 4


def test_the_list_as_json(cli: Cli, root: Path) -> None:
    key = fill("data/a.jsonl")
    listed = json.loads(cli("cache", "--json").out)
    (entry,) = listed["entries"]
    assert (listed["folder"], listed["bytes"], listed["unfinished_bytes"]) == (str(root), entry["bytes"], 0)
    assert entry.pop("bytes") > 100
    for name in ("created", "last_used"):
        assert entry.pop(name).startswith(time.strftime("%Y-", time.gmtime()))
    assert entry.pop("made_from")["key"] == {"source": "data/a.jsonl", "count": 3}
    assert entry == {
        "key": key, "source": "data/a.jsonl", "rows": 3, "features": 3, "tokens": 6, "in_use": False, "damaged": False,
    }  # fmt: skip


def test_in_use_damaged_and_unfinished(cli: Cli, root: Path) -> None:
    fill("a")
    store = cache.cached({"source": "a", "count": 3}, lambda folder: None)
    broken = fill("b", days=1)
    (root / "tokens" / broken / "rows.bin").unlink()
    (root / "tokens" / f".{'1' * 64}.tmp").mkdir()
    (root / "tokens" / f".{'1' * 64}.tmp" / "rows.bin").write_bytes(bytes(2_500_000))
    lines = cli("cache").out.splitlines()
    assert lines[1].endswith("in use")
    assert lines[2].split()[:5] == [broken[:12], "-", "0", "0", "0"]
    assert lines[2].endswith("damaged")
    assert lines[3] == "2.5 MB in unfinished entries, of running or killed runs"
    ran = cli("cache", "clear")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == f"kept {store.folder.name[:12]} (a): a run uses it"
    assert ran.out.splitlines()[1].startswith("removed 1 entry, 2.5 MB")


def test_clear_some(cli: Cli, root: Path) -> None:
    keys = [fill(f"{number}.jsonl", days=number) for number in range(4)]
    done = json.loads(cli("cache", "clear", keys[0], keys[3][:8], "--older-than", "2", "--json").out)
    assert [entry["key"] for entry in done["removed"]] == [keys[3]]
    assert (done["kept"], done["folder"], done["bytes"]) == ([], str(root), done["removed"][0]["bytes"])
    assert cli("cache", "clear", "--older-than", "0.5").out.startswith("removed 2 entries, ")
    assert [entry.key for entry in cache.entries()] == [keys[0]]
    assert cli("cache", "clear", keys[0][:4]).code == 0
    assert cache.entries() == []


@pytest.mark.parametrize("key", ["ffff", "f", "../x", "\x1b[31m", "é"])
def test_a_wrong_key_removes_nothing(cli: Cli, root: Path, key: str) -> None:
    good = fill("a.jsonl")
    ran = cli("cache", "clear", good, key)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"error: {root}: no entry has the key ")
    assert "\x1b" not in ran.err
    assert len(ran.err.splitlines()) == 2
    assert len(cache.entries()) == 1


@pytest.mark.parametrize(
    "args",
    [["nope"], ["list", "abcd"], ["dir", "abcd"], ["list", "--older-than", "1"], ["clear", "--older-than", "-1"]],
)
def test_wrong_usage(cli: Cli, root: Path, args: list[str]) -> None:
    fill("a.jsonl")
    ran = cli("cache", *args)
    assert (ran.code, ran.out) == (2, "")
    assert len(cache.entries()) == 1


def test_the_folder(cli: Cli, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("cache", "dir").out == f"{root}\n"
    assert json.loads(cli("cache", "dir", "--json").out) == {"folder": str(root)}

    def no_home() -> Path:
        raise RuntimeError

    monkeypatch.setenv("PEFTCLI_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    for args in (["dir"], ["list"], ["clear"]):
        ran = cli("cache", *args)
        assert (ran.code, ran.out) == (7, "")
        assert "no home folder" in ran.err


def test_a_cache_that_cannot_be_read(cli: Cli, root: Path) -> None:
    root.mkdir()
    (root / "tokens").write_text("")
    ran = cli("cache")
    assert (ran.code, ran.out) == (7, "")
    assert ran.err == f"error: {root}/tokens: cannot be read: Not a directory\n"


def test_without_torch(root: Path) -> None:
    fill("a.jsonl")
    code = "import sys; from peftcli.cli.app import main; main(['cache']); sys.exit('torch' in sys.modules)"
    environment = {**trainkit.subprocess_environment(), "PEFTCLI_CACHE": str(root)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "a.jsonl" in ran.stdout
