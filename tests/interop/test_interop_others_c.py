"""PSOFT, Lily and others that PEFT 0.21 has: what we write PEFT reads, and the reverse, to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, checkpoint_activations, labelled, logits, tiny
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

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.merge import merge
from peftcli.methods import config_from_dict

KINDS = ("llama", "gpt2", "t5", "bert", "whisper", "mixtral")
LINEAR_ONLY = {"psoft", "lily", "peanut", "supertuning"}
"""Methods with which PEFT does not adapt GPT-2's Conv1D."""

SETTINGS: dict[str, dict[str, Any]] = {
    "psoft": {"r": 6},
    "lily": {"r": 6, "num_B": 3},
    "tinylora": {"r": 3, "u": 10},
    "pvera": {"r": 8},
    "frod": {},
    "peanut": {"r": 6, "scaling": 0.1},
    "deft": {"r": 4},
    "supertuning": {"sparsity": 0.9},
}
"""What each method is run with here, for the size of the tiny models and of their random weights."""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{method}-{kind}": (method, kind, {"target_modules": ["q_proj", "v_proj"]} if kind == "whisper" else {})
        for method in SETTINGS
        for kind in KINDS
        if kind != "gpt2" or method not in LINEAR_ONLY
    },
    **{f"{method}-all-linear": (method, "llama", {"target_modules": "all-linear"}) for method in SETTINGS},
    **{
        f"{method}-saved": (method, "bert", {"modules_to_save": ["classifier"], "target_modules": ["query", "dense"]})
        for method in SETTINGS
    },
    "psoft-pissa": ("psoft", "llama", {"ab_svd_init": "pissa_init", "psoft_alpha": 5, "psoft_dropout": 0.1}),
    "psoft-lowrank": ("psoft", "llama", {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3, "random_seed": 4}),
    "psoft-free": ("psoft", "llama", {"psoft_orth": False}),
    "psoft-no-vectors": ("psoft", "llama", {"psoft_mag_a": False, "psoft_mag_b": False}),
    **{
        f"psoft-neumann-{terms}": ("psoft", "llama", {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms})
        for terms in (1, 2, 3, 4, 5, 7)
    },
    "psoft-bound": ("psoft", "llama", {"use_cayley_neumann": True, "cayley_neumann_eps": 0.9}),
    "psoft-excluded": ("psoft", "llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "lily-stride": ("lily", "llama", {"stride_A": 2, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
    "lily-all-layers": ("lily", "t5", {"stride_A": 3, "target_modules": ["q", "v", "wo"], "scaling": 0.5}),
    "lily-regex": ("lily", "llama", {"stride_A": 3, "target_modules": r".*\.[kqv]_proj"}),
    "lily-layers": ("lily", "llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "tinylora-tied": ("tinylora", "llama", {"weight_tying": 1.0, "projection_seed": 1}),
    "tinylora-groups": (
        "tinylora",
        "llama",
        {"weight_tying": 0.4, "target_modules": "all-linear"},
    ),
    "tinylora-embedding": ("tinylora", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tinylora-bias": ("tinylora", "opt", {"bias": "tinylora_only", "tinylora_dropout": 0.1}),
    "tinylora-small": ("tinylora", "bert", {"r": 20, "target_modules": ["classifier"]}),
    "pvera-two-shapes": ("pvera", "llama", {"target_modules": ["q_proj", "down_proj"], "projection_prng_key": 5}),
    "pvera-bias": ("pvera", "opt", {"bias": "all", "d_initial": 0.5, "pvera_dropout": 0.25}),
    "frod-dense": ("frod", "llama", {"sparse_rate": 1.0, "projection_prng_key": 7}),
    "frod-diagonal": ("frod", "llama", {"sparse_rate": 0.0}),
    "frod-wide": ("frod", "llama", {"target_modules": ["down_proj", "up_proj"], "layers_to_transform": [0]}),
    "frod-bert-outputs": ("frod", "bert", {"target_modules": ["attention.output.dense", "query"]}),
    "frod-bias": ("frod", "opt", {"bias": "frod_only", "frod_dropout": 0.1}),
    **{
        f"peanut-{act}": ("peanut", "llama", {"act_fn": act, "depth": depth})
        for depth, act in enumerate(("silu", "gelu_new", "tanh"))
    },
    "peanut-layers": ("peanut", "llama", {"layers_to_transform": 1, "exclude_modules": ["v_proj"]}),
    "deft-qr": ("deft", "llama", {"decomposition_method": "qr", "alpha": 3}),
    "deft-qr-conv1d": ("deft", "gpt2", {"decomposition_method": "qr", "para": True}),
    "deft-para": ("deft", "llama", {"para": True}),
    "deft-bias": ("deft", "opt", {"bias": "deft_only", "deft_dropout": 0.1, "alpha": 2}),
    "deft-small": ("deft", "bert", {"r": 8, "target_modules": ["classifier"]}),
    "supertuning-bottom": ("supertuning", "llama", {"select_top": False}),
    "supertuning-supra": ("supertuning", "llama", {"r": 3, "lora_dropout": 0.1}),
    "supertuning-supra-alpha": ("supertuning", "bert", {"r": 3, "lora_alpha": 5.0}),
}

torch.sparse.check_sparse_tensor_invariants.disable()  # PEFT's FRoD leaves it open, of which torch warns


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
    extra = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")  # what PEFT writes for no reader
    assert here == {name: value for name, value in there.items() if not name.endswith(extra)}
    if method == "lily" and settings.get("target_modules") == "all-linear":
        return  # see below, where PEFT is wrong
    trainable = sum(value.numel() for value in oracle.parameters() if value.requires_grad)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == trainable


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("method", ["tinylora", "pvera", "frod", "supertuning"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_what_is_left_out_of_the_file_is_found_again_both_ways(method: str, kind: str, tmp_path: Path) -> None:
    key = "save_precomputed_indices" if method == "supertuning" else "save_projection"
    settings = {**SETTINGS[method], key: False}
    model, folder = written_by_us((method, kind, settings), tmp_path / "ours")
    same_logits(kind, read_by_peft(kind, folder), model)  # it says that it has to find it
    same_logits(kind, loaded_here(kind, folder), model)
    oracle = theirs(kind, method, **settings)
    saved_by_peft(oracle, tmp_path / "theirs")
    same_logits(kind, loaded_here(kind, tmp_path / "theirs"), oracle)
    names, others = (file_of(place)[1].keys() for place in (folder, tmp_path / "theirs"))
    assert names == others


def test_pveras_seed_of_what_is_drawn_is_kept_for_peft(tmp_path: Path) -> None:
    oracle = theirs("llama", "pvera", r=8, generator_seed=3)
    config = config_from_dict(read_config(saved_by_peft(oracle, tmp_path / "a")))
    model = tiny("llama")
    load_adapter(model, config, tmp_path / "a", trainable=True)
    save_adapter(model, config, tmp_path / "b")
    assert file_of(tmp_path / "b")[0]["generator_seed"] == 3
    same_logits("llama", loaded_by_peft("llama", tmp_path / "b"), oracle)


# --- where PEFT is wrong: each of these fails when PEFT mends it ------------------------------------------------------


@pytest.mark.parametrize("method", sorted(LINEAR_ONLY))
def test_peft_does_not_adapt_gpt2s_layers_with(method: str, tmp_path: Path) -> None:
    model, folder = written_by_us((method, "gpt2", SETTINGS[method]), tmp_path)
    with pytest.raises((TypeError, ValueError, NotImplementedError), match="support"):
        loaded_by_peft("gpt2", folder)
    same_logits("gpt2", loaded_here("gpt2", folder), model)


def test_pefts_psoft_depends_on_signs_that_a_decomposition_is_free_to_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's signs are not a CPU's. Ours come from the CPU wherever the model is."""
    model, folder = written_by_us(("psoft", "llama", {"r": 6}), tmp_path)
    right = torch.linalg.svd

    def otherwise(*args: Any, **kwargs: Any) -> Any:
        u, s, vt = right(*args, **kwargs)
        signs = torch.tensor([1.0, -1.0]).repeat(len(s))[: len(s)]
        return u * signs, s, signs.unsqueeze(1) * vt

    monkeypatch.setattr(torch.linalg, "svd", otherwise)
    found = logits(loaded_by_peft("llama", folder), batch("llama"))
    assert not torch.allclose(found, logits(model, batch("llama")), atol=1e-2)


def test_pefts_lily_shares_nothing_with_all_linear() -> None:
    settings = {**SETTINGS["lily"], "target_modules": "all-linear", "stride_A": 2}
    shared = [
        {id(value) for name, value in model.named_parameters() if "lily_B" in name}
        for model in (theirs("llama", "lily", **settings), ours("llama", "lily", **settings)[0])
    ]
    assert [len(found) for found in shared] == [14, 7], "two layers of seven linear layers each"


def test_pefts_frod_takes_its_basis_from_the_file_and_what_belongs_to_it_from_elsewhere(tmp_path: Path) -> None:
    """The same adapter in a basis whose first vector points the other way, as another machine may find it."""
    model, folder = written_by_us(("frod", "llama", {"target_modules": ["q_proj"]}), tmp_path)
    layers = [layer for layer in model.modules() if hasattr(layer, "frod_V") and layer.base_layer is not None]
    with torch.no_grad():
        layers[0].frod_V[:, 0] *= -1
        rows, columns = layers[0].frod_s.indices
        for layer in layers:
            layer.frod_lambda_s_values[(rows == 0) ^ (columns == 0)] *= -1
    config = config_from_dict(read_config(folder))
    before = loaded_here("llama", folder)
    save_adapter(model, config, folder)
    same_logits("llama", loaded_here("llama", folder), before)
    found = logits(loaded_by_peft("llama", folder), batch("llama"))
    assert not torch.allclose(found, logits(before, batch("llama")), atol=1e-2)


def test_pefts_tinylora_forgets_on_merging_that_an_embedding_scales(tmp_path: Path) -> None:
    model, folder = written_by_us(("tinylora", "gemma3", {"r": 3, "target_modules": ["embed_tokens"]}), tmp_path)
    oracle, ids = read_by_peft("gemma3", folder), batch("gemma3")["input_ids"]
    same_logits("gemma3", oracle, model)
    with torch.no_grad():
        right = oracle.get_input_embeddings()(ids)
        oracle.get_input_embeddings().merge()
        merged = oracle.get_input_embeddings()(ids)
    assert not torch.allclose(merged, right, atol=1e-2)
    merge(model, config_from_dict(read_config(folder)))
    torch.testing.assert_close(model.get_input_embeddings()(ids), right)


def test_pefts_pvera_with_a_seed_draws_anew_when_a_checkpointed_layer_is_called_again() -> None:
    def gradients(*, again: bool) -> torch.Tensor:
        model = theirs("llama", "pvera", r=8, generator_seed=3).train()
        torch.manual_seed(0)
        if again:
            checkpoint_activations(model.base_model.model)
        model(**labelled("llama")).loss.backward()
        return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None])

    plain, checkpointed = gradients(again=False), gradients(again=True)
    assert (plain - checkpointed).norm() > 0.01 * plain.norm()
