"""The name of a base model becomes an open base model.

Nothing else turns a base model's name into files: whoever needs its config, processor, weights or modules takes them
from the ``OpenBase`` that ``open_base`` returns.
"""

from __future__ import annotations

from pathlib import Path

from peftcli.models.base import BaseWeights, LoadedModel, OpenBase, ProcessorKind, build_empty, label_options
from peftcli.models.find import find_base
from peftcli.models.pipeline import OpenPipeline
from peftcli.models.tokens import template_text
from peftcli.schema import BaseModel
from peftcli.system.memory import collect_from_here

__all__ = ["BaseWeights", "LoadedModel", "OpenBase", "ProcessorKind", "build_empty", "label_options", "open_base"]


def open_base(spec: BaseModel, processors: Path | None = None) -> OpenBase:
    """Find a base model and check its files; what is read of it is of one commit.

    ``processors`` is the folder of an adapter, whose own tokenizer or other processor comes before the base model's.

    Raises:
        ModelError: there is no such model, or one of its files is damaged.
        HubError: the hub has no such model, or refuses it.
        NetworkError: the hub cannot be reached.
    """
    collect_from_here()  # what a command imports has been imported
    template = template_text(spec)  # a mistake in it is told before anything is fetched
    found = find_base(spec)
    return (OpenPipeline if found.is_pipeline else OpenBase)(spec, found, template, processors)
