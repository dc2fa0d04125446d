"""LoRA on modules that the tiny transformers lack: what we write PEFT reads, and the reverse, to the same output.

Where PEFT is wrong, a test says how, so that it fails once PEFT is mended.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lora_cases import FURTHER
from models_tiny import batch, logits, randomise, tiny
from oracle import file_of, loaded_by_peft, ours, saved_by_peft, silence, theirs
from torch import nn

import peftcli
from peftcli.core.files import load_adapter, read_config, save_adapter, write_tensor_file
from peftcli.core.inject import inject, set_trainable
from peftcli.core.merge import merge
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class _Parts(nn.Module):
    """One of each kind of module, one after the other: ``(B, 4, 6)`` -> ``(B, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(4, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, groups=2, stride=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv2 = nn.Conv2d(2, 4, 2, padding=1)
        self.conv3 = nn.Conv3d(2, 2, (1, 2, 3), stride=2)
        self.head = nn.Linear(4 * 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.conv1(x)).mT  # (B, 2, 8)
        x, _ = self.attention(x, x, x)
        x = self.conv2(x.reshape(-1, 2, 2, 4))  # (B, 4, 3, 5)
        x = self.conv3(x.reshape(-1, 2, 2, 3, 5))  # (B, 2, 1, 1, 2)
        return self.head(x.reshape(len(x), -1).repeat(1, 3))


def _parts() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return _Parts().eval()


X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
CASES: dict[str, dict[str, Any]] = {
    "conv1d": {"target_modules": ["conv1"]},
    "grouped": {"target_modules": ["grouped"], "r": 4},
    "attention": {"target_modules": ["attention"], "use_rslora": True},
    "conv2d": {"target_modules": ["conv2"], "rank_pattern": {"conv2": 3}},
    "conv3d": {"target_modules": ["conv3", "head"], "alpha_pattern": {"conv3": 20}},
    "all": {"target_modules": ["conv1", "grouped", "attention", "conv2", "conv3", "head"]},
    "conv1d-dora": {"target_modules": ["conv1"], "use_dora": True},
    "conv2d-dora": {"target_modules": ["conv2"], "use_dora": True},
    "conv3d-dora": {"target_modules": ["conv3"], "use_dora": True},
    "conv-bias": {"target_modules": ["conv1", "conv2"], "bias": "lora_only"},
    "conv-lora-bias": {"target_modules": ["conv1", "conv2", "conv3"], "lora_bias": True},
    "attention-saved": {"target_modules": ["head"], "modules_to_save": ["attention", "conv3"]},
}


def _theirs(**settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_parts(), peft.LoraConfig(**settings))
    randomise(model)
    return model.eval()


def _ours(**settings: Any) -> tuple[nn.Module, LoraConfig]:
    model, config = _parts(), LoraConfig(**settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model.eval(), config


@pytest.fixture(params=CASES)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return CASES[request.param]


@pytest.mark.grid(keep=6)
def test_what_we_write_peft_reads(settings: dict[str, Any], tmp_path: Path) -> None:
    model, config = _ours(**settings)
    save_adapter(model, config, tmp_path)
    with silence() if "grouped" not in settings["target_modules"] else warnings.catch_warnings(action="ignore"):
        loaded = peft.PeftModel.from_pretrained(_parts(), tmp_path).eval()
    torch.testing.assert_close(loaded(X), model(X))
    assert not torch.allclose(model(X), _parts()(X), atol=1e-3)


@pytest.mark.grid(keep=6)
def test_what_peft_writes_we_read(settings: dict[str, Any], tmp_path: Path) -> None:
    written = _theirs(**settings)
    saved_by_peft(written, tmp_path)
    model = _parts()
    load_adapter(model, config_from_dict(read_config(tmp_path)), tmp_path)
    torch.testing.assert_close(model(X), written(X))


@pytest.mark.grid(keep=6)
def test_names_and_shapes_are_pefts(settings: dict[str, Any], tmp_path: Path) -> None:
    saved_by_peft(_theirs(**settings), tmp_path)
    _, tensors = file_of(tmp_path)
    here = {name: tuple(value.shape) for name, value in adapter_state(_ours(**settings)[0]).items()}
    assert here == {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_dora_that_starts_from_the_base_weight(settings: dict[str, Any], tmp_path: Path) -> None:
    model, config = ours("llama", "lora", use_dora=True, **settings)
    save_adapter(model, config, tmp_path / "ours")
    found = loaded_by_peft("llama", tmp_path / "ours")
    torch.testing.assert_close(logits(found, batch("llama")), logits(model, batch("llama")), atol=1e-5, rtol=1e-5)
    written = theirs("llama", "lora", use_dora=True, **settings)
    saved_by_peft(written, tmp_path / "theirs")
    read = tiny("llama")
    load_adapter(read, config_from_dict(read_config(tmp_path / "theirs")), tmp_path / "theirs")
    torch.testing.assert_close(logits(read, batch("llama")), logits(written, batch("llama")), atol=1e-5, rtol=1e-5)


# where PEFT is wrong


class _One(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.part = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x)


def _with_peft(module: nn.Module, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(_One(module), peft.LoraConfig(**settings))
    randomise(model)
    return model.eval()


def test_peft_drops_dilation_and_padding_mode() -> None:
    """Ours keep both and are merged right: see test_methods_formulas.py."""
    x = torch.randn(1, 4, 8, 8)
    dilated = _with_peft(nn.Conv2d(4, 4, 3, dilation=2), target_modules=["part"])
    with pytest.raises(RuntimeError, match="must match the size"):
        dilated(x)
    circular = _with_peft(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), target_modules=["part"])
    before = circular(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = circular.merge_and_unload()
    assert (merged(x) - before).abs().max() > 0.1


def test_peft_takes_the_norm_of_no_delta_in_dora_on_a_convolution_with_groups() -> None:
    """It takes B for a matrix of another shape. Ours refuses it: there is no such delta."""
    _with_peft(nn.Conv2d(4, 4, 3, groups=2), target_modules=["part"], use_dora=True)
    with pytest.raises(AdapterError, match="use_dora: is not supported for part, a convolution with groups"):
        inject(_One(nn.Conv2d(4, 4, 3, groups=2)), LoraConfig(target_modules=["part"], use_dora=True))


def test_peft_adds_the_delta_of_attentions_output_twice() -> None:
    """In training as in merging; ours does it too, since that is what the file means."""
    model = _with_peft(nn.MultiheadAttention(8, 2), target_modules=["part"])
    attention = model.base_model.model.part
    before = attention.out_proj.weight.clone()
    delta = attention.base_layer.out_proj.get_delta_weight("default")
    attention.merge()
    torch.testing.assert_close(attention.out_proj.weight, before + 2 * delta)


def test_peft_cannot_run_whisper_with_adapted_convolutions() -> None:
    settings = {"target_modules": ["conv1", "conv2"]}
    model, config = ours("whisper", "lora", **settings)
    expected = logits(model, batch("whisper"))
    with pytest.raises(AttributeError, match="no attribute 'stride'"):
        logits(theirs("whisper", "lora", **settings), batch("whisper"))
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("whisper")), expected, atol=1e-4, rtol=1e-4)


def test_pefts_adapter_has_no_effect_in_pytorchs_encoder_outside_of_training() -> None:
    """Ours has: see test_methods_lora_modules.py."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    before = layer(x)
    model = _with_peft(layer, target_modules=["self_attn", "linear1"])
    torch.testing.assert_close(model(x), before)
    assert not torch.allclose(model.train()(x), before, atol=1e-2)


def test_peft_merges_into_an_output_projection_what_had_no_effect() -> None:
    model = _with_peft(nn.MultiheadAttention(8, 2), target_modules=["out_proj"])
    x = torch.randn(3, 1, 8)
    attend = model.base_model.model.part
    before, _ = attend(x, x, x)
    torch.testing.assert_close(before, nn.MultiheadAttention.forward(attend, x, x, x)[0])
    model.merge_adapter()
    assert (attend(x, x, x)[0] - before).abs().max() > 0.1


def _off_by(kind: str, settings: dict[str, Any]) -> float:
    """How far PEFT's merged logits are from those that it merged."""
    model = theirs(kind, "lora", **settings)
    expected = logits(model, batch(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (logits(model.merge_and_unload(), batch(kind)) - expected).abs().max().item()


MERGED_WRONG = [
    "replicated",
    "replicated-turned",
    "tied-embedding",
    "tied-head",
    "tied-scaled",
    "tokens-tied-apart",
]


@pytest.mark.parametrize("name", MERGED_WRONG)
def test_interop_3_4_layer_replication_and_tied_weights_are_merged_wrongly_by_peft(name: str) -> None:
    kind, settings = FURTHER[name]
    assert _off_by(kind, settings) > 0.5
    model, config = ours(kind, "lora", **settings)
    expected = logits(model, batch(kind))
    merge(model, config)
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-4, rtol=1e-4)


def test_tokens_beside_an_adapted_head_are_merged_wrongly_by_peft() -> None:
    """Ours: see test_methods_lora_tokens.py."""
    assert _off_by("llama_tied", {"trainable_token_indices": [3, 90], "target_modules": ["lm_head"]}) > 0.5


def test_the_adapter_that_a_tied_head_shares_starts_as_that_of_a_head() -> None:
    starts = []
    for library in (peft, peftcli):
        torch.manual_seed(0)
        config = library.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
        model = library.get_peft_model(tiny("llama_tied"), config)
        starts += [value for name, value in model.named_parameters() if "lora_embedding_B" in name]
    assert all(0.9 / 32**0.5 < value.abs().max() < 1 / 32**0.5 for value in starts)  # uniform, by the hidden size


@pytest.mark.filterwarnings("ignore:Model has|You have requested")
@pytest.mark.parametrize("settings", [{"target_modules": ["wte"]}, {"modules_to_save": ["wte"]}])
def test_tied_modules_under_other_names_are_exchanged(settings: dict[str, Any], tmp_path: Path) -> None:
    """PEFT ties modules that are called embed_tokens and lm_head."""
    settings = {"target_modules": ["c_attn"], **settings, "ensure_weight_tying": True}
    for writer, reader in [(peft, peftcli), (peftcli, peft), (peftcli, peftcli)]:
        model = writer.get_peft_model(tiny("gpt2"), writer.LoraConfig(fan_in_fan_out=True, **settings)).eval()
        randomise(model)
        model.save_pretrained(tmp_path)
        loaded = reader.PeftModel.from_pretrained(tiny("gpt2"), tmp_path).eval()
        expected = logits(model, batch("gpt2"))
        torch.testing.assert_close(logits(loaded, batch("gpt2")), expected, atol=1e-4, rtol=1e-4)


def test_peft_finds_layers_whose_list_stands_first_in_their_names(tmp_path: Path) -> None:
    def body() -> Any:
        return tiny("llama").model  # layers.1.self_attn.q_proj

    inputs = batch("llama")
    model = peftcli.get_peft_model(body(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[1])).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(body(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


def test_pefts_tied_adapters_have_gradients_of_their_own() -> None:
    model = theirs("llama_tied", "lora", target_modules=["embed_tokens"], ensure_weight_tying=True)
    [a, *_] = [value for name, value in model.named_parameters() if "lora_embedding_A" in name]
    [b, *_] = [value for name, value in model.named_parameters() if "lm_head.lora_B" in name]
    assert a.data_ptr() == b.data_ptr()
    model(**batch("llama_tied"), labels=batch("llama_tied")["input_ids"]).loss.backward()
    assert not torch.allclose(a.grad.T, b.grad, atol=1e-3)


def test_peft_takes_the_bias_of_lora_bias_for_a_damaged_tensor(tmp_path: Path) -> None:
    kind, settings = FURTHER["lora-bias"]
    model = theirs(kind, "lora", **settings)
    with pytest.warns(UserWarning, match="lora_B.bias.* A 1-D or zero-sized"):
        model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("more", [["q_proj"], []])
def test_a_lora_for_each_expert_is_read_once_peft_has_converted_it(more: list[str], tmp_path: Path) -> None:
    tensors = {}
    for path in (f"{layer}.block_sparse_moe.experts.{expert}" for layer in range(2) for expert in range(4)):
        for name, (out, inputs) in {"w1": (64, 32), "w2": (32, 64), "w3": (64, 32)}.items():
            place = f"base_model.model.model.layers.{path}.{name}.lora_"
            tensors |= {f"{place}A.weight": torch.randn(2, inputs), f"{place}B.weight": torch.randn(out, 2)}
    for place in (f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_" for layer in range(2) if more):
        tensors |= {f"{place}A.weight": torch.randn(2, 32), f"{place}B.weight": torch.randn(32, 2)}
    write_tensor_file(tmp_path / "adapter_model.safetensors", tensors)
    LoraConfig(r=2, target_modules=["w1", "w2", "w3", *more], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"a LoRA for each expert.*save it again"):
        peftcli.PeftModel.from_pretrained(tiny("mixtral"), tmp_path)
    converted = peft.PeftModel.from_pretrained(tiny("mixtral"), tmp_path)
    converted.save_pretrained(tmp_path / "again")
    read = peftcli.PeftModel.from_pretrained(tiny("mixtral"), tmp_path / "again")
    torch.testing.assert_close(logits(read, batch("mixtral")), logits(converted, batch("mixtral")))


def test_peft_writes_unset_targets_beside_parameters_otherwise_for_mixtral() -> None:
    """Elsewhere it adapts the usual modules too, but not where it rewrites the config. Ours: the parameters alone."""
    assert theirs("mixtral", "lora", target_parameters=["down_proj"]).peft_config["default"].target_modules == set()
    assert theirs("llama", "lora", target_parameters=["up_proj.weight"]).peft_config["default"].target_modules
    assert ours("llama", "lora", target_parameters=["up_proj.weight"])[1].target_modules == set()
