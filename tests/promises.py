"""What every method promises on every shape of base model, each promise a function that raises when it is broken.

``tests/contract/test_conformance.py`` runs them as tests, and ``docs/conformance.py`` writes the table of them.
"""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, labelled, logits, randomise, tiny
from oracle import file_of, loaded_by_peft, saved_by_peft, theirs
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable
from peftcli.core.merge import merge
from peftcli.core.weights import adapter_state, load_training_state, named_tensors, training_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict

MODELS = {
    "llama": "Llama",
    "gpt2": "GPT-2",
    "t5": "T5",
    "bert": "BERT",
    "whisper": "Whisper",
    "convnet": "ResNet",
    "mixtral": "Mixtral",
}
"""The tiny models of the table: kind in ``models_tiny`` -> title."""
TASK_TYPES = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "mixtral": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bert": "SEQ_CLS",
}
TIED = {"llama": "llama_tied", "gpt2": "gpt2", "t5": "t5", "whisper": "whisper"}
"""The kind whose input and output embeddings share a weight."""
TOLERANCE = 1e-5
"""Largest difference of logits, as a share of their deviation, that float32 explains."""

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("*", "bert"): {"modules_to_save": ["classifier"]},
    ("*", "whisper"): {"target_modules": ["q_proj", "v_proj"]},  # PEFT has no default there
    ("*", "mixtral"): {"target_modules": ["q_proj", "v_proj"]},
    ("lora", "convnet"): {"target_modules": ["convolution"]},
    ("prompt_tuning", "*"): {"num_virtual_tokens": 4},
    ("adalora", "*"): {"total_step": 4},
}
"""What a method is run with: (method, kind) patterns -> settings, of which all that match count. Else its defaults."""

NOT_FOR: dict[tuple[str, str], str] = {
    ("prompt_tuning", "whisper"): "reads sound, not token ids: no input embedding to put virtual tokens into",
    ("prompt_tuning", "convnet"): "reads pixels, not token ids: no input embedding to put virtual tokens into",
}
"""Methods that do not go with a model: (method, kind) patterns -> reason. ``inject`` must refuse them."""

PEFT_CANNOT: dict[tuple[str, str], str] = {}
"""Where PEFT 0.21 fails itself: (method, kind) patterns -> what it does. It must still fail."""


class NotApplicable(Exception):
    """A promise that means nothing here; says why."""


def settings_of(method: str, kind: str) -> dict[str, Any]:
    """What a method is run with on a model of a kind. A copy: PEFT appends to lists that it is given."""
    known = {field.name for field in fields(METHODS[method].config_class())}
    found: dict[str, Any] = {}
    for (methods, kinds), values in SETTINGS.items():
        if fnmatch.fnmatch(method, methods) and fnmatch.fnmatch(kind, kinds):
            found |= copy.deepcopy({name: value for name, value in values.items() if name in known})
    return found


def config_of(method: str, kind: str) -> AdapterConfig:
    return METHODS[method].config_class()(**settings_of(method, kind), task_type=TASK_TYPES.get(kind))


def adapted(
    kind: str, method: str, base: nn.Module | None = None, like: str | None = None
) -> tuple[Any, AdapterConfig]:
    """A tiny model with a random adapter in it, and the adapter's config."""
    model, config = tiny(kind) if base is None else base, config_of(method, like or kind)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model.eval(), config


def why_not(method: str, kind: str) -> str | None:
    """Why the method does not go with the model; None when it does."""
    return _reason(NOT_FOR, method, kind)


def is_refused(method: str, kind: str) -> None:
    """For methods that do not go with a model: ``inject`` says so and changes nothing."""
    model = tiny(kind)
    before = [name for name, _ in model.named_modules()]
    try:
        inject(model, config_of(method, kind))
    except AdapterError:
        assert [name for name, _ in model.named_modules()] == before
        return
    raise AssertionError(f"{method} is said not to go with {kind}, and does")


def _forward_equals_pefts(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method)
    save_adapter(model, config, folder)
    with _peft(method, kind), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.PeftModel.from_pretrained(tiny(kind), folder).eval()
    _close(_last(logits(oracle, batch(kind)), model, kind), _last(logits(model, batch(kind)), model, kind))


def _our_file_loads_in_peft(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method)
    save_adapter(model, config, folder)
    with _peft(method, kind):
        loaded_by_peft(kind, folder)


def _pefts_file_loads_here(method: str, kind: str, folder: Path) -> None:
    with _peft(method, kind):
        oracle = theirs(kind, method, task_type=TASK_TYPES.get(kind), **settings_of(method, kind))
        expected = logits(oracle, batch(kind))
        saved_by_peft(oracle, folder)
    model = tiny(kind)
    load_adapter(model, config_from_dict(read_config(folder)), folder)
    _close(_last(logits(model, batch(kind)), model, kind), _last(expected, model, kind))
    written = {name for name in file_of(folder)[1] if not name.endswith(".base_layer.weight")}
    assert adapter_state(model).keys() == written


def _merge_equals_unmerged(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method)
    expected = logits(model, batch(kind))
    if reason := config.merge_problem():
        try:
            merge(model, config)
        except AdapterError:
            raise NotApplicable(reason) from None
        raise AssertionError("merged what cannot be merged")
    merge(model, config)
    assert list(model.state_dict()) == list(tiny(kind).state_dict())
    _close(logits(model, batch(kind)), expected, 1e-4)


def _disabled_equals_base(method: str, kind: str, folder: Path) -> None:
    model, _ = adapted(kind, method)
    with disabled(model):
        assert torch.equal(logits(model, batch(kind)), logits(tiny(kind), batch(kind)))


def _only_the_adapter_trains(method: str, kind: str, folder: Path) -> None:
    model, _ = adapted(kind, method)
    own = {id(parameter) for _, _, parameter in named_tensors(model).values()}
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(**labelled(kind)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (id(parameter) in own) == (parameter.grad is not None), name
        assert (id(parameter) in own) == (not torch.equal(parameter, before[name])), name


def _resume_trains_on(method: str, kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    straight = tiny(kind)
    config = config_of(method, kind)
    inject(straight, config)
    _steps(straight, config, kind, 0, 2)
    kept = {name: value.clone() for name, value in training_state(straight).items()}
    states = {name: copy.deepcopy(value) for name, value in _OPTIMIZERS[id(straight)].state_dict().items()}
    _steps(straight, config, kind, 2, 4)
    torch.manual_seed(1)
    resumed, again = tiny(kind), config_of(method, kind)
    inject(resumed, again)
    load_training_state(resumed, kept)
    _optimizer(resumed).load_state_dict(states)
    _steps(resumed, again, kind, 2, 4)
    for name, value in training_state(straight).items():
        assert torch.equal(value, training_state(resumed)[name]), name


def _a_bf16_base(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method, base=tiny(kind).to(torch.bfloat16))
    assert {value.dtype for value in adapter_state(model).values() if value.is_floating_point()} == {torch.float32}
    half = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in batch(kind).items()}
    found = logits(model, half)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
    loss = model(**{k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in labelled(kind).items()}).loss
    loss.backward()
    assert {p.grad.dtype for _, _, p in named_tensors(model).values() if p.grad is not None} == {torch.float32}
    save_adapter(model, config, folder)
    again = tiny(kind).to(torch.bfloat16)
    load_adapter(again, config_from_dict(read_config(folder)), folder)
    assert torch.equal(logits(again, half), found)


def _tied_weights(method: str, kind: str, folder: Path) -> None:
    if kind not in TIED:
        raise NotApplicable("has no output head that could be tied to its input embedding")
    tied = TIED[kind]
    model, config = adapted(tied, method, like=kind)
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert ends[0] is ends[1]
    expected = logits(model, batch(tied))
    save_adapter(model, config, folder)
    again = tiny(tied)
    load_adapter(again, config_from_dict(read_config(folder)), folder)
    assert torch.equal(logits(again, batch(tied)), expected)
    if config.merge_problem() is None:
        merge(model, config)
        _close(logits(model, batch(tied)), expected, 1e-4)


def _gradient_checkpointing(method: str, kind: str, folder: Path) -> None:
    model, _ = adapted(kind, method)
    if not model.supports_gradient_checkpointing:
        raise NotApplicable("the model does not support gradient checkpointing")
    expected = _gradients(model.train(), kind)
    enable = "activation_checkpointing_enable"  # its name since transformers 5.24 or so
    getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")({"use_reentrant": False})
    found = _gradients(model, kind)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-12, name


PROMISES: dict[str, Callable[[str, str, Path], None]] = {
    "forward equals PEFT's within 1e-5": _forward_equals_pefts,
    "our file loads in PEFT, without a warning": _our_file_loads_in_peft,
    "PEFT's file loads here, to the same logits": _pefts_file_loads_here,
    "merged equals unmerged": _merge_equals_unmerged,
    "disabled equals the base model, exactly": _disabled_equals_base,
    "only the adapter's weights train": _only_the_adapter_trains,
    "a resumed run ends with the same bytes": _resume_trains_on,
    "bf16 base model": _a_bf16_base,
    "tied embeddings": _tied_weights,
    "gradient checkpointing": _gradient_checkpointing,
}
"""Title -> check(method, kind, empty folder)."""


@contextmanager
def _peft(method: str, kind: str) -> Iterator[None]:
    """Inside, PEFT may fail where ``PEFT_CANNOT`` says so, and must."""
    reason = _reason(PEFT_CANNOT, method, kind)
    try:
        yield
    except (Exception, pytest.fail.Exception):
        if reason:
            raise NotApplicable(f"PEFT {reason}: nothing to compare with") from None
        raise
    if reason:
        raise AssertionError(f"it is said that PEFT {reason}, and it does not")


def _reason(table: dict[tuple[str, str], str], method: str, kind: str) -> str | None:
    found = (
        reason
        for (methods, kinds), reason in table.items()
        if fnmatch.fnmatch(method, methods) and fnmatch.fnmatch(kind, kinds)
    )
    return next(found, None)


def _last(values: torch.Tensor, model: nn.Module, kind: str) -> torch.Tensor:
    """The logits of the input's own positions: a soft prompt may have lengthened the front."""
    ids = batch(kind).get("decoder_input_ids", batch(kind).get("input_ids"))
    return values if ids is None or values.ndim < 3 else values[:, -ids.shape[1] :]


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    difference = float((found - expected).abs().max() / expected.std().clamp(min=1.0))
    assert difference <= tolerance, f"logits differ by {difference:.3g} of their deviation"


def _gradients(model: nn.Module, kind: str) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(**labelled(kind)).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


_OPTIMIZERS: dict[int, torch.optim.Optimizer] = {}


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    if id(model) not in _OPTIMIZERS:
        _OPTIMIZERS.clear()
        parameters = [parameter for _, _, parameter in named_tensors(model).values()]
        _OPTIMIZERS[id(model)] = torch.optim.AdamW(parameters, lr=1e-2)
    return _OPTIMIZERS[id(model)]


def _steps(model: nn.Module, config: AdapterConfig, kind: str, start: int, end: int) -> None:
    """Training steps ``start`` + 1 to ``end``, each with its own random state, as the loop takes them."""
    model.train()
    optimizer = _optimizer(model)
    for step in range(start, end):
        torch.manual_seed(step)
        optimizer.zero_grad(set_to_none=True)
        loss = model(**labelled(kind, seed=step)).loss
        penalty = config.penalty(model)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        config.after_step(model, step + 1, 4)
