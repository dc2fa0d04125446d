"""(IA)^3, LoHa, OFT and others: what we write PEFT reads, and the reverse, to the same logits."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import oracle
import peft.tuners.boft.layer as boft_of_peft
import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from oracle import (
    Case,
    file_of,
    loaded_by_peft,
    loaded_here,
    ours,
    peft_config_class,
    same_logits,
    saved_by_peft,
    theirs,
    written_by_us,
)
from peft import HRAConfig, OFTConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.merge import merge
from peftcli.core.targets import wrap
from peftcli.methods import METHODS, config_from_dict

KINDS = ("llama", "gpt2", "t5", "bert")
METHODS_HERE = (
    *("ia3", "loha", "lokr", "ln_tuning", "oft", "boft", "hra"),
    *("trainable_tokens", "beft", "road", "glora", "osf"),
)
CONV1D = {"ia3", "ln_tuning", "trainable_tokens"}
"""Methods with which PEFT adapts GPT-2. The others know no Conv1D there."""
FOR_A_KIND = {
    ("ln_tuning", "bert"): {"target_modules": ["LayerNorm"]},
    ("osf", "t5"): {"target_modules": ["q", "wi"]},
    ("osf", "bert"): {"target_modules": ["query", "intermediate.dense"]},
    ("glora", "t5"): {"target_modules": ["v"]},  # with random queries its attention saturates
}
"""Settings for one kind of model, first of all where PEFT has no default."""
CONVOLUTIONS = {"target_modules": ["convolution"]}

SETTINGS: dict[str, dict[str, Any]] = {
    "oft": {"oft_block_size": 4},  # larger blocks of random numbers are far from a rotation
    "trainable_tokens": {"token_indices": [79, 58, 16]},
    "road": {"group_size": 8},
    "glora": {"r": 2},
}
"""What each method is run with here, for the size of the tiny models and of their random weights."""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{
        f"{method}-{kind}": (method, kind, FOR_A_KIND.get((method, kind), {}))
        for method in METHODS_HERE
        for kind in KINDS
        if kind != "gpt2" or method in CONV1D
    },
    **{
        f"{method}-all-linear": (method, "llama", {"target_modules": "all-linear"})
        for method in ("loha", "lokr", "oft", "boft", "hra", "beft", "road", "glora", "osf")
    },
    "ia3-all-linear": ("ia3", "llama", {"target_modules": "all-linear", "feedforward_modules": []}),
    "ia3-qwen2": ("ia3", "qwen2", {}),
    "ia3-bloom": ("ia3", "bloom", {}),
    "ia3-opt": ("ia3", "opt", {}),
    "ia3-mixtral": ("ia3", "mixtral", {}),
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
    "ln-tuning-ends": ("ln_tuning", "llama", {"target_modules": ["embed_tokens", "norm", "lm_head"]}),
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
    "tokens-tied": ("trainable_tokens", "llama_tied", {}),
    "tokens-tied-opt": ("trainable_tokens", "opt", {}),
    "tokens-tied-scaled": ("trainable_tokens", "gemma3", {}),
    "tokens-of-the-head": ("trainable_tokens", "llama", {"target_modules": ["lm_head"]}),
    "tokens-of-both": ("trainable_tokens", "llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tokens-whisper": ("trainable_tokens", "whisper", {}),
    "beft-qwen2": ("beft", "qwen2", {}),
    "beft-saved": ("beft", "bert", {"modules_to_save": ["classifier"]}),
    "road-2": ("road", "llama", {"variant": "road_2"}),
    "road-4": ("road", "llama", {"variant": "road_4", "group_size": 4}),
    "road-biases": ("road", "opt", {"variant": "road_4"}),
    "glora-vectors": ("glora", "opt", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
    "glora-constants": ("glora", "opt", {"config_A_B": "constant", "config_C": "none"}),
    "glora-biases-only": ("glora", "opt", {"config_A_B": "none"}),
    "glora-bias": ("glora", "opt", {"bias": "glora_only"}),
    "osf-opt": ("osf", "opt", {"effective_rank": 3}),
    "osf-share": ("osf", "llama", {"effective_rank": 0.75}),
    "osf-pattern": ("osf", "llama", {"rank_pattern": {"layers.1": 4, "q_proj": 0.25}}),
    "hra-conv-orthogonal": ("hra", "convnet", {**CONVOLUTIONS, "r": 4, "apply_GS": True}),
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
    method, kind, settings = CASES[request.param]
    return method, kind, {**SETTINGS.get(method, {}), **settings}


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
    written = theirs(kind, method, **settings)
    here, there = (
        {name: (tuple(value.shape), value.dtype) for name, value in file_of(place)[1].items()}
        for place in (folder, saved_by_peft(written, tmp_path / "theirs"))
    )
    extra = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")  # what PEFT writes for no reader
    assert here == {name: value for name, value in there.items() if not name.endswith(extra)}
    trainable = sum(value.numel() for value in written.parameters() if value.requires_grad)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == trainable


@pytest.mark.parametrize("method", ["loha", "lokr", "oft", "boft", "hra", "road", "glora"])
def test_peft_refuses_gpt2_and_we_adapt_it(method: str) -> None:
    with pytest.raises((TypeError, ValueError), match="support"):
        theirs("gpt2", method, **SETTINGS.get(method, {}))
    model, config = ours("gpt2", method, **SETTINGS.get(method, {}))
    expected = logits(model, batch("gpt2"))
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("gpt2")), expected, atol=1e-4, rtol=1e-4)


def test_tied_ends_that_are_both_named_share_their_rows(tmp_path: Path) -> None:
    """PEFT puts one layer into the other, and cannot run the model."""
    settings = {"target_modules": ["embed_tokens", "lm_head"], "token_indices": [79, 58]}
    case = ("trainable_tokens", "llama_tied", settings)
    model, folder = written_by_us(case, tmp_path / "ours")
    assert file_of(folder)[0]["target_modules"] == ["embed_tokens"]
    same_logits("llama_tied", loaded_by_peft("llama_tied", folder), model)
    written = theirs("llama_tied", "trainable_tokens", **settings)
    with pytest.raises(ValueError, match="unknown layer type"):
        logits(written, batch("llama_tied"))


@pytest.mark.parametrize("targets", [["embed_tokens"], ["decoder.embed_tokens"], ["lm_head"]])
def test_rows_of_pefts_for_one_of_what_shares_the_weight_stay_its_own(targets: list[str], tmp_path: Path) -> None:
    """Of T5, PEFT ties rows to those of the input embedding only. Merged, its model is another one; here it is not."""
    settings = {"target_modules": targets, "token_indices": [79, 58]}
    written = theirs("t5", "trainable_tokens", **settings)
    folder = saved_by_peft(written, tmp_path / "theirs")
    model, again = tiny("t5"), tmp_path / "ours"
    config = config_from_dict(read_config(folder))
    load_adapter(model, config, folder)
    same_logits("t5", model, written)
    save_adapter(model, config, again)
    same_logits("t5", loaded_by_peft("t5", again), written)
    merge(model, config)
    same_logits("t5", model, written)


def test_rows_of_what_shares_the_weight_are_named_by_the_input_embedding(tmp_path: Path) -> None:
    """PEFT would not tie the others to an encoder's embedding."""
    case = ("trainable_tokens", "t5", {"target_modules": ["encoder.embed_tokens"], "token_indices": [79, 58]})
    model, folder = written_by_us(case, tmp_path)
    same_logits("t5", loaded_by_peft("t5", folder), model)


def test_peft_rotates_what_convolutions_read_wrongly_and_merges_it_right(tmp_path: Path) -> None:
    """Where its windows overlap, PEFT adds up what each of them has of a pixel; one that starts does so too."""
    settings = {**CONVOLUTIONS, "oft_block_size": 3}
    pixels = {"pixel_values": torch.randn(2, 3, 64, 64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = get_peft_model(tiny("convnet"), OFTConfig(**settings)).eval()
    right = logits(tiny("convnet"), pixels)
    assert (logits(started, pixels) - right).abs().max() > right.abs().max()
    model, folder = written_by_us(("oft", "convnet", settings), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(tiny("convnet"), folder).merge_and_unload()
    same_logits("convnet", model, merged)


class _ButterflyExtension:
    """In Python, what PEFT's CUDA extension does: blocks (m, n, k, k) to m block-diagonal matrices."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]


BUTTERFLIES = [
    ("llama", {"boft_n_butterfly_factor": 2}),
    ("llama", {"boft_n_butterfly_factor": 3, "boft_block_size": 8}),
    (
        "opt",
        {"boft_n_butterfly_factor": 4, "boft_block_size": 0, "boft_block_num": 8, "target_modules": ["fc2", "fc1"]},
    ),
    ("convnet", {"boft_n_butterfly_factor": 2, "target_modules": ["layer.1.convolution"]}),
]


@pytest.mark.parametrize(("kind", "settings"), BUTTERFLIES)
def test_butterfly_factors_are_pefts(
    kind: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_of_peft, "get_fbd_cuda", _ButterflyExtension)
    model, folder = written_by_us(("boft", kind, settings), tmp_path / "ours")
    same_logits(kind, loaded_by_peft(kind, folder), model)
    written = theirs(kind, "boft", **settings)
    same_logits(kind, loaded_here(kind, saved_by_peft(written, tmp_path / "theirs")), written)


def test_without_its_extension_peft_trains_one_factor_and_says_several(tmp_path: Path) -> None:
    settings = {"boft_n_butterfly_factor": 3}
    written = theirs("llama", "boft", **settings)
    config, tensors = file_of(saved_by_peft(written, tmp_path / "theirs"))
    assert config["boft_n_butterfly_factor"] == 3
    assert {len(value) for name, value in tensors.items() if name.endswith("boft_R")} == {1}
    same_logits("llama", loaded_here("llama", tmp_path / "theirs"), written)
    _, folder = written_by_us(("boft", "llama", settings), tmp_path / "ours")
    with pytest.raises(RuntimeError, match="size mismatch"):
        loaded_by_peft("llama", folder)


def test_peft_cannot_read_its_ia3_where_only_targets_are_given_and_we_write_what_it_reads(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"target_modules": ["q_proj"]}
    written = theirs("llama", "ia3", **settings)
    saved_by_peft(written, tmp_path / "theirs")
    with pytest.raises(ValueError, match="subset"):
        loaded_by_peft("llama", tmp_path / "theirs")
    model, folder = written_by_us(("ia3", "llama", settings), tmp_path / "ours")
    same_logits("llama", loaded_by_peft("llama", folder), model)
    model, folder = written_by_us(("ia3", "bert", {"target_modules": ["dense"]}), tmp_path / "more")
    same_logits("bert", loaded_by_peft("bert", folder), model)


def test_peft_takes_the_end_of_a_name_for_a_feedforward_module() -> None:
    written = theirs("t5", "ia3", target_modules=["o", "wo"], feedforward_modules=["o"])
    shapes = {name: tuple(value.shape) for name, value in written.named_parameters() if "encoder.block.0" in name}
    assert shapes["base_model.model.encoder.block.0.layer.1.DenseReluDense.wo.ia3_l.default"] == (1, 64)
    model, _ = ours("t5", "ia3", target_modules=["o", "wo"], feedforward_modules=["o"])
    assert model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo").ia3_l.shape == (32, 1)
    assert model.get_submodule("encoder.block.0.layer.0.SelfAttention.o").ia3_l.shape == (1, 32)


def test_peft_starts_orthogonal_reflections_from_rounding_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        started = get_peft_model(tiny("llama"), HRAConfig(apply_GS=True)).eval()
    u = started.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").hra_u["default"]
    assert torch.equal(u[:, 0], u[:, 1])  # so that what the second has of its own is nothing


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("settings", [{"r": 2}, {"r": 2, "use_effective_conv2d": True}, {"r": 30}])
def test_one_dimensional_convolutions_are_pefts(method: str, settings: dict[str, Any]) -> None:
    """On a layer of its own: in Whisper, PEFT fails, since its layers do not have the attributes of those below."""
    torch.manual_seed(0)
    base = nn.Conv1d(32, 48, 3, stride=2, padding=1).requires_grad_(False)
    config = METHODS[method].config_class()(target_modules=["0"], **settings)
    layer: Any = wrap(base, "0", config).eval()
    their_config = peft_config_class(method)(target_modules=["0"], **settings)
    their_layer = inject_adapter_in_model(their_config, nn.Sequential(copy.deepcopy(base))).eval()[0]
    randomise(layer)
    for name, parameter in layer.own_tensors().items():
        getattr(their_layer, name)["default"].data.copy_(parameter)
    assert len(list(their_layer.parameters())) == len(list(layer.parameters()))
    x = torch.randn(2, 32, 9)
    torch.testing.assert_close(layer(x), their_layer(x))
    merged = layer.folded(dict(base.named_parameters()))["weight"]
    torch.testing.assert_close(nn.functional.conv1d(x, merged, base.bias, 2, 1), layer(x))
