"""The base model of a foreign adapter, without its weights: names and shapes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import inject, meta_copy
from peftcli.core.layer import base_modules
from peftcli.core.targets import matching
from peftcli.errors import AdapterError, ModelError
from peftcli.models.conversions import renaming_of_older
from peftcli.models.open import OpenBase, open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.found import task_of_class

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class EmptyBase:
    """An open base model, as the class that its config names, on the meta device."""

    opened: OpenBase
    model: Any
    task: str | None
    """The first task of that class; None: it is a model without a head."""
    options: Mapping[str, Any]
    """With which ``model`` was built."""

    @property
    def task_type(self) -> str | None:
        """PEFT's name of the task; None: it has none."""
        return TASKS[self.task].task_type if self.task else None

    @property
    def name(self) -> str:
        """As it was given."""
        return self.opened.name

    def names(self, paths: Iterable[str]) -> dict[str, str]:
        """Return this model's names of modules or parameters: the given path -> the name.

        Older names of transformers are understood, and ``model.`` in the place of this model's own prefix.

        Raises:
            AdapterError: the model lacks one; the message gives near names.
        """
        rename = renaming_of_older(self.model)
        known = {*base_modules(self.model), *dict(self.model.named_parameters())}
        found = {path: rename(_PREFIX + path).removeprefix(_PREFIX) for path in paths}
        own = getattr(self.model, "base_model_prefix", "model")
        other = {name: f"{own}.{name.removeprefix('model.')}" for name in found.values()}
        found = {
            path: name if name in known or other[name] not in known else other[name] for path, name in found.items()
        }
        if lost := [name for name in found.values() if name not in known]:
            try:
                matching(self.model, [*base_modules(self.model)], lost[:1], "target_modules")
            except AdapterError as error:
                message = f"{len(lost)} of the {len(found)} adapted modules are not in {self.name}: {error.message}"
                raise AdapterError(message, hint="give the adapter's own base model with --base") from None
        return found

    def module(self, name: str) -> nn.Module:
        """Return the module of that name."""
        return base_modules(self.model)[name]

    def with_layers(self, config: AdapterConfig) -> nn.Module:
        """Return a copy with the adapter's empty layers, which complete the config.

        Raises:
            AdapterError: the config does not fit the model.
        """
        model = meta_copy(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the result is loaded
            inject(model, config)
        return model


def open_empty(name: str, **options: Any) -> EmptyBase:
    """Open a base model without weights, as the class that its config names.

    Raises:
        ModelError: there is no such model, or transformers cannot build it.
        HubError, NetworkError: it cannot be fetched.
    """
    opened = open_base(BaseModel(name=name))
    if not opened.config.architectures:
        raise ModelError(f"the config of {opened.name} names no architecture", key="base_model")
    architecture = opened.config.architectures[0]
    own = next((task for task, row in TASKS.items() if architecture in row.auto_classes), None)  # of a pipeline
    task = own or task_of_class(architecture)
    auto_class = TASKS[task].of(opened.config).auto_class if task else architecture
    return EmptyBase(opened, opened.empty_model(auto_class, **options), task, options)
