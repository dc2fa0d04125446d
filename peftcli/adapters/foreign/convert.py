"""``peftcli convert``: an adapter of another program becomes an adapter folder."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftcli.adapters.card import write_card
from peftcli.adapters.foreign import FORMATS, Format
from peftcli.adapters.foreign.base import EmptyBase
from peftcli.adapters.foreign.source import Converted, Request, Source, find_source
from peftcli.adapters.load import apply_adapter, find_adapter
from peftcli.core.files import write_adapter
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError, PeftcliError
from peftcli.guard.adapter_folder import WEIGHTS_FILE
from peftcli.models.open import LoadedModel
from peftcli.system.outputs import expand_user, new_folder, require_empty
from peftcli.tasks import TASKS


def convert_adapter(
    path: Path,
    output: Path,
    *,
    base: str | None = None,
    format: str | None = None,
    alpha: float | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the adapter that another program left at ``path`` as an adapter folder.

    Args:
        path: its file, or the folder of it.
        output: new or empty folder; it appears whole or not at all.
        base: the base model, in place of the one that the file names.
        format: one of ``FORMATS``; by default the one that the file shows.
        alpha: lora_alpha, for files that do not hold it.
        tell: logs a line.

    Returns:
        What was written, as the schema of ``peftcli convert`` describes it.

    Raises:
        AdapterError: the file cannot be read, is of no known format, or holds what an adapter folder cannot.
        ModelError, HubError, NetworkError: the base model cannot be opened.
        UsageError: the output folder is not empty.
        StorageError: it cannot be written.
    """
    output = expand_user(output)
    require_empty(output)
    source = find_source(expand_user(path))
    name = format or _recognise(source)
    row = FORMATS[name]
    tell(f"{source.file}: {row.program}")
    made: Converted = _module(row).read(Request(source, name, base, alpha))
    with new_folder(output) as partial:
        _write(partial, made)
        modules = _check(partial, made.base, source)
    return {
        "output": str(output),
        "format": name,
        "program": row.program,
        "base_model": made.base.name,
        "method": made.config.peft_type.lower(),
        "modules": modules,
        "parameters": sum(value.numel() for value in made.tensors.values()),
        "bytes": (output / WEIGHTS_FILE).stat().st_size,
        "steps": [asdict(step) for step in made.steps],
    }


def _write(folder: Path, made: Converted) -> None:
    """Write the adapter, and of a pipeline the files that other libraries read, which hold the weights too."""
    write_adapter(made.tensors, made.config, folder)
    if made.base.opened.is_pipeline:
        assert made.base.task is not None
        row = TASKS[made.base.task]
        row.open(row.settings(**made.base.options), made.base.opened, made.config).save(folder)
    write_card(folder)


def _module(row: Format) -> Any:
    return importlib.import_module(f"peftcli.adapters.foreign.{row.module}")


def _recognise(source: Source) -> str:
    """Return the first format that the file shows.

    Raises:
        AdapterError: there is none.
    """
    for name, row in FORMATS.items():
        if row.is_recognised and _module(row).recognises(source):
            return name
    raise source.refuse("is of no format that is known", f"known are {', '.join(FORMATS)}; --from names one")


def _check(folder: Path, base: EmptyBase, source: Source) -> int:
    """Load the new folder into the empty base model, and return how many modules it adapts.

    Raises:
        AdapterError: it does not fit.
    """
    try:
        apply_adapter(LoadedModel(base.model), find_adapter(str(folder)))
    except PeftcliError as error:
        raise AdapterError(error.message, file=str(source.file), key=error.key, hint=error.hint) from None
    return len(adapter_layers(base.model))
