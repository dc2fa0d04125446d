"""Sources of rows: a file, a folder of files, or a dataset on the hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

from peftcli.data.dialect import Dialect
from peftcli.data.exports import from_export
from peftcli.data.hub_rows import HubRows
from peftcli.data.media import SAMPLE, MediaRule, captions_of, describe_media, find_rules, is_media, media_rows
from peftcli.data.plain_text import HEAD, LINES_OF_TEXT, form_of
from peftcli.data.readers import (
    ACCEPTED,
    COMPRESSED,
    EXTENSIONS,
    check_file,
    check_regular,
    class_names_of,
    find_dialect,
    kind_of,
    read_file,
    read_stdin,
)
from peftcli.data.rows import Place, Row, add_keys, count_of
from peftcli.data.text_rows import first_line, quote
from peftcli.errors import DataError
from peftcli.guard.files import read_small
from peftcli.schema import FILE_SETTINGS, Dataset, Source
from peftcli.system.disk import sha256
from peftcli.system.hub_requests import is_repo_id
from peftcli.system.outputs import expand_user

_SAVED = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
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
_MAX_DESCRIPTION = 1 << 20
_EVALUATED = ("validation", "valid", "val", "dev", "eval", "test")
"""Splits for evaluation, the likeliest first."""
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FILE_ENDINGS = (
    *(*EXTENSIONS, *COMPRESSED),
    *(".md", ".zip", ".bz2", ".xz", ".yaml", ".xls", ".pkl", ".spacy"),
)
"""A name with one of these endings is a file, though it could be a hub id."""
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
        captions: Mapping[str, str] | None = None,
        documents: bool = False,
        note: str | None = None,
    ):
        self._source, self._hub, self._media = source, hub, media or {}
        self._tools = dict[str, None]()
        self._captions, self._documents, self._note = captions or {}, documents, note
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
        for name, path in chain(self._media.items(), ((path, path) for path in self._captions.values())):
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

    @cached_property
    def dialects(self) -> dict[str, Dialect]:
        """How the text of each file is read: as the source says, else as found from its bytes."""
        given = self._source
        return {
            name: find_dialect(
                path, name, delimiter=given.delimiter, encoding=given.encoding, is_document=self._documents
            )
            for name, path in self.files.items()
        }

    @cached_property
    def rules(self) -> list[MediaRule]:
        """How columns name files that lie elsewhere or lack a suffix, by the first rows.

        Where a name in the header names such a file too, the header is a row, and the columns get other names.
        """
        found = self._rules()
        name = next(iter(self.dialects), "")
        if found and name and (columns := self._names_of_columns(found[0], name)):
            self.dialects[name] = replace(self.dialects[name], columns=columns)
            found = self._rules()
        return found

    def _rules(self) -> list[MediaRule]:
        if self._hub is not None or not self.files:
            return []
        with suppress(DataError):
            first = islice((row for row in self._plain_rows() if isinstance(row, Row)), SAMPLE)
            return find_rules(list(first), Path(next(iter(self.files))).name)
        return []

    def _names_of_columns(self, rule: MediaRule, name: str) -> tuple[str, ...]:
        """Names for the columns of a file whose header is a row; those of LJSpeech where there are as many."""
        path, root = self.files[name], self._source.media_root
        folder = expand_user(Path(root)) if root else path.parent
        if kind_of(path.name) not in ((".csv", ""), (".tsv", "")):
            return ()
        if not (folder / f"{rule.folder}{rule.column}{rule.suffix}").is_file():
            return ()
        first = next((row for row in read_file(path, name, self.dialects[name]) if isinstance(row, Row)), None)
        columns = list(first.values) if first else []
        if not columns or columns[0] != rule.column:
            return tuple(f"column_{at}" for at in range(1, len(columns) + 1))
        known = {2: ("id", "text"), 3: ("id", "raw_text", "text")}
        return known.get(len(columns), ("id", *(f"column_{at}" for at in range(2, len(columns) + 1))))

    def notes(self) -> list[str]:
        """Return what was chosen while the source was opened, a line each."""
        found = [self._note] if self._note else []
        if self.left_out:
            first = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
            found.append(f"left out {count_of(len(self.left_out), 'file')} of other kinds: {first}")
        if not self.files and (how := describe_media(self._media, self._folder, self._captions)):
            found.append(how)
        rules = [rule.described() for rule in self.rules]
        found += [*dict.fromkeys(filter(None, (dialect.described() for dialect in self.dialects.values()))), *rules]
        found += [f"an export of {tool}, read as its texts with entities or classes" for tool in self._tools]
        return [f"{self.name}: {each}" for each in found]

    @property
    def _folder(self) -> str:
        return str(Path(self._source.train))

    def _file_rows(self) -> Iterator[Row | DataError]:
        if not self.files:
            yield from media_rows(self._media, self._folder, self._captions)
            return
        rules = self.rules
        for row in self._plain_rows():
            if isinstance(row, Row):
                for rule in rules:
                    rule.apply(row)
            yield row

    def _plain_rows(self) -> Iterator[Row | DataError]:
        """Yield the rows of the files."""
        declared, root = self.class_names(), self._source.media_root
        for name, path in self.files.items():
            own = self._class_names[name]
            named = {column: names for column, names in own.items() if names != declared[column]}
            folder = expand_user(Path(root)) if root else path.parent
            label = path.parent.name if self._documents and path.parent != Path(self._source.train) else None
            for row in read_file(path, name, self.dialects[name], is_document=self._documents):
                if isinstance(row, Row):
                    if label is not None:
                        row.values["label"] = label
                    values = row.values
                    if exported := from_export(values):
                        tool, values = exported
                        self._tools[tool] = None
                    row = _named(replace(row, values=values, folder=folder), named)
                yield row

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
    """Resolve a folder: its files of rows, with the media that they may name; without any, its media are the rows.

    Texts are rows where there is nothing else.
    """
    top, shown = source.train, display_name(source.train)
    listed = {path[len(str(folder)) + 1 :]: path for path in _walk(str(folder), top)}
    names = sorted(listed, key=lambda name: name.split("/"))
    saved, note = _saved_split(source, names)
    descriptions = {name for name in names if name.rpartition("/")[2] in _SAVED}
    media = [name for name in names if is_media(name)]
    files = [name for name in names if kind_of(name) and name not in descriptions]
    if saved is not None:
        files, media = saved, []
    texts = [name for name in files if kind_of(name) == (".txt", "")]
    captions = captions_of((listed[name] for name in media), {name: listed[name] for name in texts})
    if len(texts) < len(files) or media:
        files = [name for name in files if name not in texts]
    found, read = files or media, {*files, *((name for name in texts) if captions else ())}
    if not found:
        there = display_name(", ".join(names[:5])[:200]) or "nothing"
        message = f"the folder contains no file that can be read; it contains: {there}"
        raise DataError(message, file=shown, hint=ACCEPTED)
    if saved is None:
        _refuse_splits(found, files, shown)
    documents = bool(texts) and files == texts and _are_documents(files, listed)
    if documents:
        classes = len({name.rpartition("/")[0] for name in files if "/" in name})
        note = f"{count_of(len(files), 'text')}, a row each"
        note += f", labelled by {count_of(classes, 'folder')}" if classes else ""

    def called(name: str) -> str:
        return display_name(f"{top.rstrip('/')}/{name}")

    for name in files:
        check_file(Path(listed[name]), called(name))
    return ResolvedSource(
        source,
        {called(name): Path(listed[name]) for name in files},
        media={called(name): listed[name] for name in media},
        left_out=[display_name(name) for name in names if not (saved or is_media(name) or name in read)],
        captions={} if files else captions,
        documents=documents,
        note=note,
    )


def _refuse_splits(found: Sequence[str], files: Sequence[str], shown: str) -> None:
    """Raise DataError if a folder contains several splits."""
    split_of = _split_in_name if files else _split_of_folder
    of_split = {split: name for name in found if (split := split_of(name))}
    unnamed = [name for name in files if not _split_in_name(name)]
    if unnamed and any(_whole_split(name.split("/")) for name in files):
        of_split.setdefault("train", unnamed[-1])
    splits = [display_name(of_split[split]) for split in ("train", "validation", "test") if split in of_split]
    if len(splits) > 1:
        message = f"the folder contains several splits: {' and '.join(splits)}"
        raise DataError(message, file=shown, hint="Give the file or subfolder of one split; dataset.mix takes several.")


def _are_documents(files: Sequence[str], listed: Mapping[str, str]) -> bool:
    """Whether each of several text files is a row, and not each of its lines: those of one split are read by lines."""
    if len(files) < 2 or any(map(_whole_split, ([name.rpartition("/")[2]] for name in files))):
        return False
    with Path(listed[files[0]]).open("rb") as file:
        return form_of(file.read(HEAD)) == LINES_OF_TEXT


def saved_splits(name: str) -> list[str]:
    """Return the splits of a folder that ``DatasetDict.save_to_disk`` wrote; none for anything else."""
    path = expand_user(Path(name)) / "dataset_dict.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        splits = json.loads(read_small(path, _MAX_DESCRIPTION))["splits"]
        return [split for split in splits if isinstance(split, str)]
    return []


def _saved_split(source: Source, names: Sequence[str]) -> tuple[list[str] | None, str | None]:
    """The Arrow files that ``save_to_disk`` wrote of the source's split, and what to say; None for other folders."""
    arrow = [name for name in names if name.endswith(".arrow") and not name.rpartition("/")[2].startswith("cache-")]
    if "state.json" in names:
        return [name for name in arrow if "/" not in name], None
    if "dataset_dict.json" not in names:
        return None, None
    splits = saved_splits(source.train)
    if source.split not in splits:
        message = f"has no split {source.split!r}; it has: {', '.join(splits)[:200]}"
        raise DataError(message, file=display_name(source.train), key="dataset.split")
    note = f"the split {source.split} of {', '.join(splits)[:200]}"
    return [name for name in arrow if name.rpartition("/")[0] == source.split], note


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
    split = dataset.eval_split or dataset.split
    if exists_locally(name):
        splits = saved_splits(name)
        split = dataset.eval_split or next(filter(splits.__contains__, _EVALUATED), "train") if splits else "train"
    trained = [source for source in dataset.sources() if source.train == name]
    if len(trained) == 1:
        return replace(trained[0], split=split, weight=None, limit=None)
    same = {key: getattr(dataset, key) for key in ("streaming", "format", "columns", *FILE_SETTINGS)}
    return Source(train=name, split=split, **same)


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
