"""``peftcli cache``."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json
from peftcli.data.rows import count_of
from peftcli.errors import UsageError

if TYPE_CHECKING:
    from peftcli.data.cache import Entry

_DAY = 86400


def cache(
    what: Annotated[str, typer.Argument(metavar="[list|clear|dir]", help="What to do with the cache.")] = "list",
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help="With clear: the entries to remove; by default all.")
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", metavar="DAYS", min=0, help="With clear: only entries unused for this many days."),
    ] = None,
    as_json: Json = False,
) -> None:
    """List or clear the cache of encoded datasets."""
    actions = ("list", "clear", "dir")
    if what not in actions:
        raise UsageError(f"unknown action: {what!r}", hint=f"known: {', '.join(actions)}")
    if what != "clear" and (keys or older_than is not None):
        raise UsageError(f"{what} takes neither KEY nor --older-than", hint="use them with peftcli cache clear")
    if what == "clear":
        _clear(keys or [], older_than, as_json)
    elif what == "list":
        _list(as_json)
    else:
        from peftcli.data.cache import root

        folder = str(root())
        console.print_json({"folder": folder}) if as_json else console.out(folder)


def _list(as_json: bool) -> None:
    from peftcli.data.cache import entries, root, unfinished

    found, left = entries(), unfinished()
    total = sum(entry.bytes for entry in found) + left
    if as_json:
        return console.print_json(
            {"folder": str(root()), "bytes": total, "unfinished_bytes": left, "entries": [_as_dict(e) for e in found]}
        )
    if found:
        columns = ["key", "source", "rows", "features", "tokens", "size", "last used"]
        console.table(columns, [_row(entry) for entry in found])
    if left:
        console.out(f"{console.format_size(left)} in unfinished entries, of running or killed runs")
    return console.out(
        f"{_count_entries(len(found))}, {console.format_size(total)}, in {root()}; "
        "only `peftcli cache clear` removes entries"
    )


def _clear(keys: list[str], older_than: float | None, as_json: bool) -> None:
    from peftcli.data.cache import clear, entries, find, root

    selected = find(keys) if keys else entries()
    if older_than is not None:
        limit = time.time() - older_than * _DAY
        selected = [entry for entry in selected if entry.last_used <= limit]
    cleared = clear(selected)
    if as_json:
        removed, kept = ([_as_dict(entry) for entry in entries] for entries in (cleared.removed, cleared.kept))
        return console.print_json({"folder": str(root()), "bytes": cleared.bytes, "removed": removed, "kept": kept})
    for entry in cleared.kept:
        console.out(f"kept {entry.key[:12]} ({entry.source}): a run uses it")
    return console.out(f"removed {_count_entries(len(cleared.removed))}, {console.format_size(cleared.bytes)}")


def _as_dict(entry: Entry) -> dict[str, Any]:
    times = {name: time.gmtime(getattr(entry, name)) for name in ("created", "last_used")}
    return asdict(entry) | {name: time.strftime("%Y-%m-%dT%H:%M:%SZ", found) for name, found in times.items()}


def _row(entry: Entry) -> list[str]:
    used = "in use" if entry.in_use else "damaged" if entry.damaged else _format_age(time.time() - entry.last_used)
    counts = (f"{count:,}" for count in (entry.rows, entry.features, entry.tokens))
    source = " ".join((entry.source or "-").split())  # on one line
    return [entry.key[:12], source, *counts, console.format_size(entry.bytes), used]


def _format_age(seconds: float) -> str:
    for size, name in ((_DAY, "day"), (3600, "hour"), (60, "minute")):
        if (count := int(seconds // size)) > 0:
            return f"{count_of(count, name)} ago"
    return "just now"


def _count_entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count:,} entries"
