from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import FolderBusy, StorageError, UsageError
from peftcli.system.disk import write_file
from peftcli.system.outputs import StdoutClosed, new_folder, partial_file, write_output


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


class Stopped(Exception):
    """Ends a block."""


@contextmanager
def ended_by(error: type[Exception], block: AbstractContextManager) -> Iterator[Any]:
    """Gives what the block gives; what follows must end in the error."""
    with pytest.raises(error), block as given:
        yield given


def fill(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("a")
    (folder / "b").touch(0o600)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


WHOLE = ["out", "out/b", "out/config.json", "out/sub", "out/sub/a"]


def test_a_new_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "x" / "out") as partial:
        fill(partial)
        assert not (tmp_path / "x" / "out").exists()
    assert tree(tmp_path) == ["x", *(f"x/{name}" for name in WHOLE)]


def test_a_folder_that_is_there_is_filled_and_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    before = (tmp_path / "out").stat()
    monkeypatch.chdir(tmp_path / "out")
    with new_folder(Path()) as partial:
        fill(partial)
    assert tree(tmp_path) == WHOLE
    after = (tmp_path / "out").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(tmp_path: Path, there: bool) -> None:
    (tmp_path / "link").symlink_to("out")
    if there:
        (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "link") as partial:
        fill(partial)
    assert tree(tmp_path) == ["link", *WHOLE]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("there", [True, False])
def test_an_error_leaves_nothing(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "x" / "out").mkdir(parents=True)
    with ended_by(Stopped, new_folder(tmp_path / "x" / "out")) as partial:
        fill(partial)
        raise Stopped
    assert tree(tmp_path) == (["x", "x/out"] if there else [])


def test_modes_follow_the_umask(tmp_path: Path, umask: None) -> None:
    with new_folder(tmp_path / "out") as partial:
        fill(partial)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("kind", ["file", "full"])
def test_what_is_there_is_kept(tmp_path: Path, kind: str) -> None:
    if kind == "full":
        (tmp_path / "out").mkdir()
    (tmp_path / ("out" if kind == "file" else "out/mine")).write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="not empty"), new_folder(tmp_path / "out"):
        raise AssertionError
    assert tree(tmp_path) == before


@pytest.mark.parametrize("there", [True, False])
def test_of_two_the_first_that_is_ready_wins(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "out").mkdir()
    with ended_by(UsageError, new_folder(tmp_path / "out")) as slow:
        (slow / "slow").touch()
        with new_folder(tmp_path / "out") as fast:
            fill(fast)
        assert slow.exists()
    assert tree(tmp_path) == WHOLE


@pytest.mark.parametrize("there", [True, False])
def test_a_leftover_of_a_killed_process_goes(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "out").mkdir()
    child = os.fork()
    if not child:
        with new_folder(tmp_path / "out") as partial:
            fill(partial)
            os._exit(0)
    os.waitpid(child, 0)
    assert len(tree(tmp_path)) > 3
    with new_folder(tmp_path / "out") as partial:
        fill(partial)
    assert tree(tmp_path) == WHOLE


def test_a_partial_folder_that_another_process_removes_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process may take it for a leftover, before it is open and locked."""
    open_file, removed = os.open, list[str]()

    def remove_first(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith(".partial") and not removed:
            removed.append(str(path))
            Path(path).rmdir()
        return open_file(path, *args, **options)

    monkeypatch.setattr(os, "open", remove_first)
    with new_folder(tmp_path / "out") as partial:
        fill(partial)
    assert removed
    assert tree(tmp_path) == WHOLE


def test_files_of_the_user_that_look_like_leftovers_are_kept(tmp_path: Path) -> None:
    mine = [".out.partial", ".out.mine.partial", ".outer.7.partial"]
    for name in mine:
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "out") as partial:
        fill(partial)
    assert tree(tmp_path) == sorted([*mine, *WHOLE])


def test_a_name_of_255_bytes(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        with new_folder(tmp_path / name) as partial:
            fill(partial)
        assert (tmp_path / name / "config.json").exists()
        write_output(tmp_path / "files" / name, b"a")
        assert (tmp_path / "files" / name).read_bytes() == b"a"
    assert len(list(tmp_path.iterdir())) == 3


def test_a_storage_error_names_what_the_user_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, new_folder(tmp_path / "out") as partial:
        raise StorageError("cannot write: full", file=str(partial / "model.safetensors"))
    assert caught.value.file == str(tmp_path / "out")
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "x" / "out"
    with pytest.raises(StorageError, match="file/x/out: cannot write: Not a directory"), new_folder(out):
        raise AssertionError
    assert tree(tmp_path) == ["file"]


def test_a_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real/file")
    (tmp_path / "real").mkdir()
    for content in (b"a", b"b"):
        write_output(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "real" / "file").read_bytes() == content
    assert tree(tmp_path) == ["link", "real", "real/file"]


def test_a_pipe_and_a_device_are_written_as_they_are(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_output(tmp_path / "pipe", b"through")
    assert os.read(reader, 99) == b"through"
    os.close(reader)
    write_output(Path("/dev/null"), b"a")
    for name in ("9" * 4, "9" * 40, str(os.open("/dev/null", os.O_RDONLY))):
        with pytest.raises(UsageError, match="is not open for writing"):
            write_output(Path("/dev/fd") / name, b"a")
    with pytest.raises(StorageError, match="/dev/full: cannot write: No space left"):
        write_output(Path("/dev/full"), b"a")
    with pytest.raises(UsageError, match="is a folder"):
        write_output(tmp_path, b"a")


def test_standard_output_that_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    before = os.dup(1)
    os.dup2(write, 1)
    try:
        with pytest.raises(StdoutClosed):
            write_output(Path("/dev/stdout"), b"a")
    finally:
        os.dup2(before, 1)
        for each in (before, write):
            os.close(each)


def test_an_unfinished_file_is_gone_on_with(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.jsonl"
    with ended_by(Stopped, partial_file(target, "key")) as file:
        file.append(b"1\n2\nhalf")
        raise Stopped
    with ended_by(Stopped, partial_file(target, "another key")) as other:
        assert other.lines() == []
        raise Stopped
    assert len(tree(tmp_path)) == 2
    assert not target.exists()
    with partial_file(target, "key") as file:
        assert file.lines() == [b"1\n", b"2\n"]
        file.truncate(file.lines()[:1])
        file.append(b"3\n")
    assert target.read_bytes() == b"1\n3\n"
    assert tree(tmp_path) == ["new", "new/out.jsonl"]


def test_an_unfinished_file_without_a_line_goes(tmp_path: Path) -> None:
    with ended_by(Stopped, partial_file(tmp_path / "new" / "out", "key")):
        raise Stopped
    assert tree(tmp_path) == []


def test_two_do_not_write_one_unfinished_file(tmp_path: Path) -> None:
    with partial_file(tmp_path / "out", "key") as file:
        file.append(b"1\n")
        with pytest.raises(FolderBusy, match="another process"), partial_file(tmp_path / "out", "key"):
            raise AssertionError
        file.append(b"2\n")
    assert (tmp_path / "out").read_bytes() == b"1\n2\n"


def test_leftovers_of_other_keys_go_unless_they_are_held(tmp_path: Path) -> None:
    for key in ("dead", "alive"):
        with ended_by(Stopped, partial_file(tmp_path / "out", key)) as file:
            file.append(key.encode())
            raise Stopped
    alive = next(path for path in tmp_path.iterdir() if path.read_bytes() == b"alive")
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with partial_file(tmp_path / "out", "key") as file:
            file.append(b"1\n")
    assert sorted(tmp_path.iterdir()) == sorted([alive, tmp_path / "out"])


def test_a_piece_that_cannot_be_read_is_no_error_of_writing(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(StorageError, match="cannot read: No such file") as caught:
        write_file(tmp_path / "out", (path.read_bytes() for path in (Path(__file__), missing)))
    assert caught.value.file == str(missing)
    assert not list(tmp_path.iterdir())
