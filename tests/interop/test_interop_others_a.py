"""(IA)^3, LoHa, OFT and others: what we write PEFT reads, and the reverse, to the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import oracle
import peft.tuners.boft.layer as boft_of_peft
import pytest
import torch
from models_tiny import batch, logits, tiny
from oracle import file_of, loaded_by_peft, ours, saved_by_peft, theirs
from torch import nn

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.merge import merge
from peftcli.methods import config_from_dict

KINDS = ("llama", "gpt2", "t5", "bert")
CONV1D = {"ia3", "ln_tuning"}
"""Methods with which PEFT adapts GPT-2. The others are refused there by PEFT, which leaves its Conv1D out."""
CONVOLUTIONS = {"target_modules": ["convolution"]}

SETTINGS: dict[str, dict[str, Any]] = {
    "oft": {"oft_block_size": 4},  # larger blocks of random numbers are far from a rotation
}
"""What each method is run with here, for the size of the tiny models and of their random weights."""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{method}-{kind}": (method, kind, {"target_modules": ["LayerNorm"]} if method == "ln_tuning" else {})
        if kind == "bert"
        else (method, kind, {})
        for method in ("ia3", "loha", "lokr", "ln_tuning", "oft", "boft", "hra")
        for kind in KINDS
        if kind != "gpt2" or method in CONV1D
    },
    **{
        f"{method}-all-linear": (method, "llama", {"target_modules": "all-linear"})
        for method in ("loha", "lokr", "oft", "boft", "hra")
    },
    "ia3-all-linear": ("ia3", "llama", {"target_modules": "all-linear", "feedforward_modules": []}),
    "ia3-qwen2": ("ia3", "qwen2", {}),
    "ia3-bloom": ("ia3", "bloom", {}),
    "ia3-opt": ("ia3", "opt", {}),
    "ia3-saved": ("ia3", "bert", {"modules_to_save": ["classifier"]}),
    "ia3-excluded": ("ia3", "llama", {"exclude_modules": ["layers.0.self_attn.k_proj"]}),
    "ia3-own": ("ia3", "gpt2", {"target_modules": ["c_fc", "c_attn"], "feedforward_modules": ["c_attn"]}),
    "ia3-conv": ("ia3", "convnet", {**CONVOLUTIONS, "feedforward_modules": []}),
    "ia3-conv-feedforward": ("ia3", "convnet", {**CONVOLUTIONS, "feedforward_modules": ["convolution"]}),
    "loha-patterns": ("loha", "llama", {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2}, "alpha": 12}),
    "loha-layers": ("loha", "llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "rank_dropout": 0.5}),
    "loha-conv": ("loha", "convnet", {**CONVOLUTIONS, "r": 3}),
    "loha-conv-effective": ("loha", "convnet", {**CONVOLUTIONS, "r": 3, "use_effective_conv2d": True}),
    "lokr-small": ("lokr", "llama", {"r": 2, "decompose_both": True, "decompose_factor": 8}),
    "lokr-thin": ("lokr", "llama", {"r": 1, "decompose_both": True, "target_modules": ["q_proj", "down_proj"]}),
    "lokr-odd": ("lokr", "bert", {"r": 2, "decompose_factor": 5, "target_modules": ["classifier", "query"]}),
    "lokr-patterns": ("lokr", "llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 2}}),
    "lokr-lycoris": ("lokr", "llama", {"init_weights": "lycoris", "module_dropout": 0.5}),
    "lokr-conv": ("lokr", "convnet", {**CONVOLUTIONS, "r": 1}),
    "lokr-conv-whole": ("lokr", "convnet", {**CONVOLUTIONS, "r": 30}),
    "lokr-conv-effective": ("lokr", "convnet", {**CONVOLUTIONS, "r": 1, "use_effective_conv2d": True}),
    "ln-tuning-bloom": ("ln_tuning", "bloom", {}),
    "ln-tuning-gemma3": ("ln_tuning", "gemma3", {}),
    "ln-tuning-qwen2": ("ln_tuning", "qwen2", {}),
    "ln-tuning-saved": ("ln_tuning", "bert", {"target_modules": ["LayerNorm"], "modules_to_save": ["classifier"]}),
    "ln-tuning-excluded": ("ln_tuning", "llama", {"exclude_modules": ["model.norm"]}),
    "oft-cayley": ("oft", "llama", {"oft_block_size": 32, "use_cayley_neumann": False}),
    "oft-terms-2": ("oft", "llama", {"num_cayley_neumann_terms": 2}),
    "oft-terms-3": ("oft", "llama", {"num_cayley_neumann_terms": 3}),
    "oft-terms-4": ("oft", "llama", {"num_cayley_neumann_terms": 4}),
    "oft-terms-8": ("oft", "llama", {"num_cayley_neumann_terms": 8}),
    "oft-shared": ("oft", "llama", {"block_share": True}),
    "oft-coft": ("oft", "llama", {"coft": True, "eps": 0.4}),
    "oft-coft-shared": ("oft", "llama", {"coft": True, "eps": 0.4, "block_share": True}),
    "oft-blocks": ("oft", "llama", {"r": 16, "oft_block_size": 0}),
    "oft-no-divisor": ("oft", "llama", {"oft_block_size": 7}),
    "oft-no-divisor-of-blocks": ("oft", "llama", {"oft_block_size": 0, "r": 13}),
    "oft-bias": ("oft", "opt", {"bias": "oft_only"}),
    "oft-conv-1x1": ("oft", "convnet", {"target_modules": ["shortcut.convolution"]}),
    "oft-embedding": ("oft", "llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "oft-embedding-scaled": ("oft", "gemma3", {"target_modules": ["embed_tokens"]}),
    "boft-blocks": ("boft", "llama", {"boft_block_size": 0, "boft_block_num": 4}),
    "boft-bias": ("boft", "opt", {"bias": "boft_only"}),
    "boft-all-biases": ("boft", "bert", {"bias": "all"}),
    "boft-odd-blocks": ("boft", "convnet", {**CONVOLUTIONS, "boft_block_size": 1}),
    "boft-conv": ("boft", "convnet", {"target_modules": ["layer.1.convolution"], "boft_block_size": 6}),
    "hra-odd": ("hra", "llama", {"r": 3}),
    "hra-orthogonal": ("hra", "llama", {"apply_GS": True, "r": 4}),
    "hra-bias": ("hra", "opt", {"bias": "hra_only"}),
    "hra-conv": ("hra", "convnet", {**CONVOLUTIONS, "r": 4}),
    "hra-conv-orthogonal": ("hra", "convnet", {**CONVOLUTIONS, "r": 4, "apply_GS": True}),
}

OF_ITSELF = (
    "Unsupported layer type",  # of each norm that it trains
    "no implementation exists to tie the adapters",  # of any adapter on a tied embedding
    "Adjusted `",  # of a block size that does not divide a layer's inputs
    "symmetric initialization can NOT",  # of an odd number of reflections
)
"""What PEFT warns of when it loads its own adapters too."""

Case = tuple[str, str, dict[str, Any]]


@pytest.fixture(autouse=True)
def _peft_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "_NOT_OF_THE_FILE", (*oracle._NOT_OF_THE_FILE, *OF_ITSELF))
    monkeypatch.setattr(boft_of_peft, "get_fbd_cuda", lambda: None)  # it would call a compiler for every layer


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    method, kind, settings = CASES[request.param]
    return method, kind, {**SETTINGS.get(method, {}), **settings}


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


def test_what_we_write_peft_reads(case: Case, tmp_path: Path) -> None:
    kind = case[1]
    model, folder = _written(case, tmp_path)
    _close(kind, loaded_by_peft(kind, folder), model)
    assert (logits(model, batch(kind)) - logits(tiny(kind), batch(kind))).abs().max() > 3e-4


def test_what_peft_writes_we_read(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    written = theirs(kind, method, **settings)
    _close(kind, _loaded(kind, saved_by_peft(written, tmp_path)), written)


def test_names_shapes_dtypes_and_counts_are_pefts(case: Case, tmp_path: Path) -> None:
    method, kind, settings = case
    model, folder = _written(case, tmp_path / "ours")
    written = theirs(kind, method, **settings)
    here, there = (
        {name: (tuple(value.shape), value.dtype) for name, value in file_of(place)[1].items()}
        for place in (folder, saved_by_peft(written, tmp_path / "theirs"))
    )
    extra = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")  # what PEFT writes for no reader
    assert here == {name: value for name, value in there.items() if not name.endswith(extra)}
    trainable = sum(value.numel() for value in written.parameters() if value.requires_grad)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == trainable


@pytest.mark.parametrize("method", ["loha", "lokr", "oft", "boft", "hra"])
def test_peft_refuses_gpt2_and_we_adapt_it(method: str) -> None:
    with pytest.raises((TypeError, ValueError), match="support"):
        theirs("gpt2", method)
    model, config = ours("gpt2", method)
    expected = logits(model, batch("gpt2"))
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("gpt2")), expected, atol=1e-4, rtol=1e-4)
