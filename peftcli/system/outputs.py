"""Output files and folders of commands: each appears complete or not at all. No torch here.

Until it is complete, an output is called ``.NAME.<...>.partial``, beside its final name or, if the output folder exists
already, inside that folder. The process that writes it holds a flock on it: an unlocked one is a leftover.
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
from tempfile import TemporaryFile

from peftcli.errors import FolderBusy, StorageError, UsageError
from peftcli.system.disk import cannot_write, sync_file, sync_folder
from peftcli.system.signals import check

_MAX_NAME = 200
"""Bytes of a name that its partial name repeats: the whole partial name must fit into 255."""
_LAST = "config.json"
"""The file that makes a folder loadable is moved last."""
_DESCRIPTOR = re.compile(r"/dev/(?P<name>stdout|stderr)|/(?:dev|proc/self)/fd/(?P<number>\d+)")
_ENDING = re.compile(r"(\d+(-\d+)?|[0-9a-f]{16})\.partial")
_LIBRARY_ERROR = re.compile(r"\(os error (\d+)\)|file <.+>.*: .+ \((\d+)\)$")
"""How Rust libraries and PyTorch report an error of the operating system."""


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; its content moves to ``output`` when the block ends without an error.

    An existing folder must be empty. It is filled, not replaced: it may be a mount point, a link, or the user's current
    folder.

    Raises:
        UsageError: ``output`` is a file, or a folder that is not empty, perhaps because of another process.
        StorageError: ``output`` cannot be written.
    """
    require_empty(output)
    target = _real_path(output)
    with _parents(target, output):
        with storage_errors(output):
            for folder in {target, target.parent}:
                _remove_leftovers(folder, target.name)
            partial, handle = _create_partial_folder(target)
        try:
            yield partial
            with storage_errors(output):
                _publish(partial, target, output)
        except StorageError as error:
            if error.file is None or not Path(error.file).is_relative_to(partial):
                raise
            # the user does not know the partial folder
            raise StorageError(error.message, file=str(output), hint=error.hint) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(handle)


def require_empty(output: Path) -> None:
    """Raise UsageError if ``output`` is a file, or a folder that contains more than unfinished outputs."""
    with storage_errors(output):
        is_taken = output.exists() and (not output.is_dir() or _has_content(output))
    if is_taken:
        raise _not_empty(output)


def write_output(path: Path, content: bytes) -> None:
    """Write an output file: complete or not at all, following links; pipes and devices are written to directly.

    Raises:
        UsageError: ``path`` is a folder, or an open file of this process that is not open for writing.
        StorageError: ``path`` cannot be written.
    """
    if is_stream(path):
        number = _descriptor(path)
        # opening it again would overwrite the start of a file that stdout is redirected to
        with storage_errors(path), path.open("wb") if number is None else os.fdopen(os.dup(number), "wb") as stream:
            stream.write(content)
        return
    with partial_file(path) as file:
        file.truncate([])
        file.append(content)


def require_writable(path: Path) -> None:
    """Raise what writing a file will raise, as far as that shows before: UsageError or StorageError."""
    if is_stream(expand_user(path)):
        return
    folder = next(parent for parent in Path(os.path.realpath(expand_user(path))).parents if parent.exists())
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:  # of a mode that os.access lets root pass, too
        raise StorageError(f"cannot write into {folder}: {error.strerror}", file=str(path)) from None


def refuse_input(path: Path, source: Path | None) -> None:
    """Raise UsageError where an output file is the input ``source``, which it would replace."""
    with suppress(OSError):
        if source is not None and expand_user(path).samefile(expand_user(source)):
            raise UsageError("is the input too, which the answers would replace", file=str(path), key="--output")


def is_stdout(path: Path) -> bool:
    """Return whether a path like ``/dev/stdout`` names standard output."""
    return _descriptor(path) == 1


def expand_user(path: Path) -> Path:
    """Expand ``~``, which the shell does not expand in ``--output=~/x``."""
    with suppress(RuntimeError):  # no such user
        return path.expanduser()
    return path


def is_stream(path: Path) -> bool:
    """Return whether a path is a pipe, a device or an open file of this process, which cannot be replaced.

    Raises:
        UsageError: ``path`` is a folder, or an open file of this process that is not open for writing.
        StorageError: ``path`` cannot be reached.
    """
    with storage_errors(path):
        if path.is_dir():
            raise UsageError("is a folder", file=str(path), hint="name a file")
        return _descriptor(path) is not None or (path.exists() and not path.is_file())


def _descriptor(path: Path) -> int | None:
    """Return the file descriptor that a path like ``/dev/stdout`` names; None for other paths."""
    if (found := _DESCRIPTOR.fullmatch(str(path))) is None:
        return None
    number = int(found["number"]) if found["number"] else ("stdout", "stderr").index(found["name"]) + 1
    with suppress(OSError, OverflowError):  # no such descriptor, or an impossible number
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            return number
    raise UsageError("is not open for writing", file=str(path), key="--output")


class PartialFile:
    """An output file that grows line by line under its partial name."""

    def __init__(self, file: FileIO, path: Path):
        self._file, self._path = file, path
        self.is_discarded = False

    def lines(self) -> list[bytes]:
        """Return the complete lines that an earlier command wrote, each with its newline."""
        with storage_errors(self._path):
            self._file.seek(0)
            return [line for line in self._file.readall().splitlines(keepends=True) if line.endswith(b"\n")]

    def truncate(self, lines: list[bytes]) -> None:
        """Truncate the file after ``lines``, its first ones."""
        with storage_errors(self._path):
            self._file.truncate(sum(map(len, lines)))
            self._file.seek(0, os.SEEK_END)

    def append(self, content: bytes) -> None:
        """Append to the file."""
        with storage_errors(self._path):
            while content:
                content = content[self._file.write(content) or 0 :]

    def discard(self) -> None:
        """Let the file be removed when the block ends: its content has become the output in another way."""
        self.is_discarded = True


@contextmanager
def partial_file(path: Path, key: str = "") -> Iterator[PartialFile]:
    """Yield a file that becomes ``path`` when the block ends without an error.

    After an error the file is removed; with a ``key`` it is kept, for a later call with the same key.

    Raises:
        FolderBusy: another process is writing the file.
        StorageError: the file cannot be written.
    """
    target = _real_path(path)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    partial = target.with_name(f"{_partial_prefix(target.name)}{digest}.partial")
    with _parents(target, path):
        with storage_errors(path):
            file = FileIO(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+")
        with file:
            if _lock(file.fileno()) is False or not is_at(file.fileno(), partial):
                raise FolderBusy("another process is writing this file", file=str(path))
            growing = PartialFile(file, path)
            try:
                yield growing
                if not growing.is_discarded:
                    with storage_errors(path):
                        os.fsync(file.fileno())
                        partial.replace(target)
                        sync_folder(target.parent)
                        _remove_leftovers(target.parent, target.name)
            finally:
                is_useless = growing.is_discarded or not key or not os.fstat(file.fileno()).st_size
                if is_useless and is_at(file.fileno(), partial):
                    with storage_errors(path):
                        partial.unlink()
                        file.close()


class StdoutClosed(BrokenPipeError):
    """Nobody reads standard output any more."""


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Translate errors of the operating system, raised by Python or by a library, while ``path`` is written.

    Raises:
        StdoutClosed: ``path`` is standard output, and nobody reads it.
        StorageError: another error of the operating system occurred.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, BrokenPipeError) and is_stdout(path):
            raise StdoutClosed from None
        raise cannot_write(path, error.errno, error.strerror or str(error)) from None
    except Exception as error:
        if (found := _LIBRARY_ERROR.search(str(error))) is None:
            raise
        number = int(found[1] or found[2])
        raise cannot_write(path, number, os.strerror(number)) from None


def _real_path(path: Path) -> Path:
    """Resolve the links of a path."""
    with storage_errors(path):
        return Path(os.path.realpath(path))


def _create_partial_folder(target: Path) -> tuple[Path, int]:
    """Create the partial folder of ``target``; return it with a handle that holds its lock."""
    parent = target if target.is_dir() else target.parent
    for number in count():
        ending = f"{os.getpid()}-{number}" if number else str(os.getpid())  # other machines may have equal process ids
        partial = parent / f"{_partial_prefix(target.name)}{ending}.partial"
        try:
            partial.mkdir()
        except FileExistsError:
            continue
        # until it is locked, another process may remove it as a leftover
        try:
            handle = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        if _lock(handle) is not False and is_at(handle, partial):
            break
        os.close(handle)
    return partial, handle


def _publish(partial: Path, target: Path, output: Path) -> None:
    """Flush the files of a partial folder and move them to ``target``, unless another process was faster."""
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
        partial.rename(target)  # replaces an empty folder only
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _not_empty(output) from None
        raise
    sync_folder(target.parent)


def _move_into(partial: Path, target: Path, output: Path) -> None:
    handle = os.open(target, os.O_RDONLY)
    try:
        _lock(handle, wait=True)
        if _has_content(target):
            raise _not_empty(output)
        for path in sorted(partial.iterdir(), key=lambda path: (path.name == _LAST, path.name)):
            path.rename(target / path.name)
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_empty(output: Path) -> UsageError:
    return UsageError("exists and is not empty; nothing was changed", file=str(output), key="--output")


def _has_content(folder: Path) -> bool:
    mark = _partial_prefix(folder.resolve().name)
    return not all(_is_partial(path, mark) for path in folder.iterdir())


def _partial_prefix(name: str) -> str:
    raw = os.fsencode(name)
    if len(raw) > _MAX_NAME:
        name = raw[: _MAX_NAME - 20].decode(errors="ignore") + hashlib.sha256(raw).hexdigest()[:16]
    return f".{name}."


def _is_partial(path: Path, mark: str) -> bool:
    return path.name.startswith(mark) and bool(_ENDING.fullmatch(path.name[len(mark) :]))


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove the unlocked partial outputs of ``name`` in ``folder``."""
    with suppress(OSError):  # the folder may not exist yet, or may be another user's
        for path in folder.iterdir():
            if _is_partial(path, _partial_prefix(name)):
                with suppress(OSError):
                    _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if _lock(handle) and is_at(handle, path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    finally:
        os.close(handle)


def _lock(handle: int, wait: bool = False) -> bool | None:
    """Lock a file or folder. Return False if another process holds the lock, None if locks are not supported."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(handle: int, path: Path) -> bool:
    """Return whether ``path`` is still the open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


@contextmanager
def _parents(target: Path, path: Path) -> Iterator[None]:
    """Create the missing parent folders of ``target``; remove those that are empty when the block ends."""
    with storage_errors(path):
        missing = [parent for parent in target.parents if not parent.exists()]
    try:
        with storage_errors(path):
            target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # not empty
                parent.rmdir()
