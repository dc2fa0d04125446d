"""Every method and PEFT: what we write PEFT reads, and the reverse, to the same logits; the files are of one form."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lora_cases
import oracle
import peft.tuners.boft.layer as boft_of_peft
import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import (
    PEFTS_METHODS,
    Case,
    file_of,
    loaded_by_peft,
    loaded_here,
    same_logits,
    saved_by_peft,
    theirs,
    written_by_us,
)
from promises import TASK_TYPES
from torch import nn

from peftcli.core.inject import set_trainable
from peftcli.core.weights import file_tensors
from peftcli.methods import METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # PEFT's SHiRA, once a process
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape"),  # so it says of lora_B.bias
]
torch.sparse.check_sparse_tensor_invariants.disable()  # PEFT's FRoD leaves it open, of which torch warns

SETTINGS: dict[str, dict[str, Any]] = {
    "oft": {"oft_block_size": 4},  # larger blocks of random numbers are far from a rotation
    "trainable_tokens": {"token_indices": [79, 58, 16]},
    "road": {"group_size": 8},
    "glora": {"r": 2},
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
    "psoft": {"r": 6},
    "lily": {"r": 6, "num_B": 3},
    "tinylora": {"r": 3, "u": 10},
    "pvera": {"r": 8},
    "peanut": {"r": 6, "scaling": 0.1},
    "deft": {"r": 4},
    "supertuning": {"sparsity": 0.9},
    "adamss": {"r": 8, "num_subspaces": 3, "subspace_rank": 2},
    "adaption_prompt": {"adapter_len": 5, "adapter_layers": 2},
    "poly": {"r": 3, "n_tasks": 3, "n_skills": 2},
}
"""What each method is run with here, for the size of the tiny models and of their random weights."""

FOUR = ("llama", "gpt2", "t5", "bert")
NO_CONV1D = ("llama", "t5", "bert")
"""For methods with which PEFT does not adapt GPT-2's Conv1D."""
PLAIN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("loha", "lokr", "oft", "boft", "hra", "road", "c3a", "miss", "shira", "delora"), NO_CONV1D),
    **dict.fromkeys(("adalora", "vera", "randlora", "vblora", "unilora", "fourierft", "waveft", "hira"), FOUR),
    **dict.fromkeys(("tinylora", "pvera", "frod", "deft"), (*FOUR, "mixtral")),
    **dict.fromkeys(("psoft", "lily", "peanut", "supertuning"), (*NO_CONV1D, "mixtral")),
    "ia3": (*FOUR, "qwen2", "bloom", "opt", "mixtral"),
    "ln_tuning": ("llama", "gpt2", "t5", "bloom", "gemma3", "qwen2"),
    "trainable_tokens": (*FOUR, "llama_tied", "opt", "gemma3", "whisper"),
    "beft": (*NO_CONV1D, "qwen2"),
    "glora": ("llama", "bert"),
    "osf": ("llama",),
    "gralora": FOUR,
    "adamss": (*NO_CONV1D, "opt", "mixtral"),
    "adaption_prompt": ("gpt2",),
}
"""Method -> kinds of models for which it needs no further settings."""
MORE = ("psoft", "lily", "tinylora", "pvera", "frod", "peanut", "deft", "supertuning", "adamss")
"""Methods that are also compared on Whisper, and beside a head that trains."""
CONVOLUTIONS = {"target_modules": ["convolution"]}
TASK = {kind: {"task_type": task} for kind, task in TASK_TYPES.items()}

FURTHER: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ia3": [
        ("llama", {"target_modules": "all-linear", "feedforward_modules": []}),
        ("bert", {"modules_to_save": ["classifier"]}),
        ("llama", {"exclude_modules": ["layers.0.self_attn.k_proj"]}),
        ("gpt2", {"target_modules": ["c_fc", "c_attn"], "feedforward_modules": ["c_attn"]}),
        ("convnet", {**CONVOLUTIONS, "feedforward_modules": []}),
        ("convnet", {**CONVOLUTIONS, "feedforward_modules": ["convolution"]}),
    ],
    "loha": [
        ("llama", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2}, "alpha": 12}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "rank_dropout": 0.5}),
        ("convnet", {**CONVOLUTIONS, "r": 3}),
        ("convnet", {**CONVOLUTIONS, "r": 3, "use_effective_conv2d": True}),
    ],
    "lokr": [
        ("llama", {"r": 2, "decompose_both": True, "decompose_factor": 8}),
        ("llama", {"r": 1, "decompose_both": True, "target_modules": ["q_proj", "down_proj"]}),
        ("bert", {"r": 2, "decompose_factor": 5, "target_modules": ["classifier", "query"]}),
        ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 2}}),
        ("llama", {"init_weights": "lycoris", "module_dropout": 0.5}),
        ("convnet", {**CONVOLUTIONS, "r": 1}),
        ("convnet", {**CONVOLUTIONS, "r": 30}),
        ("convnet", {**CONVOLUTIONS, "r": 1, "use_effective_conv2d": True}),
    ],
    "ln_tuning": [
        ("bert", {"target_modules": ["LayerNorm"]}),
        ("bert", {"target_modules": ["LayerNorm"], "modules_to_save": ["classifier"]}),
        ("llama", {"target_modules": ["embed_tokens", "norm", "lm_head"]}),
        ("llama", {"exclude_modules": ["model.norm"]}),
    ],
    "oft": [
        ("llama", {"oft_block_size": 32, "use_cayley_neumann": False}),
        *(("llama", {"num_cayley_neumann_terms": terms}) for terms in (2, 3, 4, 8)),
        ("llama", {"block_share": True}),
        ("llama", {"coft": True, "eps": 0.4}),
        ("llama", {"coft": True, "eps": 0.4, "block_share": True}),
        ("llama", {"r": 16, "oft_block_size": 0}),
        ("llama", {"oft_block_size": 7}),  # no divisor
        ("llama", {"oft_block_size": 0, "r": 13}),
        ("opt", {"bias": "oft_only"}),
        ("convnet", {"target_modules": ["shortcut.convolution"]}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("gemma3", {"target_modules": ["embed_tokens"]}),  # which scales
    ],
    "boft": [
        ("llama", {"boft_block_size": 0, "boft_block_num": 4}),
        ("opt", {"bias": "boft_only"}),
        ("bert", {"bias": "all"}),
        ("convnet", {**CONVOLUTIONS, "boft_block_size": 1}),
        ("convnet", {"target_modules": ["layer.1.convolution"], "boft_block_size": 6}),
    ],
    "hra": [
        ("llama", {"r": 3}),
        ("llama", {"apply_GS": True, "r": 4}),
        ("opt", {"bias": "hra_only"}),
        ("convnet", {**CONVOLUTIONS, "r": 4}),
        ("convnet", {**CONVOLUTIONS, "r": 4, "apply_GS": True}),
    ],
    "trainable_tokens": [
        ("llama", {"target_modules": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    ],
    "beft": [("bert", {"modules_to_save": ["classifier"]})],
    "road": [
        ("llama", {"variant": "road_2"}),
        ("llama", {"variant": "road_4", "group_size": 4}),
        ("opt", {"variant": "road_4"}),
    ],
    "glora": [
        ("t5", {"target_modules": ["v"]}),  # with random queries its attention saturates
        ("opt", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
        ("opt", {"config_A_B": "constant", "config_C": "none"}),
        ("opt", {"config_A_B": "none"}),
        ("opt", {"bias": "glora_only"}),
    ],
    "osf": [
        ("t5", {"target_modules": ["q", "wi"]}),
        ("bert", {"target_modules": ["query", "intermediate.dense"]}),
        ("opt", {"effective_rank": 3}),
        ("llama", {"effective_rank": 0.75}),
        ("llama", {"rank_pattern": {"layers.1": 4, "q_proj": 0.25}}),
    ],
    "adalora": [
        ("convnet", CONVOLUTIONS),
        ("opt", {"bias": "all", "lora_dropout": 0.25}),
        ("bert", {"modules_to_save": ["classifier"], "target_modules": ["query"]}),
    ],
    "vera": [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "projection_prng_key": 5}),  # two shapes
        ("opt", {"bias": "vera_only", "d_initial": 0.5, "vera_dropout": 0.25}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ],
    "randlora": [
        ("llama", {"target_modules": ["q_proj", "down_proj", "up_proj"], "r": 5}),
        ("llama", {"sparse": True, "projection_prng_key": 7}),
        ("gpt2", {"very_sparse": True, "target_modules": ["c_attn", "mlp.c_proj"]}),
    ],
    "vblora": [
        ("llama", {"save_only_topk_weights": True, "topk": 3}),
        ("gpt2", {"save_only_topk_weights": True, "topk": 1, "num_vectors": 300}),
        ("opt", {"bias": "vblora_only", "save_only_topk_weights": True}),
    ],
    "unilora": [
        ("llama", {"save_indices": True, "proj_seed": 5, "theta_d_length": 100}),
        ("opt", {"bias": "unilora_only", "unilora_dropout": 0.1, "theta_d_length": 3000}),
    ],
    "fourierft": [
        ("llama", {"n_frequency_pattern": {"v_proj": 20}, "random_loc_seed": 3}),
        ("opt", {"bias": "fourier_only", "scaling": 40.0}),
    ],
    "waveft": [
        ("llama", {"wavelet_family": "db4"}),
        ("bert", {"wavelet_family": "sym3", "target_modules": ["classifier", "query"]}),
        ("gpt2", {"wavelet_family": "db10", "n_frequency_pattern": {"h.0.mlp.c_proj": 9}}),
        ("llama", {"use_idwt": False, "scaling": 0.5}),
    ],
    "c3a": [
        ("llama", {"block_size_pattern": {"v_proj": 4}, "init_weights": True}),
        ("llama", {"block_size": 1}),
    ],
    "miss": [
        ("llama", {"init_weights": "bat"}),
        ("opt", {"init_weights": "bat", "bias": "MiSS_only"}),
        ("llama", {"init_weights": "mini", "mini_r": 4}),
        ("t5", {"r": 5}),
        ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"], "miss_dropout": 0.1}),
    ],
    "shira": [("llama", {"random_seed": 11})],
    "hira": [
        ("convnet", CONVOLUTIONS),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"init_weights": "gaussian", "hira_dropout": 0.1}),
    ],
    "delora": [
        ("llama", {"rank_pattern": {"v_proj": 2}, "lambda_pattern": {"q_proj": 7}}),
        ("opt", {"bias": "delora_only", "module_dropout": 0.1}),
    ],
    "gralora": [
        ("llama", {"hybrid_r": 2, "gralora_k": 4}),
        ("gpt2", {"hybrid_r": 3, "bias": "all"}),
    ],
    "psoft": [
        ("llama", {"ab_svd_init": "pissa_init", "psoft_alpha": 5, "psoft_dropout": 0.1}),
        ("llama", {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3, "random_seed": 4}),
        ("llama", {"psoft_orth": False}),
        ("llama", {"psoft_mag_a": False, "psoft_mag_b": False}),
        *(("llama", {"use_cayley_neumann": True, "num_cayley_neumann_terms": n}) for n in (1, 2, 3, 4, 5, 7)),
        ("llama", {"use_cayley_neumann": True, "cayley_neumann_eps": 0.9}),
        ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    ],
    "lily": [
        ("llama", {"stride_A": 2, "target_modules": ["q_proj", "k_proj", "down_proj"]}),
        ("t5", {"stride_A": 3, "target_modules": ["q", "v", "wo"], "scaling": 0.5}),
        ("llama", {"stride_A": 3, "target_modules": r".*\.[kqv]_proj"}),
        ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ],
    "tinylora": [
        ("llama", {"weight_tying": 1.0, "projection_seed": 1}),
        ("llama", {"weight_tying": 0.4, "target_modules": "all-linear"}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
        ("opt", {"bias": "tinylora_only", "tinylora_dropout": 0.1}),
        ("bert", {"r": 20, "target_modules": ["classifier"]}),
    ],
    "pvera": [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "projection_prng_key": 5}),
        ("opt", {"bias": "all", "d_initial": 0.5, "pvera_dropout": 0.25}),
    ],
    "frod": [
        ("llama", {"sparse_rate": 1.0, "projection_prng_key": 7}),
        ("llama", {"sparse_rate": 0.0}),
        ("llama", {"target_modules": ["down_proj", "up_proj"], "layers_to_transform": [0]}),
        ("bert", {"target_modules": ["attention.output.dense", "query"]}),
        ("opt", {"bias": "frod_only", "frod_dropout": 0.1}),
    ],
    "peanut": [
        *(("llama", {"act_fn": act, "depth": depth}) for depth, act in enumerate(("silu", "gelu_new", "tanh"))),
        ("llama", {"layers_to_transform": 1, "exclude_modules": ["v_proj"]}),
    ],
    "deft": [
        ("llama", {"decomposition_method": "qr", "alpha": 3}),
        ("gpt2", {"decomposition_method": "qr", "para": True}),
        ("llama", {"para": True}),
        ("opt", {"bias": "deft_only", "deft_dropout": 0.1, "alpha": 2}),
        ("bert", {"r": 8, "target_modules": ["classifier"]}),
    ],
    "supertuning": [
        ("llama", {"select_top": False}),
        ("llama", {"r": 3, "lora_dropout": 0.1}),
        ("bert", {"r": 3, "lora_alpha": 5.0}),
    ],
    "adamss": [
        ("llama", {"target_modules": "all-linear", "num_subspaces": 5, "random_seed": 7}),
        ("llama", {"layers_to_transform": [1], "subspace_rank": 7}),
        ("llama", {"use_dynamic_rank": True, "svd_threshold": 0.6, "subspace_rank": 4}),
        ("llama", {"use_asa": True, "asa_target_subspaces": 2}),
    ],
    "poly": [
        *((kind, TASK[kind]) for kind in ("llama", "t5", "bert", "mixtral")),
        ("llama", {"n_splits": 4, "target_modules": "all-linear", **TASK["llama"]}),
        ("bert", {"modules_to_save": ["classifier"], "target_modules": ["query", "value"], **TASK["bert"]}),
        ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"], **TASK["llama"]}),
    ],
    "adaption_prompt": [
        ("llama", TASK["llama"]),
        ("llama", {"adapter_layers": 1, "target_modules": "self_attn"}),
    ],
}
"""Method -> kinds of models, and settings beside those above."""

_HEAD: dict[str, Any] = {"modules_to_save": ["classifier"], "target_modules": ["query", "dense"]}
_WITHOUT_ALL_LINEAR = {"ia3", "ln_tuning", "trainable_tokens", "adamss", "poly", "adaption_prompt"}
for _method, _cases in FURTHER.items():
    _cases += [(kind, {}) for kind in PLAIN.get(_method, ())]
    _cases += [] if _method in _WITHOUT_ALL_LINEAR else [("llama", {"target_modules": "all-linear"})]
    _cases += [("whisper", {"target_modules": ["q_proj", "v_proj"]}), ("bert", _HEAD)] if _method in MORE else []

CASES: dict[str, Case] = {
    **{f"lora {name}": ("lora", *case) for name, case in lora_cases.CASES.items()},
    **{
        f"{method} {kind} {number}": (method, kind, {**SETTINGS.get(method, {}), **settings})
        for method, cases in FURTHER.items()
        for number, (kind, settings) in enumerate(cases)
    },
}
OF_ITSELF = (
    "Adjusted `",  # of a block size that does not divide a layer's inputs
    "symmetric initialization can NOT",  # of an odd number of reflections
    "rank_pattern keys did not match",  # of OSF's patterns, which match all the same
)
"""What PEFT warns of when it loads its own adapters too."""


@pytest.fixture(autouse=True)
def _peft_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_NOT_OF_THE_FILE", (*oracle._NOT_OF_THE_FILE, *OF_ITSELF))
    monkeypatch.setattr(boft_of_peft, "get_fbd_cuda", lambda: None)  # it would call a compiler for every layer


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return copy.deepcopy(CASES[request.param])  # PEFT appends to lists


def _share(case: str) -> str:
    """The method; LoRA, which has most cases, in eight parts."""
    method = CASES[case][0]
    return f"lora {list(CASES).index(case) % 8}" if method == "lora" else method


def _tasks(case: Case) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.tensor([2, 0])} if case[0] == "poly" else {}


def test_every_method_of_pefts_is_compared() -> None:
    """Soft prompts in test_prompts.py, X-LoRA in a file of its own."""
    assert {name for name in PEFTS_METHODS if not METHODS[name].soft_prompt} == {"lora", "xlora", *FURTHER}


@pytest.mark.grid(each=_share)
def test_what_we_write_peft_reads(case: Case, tmp_path: Path) -> None:
    kind = case[1]
    model, folder = written_by_us(case, tmp_path)
    same_logits(kind, loaded_by_peft(kind, folder), model, **_tasks(case))
    inputs = batch(kind)
    assert (logits(model, {**inputs, **_tasks(case)}) - logits(tiny(kind), inputs)).abs().max() > 3e-4


@pytest.mark.grid(each=_share)
def test_what_peft_writes_we_read_and_some_train_alike(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    written = theirs(kind, method, **settings)
    loaded = loaded_here(kind, saved_by_peft(written, tmp_path))
    same_logits(kind, loaded, written, **_tasks(case))
    if method in ("adamss", "adaption_prompt", "poly"):
        set_trainable(loaded, True)
        expected, found = (_gradient(case, model) for model in (written, loaded))
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def _gradient(case: Case, model: nn.Module) -> torch.Tensor:
    """The gradients of all that trains, in the order of the sorted values, whatever it is called."""
    model.zero_grad()
    model(**labelled(case[1]), **_tasks(case)).loss.backward()
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None]).sort().values


@pytest.mark.grid(keep=26)
def test_names_shapes_dtypes_and_counts_are_pefts(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    model, folder = written_by_us(case, tmp_path / "ours")
    written = theirs(kind, method, **settings)
    here, there = (
        {name: (tuple(value.shape), value.dtype) for name, value in file_of(place)[1].items()}
        for place in (folder, saved_by_peft(written, tmp_path / "theirs"))
    )
    for name, (layer, tensor, _) in file_tensors(model).items():
        if tensor in layer.optional:  # our own, which PEFT does not read
            here.pop(name)
    extra = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")  # what PEFT writes for no reader
    assert here == {name: value for name, value in there.items() if not name.endswith(extra)}
    if method != "lily" or settings.get("target_modules") != "all-linear":  # PEFT's lily shares nothing then
        counts = [
            sum({value.data_ptr(): value.numel() for value in each.parameters() if value.requires_grad}.values())
            for each in (model, written)  # PEFT has tied adapters twice, over one memory
        ]
        assert counts[0] == counts[1]
