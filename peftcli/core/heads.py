"""The heads of models with a task: new weights, which train in full beside any adapter."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import base_module, base_modules, cast, model_ends
from peftcli.core.quantised import is_quantised
from peftcli.core.targets import find_modules, module_matches
from peftcli.errors import AdapterError
from peftcli.guard.files import first_of

TASKS_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""PEFT's names of the tasks whose models have a head of their own."""

_PEFT_GUESSES = ("classifier", "score", "qa_outputs")
"""What PEFT adds to modules_to_save, whether the model has it or not. Longer names with these endings match too."""


def head_names(model: Any) -> list[str]:
    """Return the names of the modules beside the model's body: classifier, score, qa_outputs, or any other name."""
    if not hasattr(model, "base_model_prefix"):  # no model of transformers
        return []
    ends = [base_module(end) for end in model_ends(model) if end is not None]

    def is_head(child: nn.Module) -> bool:
        is_body = hasattr(child, "base_model_prefix") or any(base_module(module) in ends for module in child.modules())
        return not is_body and any(True for _ in child.parameters())

    return [name for name, child in model.named_children() if is_head(child)]


def parameters_of_heads(model: Any) -> list[str]:
    """Return the names of the parameters of ``head_names``."""
    heads = tuple(f"{name}." for name in head_names(model))
    return [name for name, _ in model.named_parameters() if name.startswith(heads)]


def widen_heads(model: Any) -> None:
    """Let each head with an output for each label compute in float32, whatever the rest computes in.

    Of numbers near 2000, bfloat16 has every eighth. A quantised head stays as it is. An adapter's layers on a head
    compute so too: they must be in the model by then. A model without a head stays as it is.
    """
    if not any(hasattr(child, "base_model_prefix") for child in model.children()):
        return
    modules = base_modules(model)
    for name in head_names(model):
        parts = [module for path, module in modules.items() if f"{path}.".startswith(f"{name}.")]
        labelled = any(isinstance(part, nn.Linear) and part.out_features == model.config.num_labels for part in parts)
        if labelled and not any(map(is_quantised, parts)):
            head: Any = model.get_submodule(name)
            head.float()
            for each in {head, base_module(head)}:  # of which the latter stays where the adapter is taken out
                each.forward = functools.partial(_in_float32, each, each.forward)


def _in_float32(head: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(next(head.parameters()).device.type, enabled=False):
        given = {name: cast(value, torch.float32) for name, value in kwargs.items()}
        return forward(*cast(args, torch.float32), **given)


def resolve_heads(model: nn.Module, config: AdapterConfig, initialised: Collection[str] = ()) -> None:
    """Complete the ``modules_to_save`` of a new adapter by what is new; make a loaded one's those that its file holds.

    ``initialised`` names the parameters that the base model's checkpoint did not hold, as far as that is known.

    Warns when a loaded adapter's file does not hold a head of which that is not known.

    Raises:
        AdapterError: a parameter that is new would stay random.
    """
    has_head = config.task_type in TASKS_WITH_HEADS
    given = config.modules_to_save or []
    if config.inference_mode:  # whose file would hold the tensors of more, and is refused then
        guesses = [guess for guess in _PEFT_GUESSES if has_head and guess in given]
        names = [name for name in base_modules(model) if name]
        guessed = [name for name in names if any(name.endswith(guess) for guess in guesses)]
        there = [entry for entry in given if any(module_matches(name, entry) for name in names)]
        given = [*dict.fromkeys([*(entry for entry in there if entry not in guesses), *guessed])]
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
    missing = [*dict.fromkeys(head for head in [*heads, *new] if not any(_overlap(head, name) for name in saved))]
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
        if (name and below and below <= left) or (below == {*parameters} and left.intersection(below)):
            found.append(name)
        elif mixed := left.intersection(parameters):
            raise AdapterError(
                f"{min(mixed)} is not in the base model's checkpoint, and cannot be trained without the rest of "
                f"{name or 'the model'}",
                key="modules_to_save",
            )
    return found


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")
