"""What can be known of a run before it starts. Imports torch only where that is not known from the last time."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftcli.data.cache import outcomes
from peftcli.data.sources import eval_source, open_source
from peftcli.errors import HubError, Interrupted, NetworkError, PeftcliError, RecipeError, StorageError
from peftcli.guard.files import open_regular
from peftcli.models.find import find_base
from peftcli.schema import Recipe
from peftcli.system import date
from peftcli.system.disk import write_file
from peftcli.train.checked import DeepCheck


def preview(recipe: Recipe) -> dict[str, Any]:
    """What a run of the recipe would do: its data, its parameters, its steps.

    Raises:
        RecipeError: it would fail. Its exit code is that of the first error.
    """
    found = deep_check(recipe)
    if found.errors:
        error = RecipeError(found.errors)
        error.exit_code = found.exit_code
        raise error
    return found.would


def deep_check(recipe: Recipe) -> DeepCheck:
    """Every error and every warning that opening the recipe's data and model brings up, and what the disk lacks.

    It encodes the rows and builds the model without weights, which takes seconds of imports. Its outcome is a function
    of the recipe, the small files of the base model, the content of the data, the code and the installed packages, and
    of the day where a chat template writes the date. So an outcome without errors is kept under a hash of all these.
    """
    state = state_of(recipe)
    debugs = logging.getLogger(__name__).isEnabledFor(logging.DEBUG)  # what is kept has no log
    found = None if state is None or debugs else _read(recipe, state)
    if found is None:
        from peftcli.train.examine import examine

        with warnings.catch_warnings(record=True) as shown, _logged_warnings() as logged:
            found = examine(recipe)
        for each in shown:
            warnings.showwarning(each.message, each.category, each.filename, each.lineno)
        if state is not None and not (found.errors or shown or logged):
            with suppress(StorageError):  # of a cache that cannot be written
                write_file(_place(recipe), json.dumps({"state": state, "would": found.would}).encode())
    found.check_disk(recipe)
    return found


@contextmanager
def _logged_warnings() -> Iterator[list[logging.LogRecord]]:
    """Yield a list that gets what is logged meanwhile, warnings and worse."""
    make, found = logging.getLogRecordFactory(), list[logging.LogRecord]()

    def note(*args: Any, **more: Any) -> logging.LogRecord:
        record = make(*args, **more)
        if record.levelno >= logging.WARNING:
            found.append(record)
        return record

    logging.setLogRecordFactory(note)
    try:
        yield found
    finally:
        logging.setLogRecordFactory(make)


_NOT_READ = {
    "output_dir", "learning_rate", "loraplus_lr_ratio", "loraplus_lr_embedding", "lr_scheduler_type", "weight_decay",
    "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "logging_steps", "eval_steps",
    "max_time", "save_on_signal",
}  # fmt: skip
"""Settings of ``training`` that a deep check does not read."""
_LARGE = 64 << 20
"""Bytes of a file of the base model that is known by its size: weights, of which a deep check reads nothing."""
_MAX_FILES = 1000
_DEVICES = ("nvidia*", "kfd", "dri/*")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""What decides how many GPUs there are, and so how many processes a run has: files below ``/dev``, and variables."""


def state_of(recipe: Recipe) -> str | None:
    """Return a hash of all that a deep check of the recipe depends on; None where that cannot be known.

    Raises:
        HubError: the hub refuses the base model or the data.
        NetworkError: the hub cannot be reached.
    """
    chosen = recipe.training.per_device_train_batch_size, recipe.training.gradient_checkpointing, recipe.launch.strategy
    if "auto" in chosen:  # by the memory that is free
        return None
    base, named = recipe.base_model, {**recipe.method, **(recipe.task or {})}
    if base.trust_remote_code or base.name.endswith(".gguf") or recipe.training.init_adapter_from is not None:
        return None
    if any(_names_file(*each) for each in _texts(named)):
        return None
    try:
        folder = find_base(base).folder
        files = list(_contents(folder))
        template = base.chat_template
        if template and template != "chatml":
            files.append((template, _hash(Path(template)), date.writes_date(Path(template).read_bytes())))
        evaluation = eval_source(recipe.dataset)
        sources = [*recipe.dataset.sources(), *([evaluation] if evaluation else [])]
        states = [open_source(source).state() for source in sources]
    except (HubError, Interrupted, NetworkError):
        raise
    except (PeftcliError, OSError, ValueError):  # the deep check says what is wrong
        return None
    given = asdict(recipe)
    given["gates"] = sorted(recipe.gates)
    given["training"] = {name: value for name, value in given["training"].items() if name not in _NOT_READ}
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    devices = (path for pattern in _DEVICES for path in Path("/dev").glob(pattern))
    parts = {
        "recipe": given,
        "base": [file[:2] for file in files],
        "day": date.today().isoformat() if any(file[2] for file in files) else None,
        "data": states,
        "code": code.hexdigest(),
        "packages": [sys.version, *_packages()],
        "devices": [*sorted(map(str, devices)), *(os.environ.get(name) for name in _VISIBLE)],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _read(recipe: Recipe, state: str) -> DeepCheck | None:
    """Return the outcome that was kept for this state."""
    with suppress(OSError, ValueError, KeyError, TypeError, StorageError):
        kept = json.loads(_place(recipe).read_bytes())
        if kept["state"] == state:
            return DeepCheck(would=kept["would"])
    return None


def _place(recipe: Recipe) -> Path:
    name = hashlib.sha256(os.fsencode(Path(recipe.training.output_dir).absolute())).hexdigest()
    return outcomes() / f"{name}.json"


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all texts in a value, each with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else ((key, each) for each in value):
            yield from _texts(inner, str(name))


def _names_file(key: str, text: str) -> bool:
    """Whether a setting names, or may name, a file or another model, which would be read."""
    return key.endswith(("path", "file", "code", "dir")) or "/" in text or (key != "type" and os.path.lexists(text))


def _contents(folder: Path) -> Iterator[tuple[str, str, bool]]:
    """Yield each file of the base model: name, hash, and whether it may be a template that writes the date."""
    count = 0
    for top, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            count += 1
            if count > _MAX_FILES:
                raise ValueError(f"{folder} contains more than {_MAX_FILES} files")
            path = Path(top) / name
            is_template = path.suffix == ".jinja" or name in ("tokenizer_config.json", "chat_template.json")
            yield str(path.relative_to(folder)), _hash(path), is_template and date.writes_date(path.read_bytes())


def _hash(path: Path) -> str:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        return str(size) if size > _LARGE else hashlib.sha256(file.read()).hexdigest()


def _packages() -> list[str]:
    """Return the names and versions of the installed packages but this one, as the names of their folders say them."""
    found: set[str] = set()
    for folder in sys.path:
        with suppress(OSError):
            found |= {path.name for path in Path(folder).iterdir() if path.suffix in (".dist-info", ".egg-info")}
    return sorted(name for name in found if not name.startswith("peftcli"))  # whose code is hashed
