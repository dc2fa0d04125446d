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
from models_tiny import batch, logits, randomise, tiny
from oracle import file_of, ours, saved_by_peft, silence
from torch import nn

import peftcli
from peftcli.core.files import load_adapter, read_config, save_adapter, write_tensor_file
from peftcli.core.inject import inject, set_trainable
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


def test_dora_on_a_convolution_with_groups_is_refused() -> None:
    """PEFT takes B for a matrix of another shape, and the norm of what is no delta."""
    base = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(AdapterError, match="use_dora: is not supported for 0, a convolution with groups"):
        inject(base, LoraConfig(target_modules=["0"], use_dora=True))


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


def test_unset_targets_beside_parameters_are_none() -> None:
    """PEFT adapts the usual modules too, but not where it rewrites the config, as for Mixtral."""
    assert ours("llama", "lora", target_parameters=["up_proj.weight"])[1].target_modules == set()
