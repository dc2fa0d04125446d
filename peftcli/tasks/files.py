"""Files of rows, pictures and sounds: found, checked, and read again for a batch. What is in them is not cached."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.data.rows import Reader, Row
from peftcli.data.store import Column, Example
from peftcli.errors import DataError
from peftcli.guard.files import is_file

_MAX_NAME = 255
"""Characters of a file that was not found, in its error: it may be what the file should hold."""
FILE_COLUMNS = {"path": Column("str"), "content": Column("bytes"), "digest": Column("bytes")}
"""Those of a ``File`` in a store."""


@dataclass(frozen=True)
class File:
    """A file of a row, as a store holds it."""

    path: str
    """Empty where the row has only bytes."""
    held: bytes
    """The bytes that the row has; empty where the path is read."""
    digest: bytes

    @classmethod
    def of(cls, example: Example, prefix: str = "") -> File:
        """Return the file that an example holds in columns with this prefix."""
        return cls(*(example.arrays[f"{prefix}{name}"] for name in FILE_COLUMNS))

    def arrays(self, prefix: str = "") -> dict[str, Any]:
        """Return the values of these columns."""
        values = (self.path, self.held, self.digest)
        return {f"{prefix}{name}": value for name, value in zip(FILE_COLUMNS, values, strict=True)}

    def read(self) -> bytes:
        """Read the file, which must still be the one that was encoded.

        Raises:
            DataError: it is not.
        """
        content = self.held or read_file(self.path)
        if digest_of(content) != self.digest:
            raise DataError(
                "has changed since the rows were read",
                file=self.path,
                hint="Forget what was read: peftcli cache clear. Then start a new run.",
            )
        return content


def file_of(row: Row, reader: Reader, column: str, what: str = "a picture") -> tuple[File, bytes]:
    """The file that a row names, or whose bytes it has, and its content.

    Raises:
        DataError: the row has none, or it cannot be read.
    """
    value, key = reader.value(row, column), reader.names[column]
    path, content = (value.get("path"), value.get("bytes")) if isinstance(value, dict) else (value, None)
    if isinstance(value, bytes):
        path, content = "", value
    if not content and (not isinstance(path, str) or not path):
        raise row.place.error(f"expected a file or the bytes of {what}, found {value!r:.60}", key=key)
    found, folders = str(path or ""), [row.folder.absolute(), Path.cwd()]
    if not content and is_file(beside := row.folder / found):
        found = str(beside)
    with errors_of_row(row, key):
        read = content or read_file(found, () if Path(found).is_absolute() else folders)
    return File(found, content or b"", digest_of(read)), read


@contextmanager
def errors_of_row(row: Row, key: str) -> Iterator[None]:
    """Inside, the error of a file becomes one of its row, with the path in its message."""
    try:
        yield
    except DataError as error:
        if error.key is not None:  # it is one of a row
            raise
        message = f"{error.file}: {error.message}" if error.file else error.message
        raise row.place.error(message, key=key, hint=error.hint) from None


def read_file(path: str, folders: Sequence[Path] = ()) -> bytes:
    """Read a file, which was looked for in ``folders``.

    Raises:
        DataError: the file does not exist, or cannot be read.
    """
    file = Path(path)
    if not is_file(file):
        shown = path if len(path) < _MAX_NAME else f"{path[:_MAX_NAME]}..."
        if len(path) < _MAX_NAME and file.is_dir():
            raise DataError("is a folder, and no file", file=shown)
        if "://" in path:
            hint = "Download it, and name the file in its place."
            raise DataError("is an address, and only files are read", file=shown, hint=hint)
        places = " or ".join(dict.fromkeys(map(str, folders)))
        raise DataError(f"no such file in {places}" if places else "no such file", file=shown)
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", file=path) from None


def digest_of(content: bytes) -> bytes:
    """Return the digest by which a file's content is known again."""
    return hashlib.sha256(content).digest()[:8]
