"""AdaLoRA, VeRA and others that add to a weight: what we write PEFT reads, and the reverse, to the same logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import file_of, loaded_by_peft, ours, saved_by_peft, theirs
from torch import nn

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.methods import config_from_dict

KINDS = ("llama", "gpt2", "t5", "bert")
LINEAR_ONLY = {"c3a", "miss", "shira", "delora"}
"""Methods with which PEFT does not adapt GPT-2's Conv1D."""

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "vera": {"r": 8},
    "randlora": {"r": 4, "randlora_alpha": 20},
    "vblora": {"num_vectors": 20, "vector_length": 8},
    "fourierft": {"n_frequency": 50},
    "waveft": {"n_frequency": 50, "scaling": 2.0},
    "c3a": {"block_size": 8},
    "miss": {"r": 8},
    "shira": {"r": 2},
    "hira": {"r": 4},
    "delora": {"r": 4},
    "gralora": {"r": 4, "alpha": 8},
}
"""What each method is run with here, for the size of the tiny models and of their random weights."""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{method}-{kind}": (method, kind, {})
        for method in SETTINGS
        for kind in KINDS
        if kind != "gpt2" or method not in LINEAR_ONLY
    },
    **{
        f"{method}-all-linear": (method, "llama", {"target_modules": "all-linear"})
        for method in SETTINGS
    },
    "adalora-conv": ("adalora", "convnet", {"target_modules": ["convolution"]}),
    "adalora-bias": ("adalora", "opt", {"bias": "all", "lora_dropout": 0.25}),
    "adalora-saved": ("adalora", "bert", {"modules_to_save": ["classifier"], "target_modules": ["query"]}),
    "vera-two-shapes": ("vera", "llama", {"target_modules": ["q_proj", "down_proj"], "projection_prng_key": 5}),
    "vera-bias": ("vera", "opt", {"bias": "vera_only", "d_initial": 0.5, "vera_dropout": 0.25}),
    "vera-layers": ("vera", "llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "randlora-two-shapes": ("randlora", "llama", {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 5}),
    "randlora-sparse": ("randlora", "llama", {"sparse": True, "projection_prng_key": 7}),
    "randlora-very-sparse": ("randlora", "gpt2", {"very_sparse": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "vblora-topk": ("vblora", "llama", {"save_only_topk_weights": True, "topk": 3}),
    "vblora-topk-1": ("vblora", "gpt2", {"save_only_topk_weights": True, "topk": 1, "num_vectors": 300}),
    "vblora-bias": ("vblora", "opt", {"bias": "vblora_only", "save_only_topk_weights": True}),
    "fourierft-pattern": ("fourierft", "llama", {"n_frequency_pattern": {"v_proj": 20}, "random_loc_seed": 3}),
    "fourierft-bias": ("fourierft", "opt", {"bias": "fourier_only", "scaling": 40.0}),
    "waveft-db4": ("waveft", "llama", {"wavelet_family": "db4"}),
    "waveft-sym3-odd": ("waveft", "bert", {"wavelet_family": "sym3", "target_modules": ["classifier", "query"]}),
    "waveft-db10": ("waveft", "gpt2", {"wavelet_family": "db10", "n_frequency_pattern": {"h.0.mlp.c_proj": 9}}),
    "waveft-plain": ("waveft", "llama", {"use_idwt": False, "scaling": 0.5}),
    "c3a-pattern": ("c3a", "llama", {"block_size_pattern": {"v_proj": 4}, "init_weights": True}),
    "c3a-odd": ("c3a", "llama", {"block_size": 1}),
    "miss-bat": ("miss", "llama", {"init_weights": "bat"}),
    "miss-bat-bias": ("miss", "opt", {"init_weights": "bat", "bias": "MiSS_only"}),
    "miss-mini": ("miss", "llama", {"init_weights": "mini", "mini_r": 4}),
    "miss-remainder": ("miss", "t5", {"r": 5}),
    "miss-excluded": ("miss", "llama", {"exclude_modules": ["layers.0.self_attn.q_proj"], "miss_dropout": 0.1}),
    "shira-seeded": ("shira", "llama", {"random_seed": 11}),
    "hira-conv": ("hira", "convnet", {"target_modules": ["convolution"]}),
    "hira-embedding": ("hira", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "hira-gaussian": ("hira", "llama", {"init_weights": "gaussian", "hira_dropout": 0.1}),
    "delora-patterns": ("delora", "llama", {"rank_pattern": {"v_proj": 2}, "lambda_pattern": {"q_proj": 7}}),
    "delora-bias": ("delora", "opt", {"bias": "delora_only", "module_dropout": 0.1}),
    "gralora-hybrid": ("gralora", "llama", {"hybrid_r": 2, "gralora_k": 4}),
    "gralora-hybrid-conv1d": ("gralora", "gpt2", {"hybrid_r": 3, "bias": "all"}),
}

Case = tuple[str, str, dict[str, Any]]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    method, kind, settings = CASES[request.param]
    return method, kind, {**SETTINGS[method], **settings}


def _written(case: Case, folder: Path) -> tuple[nn.Module, Path]:
    """Our adapter, and the folder that it was written to."""
    method, kind, settings = case
    model, config = ours(kind, method, **settings)
    save_adapter(model, config, folder)
    return model, folder


def _loaded(kind: str, folder: Path) -> nn.Module:
    model = tiny(kind)
    load_adapter(model, config_from_dict(read_config(folder)), folder)
    return model


def _close(kind: str, found: Any, expected: Any) -> None:
    right = logits(expected, batch(kind))
    scale = right.abs().max().item()
    torch.testing.assert_close(logits(found, batch(kind)), right, atol=1e-5 * max(scale, 1.0), rtol=1e-5)


def test_what_we_write_peft_reads(case: Case, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    method, kind, _ = case
    model, folder = _written(case, tmp_path)
    if method == "randlora":  # see test_peft_misses_its_own_copies
        with pytest.warns(UserWarning, match="missing adapter keys"):
            oracle = peft.PeftModel.from_pretrained(tiny(kind), folder).eval()
    else:
        oracle = loaded_by_peft(kind, folder)
    _close(kind, oracle, model)
    assert (logits(model, batch(kind)) - logits(tiny(kind), batch(kind))).abs().max() > 3e-4


def test_what_peft_writes_we_read(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    written = theirs(kind, method, **settings)
    _close(kind, _loaded(kind, saved_by_peft(written, tmp_path)), written)


def test_names_shapes_dtypes_and_counts_are_pefts(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    model, folder = _written(case, tmp_path / "ours")
    oracle = theirs(kind, method, **settings)
    here, there = (
        {name: (tuple(value.shape), value.dtype) for name, value in file_of(written)[1].items()}
        for written in (folder, saved_by_peft(oracle, tmp_path / "theirs"))
    )
    extra = re.compile(r"base_model\.model\..*(\.randlora_[AB]|embed_tokens\.base_layer\.weight)")
    assert here == {name: value for name, value in there.items() if not extra.fullmatch(name)}
    trainable = sum(value.numel() for value in oracle.parameters() if value.requires_grad)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == trainable


def _train(model: Any, inputs: dict[str, torch.Tensor], steps: int, penalty: Any, allocate: Any) -> list[float]:
    """The losses of so many steps."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.05)
    losses = []
    for step in range(1, steps + 1):
        loss = model(**inputs).loss
        loss = loss if penalty is None else loss + penalty(model)
        loss.backward()
        optimizer.step()
        allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adalora_trains_and_shares_out_its_budget_as_peft_does(kind: str, tmp_path: Path) -> None:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 2, "total_step": 9}
    # without the task PEFT leaves the penalty out
    model, config = ours(kind, "adalora", task_type="CAUSAL_LM", target_modules="all-linear", **schedule)
    save_adapter(model, config, tmp_path / "start")
    oracle = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / "start", is_trainable=True)
    inputs = labelled(kind)
    losses = _train(model, inputs, 9, config.penalty, lambda step: config.after_step(model, step, 9))
    assert losses == pytest.approx(_train(oracle, inputs, 9, None, oracle.base_model.update_and_allocate), rel=1e-4)
    save_adapter(model, config, tmp_path / "ours")
    written, tensors = file_of(tmp_path / "ours")
    expected, theirs_ = file_of(saved_by_peft(oracle, tmp_path / "theirs"))
    assert written["rank_pattern"] == expected["rank_pattern"]
    kept = [sum(mask) for mask in written["rank_pattern"].values()]
    assert sum(kept) == 2 * len(kept)
    assert len(set(kept)) > 1
    for name, value in tensors.items():
        torch.testing.assert_close(value, theirs_[name], atol=2e-4, rtol=1e-3)
    for folder in ("theirs", "ours"):  # PEFT takes its own rank_pattern for LoRA's
        with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
            again = peft.PeftModel.from_pretrained(tiny(kind), tmp_path / folder).eval()
    _close(kind, again, model)
    _close(kind, _loaded(kind, tmp_path / "ours"), model)
    _close(kind, _loaded(kind, tmp_path / "theirs"), oracle)
