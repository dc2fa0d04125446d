"""Another model than the one that trains: a base model, or an adapter with its base, for tasks that ask one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftcli.adapters.generate import load_for_task, ready
from peftcli.adapters.load import AdapterSource, find_adapter
from peftcli.adapters.predict import BATCHES, load_predictor
from peftcli.data.rows import Place, Row, listed
from peftcli.errors import AdapterError, ModelError
from peftcli.guard.adapter_folder import CONFIG_FILE
from peftcli.models.hub_files import base_hash
from peftcli.models.open import OpenBase, open_base
from peftcli.schema import BaseModel
from peftcli.system.outputs import expand_user
from peftcli.tasks import TASKS, TaskRow
from peftcli.tasks.base import PredictOptions, Predicts, Task
from peftcli.tasks.text.fast.unpadded import unpad


@dataclass(frozen=True)
class FoundModel:
    """The ``tasks.base.OtherModel`` that ``open_other`` finds."""

    name: str
    task: str
    source: AdapterSource | None
    """The adapter; None: a base model."""

    @property
    def content(self) -> str:
        """A hash over its files; its name where it is one of the hub."""
        return base_hash(expand_user(Path(self.name))) or self.name

    @property
    def processor(self) -> Any:
        """What makes its inputs."""
        with self._open() as opened:
            return opened.processor() if self._row.processor is None else opened.processor(self._row.processor)

    def model(self, dtype: torch.dtype) -> torch.nn.Module:
        """Load the model, frozen, on its device, with weights of this type unless they are quantised.

        Raises:
            ModelError: it cannot be loaded, or lacks weights that the task needs.
            AdapterError: the adapter does not fit its base model.
        """
        with self._open() as opened:
            return self._load(opened, dtype)[1]

    def answers(self, rows: Sequence[Mapping[str, Any]], batch_size: int = 32) -> Iterator[dict[str, Any]]:
        """Answer rows as ``predict`` does, in their order."""
        asked = [Row(dict(values), Place("the rows", number)) for number, values in enumerate(rows, start=1)]
        if self.source is not None:
            yield from load_predictor(self.name, batch_size=batch_size).answers(asked)
            return
        with self._open() as opened:
            task, model = self._load(opened, torch.float32)
            assert isinstance(task, Predicts)
            for start in range(0, len(asked), batch_size * BATCHES):
                some = asked[start : start + batch_size * BATCHES]
                yield from task.predict(model, some, PredictOptions(batch_size=batch_size))

    @property
    def _row(self) -> TaskRow:
        return TASKS[self.task]

    def _open(self) -> OpenBase:
        if self.source is not None:
            return open_base(self.source.base, processors=self.source.folder)
        return open_base(BaseModel(name=self.name))

    def _load(self, opened: OpenBase, dtype: torch.dtype) -> tuple[Task[Any], Any]:
        if self.source is not None:
            found = self.source.open_task(opened)
            assert found is not None
            loaded = load_for_task(self.source, opened, found, dtype)
        else:
            found = self._row.open(self._row.settings(), opened)
            loaded = opened.model(self._row.auto_class, dtype, **found.model_options())
            if loaded.initialised:
                message = f"lacks weights that {self.task} needs: {listed(loaded.initialised)}"
                raise ModelError(message, file=self.name)
            found.fit_model(loaded.model, None)
        model = ready(loaded).requires_grad_(False)
        unpad(model, self.source.config if self.source is not None else None)
        return found, model


def open_other(name: str, task: str) -> FoundModel:
    """Find a base model, or an adapter in a folder, by its name; nothing is loaded before it is asked.

    Raises:
        AdapterError: it is an adapter of a task whose models are of another kind.
    """
    if not (expand_user(Path(name)) / CONFIG_FILE).is_file():
        return FoundModel(name, task, None)
    source = find_adapter(name)
    if source.task is None or TASKS[source.task].auto_class != TASKS[task].auto_class:
        raise AdapterError(f"is an adapter of {source.task}, and one of {task} is needed", file=name)
    return FoundModel(name, task, source)
