"""AdaLoRA, VeRA and others that add to a weight: what we write PEFT reads, and the reverse, to the same logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import (
    Case,
    file_of,
    loaded_by_peft,
    loaded_here,
    ours,
    read_by_peft,
    same_logits,
    saved_by_peft,
    theirs,
    written_by_us,
)
from torch import nn

from peftcli.core.files import read_config, save_adapter
from peftcli.core.protocols import after_step, penalty

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA, once a process

KINDS = ("llama", "gpt2", "t5", "bert")
LINEAR_ONLY = {"c3a", "miss", "shira", "delora"}
"""Methods with which PEFT does not adapt GPT-2's Conv1D."""

SETTINGS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 10},
    "vera": {"r": 8},
    "randlora": {"r": 4, "randlora_alpha": 20},
    "vblora": {"num_vectors": 20, "vector_length": 8},
    "unilora": {"r": 2},
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
    **{f"{method}-all-linear": (method, "llama", {"target_modules": "all-linear"}) for method in SETTINGS},
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
    "unilora-indices": ("unilora", "llama", {"save_indices": True, "proj_seed": 5, "theta_d_length": 100}),
    "unilora-bias": ("unilora", "opt", {"bias": "unilora_only", "unilora_dropout": 0.1, "theta_d_length": 3000}),
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


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    method, kind, settings = CASES[request.param]
    return method, kind, {**SETTINGS[method], **settings}


@pytest.mark.grid(each=lambda case: CASES[case][0])
def test_what_we_write_peft_reads(case: Case, tmp_path: Path) -> None:
    kind = case[1]
    model, folder = written_by_us(case, tmp_path)
    same_logits(kind, loaded_by_peft(kind, folder), model)
    assert (logits(model, batch(kind)) - logits(tiny(kind), batch(kind))).abs().max() > 3e-4


@pytest.mark.grid(each=lambda case: CASES[case][0])
def test_what_peft_writes_we_read(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    written = theirs(kind, method, **settings)
    same_logits(kind, loaded_here(kind, saved_by_peft(written, tmp_path)), written)


@pytest.mark.grid(keep=5)
def test_names_shapes_dtypes_and_counts_are_pefts(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    model, folder = written_by_us(case, tmp_path / "ours")
    oracle = theirs(kind, method, **settings)
    here, there = (
        {name: (tuple(value.shape), value.dtype) for name, value in file_of(written)[1].items()}
        for written in (folder, saved_by_peft(oracle, tmp_path / "theirs"))
    )
    extra = re.compile(r"base_model\.model\..*embed_tokens\.base_layer\.weight")
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
    losses = _train(
        model, inputs, 9, lambda model: penalty(model, config), lambda step: after_step(model, config, step, 9)
    )
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
    same_logits(kind, again, model)
    same_logits(kind, loaded_here(kind, tmp_path / "ours"), model)
    same_logits(kind, loaded_here(kind, tmp_path / "theirs"), oracle)


@pytest.mark.parametrize("method", ["vera", "randlora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_seed_stands_for_the_random_matrices_both_ways(method: str, kind: str, tmp_path: Path) -> None:
    settings = {**SETTINGS[method], "save_projection": False, "projection_prng_key": 21}
    model, folder = written_by_us((method, kind, settings), tmp_path / "ours")
    same_logits(kind, read_by_peft(kind, folder), model)  # it says that it has only the seed
    oracle = theirs(kind, method, **settings)
    same_logits(kind, loaded_here(kind, saved_by_peft(oracle, tmp_path / "theirs")), oracle)


def test_a_mask_of_ones_own_is_read_from_pefts_file(tmp_path: Path) -> None:
    settings = peft.ShiraConfig(r=2, target_modules=["q_proj"])
    settings.mask_fn = lambda layer, r, **_: (torch.arange(32 * 32).view(32, 32) % 8 == 3).to(layer.weight)
    settings.mask_type = "every eighth"
    oracle = peft.get_peft_model(tiny("llama"), settings)
    nn.init.normal_(oracle.base_model.model.model.layers[0].self_attn.q_proj.shira_weight["default"])
    saved_by_peft(oracle, tmp_path)
    assert read_config(tmp_path)["mask_type"] == "every eighth"
    same_logits("llama", loaded_here("llama", tmp_path), oracle)


# --- where PEFT is wrong: each of these fails when PEFT mends it ------------------------------------------------------


def test_pefts_randlora_file_holds_the_bases_once_more_for_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So does ours, but where these copies are large. PEFT then warns that they are missing, and does not use them."""
    case = ("randlora", "llama", {"r": 4, "randlora_alpha": 20})
    monkeypatch.setattr("peftcli.methods.randlora.layers._MOST_COPIED", 1000)
    model, _ = written_by_us(case, tmp_path / "ours")
    saved_by_peft(theirs("llama", "randlora", **case[2]), tmp_path / "theirs")
    count = [sum(name.endswith("randlora_B") for name in file_of(tmp_path / who)[1]) for who in ("ours", "theirs")]
    assert count == [1, 5]
    with pytest.warns(UserWarning, match="missing adapter keys"):
        oracle = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours").eval()
    same_logits("llama", oracle, model)
    loaded_here("llama", tmp_path / "theirs")


@pytest.mark.parametrize("method", sorted(LINEAR_ONLY))
def test_peft_does_not_adapt_gpt2s_layers_with(method: str, tmp_path: Path) -> None:
    model, folder = written_by_us((method, "gpt2", SETTINGS[method]), tmp_path)
    with pytest.raises(TypeError, match="is not supported"):
        loaded_by_peft("gpt2", folder)
    same_logits("gpt2", loaded_here("gpt2", folder), model)


def test_peft_ignores_hiras_rank_pattern() -> None:
    oracle = theirs("llama", "hira", r=4, rank_pattern={"q_proj": 2})
    sizes = {len(value) for name, value in peft.get_peft_model_state_dict(oracle).items() if name.endswith("hira_A")}
    assert sizes == {4}


def test_pefts_hira_forgets_that_an_embedding_scales(tmp_path: Path) -> None:
    """Ours gives the logits of the merged model; see tests/methods/test_methods_low_rank.py."""
    model, folder = written_by_us(("hira", "gemma3", {"r": 4, "target_modules": ["embed_tokens"]}), tmp_path)
    found = logits(read_by_peft("gemma3", folder), batch("gemma3"))
    assert not torch.allclose(found, logits(model, batch("gemma3")), atol=1e-2)


def test_pefts_hira_breaks_whispers_convolutions() -> None:
    """Whisper reads the stride of its convolutions, which PEFT's layer does not have."""
    oracle = theirs("whisper", "hira", r=4, target_modules=["conv1"])
    with pytest.raises(AttributeError, match="stride"):
        logits(oracle, batch("whisper"))


def test_pefts_c3a_feeds_one_adapter_to_the_next() -> None:
    layer = nn.Sequential(nn.Linear(8, 8))
    oracle = peft.get_peft_model(layer, peft.C3AConfig(block_size=4, target_modules=["0"]))
    oracle.add_adapter("other", peft.C3AConfig(block_size=4, target_modules=["0"]))
    oracle.base_model.set_adapter(["default", "other"])
    x, adapted = torch.randn(3, 8), oracle.base_model.model[0]
    with torch.no_grad():
        deltas = [adapted.get_delta_weight(name) for name in ("default", "other")]
        right = adapted.base_layer(x) + sum(x @ delta.T for delta in deltas)
        assert not torch.allclose(oracle(x), right, atol=1e-3)


def test_pefts_adalora_breaks_when_nothing_is_to_be_taken_away() -> None:
    oracle = theirs("llama", "adalora", init_r=2, target_r=2, total_step=3, task_type="CAUSAL_LM")
    oracle(**labelled("llama")).loss.backward()
    with pytest.raises(RuntimeError, match="out of range"):
        oracle.base_model.update_and_allocate(1)


def test_pefts_adalora_leaves_its_penalty_out_without_a_task() -> None:
    with_task, without = (
        theirs("llama", "adalora", total_step=3, task_type=task)(**labelled("llama")).loss.item()
        for task in ("CAUSAL_LM", None)
    )
    assert with_task > without + 0.1
