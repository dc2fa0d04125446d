"""What a name in a recipe's section ``dataset`` means: a file or folder, or a dataset of the hub."""

from __future__ import annotations

import re

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_FILE_ENDINGS = (
    *(".jsonl", ".json", ".csv", ".parquet", ".txt", ".tsv", ".md"),
    *(".gz", ".zip", ".zst", ".bz2", ".xz", ".arrow", ".yaml", ".xlsx"),
)
"""A name that ends so is meant as a file, though it could be a hub id."""


def is_path(name: str) -> bool:
    """Whether the name cannot be a hub id, or is not meant as one: where nothing has it, a file is missing."""
    return name.lower().endswith(_FILE_ENDINGS) or name.startswith((".", "~")) or not _HUB_ID.fullmatch(name)
