"""Whether a name under ``dataset`` in a recipe is a path or a hub dataset."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FILE_ENDINGS = (
    *(".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".conll", ".conllu", ".txt", ".tsv", ".md"),
    *(".gz", ".zip", ".zst", ".bz2", ".xz", ".arrow", ".yaml", ".xlsx"),
)
"""A name with one of these endings is a file, though it could be a hub id."""


def is_path(name: str) -> bool:
    """Return whether the name is a path and not a hub id, even if no such file exists."""
    return name.lower().endswith(_FILE_ENDINGS) or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name)
