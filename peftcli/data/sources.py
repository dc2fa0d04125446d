"""Sources of rows: a file, a folder of files, or a dataset on the hub."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from peftcli.data.hub_rows import HubRows
from peftcli.data.readers import (
    ACCEPTED,
    COMPRESSED,
    EXTENSIONS,
    check_file,
    check_regular,
    class_names_of,
    kind_of,
    read_file,
    read_stdin,
)
from peftcli.data.rows import Place, Row, add_keys
from peftcli.data.text_rows import first_line, quote
from peftcli.errors import DataError
from peftcli.schema import Dataset, Source
from peftcli.system.disk import sha256
from peftcli.system.hub_requests import is_repo_id
from peftcli.system.outputs import expand_user

_SAVED = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
"""Files that describe a dataset and contain no rows. ``Dataset.save_to_disk`` writes them beside Arrow files."""
_SPLIT_NAME = (
    r"(?:(?P<train>train(?:ing)?)|(?P<test>test(?:ing|[ab])?)|(?P<validation>val(?:id(?:ation)?)?|dev|eval(?:uation)?))"
)
_SPLIT = re.compile(rf"(?<![a-z]){_SPLIT_NAME}(?![a-z])", re.IGNORECASE)
"""The name of a split in a path, as datasets finds it: a word of its own."""
_WHOLE_SPLIT = re.compile(
    rf"(?:.*[^a-z])?{_SPLIT_NAME}(?:[ _-]?(?:set|images|of|\d))*(?:\.\w+)*", re.IGNORECASE | re.DOTALL
)
"""A folder or file that is a split: ``test_set``, ``val2017``, ``my-test.csv``. Others mention it: test_tube."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FILE_ENDINGS = (
    *(*EXTENSIONS, *COMPRESSED),
    *(".txt", ".tsv", ".md", ".zip", ".bz2", ".xz", ".arrow", ".yaml", ".xlsx"),
)
"""A name with one of these endings is a file, though it could be a hub id."""
_MEDIA = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".mp3"), "audio"),
}
"""Extension of a file of an image or a sound -> column with its path."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""A byte of a name that is not UTF-8, as Python reads it."""
_MAX_DEPTH, _MAX_FILES = 100, 1_000_000
"""Levels of folders, and entries of all folders of a source together."""


class ResolvedSource:
    """A source of a recipe, resolved to its files or to a dataset on the hub.

    Its methods raise DataError where a file, or a split or configuration of a dataset, is missing or cannot be read,
    and NetworkError or HubError where the hub cannot be reached or refuses access.
    """

    def __init__(
        self,
        source: Source,
        files: dict[str, Path],
        hub: HubRows | None = None,
        media: Mapping[str, str] | None = None,
        left_out: Sequence[str] = (),
    ):
        self._source, self._hub, self._media = source, hub, media or {}
        self._top = len(str(Path(source.train))) + 1
        self.files = files
        """The files of rows by name, in order; none for a folder of media or a dataset on the hub."""
        self.left_out = list(left_out)
        """Files of the folder that cannot be read."""
        self.name = display_name(source.train)
        """The name in the recipe, for messages."""
        self.path = "" if hub else str(Path(source.train).absolute())
        """Of a file or folder."""

    def class_names(self) -> dict[str, tuple[str, ...]]:
        """The names of classes that the source declares for the numbers of a column, as datasets' ``ClassLabel``.

        Those of several files are joined, in the order of the files.
        """
        if self._hub is not None:
            return self._hub.class_names()
        found = dict[str, tuple[str, ...]]()
        for of_file in self._class_names.values():
            for column, names in of_file.items():
                found[column] = tuple(dict.fromkeys([*found.get(column, ()), *names]))
        return found

    @cached_property
    def _class_names(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """File -> the names of classes that it declares, by column."""
        return {name: class_names_of(path) for name, path in self.files.items()}

    def fingerprint(self) -> dict[str, str]:
        """Identify the content: file -> SHA-256 of the bytes, read at each call; or ``name@commit`` -> commit.

        Media of a folder have one SHA-256 over their names and sizes, which a copy of the folder has too. Their bytes
        are known by the digests that a task keeps of them.
        """
        return self.state()[0]

    def state(self) -> tuple[dict[str, str], str]:
        """Return the fingerprint, and a hash of when each media file and its inode last changed on this disk."""
        if self._hub is not None:
            return {f"{self.name}@{self._hub.commit}": self._hub.commit}, ""
        hashes = {name: _sha256(path, name) for name, path in self.files.items()}
        if not self._media:
            return hashes, ""
        sizes, times = hashlib.sha256(), hashlib.sha256()
        for name, path in self._media.items():
            try:
                found = Path(path).stat()
            except OSError as error:
                raise DataError(f"cannot be read: {first_line(error)}", file=name) from error
            sizes.update(f"{path[self._top :]}\0{found.st_size}\0".encode(errors="surrogateescape"))
            times.update(f"{found.st_mtime_ns} {found.st_ctime_ns} ".encode())
        return {**hashes, self.name: sizes.hexdigest()}, times.hexdigest()

    def check_unchanged(self, state: tuple[dict[str, str], str]) -> None:
        """Raise DataError unless the content has the ``state`` taken before ``rows()`` was called."""
        (fingerprint, times), (now, times_now) = state, self.state()
        changed = [name for name, known in fingerprint.items() if now.get(name) != known]
        if changed or times_now != times:
            hint = "Run the command again when no process writes to the file."
            raise DataError("changed while it was read", file=[*changed, self.name][0], hint=hint)

    def rows(self) -> Iterator[Row | DataError]:
        """Yield the rows in order; for a bad row, the error about it. ``limit`` counts both.

        Raises:
            DataError: a file, or the rest of it, cannot be read, or there are no rows.
        """
        found = self._file_rows() if self._hub is None else self._hub_rows(self._hub)
        empty = True
        for row in islice(found, self._source.limit):
            empty = False
            if isinstance(row, Row):
                named = [name for _, name in self._source.renamed()]
                add_keys(row.values, filter(None, [*named, self._source.group_by]))
            yield row
        if empty:
            raise DataError("contains no rows", file=self.name)

    def _file_rows(self) -> Iterator[Row | DataError]:
        if not self.files:
            yield from _media_rows(self._media, str(Path(self._source.train)))
            return
        declared = self.class_names()
        for name, path in self.files.items():
            own = self._class_names[name]
            named = {column: names for column, names in own.items() if names != declared[column]}
            for row in read_file(path, name):
                yield _named(replace(row, folder=path.parent), named) if isinstance(row, Row) else row

    def _hub_rows(self, hub: HubRows) -> Iterator[Row | DataError]:
        for number, values in enumerate(hub.rows(), start=1):
            place = Place(self.name, number)
            yield place.error(values) if isinstance(values, str) else Row(values, place)


def is_path(name: str) -> bool:
    """Return whether the name is a path and not a hub id, even if no such file exists."""
    return name.lower().endswith(_FILE_ENDINGS) or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name)


def open_source(source: Source) -> ResolvedSource:
    """Resolve a source without reading it.

    Raises:
        DataError: the source does not exist, or cannot be read.
    """
    name = source.train
    if not name:
        raise DataError("is empty; name a file or a hub dataset", key="dataset.train")
    if "://" in name:
        hint = "Download the file and give its path, or give a hub dataset id."
        raise DataError(f"{quote(name)} is a URL", key="dataset", hint=hint)
    if name.startswith("~"):
        name = str(expand_user(Path(name)))
        source = replace(source, train=name)
    path = Path(name)
    if exists_locally(name):
        if _is_folder(path):
            return _open_folder(source, path)
        check_file(path, display_name(name))
        return ResolvedSource(source, {display_name(name): path})
    if is_path(name):
        raise DataError("no such file", file=display_name(name), hint=_near_files(path))
    if not is_repo_id(name):
        raise DataError("no such file, and no hub id", file=display_name(name), hint=_near_files(path))
    return ResolvedSource(source, {}, HubRows(source))


def exists_locally(name: str) -> bool:
    """Return whether a file, folder or link (even a broken one) has this name.

    Raises:
        DataError: the system refuses access.
    """
    try:
        expand_user(Path(name)).lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened: {first_line(error)}", file=display_name(name[:200])) from error
    return True


def display_name(name: str) -> str:
    """Return a file's name for messages: escaped if it cannot be printed."""
    return name if name.isprintable() else repr(name)


def _open_folder(source: Source, folder: Path) -> ResolvedSource:
    """Resolve a folder: its files of rows, with the media that they may name; without any, its media are the rows."""
    top, shown = source.train, display_name(source.train)
    listed = {path[len(str(folder)) + 1 :]: path for path in _walk(str(folder), top)}
    names = sorted(listed, key=lambda name: name.split("/"))
    descriptions = {name for name in names if name.rpartition("/")[2] in _SAVED}
    if descriptions and any(name.endswith(".arrow") for name in names):
        hint = "Write the dataset with Dataset.to_parquet, and give that file."
        raise DataError("was written by Dataset.save_to_disk, whose format cannot be read", file=shown, hint=hint)
    media = [name for name in names if is_media(name)]
    files = [name for name in names if kind_of(name) and name not in descriptions]
    found, read = files or media, set(files)
    if not found:
        there = display_name(", ".join(names[:5])[:200]) or "nothing"
        message = f"the folder contains no file that can be read; it contains: {there}"
        raise DataError(message, file=shown, hint=ACCEPTED)
    split_of = _split_in_name if files else _split_of_folder
    of_split = {split: name for name in found if (split := split_of(name))}
    unnamed = [name for name in files if not _split_in_name(name)]
    if unnamed and any(_whole_split(name.split("/")) for name in files):
        of_split.setdefault("train", unnamed[-1])
    splits = [display_name(of_split[split]) for split in ("train", "validation", "test") if split in of_split]
    if len(splits) > 1:
        message = f"the folder contains several splits: {' and '.join(splits)}"
        raise DataError(message, file=shown, hint="Give the file or subfolder of one split; dataset.mix takes several.")

    def called(name: str) -> str:
        return display_name(f"{top.rstrip('/')}/{name}")

    for name in files:
        check_file(Path(listed[name]), called(name))
    return ResolvedSource(
        source,
        {called(name): Path(listed[name]) for name in files},
        media={called(name): listed[name] for name in media},
        left_out=[display_name(name) for name in names if not is_media(name) and name not in read],
    )


def is_media(name: str) -> bool:
    """Return whether a file name has the extension of an image or a sound."""
    return Path(name).suffix.lower() in _MEDIA


def _media_rows(files: Mapping[str, str], top: str) -> Iterator[Row | DataError]:
    """Yield one row per image or sound, by names and paths, labelled with the name of its folder.

    photos/cat/1.jpg becomes {"image": "photos/cat/1.jpg", "label": "cat"}. Files directly in ``top`` have no label.
    """
    for name, path in files.items():
        values, place = {_MEDIA[Path(path).suffix.lower()]: path}, Place(name, 1)
        folder = path.rpartition("/")[0]
        if folder != top:
            values["label"] = folder.rpartition("/")[2]
        if _NOT_UTF8.search(values.get("label", "")):
            yield place.error("the name of its folder is not UTF-8", key="label", hint="Rename the folder.")
        else:
            yield Row(values, place)


def _split_in_name(name: str) -> str | None:
    """The split that the name of a file of rows mentions."""
    part = _SPLIT.search(name)
    return part and part.lastgroup


def _split_of_folder(name: str) -> str | None:
    """The split that one of a medium's folders is."""
    return _whole_split(name.split("/")[:-1])


def _whole_split(parts: Iterable[str]) -> str | None:
    """The split that a folder or file of a path is."""
    part = next(filter(None, map(_WHOLE_SPLIT.fullmatch, parts)), None)
    return part and part.lastgroup


def _walk(top: str, source: str) -> Iterator[str]:
    """Yield the files below a folder, media if they are regular ones.

    A folder with links to it is read once, by its real path if possible.
    """
    plain: list[tuple[str, tuple[str, ...]]] = [(top, ())]
    links: deque[tuple[str, tuple[str, ...]]] = deque()
    read, found = set[str](), 0
    while plain or links:
        folder, above = plain.pop() if plain else links.popleft()
        try:
            real = os.path.realpath(folder)
            with os.scandir(folder) as inside:
                entries = sorted((each for each in inside if not each.name.startswith(".")), key=lambda each: each.name)
        except OSError as error:
            raise DataError(f"the folder cannot be read: {first_line(error)}", file=display_name(folder)) from error
        if real in above:
            raise DataError("is a link to a folder above itself", file=display_name(folder))
        if real in read:
            continue
        read.add(real)
        found += len(entries)
        if len(above) > _MAX_DEPTH or found > _MAX_FILES:
            many = f"{_MAX_DEPTH} levels of folders" if found <= _MAX_FILES else f"{_MAX_FILES:,} files"
            hint = "Give a subfolder, or put the rows into fewer files."
            raise DataError(f"the folder contains more than {many}", file=display_name(source), hint=hint)
        for entry in entries:
            if _is_folder(entry):
                (links if entry.is_symlink() else plain).append((entry.path, (*above, real)))
                continue
            if is_media(entry.name) and not entry.is_file():
                check_regular(Path(entry.path), display_name(entry.path))
            yield entry.path


def _is_folder(path: Path | os.DirEntry[str]) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise DataError(f"cannot be read: {first_line(error)}", file=display_name(os.fspath(path))) from error


def _near_files(path: Path) -> str:
    folder = display_name(str(path.parent))
    if not path.parent.is_dir():
        return f"The folder {folder} does not exist either."
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), 1000)]
    except OSError as error:
        return f"The folder {folder} cannot be read: {first_line(error)}."
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    others = sorted(filter(kind_of, names))[:3]
    if not near and not others:
        return f"{folder} contains no file of that kind."
    return f"{'Similar names' if near else 'Files of data'} in {folder}: {', '.join(map(display_name, near or others))}"


def _named(row: Row, named: Mapping[str, Sequence[str]]) -> Row | DataError:
    """The row with the names of its classes in place of their numbers, in these columns."""
    for column in named.keys() & row.values:
        try:
            row.values[column] = _name(row.values[column], named[column])
        except IndexError:
            return row.place.error("a number that its file has no class for", key=column)
    return row


def _name(value: Any, names: Sequence[str]) -> Any:
    """The name of a number's class, also in a list. A number below 0, as -100, stays."""
    if isinstance(value, list):
        return [_name(each, names) for each in value]
    return names[value] if isinstance(value, int) and value >= 0 else value


def _sha256(path: Path, name: str) -> str:
    check_regular(path, name)
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"cannot be read: {first_line(error)}", file=name) from error


def eval_source(dataset: Dataset) -> Source | None:
    """Return the evaluation source if ``eval`` or ``eval_split`` names one."""
    name = dataset.eval or (dataset.train if dataset.eval_split else None)
    if name is None:
        return None
    split = "train" if exists_locally(name) else dataset.eval_split or dataset.split
    trained = [source for source in dataset.sources() if source.train == name]
    if len(trained) == 1:
        return replace(trained[0], split=split, weight=None, limit=None)
    return Source(train=name, split=split, streaming=dataset.streaming, format=dataset.format, columns=dataset.columns)


def read_rows(source: Path) -> list[Row]:
    """Read the rows of a file, folder or hub dataset; those of ``-`` are JSON lines on standard input.

    Raises:
        DataError: a row that cannot be read, or there are no rows.
    """
    rows, name = [], str(source)
    for row in read_stdin() if name == "-" else open_source(Source(train=name)).rows():
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    return rows
