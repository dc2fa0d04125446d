"""Read Excel's .xlsx files with openpyxl: the first sheet with rows, whose first row names the columns."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from datetime import date, time
from typing import IO, Any

from peftcli.data.rows import Place, Row
from peftcli.data.text_rows import TextFile, first_duplicate, first_line, quote
from peftcli.errors import DataError

_MAX_BYTES = 2 << 30
"""Bytes of all parts of a file, unpacked."""
_MAX_SHARED = 512 << 20
"""Bytes of its table of texts, which is held in memory."""


def read_excel(text: TextFile, file: IO[bytes]) -> Iterator[Row | DataError]:
    """Yield the rows of the first sheet with any. Formulas have the values that Excel saved.

    Raises:
        DataError: openpyxl is not installed, or the file cannot be read.
    """
    try:
        import openpyxl
    except ImportError:
        hint = "Install it: pip install 'peftcli[excel]'. Or save the sheet as CSV."
        raise DataError("reading .xlsx needs openpyxl", file=text.source, hint=hint) from None
    try:
        _check_parts(file, text.source)
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        for sheet in book.worksheets:
            yield from _rows(sheet.iter_rows(values_only=True), text)
            if text.number:
                return
    except (zipfile.BadZipFile, zlib.error, KeyError, ValueError, OSError, EOFError, SyntaxError, TypeError) as error:
        raise DataError(f"is not an .xlsx file, or is damaged: {first_line(error)}", file=text.source) from error


def _check_parts(file: IO[bytes], source: str) -> None:
    """Refuse what unpacks to too much, or whose XML defines entities, which can repeat themselves without end."""
    with zipfile.ZipFile(file) as parts:
        size = sum(part.file_size for part in parts.infolist())
        shared = sum(part.file_size for part in parts.infolist() if "sharedstrings" in part.filename.lower())
        if size > _MAX_BYTES or shared > _MAX_SHARED:
            raise DataError(f"unpacks to {size:,} bytes, which is too much; save it as CSV", file=source)
        for part in parts.infolist():
            if part.filename.endswith((".xml", ".rels")) and b"<!" in parts.open(part).read(1024):
                raise DataError(f"{quote(part.filename)} holds a document type, which is refused", file=source)
    file.seek(0)


def _rows(sheet: Iterator[tuple[Any, ...]], text: TextFile) -> Iterator[Row | DataError]:
    names: list[str] | None = None
    for number, cells in enumerate(sheet, start=1):
        if all(cell is None for cell in cells):
            continue
        if names is None:
            names = _header(cells, text.source)
            continue
        text.number += 1
        place = Place(text.source, text.number, number)
        if any(cell is not None for cell in cells[len(names) :]):
            yield place.error(f"more cells than the header's {len(names)}")
            continue
        values = dict(zip(names, map(_value, cells), strict=False))
        values.pop("", None)
        yield Row({**dict.fromkeys(filter(None, names)), **values}, place)


def _header(cells: tuple[Any, ...], source: str) -> list[str]:
    names = [str(cell).strip() if cell is not None else "" for cell in cells]
    while names and not names[-1]:
        names.pop()
    if "" in names[1:]:
        raise DataError(f"column {names.index('', 1) + 1} of the header has no name", file=source, line=1)
    if len(set(names)) < len(names):
        raise DataError(f"the header names {quote(first_duplicate(names))} twice", file=source, line=1)
    return names


def _value(cell: Any) -> Any:
    """Return the value of a cell as JSON would have it: dates become texts, 3.0 of a whole number 3."""
    if isinstance(cell, date | time):
        return cell.isoformat()
    return int(cell) if isinstance(cell, float) and cell.is_integer() and abs(cell) < 2**53 else cell
