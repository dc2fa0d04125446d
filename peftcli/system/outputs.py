"""The files and folders that a command is told to write: each appears whole or not at all. No torch here.

What is not whole yet stands beside its final name, or in a folder that is there already, as ``.NAME.<...>.partial``.
Its maker holds a flock on it, so that the next command can tell a leftover from work of another process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import count
from pathlib import Path

from peftcli.errors import FolderBusy, StorageError, UsageError
from peftcli.system.disk import sync_file, sync_folder
from peftcli.system.signals import check

_LONGEST_NAME = 200
"""Bytes of a name that its partial name repeats, which must not have more than 255."""
_LAST = "config.json"
"""What makes a folder one that others load."""
_DESCRIPTOR = re.compile(r"/dev/(?P<name>stdout|stderr)|/(?:dev|proc/self)/fd/(?P<number>\d+)")
_ENDING = re.compile(r"(\d+(-\d+)?|[0-9a-f]{16})\.partial")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Gives an empty folder to write into. When the block has ended without an error, what it holds is ``output``'s.

    A folder that is there already must be empty. It is filled, not replaced: it may be a mount point, a link, or where
    the user is.

    Raises:
        UsageError: ``output`` is a file, or a folder that holds something, by then another process's work perhaps.
        StorageError: it cannot be written.
    """
    refuse_taken(output)
    target = _where(output)
    with _made_parents(target, output):
        with saving(output):
            for place in {target, target.parent}:
                _remove_leftovers(place, target.name)
            partial, handle = _begin(target)
        try:
            yield partial
            with saving(output):
                _publish(partial, target, output)
        except StorageError as error:
            if error.file is None or not Path(error.file).is_relative_to(partial):
                raise
            # the user need not know what stands for the output until it is whole
            raise StorageError(error.message, file=str(output), hint=error.hint) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


def refuse_taken(output: Path) -> None:
    """Raises UsageError if ``output`` is a file, or a folder that holds something other than unfinished work."""
    with saving(output):
        taken = output.exists() and (not output.is_dir() or _holds_something(output))
    if taken:
        raise _taken(output)


def write_output(path: Path, content: bytes) -> None:
    """Write a file for the user: through a link to where it points, into a pipe or device, else whole or not at all.

    Raises:
        UsageError: it is a folder, or a file of this process that is not open for writing.
        StorageError: it cannot be written.
    """
    if is_stream(path):
        number = _descriptor(path)
        # not opened anew, which would begin at the start of what stdout may be redirected to
        with saving(path), path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as stream:
            stream.write(content)
        return
    with unfinished_file(path) as file:
        file.keep([])
        file.append(content)


def expanded(path: Path) -> Path:
    """A path with its ``~`` read as the shell does, which leaves that of ``--output=~/x`` alone."""
    with suppress(RuntimeError):  # no such user
        return path.expanduser()
    return path


def is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a device or an open file of this process: what can only be written to as it is.

    Raises:
        UsageError: it is a folder, or a file of this process that is not open for writing.
        StorageError: it cannot be reached.
    """
    with saving(path):
        if path.is_dir():
            raise UsageError("is a folder", file=str(path), hint="name a file")
        return _descriptor(path) is not None or (path.exists() and not path.is_file())


def _descriptor(path: Path) -> int | None:
    """The number of the open file of this process that a path is a name of.

    Raises:
        UsageError: it is not open for writing.
    """
    if (found := _DESCRIPTOR.fullmatch(str(path))) is None:
        return None
    number = int(found["number"]) if found["number"] else ("stdout", "stderr").index(found["name"]) + 1
    with suppress(OSError, OverflowError):  # no such file, or a number that none can have
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            return number
    raise UsageError("is not open for writing", file=str(path), key="--output")


class Unfinished:
    """A file that grows line by line under its partial name."""

    def __init__(self, file: FileIO, path: Path):
        self._file, self._path = file, path

    def lines(self) -> list[bytes]:
        """The whole lines that an earlier command has left, each with its newline."""
        with saving(self._path):
            self._file.seek(0)
            return [line for line in self._file.readall().splitlines(keepends=True) if line.endswith(b"\n")]

    def keep(self, lines: list[bytes]) -> None:
        """Cut the file after its first ``lines``."""
        with saving(self._path):
            self._file.truncate(sum(map(len, lines)))
            self._file.seek(0, os.SEEK_END)

    def append(self, content: bytes) -> None:
        """Write at the end."""
        with saving(self._path):
            while content:
                content = content[self._file.write(content) or 0 :]


@contextmanager
def unfinished_file(path: Path, key: str = "") -> Iterator[Unfinished]:
    """A file that becomes ``path`` when the block ends. After an error it goes, or is kept for the same ``key``.

    Raises:
        FolderBusy: another process is writing it.
        StorageError: it cannot be written.
    """
    target = _where(path)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    partial = target.with_name(f"{_partial_prefix(target.name)}{digest}.partial")
    with _made_parents(target, path):
        with saving(path):
            file = FileIO(partial, "r+", opener=_opened)
        with file:
            if _lock(file.fileno()) is False or not _is_at(file.fileno(), partial):
                raise FolderBusy("another process is writing this file", file=str(path))
            try:
                yield Unfinished(file, path)
                with saving(path):
                    os.fsync(file.fileno())
                    partial.replace(target)
                    sync_folder(target.parent)
                    _remove_leftovers(target.parent, target.name)
            finally:
                worthless = not key or not os.fstat(file.fileno()).st_size
                if worthless and _is_at(file.fileno(), partial):
                    partial.unlink()


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Inside, an error of the operating system is one of writing ``path``, be it Python's or that of a Rust library.

    Raises:
        StorageError: in its place.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", file=str(path)) from None
    except Exception as error:
        if (found := _RUST_ERROR.search(str(error))) is None:
            raise
        raise StorageError(f"cannot write: {os.strerror(int(found[1]))}", file=str(path)) from None


def _where(path: Path) -> Path:
    """Where a path leads by its links."""
    with saving(path):
        return Path(os.path.realpath(path))


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def _begin(target: Path) -> tuple[Path, int]:
    """A new folder for the work on ``target``, and a handle that holds its lock."""
    place = target if target.is_dir() else target.parent
    for number in count():
        ending = f"{os.getpid()}-{number}" if number else str(os.getpid())  # there are other machines' processes
        partial = place / f"{_partial_prefix(target.name)}{ending}.partial"
        try:
            partial.mkdir()
        except FileExistsError:
            continue
        handle = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
        if _lock(handle) is not False and _is_at(handle, partial):
            break
        os.close(handle)  # another process took it for a leftover
    return partial, handle


def _publish(partial: Path, target: Path, output: Path) -> None:
    """Makes a folder's files last, and gives them their place, unless another process was faster."""
    check()
    for path in [*sorted(partial.rglob("*")), partial]:
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)
    if partial.parent == target:
        _move_into(partial, target, output)
        return
    try:
        partial.rename(target)  # replaces an empty folder and no other
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _taken(output) from None
        raise
    sync_folder(target.parent)


def _move_into(partial: Path, target: Path, output: Path) -> None:
    handle = os.open(target, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        if _holds_something(target):
            raise _taken(output)
        for path in sorted(partial.iterdir(), key=lambda path: (path.name == _LAST, path.name)):
            path.rename(target / path.name)
        os.fsync(handle)
    finally:
        os.close(handle)


def _taken(output: Path) -> UsageError:
    return UsageError("exists and is not empty; nothing was changed", file=str(output), key="--output")


def _holds_something(folder: Path) -> bool:
    mark = _partial_prefix(folder.resolve().name)
    return not all(_is_partial(path, mark) for path in folder.iterdir())


def _partial_prefix(name: str) -> str:
    raw = os.fsencode(name)
    if len(raw) > _LONGEST_NAME:
        name = raw[: _LONGEST_NAME - 20].decode(errors="ignore") + hashlib.sha256(raw).hexdigest()[:16]
    return f".{name}."


def _is_partial(path: Path, mark: str) -> bool:
    return path.name.startswith(mark) and bool(_ENDING.fullmatch(path.name[len(mark) :]))


def _remove_leftovers(place: Path, name: str) -> None:
    """Removes what earlier commands for ``name`` have left unfinished in ``place``, unless they are still at it."""
    with suppress(OSError):  # it may not be there yet, or another user's
        for path in place.iterdir():
            if _is_partial(path, _partial_prefix(name)):
                with suppress(OSError):
                    _remove_if_left(path)


def _remove_if_left(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(handle) and _is_at(handle, path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool | None:
    """Locks a file or folder. False: another process has; None: the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


@contextmanager
def _made_parents(target: Path, path: Path) -> Iterator[None]:
    """Inside, the folders above ``target`` are there. Those that had to be made go again if nothing came of it."""
    with saving(path):
        missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with saving(path):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # it holds something
                parent.rmdir()
