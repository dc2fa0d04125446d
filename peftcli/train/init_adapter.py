"""The adapter that training begins from, where ``training.init_adapter_from`` names one."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peftcli.adapters.load import AdapterSource, find_adapter
from peftcli.core.config import AdapterConfig, plain
from peftcli.core.targets import module_matches
from peftcli.errors import AdapterError, HubError, NetworkError
from peftcli.guard.adapter_folder import CONFIG_FILE, find_weights
from peftcli.guard.typed_fields import mapping_at
from peftcli.methods import METHODS
from peftcli.recipe.settings import method_settings
from peftcli.schema import Recipe
from peftcli.system.disk import sha256

KEY = "training.init_adapter_from"
_NAMES = ("target_modules", "modules_to_save")
"""Settings that name modules; the adapter's file may name them in full, and what is tied to them."""


def find_init_adapter(recipe: Recipe) -> AdapterSource | None:
    """Find the adapter that the recipe's training begins from; None: it begins with a new one.

    Raises:
        AdapterError: there is no such adapter, or its config cannot be read.
        HubError: the hub has no such repository, or refuses it.
        NetworkError: the hub cannot be reached, and the cache has no copy.
    """
    if recipe.training.init_adapter_from is None:
        return None
    try:
        return find_adapter(recipe.training.init_adapter_from)
    except (AdapterError, HubError, NetworkError) as error:
        error.key = error.key or KEY
        raise


def with_init_settings(recipe: Recipe) -> Recipe:
    """The recipe with the settings of the adapter that it begins from, as its ``method``.

    Dropout is the recipe's, since it belongs to training. So are target_modules that are a pattern or ``all-linear``:
    whether they name the adapter's modules shows in the model.

    Raises:
        AdapterError: as ``find_init_adapter``, or the adapter is of another method, a setting that the recipe gives
            differs from the adapter's, or training has given its layers other sizes than settings say.
    """
    if (source := find_init_adapter(recipe)) is None:
        return recipe
    given = dict(recipe.method)
    method = given.pop("type")
    row = METHODS[method]
    if source.config.peft_type != row.peft_type:
        message = f"is {method}, and {source.folder} holds an adapter of {source.config.peft_type}"
        raise AdapterError(message, key="method.type")
    wanted = row.config_class().unchecked(**given)
    own = {name: _as_given(source.config, name) for name in method_settings(method)}
    patterns = [entry.name for entry in dataclasses.fields(source.config) if entry.name.endswith("_pattern")]
    if found := [name for name in patterns if name not in own and getattr(source.config, name)]:
        message = f"{found[0]} gives its layers sizes of their own, which a new run would not know"
        raise AdapterError(message, key=KEY, file=str(source.folder / CONFIG_FILE))
    free = {name for name in given if "dropout" in name}
    free |= {name for name in given if name == "target_modules" and isinstance(given[name], str)}
    tied = own.get("ensure_weight_tying", False)
    free |= {name for name in _NAMES if name in given and _name_the_same(given[name], own[name], tied)}
    if other := [name for name in given if name not in free and _as_given(wanted, name) != own[name]]:
        differences = [f"{name} is {given[name]!r}, and {own[name]!r} in {source.folder}" for name in other]
        hint = f"leave out what the adapter's own {CONFIG_FILE} says"
        raise AdapterError("; ".join(differences), key=f"method.{other[0]}", hint=hint)
    kept = {name: given[name] for name in free if not isinstance(given[name], list)}
    return replace(recipe, method={"type": method, **own, **kept})


def _name_the_same(given: Any, own: Any, tied: bool) -> bool:
    """Whether the adapter's names of modules are those of a recipe, some in full, and some added as they are tied."""
    if not (isinstance(given, list) and isinstance(own, list)):
        return False
    return all(any(module_matches(full, entry) for full in own) for entry in given) and (
        tied or all(any(module_matches(full, entry) for entry in given) for full in own)
    )


def _as_given(config: AdapterConfig, name: str) -> Any:
    """The value of a config's field as a recipe gives it."""
    value = getattr(config, name)
    is_config = dataclasses.is_dataclass(value) and not isinstance(value, type)
    return dataclasses.asdict(value) if is_config else plain(value)


def init_hashes(recipe: Recipe) -> dict[str, str]:
    """One hash of the two files of the adapter that training begins from, under its name in the recipe."""
    source = find_init_adapter(recipe)
    if source is None:
        return {}
    files = (source.folder / CONFIG_FILE, find_weights(source.folder))
    described = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    return {str(recipe.training.init_adapter_from): hashlib.sha256(described.encode()).hexdigest()}


@contextlib.contextmanager
def its_base_named(source: AdapterSource, recipe: Recipe) -> Iterator[None]:
    """Name the base model that the adapter was trained on in an AdapterError, where it is not the recipe's."""
    try:
        yield
    except AdapterError as error:
        own = source.config.base_model_name_or_path
        if own and own != recipe.base_model.name:
            error.message = f"was trained on {own}, not {recipe.base_model.name}: {error.message}"
        raise


def refuse_other_base(source: AdapterSource, recipe: Recipe, base_hash: str | None) -> None:
    """Raise AdapterError where the run that made the adapter recorded another base model than that of this hash."""
    recorded = mapping_at(source.record, "base_model")
    if base_hash and recorded.get("sha256") not in (None, base_hash):
        message = f"was trained on {recorded.get('name')}, whose files differ from those of {recipe.base_model.name}"
        raise AdapterError(message, key=KEY, file=str(source.folder))


def refuse_other_start(trained: AdapterSource, recipe: Recipe) -> None:
    """Raise AdapterError where the run that made ``trained`` recorded that it began from another adapter."""
    name = mapping_at(trained.record, "recipe", "training").get("init_adapter_from")
    before = mapping_at(trained.record, "identity", "data").get(str(name))
    if before is not None and before not in init_hashes(recipe).values():
        raise AdapterError(f"began from {name}, which was another adapter", key=KEY, file=str(trained.folder))
