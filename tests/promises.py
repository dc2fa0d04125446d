"""What every method promises on every shape of base model, each promise a function that raises when it is broken.

``tests/contract/test_conformance.py`` runs them as tests, and ``docs/conformance.py`` writes the table of them.
"""

from __future__ import annotations

import atexit
import copy
import fnmatch
import functools
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, checkpoint_activations, labelled, logits, randomise, tiny
from oracle import PEFTS_METHODS, file_of, loaded_by_peft, ours, read_by_peft, saved_by_peft, theirs
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable
from peftcli.core.merge import merge
from peftcli.core.protocols import after_step, penalty
from peftcli.core.weights import adapter_state, file_tensors, load_training_state, named_tensors, training_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.tasks.text.fast.unpadded import unpad

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
"""Largest difference of logits, as a share of the largest of them, that float32 explains."""

METHOD_SETTINGS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "multitask_prompt_tuning": {"num_virtual_tokens": 4},
    "cartridge": {"num_virtual_tokens": 4, "num_frozen_tokens": 2},
    "cpt": {
        "cpt_token_ids": [50, 51, 52, 53],
        "cpt_tokens_type_mask": [1, 2, 3, 2],
        "opt_projection_epsilon": 30.0,  # so that what trains matters
        "opt_projection_format_epsilon": 30.0,
    },
    "randlora": {"r": 8, "randlora_alpha": 8},
    "vblora": {"num_vectors": 20, "vector_length": 8},
    "fourierft": {"n_frequency": 50},
    "waveft": {"n_frequency": 50, "scaling": 2.0},
    "c3a": {"block_size": 8},
    "miss": {"r": 8},
    "shira": {"r": 2},
    "delora": {"r": 1},  # the bound on the update is random here and small
    "gralora": {"r": 4, "alpha": 8},
    "oft": {"oft_block_size": 4},  # larger blocks of random numbers are far from a rotation
    "adalora": {"total_step": 4},
    "trainable_tokens": {"token_indices": [58, 79]},  # among the tokens of the test batches
    "road": {"group_size": 8},
    "glora": {"bias": "glora_only"},  # D is a factor of biases, which are zero in the tiny models
    "psoft": {"r": 4},
    "lily": {"r": 8},
    "tinylora": {"u": 8},
    "pvera": {"r": 16},
    "frod": {"regularization_alpha": 0.1},  # so that the basis hangs less on how the base weights are rounded
    "peanut": {"r": 4, "scaling": 0.3},
    "deft": {"r": 4},
    "supertuning": {"sparsity": 0.9},
    "adaption_prompt": {"adapter_len": 2, "adapter_layers": 2},
    "adamss": {"r": 8, "num_subspaces": 3, "subspace_rank": 2},
}
"""What a method is run with in tests; nothing: its defaults."""

_CONVS = ("lora", "loha", "lokr", "ia3", "oft", "boft", "hra", "hira")
"""Methods that adapt convolutions."""
KIND_SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("*", "bert"): {"modules_to_save": ["classifier"]},
    ("*", "whisper"): {"target_modules": ["q_proj", "v_proj"]},  # PEFT has no default there
    ("*", "mixtral"): {"target_modules": ["q_proj", "v_proj"]},
    ("*", "convnet"): {"target_modules": ["classifier.1"]},
    **{(method, "convnet"): {"target_modules": ["layer.0.convolution"]} for method in _CONVS},
    ("adaption_prompt", "*"): {"target_modules": None},
    ("ia3", "[wcm]*"): {"feedforward_modules": []},  # PEFT has no default there
    ("multitask_prompt_tuning", "*"): {"num_tasks": 2},
    ("multitask_prompt_tuning", "t5"): {"num_transformer_submodules": 1},  # PEFT's 2 is refused
    ("ln_tuning", "bert"): {"target_modules": ["LayerNorm"]},
    ("ln_tuning", "whisper"): {"target_modules": ["self_attn_layer_norm"]},
    ("ln_tuning", "mixtral"): {"target_modules": ["input_layernorm"]},
    ("ln_tuning", "convnet"): {"target_modules": ["normalization"]},
    ("adamss", "convnet"): {"r": 4, "num_subspaces": 1},  # of eight classes the loss sees two
    ("glora", "t5"): {"target_modules": ["v"]},  # with random queries its attention saturates
    ("oft", "convnet"): {"target_modules": ["shortcut.convolution"]},  # PEFT adds up what overlapping windows see
    ("trainable_tokens", "[wm]*"): {"target_modules": ["embed_tokens"]},
    ("trainable_tokens", "bert"): {"modules_to_save": None},  # PEFT has no such setting there
}
"""What besides, for a kind of model: (method, kind) patterns -> settings, of which all that match count."""

NOT_FOR: dict[tuple[str, ...], str] = {
    ("ln_tuning", "convnet"): "the model's norms keep running statistics, which training would change",
    ("trainable_tokens", "convnet"): "the model reads pixels, not token ids",
    ("adaption_prompt", "convnet"): "the model has no attention",
    ("prefix_tuning", "convnet"): "the model has no attention that could attend to a prefix",
    ("cartridge", "convnet"): "the model has no attention that could attend to a prefix",
    ("prefix_tuning", "whisper"): "the encoder hears sound; PEFT puts a prefix into text models only",
    ("cartridge", "whisper"): "the encoder hears sound; PEFT puts a prefix into text models only",
    **{
        (method, kind): f"the model reads {what}, not token ids: virtual tokens have no place there"
        for method in ("prompt_tuning", "multitask_prompt_tuning", "p_tuning")
        for kind, what in (("whisper", "sound"), ("convnet", "pixels"))
    },
    **{("xlora", kind): "its classifier reads one state for each token" for kind in ("t5", "whisper", "convnet")},
    **{("cpt", kind): "its loss is that of a causal language model" for kind in ("t5", "bert", "whisper", "convnet")},
}
"""Methods that do not go with a model: (method, kind) patterns -> reason. ``inject`` must refuse them."""

_PLAIN_LINEAR_IN_PEFT = (
    "c3a", "miss", "shira", "delora", "loha", "lokr", "oft", "boft", "hra", "psoft", "lily", "peanut", "supertuning",
    "beft", "road", "glora", "adamss", "poly",
)  # fmt: skip
PEFT_CANNOT: dict[tuple[str, ...], str] = {
    **{(method, "gpt2", "*"): "does not adapt Conv1D" for method in _PLAIN_LINEAR_IN_PEFT},
    ("osf", "gpt2", "[foP]*"): "leaves Conv1D as it is, in silence",
    **{
        ("adaption_prompt", kind, "[foP]*"): "knows Llama, Mistral and GPT-2 only"
        for kind in ("t5", "bert", "whisper", "mixtral")
    },
    ("poly", "[wc]*", "[fP]*"): "drops task_ids where the adapter has no task_type",
    ("prefix_tuning", "bert", "[fP]*"): "demands a model that returns keys and values",
    **{
        ("xlora", kind, "[foP]*"): "finds modules of adapters below a model called model only"
        for kind in ("gpt2", "bert")
    },
    ("xlora", "*", "P*"): "leaves the classifier's first layer out of its file",
    ("cartridge", "bert", "[fP]*"): "demands a model that returns keys and values",
    ("multitask_prompt_tuning", "t5", "[fP]*"): "gives the encoder both ids and embeddings",
}
"""Where PEFT 0.21 fails itself: (method, kind, promise) patterns -> what it does. It must still do so."""


class NotApplicable(Exception):
    """A promise that means nothing here; says why."""


def base_settings(method: str, kind: str) -> dict[str, Any]:
    """What a method is run with on any model, and the adapters that it mixes."""
    return copy.deepcopy(METHOD_SETTINGS.get(method, {})) | ({"adapters": experts(kind)} if method == "xlora" else {})


@functools.cache
def experts(kind: str) -> dict[str, str]:
    """Two LoRA adapters of the tiny model for X-LoRA to mix, of other sizes and modules: PEFT's name -> folder."""
    own = {"bert": ["query", "value"], "gpt2": ["c_attn", "c_proj"], "bloom": ["query_key_value", "dense"]}.get(
        kind, ["q_proj", "v_proj"]
    )
    found = {}
    for number in range(2):
        model, config = ours(kind, "lora", seed=number, r=2 + number, target_modules=own[: number + 1])
        folder = Path(tempfile.mkdtemp(prefix="expert"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        save_adapter(model, config, folder)
        found[str(number)] = str(folder)
    return found


def settings_of(method: str, kind: str) -> dict[str, Any]:
    """What a method is run with on a model of a kind. A copy: PEFT appends to lists that it is given."""
    known = {field.name for field in fields(METHODS[method].config_class())}
    found = base_settings(method, kind)
    for (methods, kinds), values in KIND_SETTINGS.items():
        if fnmatch.fnmatch(method, methods) and fnmatch.fnmatch(kind, kinds):
            found |= copy.deepcopy({name: value for name, value in values.items() if name in known})
    return {name: value for name, value in found.items() if value is not None}


def _task_type(method: str, kind: str) -> str | None:
    """PEFT's task, which trains the head too; not where the method knows no modules_to_save."""
    return None if method == "trainable_tokens" and kind == "bert" else TASK_TYPES.get(kind)


def config_of(method: str, kind: str) -> AdapterConfig:
    return METHODS[method].config_class()(**settings_of(method, kind), task_type=_task_type(method, kind))


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
    own = _last(_logits(model, method, kind), kind)
    with _peft(method, kind, "forward equals"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = read_by_peft(kind, folder)
        _close(_last(_logits(oracle, method, kind), kind), own)


def _our_file_loads_in_peft(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method)
    save_adapter(model, config, folder)
    with _peft(method, kind, "our file loads"):
        assert len(loaded_by_peft(kind, folder).state_dict()) > len(tiny(kind).state_dict()), "PEFT has nothing of it"


def _pefts_file_loads_here(method: str, kind: str, folder: Path) -> None:
    with _peft(method, kind, "PEFT's file loads"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = theirs(kind, method, task_type=_task_type(method, kind), **settings_of(method, kind))
        expected = _last(_logits(oracle, method, kind), kind)
        saved_by_peft(oracle, folder)
        model = tiny(kind)
        load_adapter(model, config_from_dict(read_config(folder)), folder)
        _close(_last(_logits(model, method, kind), kind), expected)
    written = {name for name in file_of(folder)[1] if not name.endswith(".base_layer.weight")}
    needed = {name for name, (layer, tensor, _) in file_tensors(model).items() if tensor not in layer.optional}
    assert needed <= written


def _merge_equals_unmerged(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method)
    expected = _logits(model, method, kind)
    if reason := config.merge_problem():
        try:
            merge(model, config)
        except AdapterError:
            raise NotApplicable(reason) from None
        raise AssertionError("merged what cannot be merged")
    merge(model, config)
    assert list(model.state_dict()) == list(tiny(kind).state_dict())
    _close(_logits(model, method, kind), expected, 1e-4)


def _disabled_equals_base(method: str, kind: str, folder: Path) -> None:
    model, _ = adapted(kind, method)
    with disabled(model):
        assert torch.equal(logits(model, batch(kind)), logits(tiny(kind), batch(kind)))


def _only_the_adapter_trains(method: str, kind: str, folder: Path) -> None:
    model, _ = adapted(kind, method)
    own = {id(parameter) for _, _, parameter in named_tensors(model).values()}
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**_labelled(method, kind)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (id(parameter) in own) == (parameter.grad is not None), name
        assert (id(parameter) in own) == (not torch.equal(parameter, before[name])), name


def _resume_trains_on(method: str, kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    straight = tiny(kind)
    config = config_of(method, kind)
    inject(straight, config)
    _steps(straight, config, method, kind, 0, 2)
    kept = {name: value.clone() for name, value in training_state(straight).items()}
    states = {name: copy.deepcopy(value) for name, value in _optimizer(straight).state_dict().items()}
    _steps(straight, config, method, kind, 2, 4)
    torch.manual_seed(1)
    resumed, again = tiny(kind), config_of(method, kind)
    inject(resumed, again)
    load_training_state(resumed, kept)
    _optimizer(resumed).load_state_dict(states)
    _steps(resumed, again, method, kind, 2, 4)
    for name, value in training_state(straight).items():
        assert torch.equal(value, training_state(resumed)[name]), name


def _a_bf16_base(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method, base=tiny(kind).to(torch.bfloat16))
    assert {value.dtype for value in adapter_state(model).values() if value.is_floating_point()} == {torch.float32}
    half = _half(_inputs(method, batch(kind)))
    found = logits(model, half)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()
    loss = model(**_half(_labelled(method, kind))).loss
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
    expected = logits(model, _inputs(method, batch(tied)))
    save_adapter(model, config, folder)
    again = tiny(tied)
    load_adapter(again, config_from_dict(read_config(folder)), folder)
    assert torch.equal(logits(again, _inputs(method, batch(tied))), expected)
    if config.merge_problem() is None:
        merge(model, config)
        _close(logits(model, batch(tied)), expected, 1e-4)


def _gradient_checkpointing(method: str, kind: str, folder: Path) -> None:
    model, _ = adapted(kind, method)
    if not model.supports_gradient_checkpointing:
        raise NotApplicable("the model does not support gradient checkpointing")
    expected = _gradients(model.train(), method, kind)
    checkpoint_activations(model)
    found = _gradients(model, method, kind)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-12, name


def _without_padding(method: str, kind: str, folder: Path) -> None:
    model, config = adapted(kind, method)
    if problem := config.packing_problem():
        raise NotApplicable(problem)
    inputs = _inputs(method, batch(kind))
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, 4:] = 0
    with torch.no_grad():
        padded = _last(model(**inputs).logits, kind)
        if not unpad(model, config):
            raise NotApplicable("needs padding")
        found = _last(model(**inputs).logits, kind)
    counts = inputs["attention_mask"].bool() if padded.ndim > 2 else slice(None)
    _close(found[counts], padded[counts])


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
    "batches without padding": _without_padding,
}
"""Title -> check(method, kind, empty folder)."""


@contextmanager
def _peft(method: str, kind: str, promise: str) -> Iterator[None]:
    """Inside, PEFT may fail where ``PEFT_CANNOT`` says so, and must."""
    if method not in PEFTS_METHODS:
        raise NotApplicable("PEFT has no such method")
    reason = _reason(PEFT_CANNOT, method, kind, promise)
    try:
        yield
    except (Exception, pytest.fail.Exception):
        if reason:
            raise NotApplicable(f"PEFT {reason}: nothing to compare with") from None
        raise
    if reason:
        raise AssertionError(f"it is said that PEFT {reason}, and it does not")


def _reason(table: Mapping[tuple[str, ...], str], *place: str) -> str | None:
    """The table's first entry whose patterns match the place."""
    found = (reason for patterns, reason in table.items() if all(map(fnmatch.fnmatch, place, patterns)))
    return next(found, None)


def _inputs(method: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs with what the method reads besides."""
    by_task = method in ("multitask_prompt_tuning", "poly")
    return {**inputs, "task_ids": torch.zeros(2, dtype=torch.long)} if by_task else inputs


def _labelled(method: str, kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return _inputs(method, labelled(kind, seed))


def _logits(model: nn.Module, method: str, kind: str) -> torch.Tensor:
    return logits(model, _inputs(method, batch(kind)))


def _half(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in inputs.items()}


def _last(values: torch.Tensor, kind: str) -> torch.Tensor:
    """The logits of the input's own positions: a soft prompt may have lengthened the front."""
    ids = batch(kind).get("decoder_input_ids", batch(kind).get("input_ids"))
    return values if ids is None or values.ndim < 3 else values[:, -ids.shape[1] :]


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1.0))
    assert difference <= tolerance, f"logits differ by {difference:.3g} of the largest"


def _gradients(model: nn.Module, method: str, kind: str) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    model(**_labelled(method, kind)).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


_OPTIMIZERS = weakref.WeakKeyDictionary[nn.Module, torch.optim.Optimizer]()


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    if model not in _OPTIMIZERS:
        parameters = [parameter for _, _, parameter in named_tensors(model).values()]
        _OPTIMIZERS[model] = torch.optim.AdamW(parameters, lr=1e-2)
    return _OPTIMIZERS[model]


def _steps(model: nn.Module, config: AdapterConfig, method: str, kind: str, start: int, end: int) -> None:
    """Training steps ``start`` + 1 to ``end``, each with its own random state, as the loop takes them."""
    model.train()
    optimizer = _optimizer(model)
    for step in range(start, end):
        torch.manual_seed(step)
        optimizer.zero_grad(set_to_none=True)
        loss = model(**_labelled(method, kind, seed=step)).loss
        added = penalty(model, config)
        (loss if added is None else loss + added).backward()
        optimizer.step()
        after_step(model, config, step + 1, 4)
