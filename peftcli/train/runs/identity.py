"""What makes two runs the same, and what differs between them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from peftcli.data.media import is_media
from peftcli.data.sources import eval_source, open_source
from peftcli.errors import UsageError
from peftcli.models.hub_files import base_hash
from peftcli.recipe import to_dict
from peftcli.recipe.data_checks import exists
from peftcli.recipe.names import closest, find_alias
from peftcli.schema import Recipe
from peftcli.system.disk import sha256
from peftcli.system.outputs import expand_user
from peftcli.tasks import row_of
from peftcli.train.init_adapter import init_hashes
from peftcli.train.runs.record import IdentityRecord
from peftcli.train.runs.typed_json import flatten, to_json

_BESIDE_THE_RECIPE = ("data", "base_model", "processes", "recipe")
"""Keys that are no settings: the bytes of data and base model, how many processes train, and of a chosen checkpoint the
recipe as a whole."""


@dataclass(frozen=True)
class Change:
    """One difference between the run in a folder and the run to start."""

    key: str
    """As run.json calls it: see ``ChangeRecord.key``."""
    before: Any
    now: Any

    @property
    def is_final(self) -> bool:
        """Whether no checkpoint from before it can be resumed: its tensors are those of another method."""
        return self.key == "method.type"

    def __str__(self) -> str:
        """``training.learning_rate: 0.0002 -> 0.0001``."""
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def identity(recipe: Recipe, num_processes: int) -> IdentityRecord:
    """What makes two runs the same: the recipe, without where it runs and writes; the bytes of data and base model."""
    return IdentityRecord(
        recipe=comparable_settings(recipe),
        data=_data_hashes(recipe),
        base_model=base_hash(expand_user(Path(recipe.base_model.name))),
        processes=num_processes,
    )


def comparable_settings(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe, without where it runs, and what it writes when and where."""
    settings = to_dict(recipe)
    elsewhere = (
        "output_dir",
        "max_time",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_on_signal",
        "dataloader_num_workers",
        "verify",
        "compare_with_base",
        "measure_forgetting",
        "report_to",
        "run_name",
    )
    training = {key: value for key, value in settings["training"].items() if key not in elsewhere}
    settings = {key: value for key, value in settings.items() if key != "launch"} | {"training": training}
    if recipe.launch.strategy != "replicate":  # fsdp may add up gradients in another order
        settings["launch"] = {"strategy": recipe.launch.strategy}
    return settings


def changes(before: IdentityRecord, now: IdentityRecord) -> list[Change]:
    """The differences between two identities; of another method its type, of a file with the same bytes its name."""
    old, new = flatten(to_json(before)), flatten(to_json(now))
    differing = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    for setting in [key for key in differing if key.startswith("recipe.")]:
        file, other = f"data.{old.get(setting)}", f"data.{new.get(setting)}"
        if file in old and old[file] == new.get(other):
            differing = [key for key in differing if key not in (file, other) or (key in old and key in new)]
    found = [Change(key.removeprefix("recipe."), old.get(key), new.get(key)) for key in differing]
    if any(change.is_final for change in found):
        found = [change for change in found if change.is_final or not change.key.startswith("method.")]
    return found


def is_allowed(change: Change, allowed: Collection[str]) -> bool:
    """Whether one of ``allowed`` is the change's key, or a section of it."""
    return not change.is_final and any(change.key == key or change.key.startswith(f"{key}.") for key in allowed)


def check_keys(allowed: Sequence[str], recipe: Recipe) -> None:
    """Raise UsageError for a key that names nothing."""
    described = to_dict(recipe)
    known = {*_sections(described), *flatten(described), *_BESIDE_THE_RECIPE}
    for key in allowed:
        # settings that are not given, and files that only one of two recipes names, stand in neither
        if key not in known and not key.startswith(("data.", "method.", "gates.")):
            section, _, leaf = key.rpartition(".")
            alias = (find_alias(leaf, section) or "").partition(":")[0]
            suggestion = alias if alias in known else closest(key, sorted(known))
            hint = f"did you mean {suggestion!r}?" if suggestion else None
            raise UsageError(f"nothing is called {key!r}", key="--allow-change", hint=hint)


def digests(identity: IdentityRecord) -> dict[str, str]:
    """One hash each of an identity's recipe, data and base model, for a manifest."""
    return {
        f"{name}_sha256": hashlib.sha256(repr(sorted(flatten(getattr(identity, name)).items())).encode()).hexdigest()
        for name in ("recipe", "data", "base_model")
    }


def _sections(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, inner in values.items():
        if isinstance(inner, dict):
            found += [f"{prefix}{name}", *_sections(inner, f"{prefix}{name}.")]
    return found


def _data_hashes(recipe: Recipe) -> dict[str, str]:
    """sha256 of the recipe's local data, its chat template, its task's files, and the adapter that it begins from."""
    dataset, template = recipe.dataset, recipe.base_model.chat_template
    sources = [*dataset.sources(), *filter(None, [eval_source(dataset)])]
    local = [open_source(source) for source in sources if exists(source.train)]
    hashes = {name: digest for opened in local for name, digest in opened.fingerprint().items()}
    named = [template] if template and template != "chatml" else []
    for name in (*named, *row_of(recipe).settings_of(recipe).files()):
        if (path := expand_user(Path(name))).is_file():
            hashes[name] = sha256(path)
        elif path.is_dir():
            media = sorted(each for each in path.iterdir() if is_media(each.name) and each.is_file())
            described = "".join(f"{each.name} {sha256(each)}\n" for each in media)
            hashes[name] = hashlib.sha256(described.encode()).hexdigest()
    return hashes | init_hashes(recipe)


_FILES = ("base_model.name", "base_model.chat_template", "dataset.train", "dataset.eval", "training.init_adapter_from")
"""Settings that name files, which each machine may have elsewhere. What is in them is compared as they are read."""


def refuse_other_recipes(recipe: Recipe) -> None:
    """Refuse recipes that differ between processes: each would take a step of its own."""
    settings = comparable_settings(recipe)
    settings["training"] |= {"save_strategy": recipe.training.save_strategy, "save_steps": recipe.training.save_steps}
    settings["dataset"]["mix"] = [{**source, "train": None} for source in settings["dataset"]["mix"]]
    own = {key: value for key, value in flatten(settings).items() if key not in _FILES}
    first, *others = gather_object([own])
    for number, other in enumerate(others, 1):
        for key in sorted(first.keys() | other.keys()):
            if first.get(key) != other.get(key):
                message = f"is {first.get(key)!r} in process 0, and {other.get(key)!r} in process {number}"
                raise UsageError(message, key=key, hint="start each machine with the same recipe and overrides")
