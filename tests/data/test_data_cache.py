"""The token cache: built once, whole or not there at all, never trained from when damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from examplekit import outcome

from peftcli.data import cache
from peftcli.data.rows import Place
from peftcli.data.store import Column, Store, Writer
from peftcli.errors import StorageError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # Python 3.12 and later

KEY = {"content": {"a.jsonl": "12ab"}, "tokenizer": "34cd", "max_length": 8}
IDS = [[1, 2, 3], [4], []]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and a place for temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache"


def build(folder: Path) -> None:
    with Writer(folder, {"input_ids": Column()}) as writer:
        for number, ids in enumerate(IDS, 1):
            writer.add([Place("a.jsonl", number)], [outcome([{"input_ids": ids}], [len(ids)])])
        writer.finish(source="a.jsonl")


def never(folder: Path) -> None:
    raise AssertionError(f"built again, in {folder}")


def holds(store: Store) -> list[list[int]]:
    return [example.arrays["input_ids"].tolist() for example in store]


def names(root: Path) -> list[str]:
    """What is in the cache: ``entry``, ``lock``, ``left``, or the name of what should not be there."""
    kinds = []
    for path in (root / "tokens").iterdir():
        match = cache._NAME.fullmatch(path.name)
        kinds.append(str(match.lastgroup) if match else path.name)
    return sorted(kinds)


def forked(work: Callable[[], object]) -> Any:
    """A process that does ``work``; its exit code is 0 unless that raises."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def ended(process: Any) -> int:
    process.join(240)
    assert process.exitcode is not None, "still running"
    return process.exitcode


# --- one process ----------------------------------------------------------------------------------------------------


def test_built_once(root: Path) -> None:
    told: list[str] = []
    store = cache.cached(KEY, build, on_wait=told.append)
    assert (holds(store), store.about) == (IDS, {"source": "a.jsonl", "common": {}})
    same = dict(reversed(KEY.items()))
    assert holds(cache.cached(same, never, on_wait=told.append)) == IDS
    assert (names(root), told) == (["entry", "lock"], [])
    assert json.loads((store.folder / "key.json").read_text())["key"] == KEY


@pytest.mark.parametrize("change", ["key", "data path", "layout", "peftcli"])
def test_whatever_decides_the_ids_is_in_the_key(root: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    first, key = cache.cached(KEY, build).folder, dict(KEY)
    if change == "key":
        key["content"] = {"a.jsonl": "12ac"}
    elif change == "peftcli":
        monkeypatch.setattr(cache, "version", lambda name: "99.0")
    else:
        name = "DATA_PATH_VERSION" if change == "data path" else "FORMAT"
        monkeypatch.setattr(cache, name, getattr(cache, name) + 1)
    assert cache.cached(key, build).folder != first
    assert names(root) == ["entry", "entry", "lock", "lock"]


def test_modes(root: Path) -> None:
    before = os.umask(0o027)
    try:
        store = cache.cached(KEY, build)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (root, root / "tokens")}
    assert modes == {0o700}
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()} == {0o640}


def test_any_path_will_do(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a b\n'中" / "é"
    monkeypatch.setenv("PEFTCLI_CACHE", str(odd))
    cache.cached(KEY, build)
    (tmp_path / "link").symlink_to(odd)
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "link"))
    assert holds(cache.cached(KEY, never)) == IDS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PEFTCLI_CACHE", "link")
    store = cache.cached(KEY, never)
    monkeypatch.chdir("/")
    assert holds(Store(store.folder)) == IDS


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    for xdg, expected in ((str(tmp_path / "x"), tmp_path / "x"), ("", tmp_path / ".cache"), ("x", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
        assert cache.root() == expected / "peftcli"
    monkeypatch.setenv("PEFTCLI_CACHE", "~/c")
    assert cache.root() == tmp_path / "c"
    monkeypatch.setenv("PEFTCLI_CACHE", "")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(StorageError, match=r"no home folder[^\n]*\nset PEFTCLI_CACHE"):
        cache.root()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOENT, "gone"), SystemExit(3)])
def test_what_build_raises_passes_and_leaves_nothing(root: Path, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        cache.cached(KEY, fail, on_wait=pytest.fail)
    assert caught.value is error
    assert names(root) == ["lock"]
    assert holds(cache.cached(KEY, build)) == IDS


@pytest.mark.parametrize("damage", ["bit", "length", "missing", "manifest", "all", "description"])
def test_a_damaged_store_is_made_again(root: Path, damage: str) -> None:
    folder = cache.cached(KEY, build).folder
    ids = folder / "input_ids.ids.bin"
    data = bytearray(ids.read_bytes())
    data[4] ^= 1
    if damage == "all":
        for path in folder.iterdir():
            path.unlink()
    elif damage == "missing":
        ids.unlink()
    else:
        path = {"manifest": folder / "MANIFEST.json", "description": folder / "store.json"}.get(damage, ids)
        path.write_bytes(data if damage == "bit" else path.read_bytes()[:-1])
    told: list[str] = []
    assert holds(cache.cached(KEY, build, on_wait=told.append)) == IDS
    assert told == [f"{folder} is damaged; the data is prepared again"]
    assert names(root) == ["entry", "lock"]
    assert holds(cache.cached(KEY, never)) == IDS


def test_a_build_that_finishes_no_store(root: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read back"):
        cache.cached(KEY, lambda folder: (folder / "MANIFEST.json").write_text("{}") and None)


# --- killed, or a disk that fails -----------------------------------------------------------------------------------


EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "os.utime"}
EVENTS |= {"fcntl.flock", "shutil.rmtree"}


@pytest.fixture
def any_operation(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Iterator[int]]:
    """Processes that do ``work``, one after the other: ``act`` happens before an operation on files, each time another.

    Of the operations every ``step``-th has its turn. Gives the processes' exit codes, until there are no more
    operations; a process that notices that ends with 99.
    """
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # makes no difference here, and takes long

    def run(number: int, act: Callable[[], None], work: Callable[[], object]) -> None:
        count = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in EVENTS and (event == "fcntl.flock" or str(args[0]).startswith(str(root))):
                count += 1
                if count == number:
                    act()

        sys.addaudithook(hook)
        work()
        if count < number:
            raise SystemExit(99)

    def any_operation(act: Callable[[], None], work: Callable[[], object], step: int) -> Iterator[int]:
        for number in range(1, 500, step):
            code = ended(forked(partial(run, number, act, work)))
            if code == 99:
                return
            yield code
            shutil.rmtree(root, ignore_errors=True)
        raise AssertionError("no end")

    return any_operation


STEPS = pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])


@STEPS
def test_killed_before_any_operation(root: Path, any_operation: Callable[..., Iterator[int]], step: int) -> None:
    killed = 0
    for code in any_operation(lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: cache.cached(KEY, build), step):
        assert code == -signal.SIGKILL
        for entry in (root / "tokens").glob("?" * 64):
            assert holds(Store(entry)) == IDS  # under its name it is whole
        assert holds(cache.cached(KEY, build, on_wait=pytest.fail)) == IDS
        assert names(root) == ["entry", "lock"]
        killed += 1
    assert killed > 30 / step


@STEPS
def test_the_disk_fails_at_any_operation(root: Path, any_operation: Callable[..., Iterator[int]], step: int) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, "Input/output error")

    def work() -> None:
        told: list[str] = []
        assert holds(cache.cached(KEY, build, on_wait=told.append)) == IDS
        if told:
            assert "removed when this process ends" in told[0]
            raise SystemExit(3)

    codes = []
    for code in any_operation(fail, work, step):
        for entry in (root / "tokens").glob("?" * 64):
            assert holds(Store(entry)) == IDS
        codes.append(code)
    assert set(codes) == {0, 3}
    assert codes.count(3) > 20 / step


@pytest.mark.parametrize("place", ["fsync", "write"])
def test_a_full_disk_falls_back_to_a_temporary_folder(root: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def onto_a_full_disk(folder: Path) -> None:
        if place == "write" and folder.is_relative_to(root):
            (folder / "input_ids.ids.bin").symlink_to("/dev/full")
        build(folder)

    def sync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().is_relative_to(root):
            raise OSError(errno.ENOSPC, "No space left on device")

    if place == "fsync":
        monkeypatch.setattr(os, "fsync", sync)
    told: list[str] = []
    store = cache.cached(KEY, onto_a_full_disk, on_wait=told.append)
    assert (holds(store), names(root)) == (IDS, ["lock"])
    (text,) = told
    assert "No space left on device; tokens go to " in text
    assert store.folder.is_relative_to(root.parent / "tmp")
    assert cache.cached(KEY, never, on_wait=told.append).folder == store.folder
    assert len(told) == 1


def test_no_room_anywhere(root: Path) -> None:
    def onto_a_full_disk(folder: Path) -> None:
        (folder / "rows.bin").symlink_to("/dev/full")
        build(folder)

    with pytest.raises(StorageError, match="No space left") as caught:
        cache.cached(KEY, onto_a_full_disk)
    assert caught.value.exit_code == 7
    assert str(caught.value.file).startswith(str(root.parent / "tmp"))
    assert str(root) in str(caught.value.hint)
    assert names(root) == names(Path(os.environ["PEFTCLI_CACHE"])) == ["lock"]


def test_no_place_at_all(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_CACHE", "/proc/cache")
    monkeypatch.setattr("tempfile.tempdir", "/proc/tmp")
    with pytest.raises(StorageError, match="cannot write") as caught:
        cache.cached(KEY, build)
    assert "/proc/cache" in str(caught.value.hint)


@pytest.mark.parametrize("why", ["a file", "no such disk", "no home"])
def test_a_cache_that_cannot_be_made(root: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "no home":
        monkeypatch.setenv("PEFTCLI_CACHE", "")
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setattr(Path, "home", no_home)
    else:
        monkeypatch.setenv("PEFTCLI_CACHE", "/proc/cache" if why == "no such disk" else str(root / "x"))
        root.write_text("")
    told: list[str] = []
    assert holds(cache.cached(KEY, build, on_wait=told.append)) == IDS
    assert holds(cache.cached(KEY, never, on_wait=told.append)) == IDS
    assert len(told) == 1
    assert "which is removed when this process ends" in told[0]


SCRIPT = """
import os, signal, sys
from test_data_cache import KEY, build, holds, IDS
from peftcli.data import cache

assert holds(cache.cached(KEY, build)) == IDS
if not os.fork():
    sys.exit()  # a child that ends first removes nothing
os.wait()
assert cache.root().is_dir()
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_temporary_cache_goes_with_its_process(root: Path) -> None:
    environment = {
        **os.environ,
        "PEFTCLI_CACHE": "/proc/cache",
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}",
    }
    left = root.parent / "tmp"

    def run(how: str) -> int:
        return subprocess.run([sys.executable, "-c", SCRIPT, how], env=environment, check=False).returncode

    assert run("killed") == -signal.SIGKILL
    (dead,) = left.iterdir()
    (left / "peftcli-cache-other").mkdir()  # nobody knows whose
    assert run("ended") == 0
    assert not dead.exists()
    assert [path.name for path in left.iterdir()] == ["peftcli-cache-other"]


# --- several processes ----------------------------------------------------------------------------------------------


class Gate:
    """Something that processes wait for, and an end of the wait."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()

    def open(self) -> None:
        os.write(self.write, b"x" * 8)

    def wait(self) -> None:
        os.read(self.read, 1)


@pytest.fixture
def gates() -> Iterator[Callable[[], Gate]]:
    made: list[Gate] = []

    def gate() -> Gate:
        made.append(Gate())
        return made[-1]

    yield gate
    for each in made:
        os.close(each.read)
        os.close(each.write)


def test_of_three_processes_one_builds(root: Path, tmp_path: Path, gates: Callable[[], Gate]) -> None:
    started, told = gates(), tmp_path / "told"
    told.mkdir()

    def slowly(folder: Path) -> None:
        (tmp_path / f"built-{os.getpid()}").touch()
        while len(list(told.iterdir())) < 2:
            time.sleep(0.01)
        build(folder)

    def work() -> None:
        def on_wait(text: str) -> None:
            assert text == "another process is preparing the same data; waiting for it"
            (told / str(os.getpid())).touch(exist_ok=False)  # told once

        started.wait()
        assert holds(cache.cached(KEY, slowly, on_wait=on_wait)) == IDS

    processes = [forked(work) for _ in range(3)]
    started.open()
    assert [ended(process) for process in processes] == [0, 0, 0]
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert names(root) == ["entry", "lock"]


def test_other_keys_wait_for_nobody(root: Path, gates: Callable[[], Gate]) -> None:
    building, finish = gates(), gates()

    def slowly(folder: Path) -> None:
        building.open()
        finish.wait()
        build(folder)

    process = forked(lambda: cache.cached(KEY, slowly))
    building.wait()
    assert holds(cache.cached({"other": 1}, build, on_wait=pytest.fail)) == IDS
    assert names(root) == ["entry", "left", "lock", "lock"]
    assert cache.unfinished() == 0
    assert cache.clear(cache.entries()).bytes > 0
    assert names(root) == ["left", "lock"]  # it is being built
    finish.open()
    assert ended(process) == 0
    assert names(root) == ["entry", "lock"]


def test_who_waits_goes_on_when_the_builder_is_killed(root: Path, gates: Callable[[], Gate]) -> None:
    building, waiting = gates(), gates()

    def hang(folder: Path) -> None:
        build(folder)
        building.open()
        signal.pause()

    def wait() -> None:
        assert holds(cache.cached(KEY, build, on_wait=lambda text: waiting.open())) == IDS

    builder = forked(lambda: cache.cached(KEY, hang))
    building.wait()
    other = forked(wait)
    waiting.wait()
    builder.kill()
    assert ended(other) == 0
    assert names(root) == ["entry", "lock"]


def test_a_cleared_lock_keeps_nobody_out(root: Path, gates: Callable[[], Gate]) -> None:
    """Who waits for a lock that is removed meanwhile takes the one that has come in its place."""
    cache.cached(KEY, build)
    (lock,) = (root / "tokens").glob("*.lock")
    waiting = gates()

    def wait() -> None:
        with cache._hold_lock(lock, waiting.open) as held:
            assert held
            assert lock.exists()

    with cache._hold_lock(lock):
        process = forked(wait)
        waiting.wait()
        lock.unlink()
    assert ended(process) == 0


# --- listing and clearing -------------------------------------------------------------------------------------------


def test_what_is_listed(root: Path) -> None:
    assert (cache.entries(), cache.unfinished()) == ([], 0)
    assert not root.exists()
    store = cache.cached(KEY, build)
    (entry,) = cache.entries()
    assert (entry.key, entry.source, entry.made_from["key"]) == (store.folder.name, "a.jsonl", KEY)
    assert (entry.rows, entry.features, entry.tokens) == (3, 3, 4)
    assert entry.bytes == sum(path.stat().st_size for path in store.folder.iterdir())
    assert (entry.in_use, entry.damaged) == (True, False)
    assert abs(time.time() - entry.created) < 60
    folder = store.folder
    del store
    assert not cache.entries()[0].in_use
    (folder / "store.json").write_text("{}")
    (folder / "key.json").write_text("{")
    (entry,) = cache.entries()
    assert (entry.damaged, entry.source, entry.rows, entry.made_from) == (True, None, 0, {})


def test_keys_may_be_cut(root: Path) -> None:
    for number in range(2):
        copy = root / "tokens" / ("abcd" + str(number) * 60)
        shutil.copytree(cache.cached(KEY, build).folder, copy)
        os.utime(copy / "key.json", (number, number))
    first, second = "abcd" + "0" * 60, "abcd" + "1" * 60
    assert [entry.key for entry in cache.entries()][1:] == [second, first], "the last used comes first"
    assert [entry.key for entry in cache.find([second, "abcd0", "abcd00"])] == [second, first]
    for wrong, message in (("abcd", "is the beginning of 2 keys"), ("abc", "no entry"), ("", "no entry"), ("x", "no")):
        with pytest.raises(UsageError, match=message):
            cache.find([first, wrong])


def test_clear(root: Path) -> None:
    first, second = (cache.cached({"number": number}, build).folder for number in range(2))
    listed = cache.entries()
    done = cache.clear(cache.find([first.name]))
    assert ([entry.key for entry in done.removed], done.kept) == ([first.name], [])
    assert done.bytes == listed[0].bytes
    assert [path.name for path in sorted((root / "tokens").iterdir())] == [second.name, f"{second.name}.lock"]
    cache.clear(cache.entries())
    assert names(root) == []
    assert cache.clear(listed).bytes == sum(entry.bytes for entry in listed)  # gone already is as good as removed
    assert holds(cache.cached({"number": 0}, build)) == IDS


def test_what_is_in_use_is_kept(root: Path) -> None:
    store, other = cache.cached(KEY, build), cache.cached({"other": 1}, build).folder
    done = cache.clear(cache.entries())
    assert [entry.key for entry in done.kept] == [store.folder.name]
    assert [entry.key for entry in done.removed] == [other.name]
    assert holds(cache.cached(KEY, never)) == IDS
    del store
    assert cache.clear(cache.entries()).kept == []
    assert names(root) == []


def test_what_another_process_uses_is_kept(root: Path, gates: Callable[[], Gate]) -> None:
    opened, done = gates(), gates()

    def use() -> None:
        store = cache.cached(KEY, build)
        opened.open()
        done.wait()
        assert holds(Store(store.folder)) == IDS

    process = forked(use)
    opened.wait()
    assert len(cache.clear(cache.entries()).kept) == 1
    done.open()
    assert ended(process) == 0
    assert len(cache.clear(cache.entries()).removed) == 1


def test_leftovers_are_cleared_and_what_is_foreign_is_not(root: Path) -> None:
    folder = cache.cached(KEY, build).folder
    tokens = root / "tokens"
    dead, live = ("1" * 64, "2" * 64)
    for key in (dead, live):
        (tokens / f".{key}.tmp").mkdir()
        (tokens / f".{key}.tmp" / "rows.bin").write_bytes(b"12345")
    (tokens / f"{'3' * 64}.lock").touch()
    (tokens / "notes.txt").touch()
    with (tokens / f"{live}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert cache.unfinished() == 10
        assert cache.clear([]).bytes == 5
    left = {path.name for path in tokens.iterdir()}
    assert left == {folder.name, f"{folder.name}.lock", f".{live}.tmp", f"{live}.lock", "notes.txt"}
    cache.clear([])
    assert cache.unfinished() == 0
    assert holds(cache.cached(KEY, never)) == IDS


@pytest.mark.parametrize("made_again", [False, True])
def test_cleared_between_being_found_and_being_held(
    root: Path, monkeypatch: pytest.MonkeyPatch, made_again: bool
) -> None:
    cache.cached(KEY, build)
    clear, wait = cache.clear, fcntl.flock

    def slow(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", wait)
        clear(cache.entries())
        if made_again:
            cache.cached(KEY, build)
        wait(handle, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    store = cache.cached(KEY, build, on_wait=pytest.fail)
    assert holds(store) == IDS
    assert names(root) == ["entry", "lock"]
    assert cache.entries()[0].in_use
