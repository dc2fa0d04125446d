"""Stores that are kept between runs, each under a hash of all that it was made from.

    <root>/tokens/<key>/        a whole store, and key.json: what it was made from. Its time is that of the last use
                  .<key>.tmp/   one that is being built, or what a builder left that was killed
                  <key>.lock    flock of the process that builds or removes <key>
          checked/              what deep checks found

A store gets its name only when it is whole and on the disk. Who uses one holds a shared flock on its manifest, so that
it is not cleared meanwhile. No entry is removed by itself.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftcli.data.store import FORMAT, MANIFEST, Store, describe
from peftcli.errors import StorageError, UsageError
from peftcli.system.disk import sync_folder
from peftcli.system.outputs import expand_user, is_at, storage_errors

DATA_PATH_VERSION = 17
"""To be raised with every change after which the same rows and settings give other examples or records."""

_ROOT = "PEFTCLI_CACHE"
_KEY = "key.json"
_TEMPORARY = "peftcli-cache-"
_OWNER = "owner.lock"
_NAME = re.compile(r"(?P<entry>[0-9a-f]{64})|\.(?P<left>[0-9a-f]{64})\.tmp|(?P<lock>[0-9a-f]{64})\.lock")
_SHORTEST = 4
"""Digits of a key that may stand for the whole."""


@dataclass(frozen=True)
class Entry:
    """One store in the cache."""

    key: str
    source: str | None
    """What it was made from, as the recipe calls it."""
    rows: int
    features: int
    """Examples."""
    tokens: int
    """Size of all examples, in the unit of the task."""
    bytes: int
    created: float
    """Seconds since 1970, as is ``last_used``."""
    last_used: float
    in_use: bool
    """Whether a run holds it."""
    damaged: bool
    """Whether it will be made again when it is wanted, as far as its description and sizes tell."""
    made_from: dict[str, Any]
    """All that the key is a hash of."""


@dataclass(frozen=True)
class Cleared:
    """The result of ``clear``."""

    removed: list[Entry]
    kept: list[Entry]
    """Entries that a run holds or builds."""
    bytes: int
    """Of what was removed, leftovers of killed builders among it."""


def root() -> Path:
    """The cache's folder: $PEFTCLI_CACHE, else peftcli in $XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        StorageError: there is no home folder.
    """
    if named := os.environ.get(_ROOT):
        return expand_user(Path(named)).absolute()
    if (xdg := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return xdg / "peftcli"
    try:
        return Path.home() / ".cache" / "peftcli"
    except RuntimeError:
        hint = f"set {_ROOT} to a folder that can be written"
        raise StorageError("there is no home folder to keep the cache in", hint=hint) from None


def cached(
    key: dict[str, Any], build: Callable[[Path], None], *, on_wait: Callable[[str], None] = lambda text: None
) -> Store:
    """The store that was made from what ``key`` says; ``build`` writes it into an empty folder if there is none.

    Of several processes that want it, one builds and the others wait. Where the cache cannot be written, the store goes
    into a temporary folder, which processes that this one starts use too, and which is removed when this process ends.

    Args:
        key: Everything that decides what the store holds, as JSON takes it. peftcli's own version is added.
        build: Writes a store with ``Writer`` into the folder that it is given.
        on_wait: Is told what the user should know: that another process is waited for, that what was found is damaged,
            that the cache cannot be written.

    Raises:
        StorageError: a temporary folder cannot be written either.
    """
    made_from = {"key": key, "peftcli": version("peftcli"), "data_path": DATA_PATH_VERSION, "format": FORMAT}
    name = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    try:
        return _found_or_built(name, made_from, build, on_wait)
    except StorageError as error:
        reason = f"{root()}: {error.message}" if error.file else error.message  # else there is no root
    try:
        os.environ[_ROOT] = str(_temporary_root())
        on_wait(f"{reason}; tokens go to {root()}, which is removed when this process ends")
        return _found_or_built(name, made_from, build, on_wait)
    except StorageError as error:
        hint = f"before that: {reason}; set {_ROOT} to a folder with room"
        raise StorageError(error.message, file=error.file, hint=hint) from None


def entries() -> list[Entry]:
    """Return the cache's entries, the last used first."""
    found = [_entry(_tokens() / key) for key, kinds in _keys().items() if "entry" in kinds]
    return sorted(filter(None, found), key=lambda entry: (-entry.last_used, entry.key))


def unfinished() -> int:
    """Bytes of what is being built, and of what killed builders have left."""
    return sum(_size(path) for path in _tokens().glob(".*.tmp"))


def find(keys: Sequence[str]) -> list[Entry]:
    """The entries of ``keys``, each of which may be cut to its first digits.

    Raises:
        UsageError: one is no entry's, or the beginning of several.
    """
    listed, found = entries(), dict[str, Entry]()
    for key in keys:
        fitting = [entry for entry in listed if len(key) >= _SHORTEST and entry.key.startswith(key)]
        if len(fitting) != 1:
            what = f"{key!r} is the beginning of {len(fitting)} keys" if fitting else f"no entry has the key {key!r}"
            hint = f"`peftcli cache` lists the keys; {_SHORTEST} digits or more may stand for one"
            raise UsageError(what, file=str(root()), hint=hint)
        found[fitting[0].key] = fitting[0]
    return list(found.values())


def clear(chosen: Sequence[Entry]) -> Cleared:
    """Remove those of the ``chosen`` entries that no run holds, and what killed builders have left.

    Raises:
        StorageError: a file or folder cannot be removed.
    """
    wanted, left = {entry.key for entry in chosen}, 0
    shutil.rmtree(outcomes(), ignore_errors=True)
    for key, kinds in _keys().items():
        if key not in wanted and "entry" in kinds and "left" not in kinds:
            continue
        entry, lock = _tokens() / key, _lock(key)
        with _hold_lock(lock) as held, storage_errors(entry):
            if held:
                left += _remove(_beside(entry))
                if key in wanted:
                    _clear(entry)
                if not entry.exists():
                    lock.unlink()
    kept = [entry for entry in chosen if (_tokens() / entry.key).exists()]
    removed = [entry for entry in chosen if entry not in kept]
    return Cleared(removed, kept, left + sum(entry.bytes for entry in removed))


def outcomes() -> Path:
    """The folder of what ``check --deep`` found, as long as no store is cleared."""
    return root() / "checked"


def _tokens() -> Path:
    return root() / "tokens"


def _lock(key: str) -> Path:
    return _tokens() / f"{key}.lock"


def _beside(entry: Path) -> Path:
    """Return the folder in which an entry is built."""
    return entry.with_name(f".{entry.name}.tmp")


def _found_or_built(
    key: str, made_from: dict[str, Any], build: Callable[[Path], None], on_wait: Callable[[str], None]
) -> Store:
    entry = _tokens() / key
    if (store := _open_store(entry)) is not None:
        return store
    with storage_errors(root()):
        for folder in (root(), _tokens()):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private, as the data may be
    with _hold_lock(_lock(key), lambda: on_wait("another process is preparing the same data; waiting for it")):
        if (store := _open_store(entry)) is None:  # none was built while this process waited
            if entry.exists():
                on_wait(f"{entry} is damaged; the data is prepared again")
            _build(entry, made_from, build)
            store = _open_store(entry)
    if store is None:
        raise StorageError("cannot be read back as it was written", file=str(entry))
    return store


def _build(entry: Path, made_from: dict[str, Any], build: Callable[[Path], None]) -> None:
    """Builds an entry under another name, and gives it its own once it is on the disk. The key's lock is held."""
    temporary = _beside(entry)
    try:
        with storage_errors(temporary):
            _remove(temporary)
            if entry.exists():
                entry.rename(temporary)
                _remove(temporary)
            temporary.mkdir()
        build(temporary)
        with storage_errors(temporary):
            (temporary / _KEY).write_text(json.dumps(made_from, indent=1), encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                sync_folder(path)
            temporary.rename(entry)
            sync_folder(entry.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _open_store(entry: Path) -> Store | None:
    """Open the store in a folder, and keep it from being cleared while it lives; None if there is no whole one."""
    with ExitStack() as stack:
        try:
            handle = os.open(entry / MANIFEST, os.O_RDONLY)
            stack.callback(os.close, handle)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_SH)
            if not is_at(handle, entry / MANIFEST):
                return None  # cleared just now
            store = Store(entry)
        except (OSError, ValueError):
            return None
        weakref.finalize(store, stack.pop_all().close).atexit = False
    with suppress(OSError):
        os.utime(entry / _KEY)
    return store


def _clear(entry: Path) -> None:
    """Removes an entry, unless a run holds it."""
    if entry.is_symlink():
        entry.unlink()
        return
    with ExitStack() as stack:
        with suppress(FileNotFoundError):  # without a manifest it is no store, and nobody's
            handle = os.open(entry / MANIFEST, os.O_RDWR)
            stack.callback(os.close, handle)
            if not _try_lock(handle):
                return
        with suppress(FileNotFoundError):  # another process was faster
            entry.rename(_beside(entry))
    _remove(_beside(entry))


@contextmanager
def _hold_lock(lock: Path, on_wait: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock of a key; without ``on_wait``, yield False if another process holds it."""
    with storage_errors(lock):
        handle, free = _open_lock(lock, on_wait)
    try:
        yield free
    finally:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # even if a process that was forked meanwhile has the file open
        os.close(handle)


def _open_lock(lock: Path, on_wait: Callable[[], None] | None) -> tuple[int, bool]:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        free = _try_lock(handle)
        if not free and on_wait is not None:
            on_wait()
            fcntl.flock(handle, fcntl.LOCK_EX)
            free = True
        if not free or is_at(handle, lock):
            return handle, free
        os.close(handle)  # it was removed, with its entry, by the process that held it


def _try_lock(handle: int) -> bool:
    """Lock a file, unless another process has locked it; return whether this process has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _entry(path: Path) -> Entry | None:
    """Describe an entry; None if it is gone."""
    try:
        created = path.stat().st_mtime
    except FileNotFoundError:
        return None
    last_used, made_from = created, dict[str, Any]()
    with suppress(OSError, ValueError):
        last_used = (path / _KEY).stat().st_mtime
        made_from = json.loads((path / _KEY).read_bytes())
    try:
        held = describe(path, verify=False)
    except ValueError:
        held = None
    return Entry(
        key=path.name,
        source=(held["about"].get("source") or ", ".join(held["files"])) if held else None,
        rows=held["rows"] if held else 0,
        features=held["examples"] if held else 0,
        tokens=held["size"] if held else 0,
        bytes=_size(path),
        created=created,
        last_used=last_used,
        in_use=_in_use(path),
        damaged=held is None,
        made_from=made_from,
    )


def _in_use(entry: Path) -> bool:
    with ExitStack() as stack, suppress(OSError):
        handle = os.open(entry / MANIFEST, os.O_RDWR)  # on NFS only what is open for writing can be locked for itself
        stack.callback(os.close, handle)
        return not _try_lock(handle)
    return False


def _keys() -> dict[str, set[str]]:
    """The keys that there are files of, and for each which: entry, left, lock."""
    found = defaultdict[str, set[str]](set)
    try:
        for path in _tokens().iterdir():
            if match := _NAME.fullmatch(path.name):
                kind = str(match.lastgroup)
                found[match[kind]].add(kind)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", file=str(_tokens())) from None
    return found


def _size(folder: Path) -> int:
    """Bytes of its files; 0 if it vanishes meanwhile."""
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in folder.iterdir())
    return 0


def _remove(folder: Path) -> int:
    """Remove a folder, if there is one; return how many bytes it had."""
    if not folder.exists():
        return 0
    size = _size(folder)
    shutil.rmtree(folder)
    return size


def _temporary_root() -> Path:
    """A cache that lives as long as this process. Removes those of processes that were killed."""
    with storage_errors(Path(os.environ.get("TMPDIR", "/tmp"))):
        for old in Path(tempfile.gettempdir()).glob(f"{_TEMPORARY}*"):
            _remove_if_dead(old)
        made = Path(tempfile.mkdtemp(prefix=f".{_TEMPORARY}"))
        handle = os.open(made / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)  # until this process and its forks have ended
        made = made.rename(made.with_name(made.name[1:]))  # from now on others find it
    atexit.register(_remove_own, made, os.getpid())
    return made


def _remove_if_dead(cache: Path) -> None:
    with ExitStack() as stack, suppress(OSError):  # it may be another user's
        handle = os.open(cache / _OWNER, os.O_RDWR | os.O_NOFOLLOW)
        stack.callback(os.close, handle)
        if _try_lock(handle):
            shutil.rmtree(cache)


def _remove_own(cache: Path, process: int) -> None:
    if os.getpid() == process:  # and not one that it has forked
        shutil.rmtree(cache, ignore_errors=True)
