"""The heads of models with a task: new weights, which train in full beside any adapter."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import base_module, base_modules, model_ends
from peftcli.core.targets import find_modules
from peftcli.errors import AdapterError
from peftcli.guard.files import first_of

TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""PEFT's names of the tasks whose models have a head of their own."""


def head_names(model: Any) -> list[str]:
    """Return the names of the modules beside the model's body: classifier, score, qa_outputs, or any other name."""
    if not hasattr(model, "base_model_prefix"):  # no model of transformers
        return []
    ends = [base_module(end) for end in model_ends(model) if end is not None]

    def is_head(child: nn.Module) -> bool:
        is_body = hasattr(child, "base_model_prefix") or any(base_module(module) in ends for module in child.modules())
        return not is_body and any(True for _ in child.parameters())

    return [name for name, child in model.named_children() if is_head(child)]


def resolve_heads(model: nn.Module, config: AdapterConfig, initialised: Collection[str] = ()) -> None:
    """Complete the ``modules_to_save`` of a new adapter by what is new; make a loaded one's those that its file holds.

    ``initialised`` names the parameters that the base model's checkpoint did not hold, as far as that is known.

    Warns when a loaded adapter's file does not hold a head of which that is not known.

    Raises:
        AdapterError: a parameter that is new would stay random.
    """
    has_head = config.task_type in TASKS_WITH_HEADS
    given = config.modules_to_save or []
    saved = find_modules(model, given, "modules_to_save")
    new = _new_modules(model, initialised, saved)
    if new and config.inference_mode:
        raise AdapterError(
            f"the adapter was saved without {', '.join(first_of(new))}, which the base model's checkpoint does not "
            "hold either: the weights would stay random",
            key="modules_to_save",
            hint="load it over the base model that it was trained on",
        )
    heads = head_names(model) if has_head and not (initialised and config.inference_mode) else []
    covered = {f"{name}." for name in saved}
    missing = [
        head
        for head in dict.fromkeys([*heads, *new])
        if not any(f"{head}.".startswith(name) or name.startswith(f"{head}.") for name in covered)
    ]
    if missing and config.inference_mode:
        warnings.warn(
            f"the adapter was saved without {', '.join(first_of(missing))}, which is part of the head and stays as "
            "it is in the base model",
            stacklevel=2,
        )
    elif missing:
        given = [*given, *(name for name in missing if not any(name.startswith(f"{other}.") for other in missing))]
    config.modules_to_save = given or None


def _new_modules(model: nn.Module, initialised: Collection[str], saved: list[str]) -> list[str]:
    """Return the fewest modules that hold the parameters ``initialised``, apart from those below ``saved`` ones."""
    modules = base_modules(model)
    own = {
        name: [f"{name}.{leaf}".lstrip(".") for leaf, _ in module.named_parameters(recurse=False)]
        for name, module in modules.items()
    }
    known = {parameter for parameters in own.values() for parameter in parameters}
    left = {name for name in known.intersection(initialised) if not any(name.startswith(f"{one}.") for one in saved)}
    found: list[str] = []
    for name, parameters in own.items():
        if not left or any(f"{name}.".startswith(f"{one}.") for one in found):
            continue
        below = {each for each in known if each.startswith(f"{name}.".lstrip("."))}
        if isinstance(modules[name], nn.ModuleList | nn.ModuleDict):
            continue  # nothing calls it: the modules in it are found
        if (name and below and below <= left) or (below == {*parameters} and left.intersection(below)):
            found.append(name)
        elif mixed := left.intersection(parameters):
            raise AdapterError(
                f"{min(mixed)} is not in the base model's checkpoint, and cannot be trained without the rest of "
                f"{name or 'the model'}",
                key="modules_to_save",
            )
    return found
