"""AdaMSS and others that PEFT 0.21 has: what we write PEFT reads, and the reverse, to the same logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import (
    Case,
    file_of,
    loaded_by_peft,
    loaded_here,
    saved_by_peft,
    theirs,
    written_by_us,
)
from promises import TASK_TYPES
from torch import nn

from peftcli.core.inject import set_trainable
from peftcli.core.weights import file_tensors, named_tensors

SETTINGS: dict[str, dict[str, Any]] = {
    "adamss": {"r": 8, "num_subspaces": 3, "subspace_rank": 2},
    "adaption_prompt": {"adapter_len": 5, "adapter_layers": 2},
    "poly": {"r": 3, "n_tasks": 3, "n_skills": 2},
}
"""What each method is run with here, for the size of the tiny models."""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"adamss-{kind}": ("adamss", kind, {"target_modules": ["q_proj", "v_proj"]} if kind == "whisper" else {})
        for kind in ("llama", "t5", "bert", "opt", "whisper", "mixtral")
    },
    **{f"poly-{kind}": ("poly", kind, {"task_type": TASK_TYPES[kind]}) for kind in ("llama", "t5", "bert", "mixtral")},
    "poly-splits": ("poly", "llama", {"n_splits": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "poly-saved": (
        "poly",
        "bert",
        {"modules_to_save": ["classifier"], "target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "poly-excluded": ("poly", "llama", {"exclude_modules": ["layers.0.self_attn.q_proj"], "task_type": "CAUSAL_LM"}),
    "adaption_prompt-llama": ("adaption_prompt", "llama", {"task_type": "CAUSAL_LM"}),
    "adaption_prompt-gpt2": ("adaption_prompt", "gpt2", {}),
    "adaption_prompt-last-layer": ("adaption_prompt", "llama", {"adapter_layers": 1, "target_modules": "self_attn"}),
    "adamss-all-linear": ("adamss", "llama", {"target_modules": "all-linear", "num_subspaces": 5, "random_seed": 7}),
    "adamss-saved": ("adamss", "bert", {"modules_to_save": ["classifier"], "target_modules": ["query", "dense"]}),
    "adamss-layers": ("adamss", "llama", {"layers_to_transform": [1], "subspace_rank": 7}),
    "adamss-dynamic": ("adamss", "llama", {"use_dynamic_rank": True, "svd_threshold": 0.6, "subspace_rank": 4}),
    "adamss-asa": ("adamss", "llama", {"use_asa": True, "asa_target_subspaces": 2}),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    method, kind, settings = CASES[request.param]
    return method, kind, copy.deepcopy({**SETTINGS[method], **settings})  # PEFT appends to lists


@pytest.mark.grid(each=lambda case: CASES[case][0])
def test_what_we_write_peft_reads(case: Case, tmp_path: Path) -> None:
    kind = case[1]
    model, folder = written_by_us(case, tmp_path)
    _same_logits(case, loaded_by_peft(kind, folder), model)
    assert (logits(model, _inputs(case)) - logits(tiny(kind), batch(kind))).abs().max() > 3e-4


@pytest.mark.grid(each=lambda case: CASES[case][0])
def test_what_peft_writes_we_read_and_train_alike(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    written = theirs(kind, method, **settings)
    loaded = loaded_here(kind, saved_by_peft(written, tmp_path))
    _same_logits(case, loaded, written)
    set_trainable(loaded, True)
    expected, found = (_gradient(case, model) for model in (written, loaded))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.grid(each=lambda case: CASES[case][0])
def test_names_shapes_dtypes_and_counts_are_pefts(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    model, folder = written_by_us(case, tmp_path / "ours")
    oracle = theirs(kind, method, **settings)
    here, there = (
        {name: (tuple(value.shape), value.dtype) for name, value in file_of(written)[1].items()}
        for written in (folder, saved_by_peft(oracle, tmp_path / "theirs"))
    )
    for name, (layer, tensor, _) in file_tensors(model).items():
        if tensor in layer.optional:  # our own, which PEFT does not read
            here.pop(name)
    assert here == there
    trainable = sum(value.numel() for value in oracle.parameters() if value.requires_grad)
    assert sum(value.numel() for _, _, value in named_tensors(model).values()) == trainable


def _inputs(case: Case) -> dict[str, torch.Tensor]:
    return {**batch(case[1]), **_tasks(case)}


def _tasks(case: Case) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.tensor([2, 0])} if case[0] == "poly" else {}


def _same_logits(case: Case, found: Any, expected: Any) -> None:
    right = logits(expected, _inputs(case))
    scale = max(right.abs().max().item(), 1.0)
    torch.testing.assert_close(logits(found, _inputs(case)), right, atol=1e-5 * scale, rtol=1e-5)


def _gradient(case: Case, model: nn.Module) -> torch.Tensor:
    """The gradients of all that trains, in the order of the sorted values, whatever it is called."""
    model.zero_grad()
    model(**labelled(case[1]), **_tasks(case)).loss.backward()
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None]).sort().values
