"""Where rows come from: a file, a folder of files, or a dataset of the hub."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from peftcli.data.hub_rows import HubRows
from peftcli.data.media import is_media, media_rows
from peftcli.data.readers import ACCEPTED, check_file, check_regular, kind_of, read_file
from peftcli.data.rows import Place, Row
from peftcli.data.source_names import is_path
from peftcli.data.text_rows import CHUNK, cut, reason
from peftcli.errors import DataError
from peftcli.schema import Dataset, Source

_SAVED = {"dataset_info.json", "dataset_dict.json"}
"""Files beside the data of a dataset that the library datasets wrote."""
_SPLIT = re.compile(r"(?:^|/)(train|test|valid|validation|val|dev|eval)(?![a-z])", re.IGNORECASE)
"""A file or folder that is named after a split."""
_DEEPEST, _MOST = 100, 1_000_000
"""Folders in each other, and what is in all folders of a source together."""


class Opened:
    """A source of a recipe, found: its files, or the dataset on the hub."""

    def __init__(
        self, source: Source, files: dict[str, Path], hub: HubRows | None = None, left_out: Sequence[str] = ()
    ):
        self._source, self._files, self._hub = source, files, hub
        self._is_media = all(map(is_media, files)) and hub is None
        self.left_out = list(left_out)
        """Files of its folder whose kind cannot be read."""
        self.described = shown(source.train)
        """What the recipe calls it."""

    @property
    def files(self) -> list[Path]:
        """Its files, in order; none for a dataset of the hub."""
        return list(self._files.values())

    def fingerprint(self) -> dict[str, str]:
        """What its content is: file -> SHA-256 of the bytes, read each time; or ``name@commit`` -> commit.

        Raises:
            DataError: a file cannot be read.
            NetworkError: the hub cannot be reached.
            HubError: the hub refuses access.
        """
        if self._hub is not None:
            return {f"{self.described}@{self._hub.commit}": self._hub.commit}
        hashes = {name: _sha256(path, name) for name, path in self._files.items()}
        if self._is_media:  # of which there are thousands
            return {self.described: hashlib.sha256(json.dumps(hashes).encode()).hexdigest()}
        return hashes

    def check_unchanged(self, fingerprint: dict[str, str]) -> None:
        """Reads the files once more and compares. What ``rows()`` gave before is the content of ``fingerprint`` then.

        Raises:
            DataError: something has changed since.
        """
        now = self.fingerprint()
        for name, known in fingerprint.items():
            if now.get(name) != known:
                raise DataError("changed while it was read", file=name, hint="Start again once nothing writes to it.")

    def rows(self) -> Iterator[Row | DataError]:
        """The rows, in order; for a row that is wrong, the error about it instead. ``limit`` counts both.

        Raises:
            DataError: a file cannot be read, or not any further, or there are no rows.
            NetworkError: the hub cannot be reached.
            HubError: the hub refuses access.
        """
        found = self._file_rows() if self._hub is None else self._hub_rows(self._hub)
        empty = True
        for row in islice(found, self._source.limit):
            empty = False
            yield row
        if empty:
            raise DataError("holds no rows", file=self.described)

    def _file_rows(self) -> Iterator[Row | DataError]:
        if self._is_media:
            yield from media_rows(self._files, Path(self._source.train))
            return
        number = 0
        for name, path in self._files.items():
            for row in read_file(path, name, number + 1):
                number += 1
                yield row

    def _hub_rows(self, hub: HubRows) -> Iterator[Row | DataError]:
        for number, values in enumerate(hub.rows(), start=1):
            place = Place(self.described, number)
            yield place.error(values) if isinstance(values, str) else Row(values, place)


def open_source(source: Source) -> Opened:
    """Finds a source. Nothing is read yet.

    Raises:
        DataError: it does not exist, or is nothing that can be read.
    """
    name = source.train
    if not name:
        raise DataError("names no file", key="dataset.train")
    if "://" in name:
        hint = "Download the file and name it, or give a hub dataset id."
        raise DataError(f"{cut(name)} is a URL", key="dataset", hint=hint)
    if source.limit is not None and source.limit < 1:
        raise DataError(f"must be at least 1, not {source.limit}", key="dataset.limit")
    path = Path(name)
    if is_local(name):
        given = [key for key in ("split", "name", "revision") if getattr(source, key) != getattr(Source, key)]
        if given:
            raise DataError(f"means nothing for a local file: {shown(name)}", key=f"dataset.{given[0]}")
        in_folder = _is_folder(path)
        files, left_out = _listed(path, name) if in_folder else ({shown(name): path}, [])
        for each, file in files.items():
            (check_regular if in_folder and is_media(each) else check_file)(file, each)
        return Opened(source, files, left_out=left_out)
    if is_path(name):
        raise DataError("no such file", file=shown(name), hint=_near_files(path))
    return Opened(source, {}, HubRows(source))


def is_local(name: str) -> bool:
    """Whether a file or folder has this name; a link that leads nowhere counts.

    Raises:
        DataError: the system refuses to look.
    """
    try:
        Path(name).lstat()
    except FileNotFoundError:
        return False
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be opened: {reason(error)}", file=shown(name[:200])) from error
    return True


def shown(name: str) -> str:
    """A file's name as errors and reports name it: escaped where it cannot be printed."""
    return name if name.isprintable() else repr(name)


def _listed(folder: Path, source: str) -> tuple[dict[str, Path], list[str]]:
    """Of a folder and its subfolders, hidden ones aside: the files that can be read, by name, and the others' names."""
    paths = sorted(_files(folder, source))
    names = [path.relative_to(folder).as_posix() for path in paths]
    if _SAVED & {path.name for path in paths}:
        hint = "Write it anew with Dataset.to_parquet, and name that file."
        raise DataError("a dataset that was saved by save_to_disk", file=shown(source), hint=hint)
    listed = dict(zip(names, paths, strict=True))
    media = {name: path for name, path in listed.items() if is_media(name)}
    found = {name: path for name, path in listed.items() if kind_of(name)} or media
    if not found:
        there = shown(", ".join(names[:5])[:200]) or "nothing"
        message = f"a folder without a file that can be read; in it: {there}"
        raise DataError(message, file=shown(source), hint=ACCEPTED)
    splits = {
        "train" if part[1].lower() == "train" else "other": name for name in found if (part := _SPLIT.search(name))
    }
    if len(splits) > 1:
        message = f"a folder with several splits: {shown(splits['train'])} and {shown(splits['other'])}"
        raise DataError(message, file=shown(source), hint="Name the file or the subfolder of one split.")
    files = {shown(f"{source.rstrip('/')}/{name}"): path for name, path in found.items()}
    return files, [shown(name) for name in names if name not in found and name not in media]


def _files(top: Path, source: str) -> Iterator[Path]:
    """The files in a folder and its subfolders. One with several names is read once, not by a link if it can be."""
    plain: list[tuple[Path, tuple[Path, ...]]] = [(top, ())]
    links: deque[tuple[Path, tuple[Path, ...]]] = deque()
    read, found = set[Path](), 0
    while plain or links:
        folder, above = plain.pop() if plain else links.popleft()
        try:
            real = folder.resolve()
            entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise DataError(f"the folder cannot be read: {reason(error)}", file=shown(str(folder))) from error
        if real in above:
            raise DataError("is a link to a folder that holds it", file=shown(str(folder)))
        if real in read:
            continue
        read.add(real)
        found += len(entries)
        if len(above) > _DEEPEST or found > _MOST:
            what = f"more than {_DEEPEST} folders in each other" if found <= _MOST else f"more than {_MOST:,} files"
            hint = "Name a subfolder, or put the rows into fewer files."
            raise DataError(f"a folder with {what}", file=shown(source), hint=hint)
        for entry in entries:
            if not _is_folder(entry):
                yield entry
            else:
                (links if entry.is_symlink() else plain).append((entry, (*above, real)))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:
        raise DataError(f"cannot be read: {reason(error)}", file=shown(str(path))) from error


def _near_files(path: Path) -> str:
    folder = shown(str(path.parent))
    if not path.parent.is_dir():
        return f"The folder {folder} does not exist either."
    try:
        names = [entry.name for entry in islice(path.parent.iterdir(), 1000)]
    except OSError as error:
        return f"The folder {folder} cannot be read: {reason(error)}."
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or sorted(filter(kind_of, names))[:3]
    return f"Near it in {folder}: {', '.join(map(shown, near))}" if near else f"{folder} holds no file of that kind."


def _sha256(path: Path, name: str) -> str:
    digest = hashlib.sha256()
    check_regular(path, name)
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
    except OSError as error:
        raise DataError(f"cannot be read: {reason(error)}", file=name) from error
    return digest.hexdigest()


def eval_source(dataset: Dataset) -> Source | None:
    """What is evaluated on, if ``eval`` or ``eval_split`` names it.

    Raises:
        DataError: settings that contradict each other.
    """
    ways = [name for name in ("eval", "eval_fraction") if getattr(dataset, name) is not None]
    if dataset.eval is None and dataset.eval_split is not None:
        ways.append("eval_split")
    if len(ways) > 1:
        raise DataError(f"two sources of evaluation rows: {' and '.join(ways)}", key=f"dataset.{ways[1]}")
    if not ways or dataset.eval_fraction is not None:
        return None
    name = dataset.train if dataset.eval is None else dataset.eval
    if name is None:
        raise DataError(
            "which dataset of the mix has this split is not said; name it in dataset.eval", key="dataset.eval_split"
        )
    local, same = is_local(name), name == dataset.train
    if local and dataset.eval_split is not None:
        raise DataError(f"means nothing for a local file: {shown(name)}", key="dataset.eval_split")
    return Source(
        train=name,
        split="train" if local else dataset.eval_split or dataset.split,
        name=dataset.name if same else None,
        revision=dataset.revision if same else None,
        streaming=dataset.streaming,
        format=dataset.format,
        columns=dataset.columns,
    )


def held_out(count: int, fraction: float, seed: int) -> set[int]:
    """Which of ``count`` rows ``eval_fraction`` holds out, as positions from 0: at least one, and not all.

    It depends on the seed and a row's position only, through SHA-256, so it is the same with every Python version.

    Raises:
        DataError: ``fraction`` is not between 0 and 1, or there are fewer than two rows.
    """
    import numpy as np

    if not 0 < fraction < 1:
        raise DataError(f"expected a number between 0 and 1, found {fraction}", key="dataset.eval_fraction")
    if count < 2:
        raise DataError("one row cannot be split into training and evaluation rows", key="dataset.eval_fraction")
    # The first 8 bytes of a digest put the rows in an order; 80 MB for 10 million rows.
    starts = (hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8] for index in range(count))
    order = np.fromiter((int.from_bytes(start, "big") for start in starts), np.uint64, count)
    size = min(max(1, round(count * fraction)), count - 1)
    return set(np.argpartition(order, size)[:size].tolist())
