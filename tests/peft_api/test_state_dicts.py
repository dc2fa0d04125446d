"""PEFT's functions for the tensors of an adapter and of the base model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from promises import config_of
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from transformers import PerceiverConfig, PerceiverForSequenceClassification

import peftcli
from peftcli.core.inject import inject
from peftcli.core.layer import AdapterLayer
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS
from peftcli.peft_api import (
    PeftModel,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)


def _config(lib: Any = peftcli, **settings: Any) -> Any:
    return lib.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], **settings})


@pytest.fixture
def model() -> PeftModel:
    model = peftcli.get_peft_model(tiny("llama"), _config())
    randomise(model)
    return model


def test_what_somebody_has_unfrozen_is_kept_too(model: PeftModel, tmp_path: Path) -> None:
    norm = model.get_base_model().model.norm.weight.requires_grad_(True)
    state, before = copy.deepcopy(model.state_dict()), norm.detach().clone()
    assert "base_model.model.model.norm.weight" in state
    with torch.no_grad():
        norm += 1
    assert not model.load_state_dict(state).missing_keys
    assert torch.equal(norm, before)
    del state["base_model.model.model.norm.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*norm"):
        model.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"in none of their files: base_model.model.model.norm.weight"):
        model.save_pretrained(tmp_path)


def test_what_adapters_share_is_no_stranger(tmp_path: Path) -> None:
    """A bank of vectors that all layers hold, and rows of an embedding that the head shares."""
    shared = [
        peftcli.VBLoRAConfig(target_modules=["q_proj"], num_vectors=8, vector_length=8, topk=1),
        peftcli.TrainableTokensConfig(token_indices=[1, 2]),
    ]
    for config in shared:
        model = peftcli.get_peft_model(tiny("llama_tied"), config)
        state = model.state_dict()
        save_file(state, tmp_path / "state.safetensors")
        assert not model.load_state_dict(load_file(tmp_path / "state.safetensors")).missing_keys
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path / "adapter")


class Sharded(nn.Module):
    """Named as PyTorch names the modules that FSDP wraps."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._fsdp_wrapped_module(*args, **kwargs)


def test_names_are_free_of_what_wraps_modules(model: PeftModel) -> None:
    expected = get_peft_model_state_dict(model)
    decoder = model.get_base_model().model
    decoder.layers[0] = Sharded(decoder.layers[0])
    decoder.layers[1].self_attn = torch.compile(decoder.layers[1].self_attn, backend="eager")
    for found in (
        get_peft_model_state_dict(model),
        get_peft_model_state_dict(torch.compile(model, backend="eager")),
        get_peft_model_state_dict(torch.compile(model, backend="eager"), unwrap_compiled=True),
    ):
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert set_peft_model_state_dict(model, expected) == ([], [])
    wrapped = tiny("llama")
    wrapped.model.layers[0] = Sharded(wrapped.model.layers[0])
    assert list(get_peft_model_state_dict(peftcli.get_peft_model(wrapped, _config()))) == list(expected)


def test_the_lengths_of_dora_in_the_state_of_a_model_of_pefts_and_in_files_of_diffusers() -> None:
    theirs = peft.get_peft_model(tiny("llama"), _config(peft, use_dora=True)).eval()
    randomise(theirs)
    state = {name: value for name, value in theirs.state_dict().items() if "lora_" in name or "modules_to_save" in name}
    plain = {name.replace(".modules_to_save", "").replace(".default", ""): value for name, value in state.items()}
    assert sum(name.endswith("lora_magnitude_vector.weight") for name in plain) == 2
    for given in (state, plain):
        ours = peftcli.get_peft_model(tiny("llama"), _config(use_dora=True)).eval()
        set_peft_model_state_dict(ours, given)
        torch.testing.assert_close(logits(ours, batch("llama")), logits(theirs, batch("llama")))


def test_a_plainly_injected_model_has_its_own_names() -> None:
    names = []
    for lib in (peftcli, peft):
        plain = tiny("llama")
        if lib is peft:
            peft.inject_adapter_in_model(_config(peft), plain)
        else:
            inject(plain, _config())
        state = lib.get_peft_model_state_dict(plain)
        names.append(set(state))
        lib.set_peft_model_state_dict(plain, {name: torch.ones_like(value) for name, value in state.items()})
        assert all((value == 1).all() for value in lib.get_peft_model_state_dict(plain).values())
    assert names[0] == names[1]
    with_prefix = {f"base_model.model.{name}": torch.zeros_like(value) for name, value in state.items()}
    plain = tiny("llama")
    inject(plain, _config())
    set_peft_model_state_dict(plain, with_prefix)
    assert not any(value.any() for value in adapter_state(plain).values())


def test_a_tuner_without_a_peft_model_has_pefts_names() -> None:
    ours, theirs = (lib.LoraModel(tiny("llama"), _config(lib), "default") for lib in (peftcli, peft))
    state = {name: torch.ones_like(value) for name, value in peft.get_peft_model_state_dict(theirs).items()}
    set_peft_model_state_dict(ours, state)
    found = get_peft_model_state_dict(ours)
    assert found.keys() == state.keys()
    assert all((value == 1).all() for value in found.values())


def test_from_a_state_that_is_given(model: PeftModel) -> None:
    model.add_adapter("other", _config())
    expected = get_peft_model_state_dict(model, adapter_name="other")
    gathered = {name.replace("layers.0.", "layers.0._fsdp_wrapped_module."): value for name, value in _all(model)}
    found = get_peft_model_state_dict(model, {name: value + 1 for name, value in gathered.items()}, "other")
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value + 1) for name, value in expected.items())
    del gathered[next(name for name in gathered if name.endswith("q_proj.lora_B.weight"))]
    with pytest.raises(AdapterError, match=r"state_dict: lacks .*lora_B"):
        get_peft_model_state_dict(model, gathered, "other")


def _with_batch_norm() -> PeftModel:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = peftcli.get_peft_model(base, _config(target_modules=["0"], modules_to_save=["1"]))
    model.train()(torch.randn(8, 4))
    return model


_BESIDE: dict[str, Any] = {
    "rows of tokens": lambda: _config(modules_to_save=None, trainable_token_indices=[5, 6]),
    "embedding": lambda: _config(modules_to_save=None, target_modules=["q_proj", "embed_tokens"]),
    "tied in full": lambda: _config(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "bias": lambda: _config(bias="all"),
    "pissa": lambda: _config(init_lora_weights="pissa"),
    "projection": lambda: peftcli.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=True
    ),
}
"""Settings whose file holds more than what trains in each layer."""
_SHARING = ("adalora", "vblora", "vera", "xlora")
"""Methods of which the same is true."""


@pytest.mark.grid(keep=5)
@pytest.mark.parametrize(
    "kind",
    [
        *_BESIDE,
        "batch norm",
        *_SHARING,
        *(pytest.param(method, marks=pytest.mark.slow) for method in METHODS if method not in _SHARING),
    ],
)
def test_a_given_state_is_written_as_the_model_that_holds_it(kind: str, tmp_path: Path) -> None:
    if kind == "batch norm":
        model = _with_batch_norm()
    else:
        config = _BESIDE[kind]() if kind in _BESIDE else config_of(kind, "llama")
        model = peftcli.get_peft_model(tiny("llama_tied" if kind in _BESIDE else "llama"), config)
    randomise(model)
    holder = copy.deepcopy(model)
    held = model.state_dict()
    state = {name: value * 1.5 if value.is_floating_point() else value for name, value in held.items()}
    holder.load_state_dict(state)
    before = copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path / "given", state_dict=state)
    holder.save_pretrained(tmp_path / "held")
    file = "adapter_model.safetensors"
    assert (tmp_path / "given" / file).read_bytes() == (tmp_path / "held" / file).read_bytes()
    found, expected = get_peft_model_state_dict(model, state), get_peft_model_state_dict(holder)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 3}}])
def test_a_config_in_a_model_is_saved_as_that_of_the_models_state(settings: dict[str, Any], tmp_path: Path) -> None:
    """As ``save_pretrained`` of transformers writes both. Before it is in a model, a config is saved as it is."""
    config = _config(init_lora_weights="pissa", target_modules=["q_proj", "v_proj"], modules_to_save=None, **settings)
    config.save_pretrained(tmp_path)
    assert peftcli.LoraConfig.from_pretrained(tmp_path) == config
    model = peftcli.inject_adapter_in_model(config, tiny("llama"))
    randomise(model)
    state = {f"base_model.model.{name}": value for name, value in get_peft_model_state_dict(model).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    config.save_pretrained(tmp_path)
    assert (config.r, config.init_lora_weights) == (2, "pissa")
    for lib in (peft, peftcli):
        read = lib.PeftModel.from_pretrained(tiny("llama"), tmp_path)
        torch.testing.assert_close(logits(read, batch("llama")), logits(model, batch("llama")))


def test_a_state_holds_what_the_file_holds_and_does_not_train() -> None:
    """As Trainer loads its best checkpoint, into a model that went on, or one of another start."""
    model = _with_batch_norm()
    state = copy.deepcopy(model.state_dict())
    expected = model.eval()(torch.ones(1, 4))
    model.train()(5 * torch.randn(8, 4))
    assert not model.load_state_dict(state).missing_keys
    assert torch.equal(model.eval()(torch.ones(1, 4)), expected)
    first, second = (peftcli.get_peft_model(tiny("llama"), config_of("cartridge", "llama")).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    assert torch.equal(logits(first, batch("llama")), logits(second, batch("llama")))


@pytest.mark.parametrize("place", ["meta", "divided"])
def test_a_base_embedding_that_is_not_whole_here_is_an_error(place: str) -> None:
    """Reading a divided one would wait for the other processes, which do not write."""
    model = peftcli.get_peft_model(tiny("llama"), _BESIDE["embedding"]())
    state, embedding = model.state_dict(), model.get_base_model().model.embed_tokens.base_layer
    if place == "meta":
        embedding.to("meta")
    else:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        if place == "divided":
            embedding.weight = nn.Parameter(distribute_tensor(embedding.weight.data, init_device_mesh("cpu", (1,))))
        with pytest.raises(AdapterError, match=r"lacks .*embed_tokens.base_layer.weight, which is not whole"):
            get_peft_model_state_dict(model, state)
        assert get_peft_model_state_dict(model, state, save_embedding_layers=False)
    finally:
        if place == "divided":
            torch.distributed.destroy_process_group()


def _all(model: PeftModel) -> list[tuple[str, torch.Tensor]]:
    return [(f"base_model.model.{name}", value) for name, value in model.get_base_model().state_dict().items()]


@pytest.mark.parametrize(("target", "save"), [("embed_tokens", False), ("q_proj", False), ("q_proj", True)])
def test_embeddings_belong_to_it_as_in_peft(target: str, save: bool) -> None:
    here, there = (
        lib.get_peft_model(tiny("llama"), _config(lib, target_modules=[target], modules_to_save=None))
        for lib in (peftcli, peft)
    )
    found = get_peft_model_state_dict(here, save_embedding_layers=save)
    assert set(found) == set(peft.get_peft_model_state_dict(there, save_embedding_layers=save))
    by_itself = set(get_peft_model_state_dict(here))
    assert any("embed_tokens.base_layer" in name for name in by_itself) == (target == "embed_tokens")


def test_an_input_embedding_that_is_a_parameter_is_none() -> None:
    """As Perceiver's, whose latents are one."""
    sizes = {"d_latents": 8, "d_model": 8, "num_self_attends_per_block": 1, "num_self_attention_heads": 2}
    base = PerceiverForSequenceClassification(PerceiverConfig(vocab_size=9, **sizes))
    model = peftcli.get_peft_model(base, _config(target_modules=["query"], modules_to_save=None))
    assert all("lora_" in name for name in get_peft_model_state_dict(model))


def test_weights_of_another_shape_stay_if_that_is_asked(model: PeftModel) -> None:
    state = get_peft_model_state_dict(model)
    wrong = {
        name: value[:1] + 1 if name.endswith("layers.0.self_attn.q_proj.lora_A.weight") else value + 1
        for name, value in state.items()
    }
    with pytest.raises(AdapterError, match=r"shape: .*lora_A"):
        set_peft_model_state_dict(model, wrong)
    before = {name: value.clone() for name, value in state.items()}
    with pytest.warns(UserWarning, match="lora_A.weight stays as it is"):
        set_peft_model_state_dict(model, wrong, ignore_mismatched_sizes=True)
    for name, value in get_peft_model_state_dict(model).items():
        assert torch.equal(value, before[name] + (0 if wrong[name].shape != value.shape else 1))


def test_weights_of_a_folder(model: PeftModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "sub")
    found = load_peft_weights(tmp_path, subfolder="sub", key_mapping={"^lm_head": "head"})
    there = peft.load_peft_weights(str(tmp_path / "sub"), "cpu", key_mapping={"^lm_head": "head"})
    assert found.keys() == there.keys()
    assert all(torch.equal(found[name], value) for name, value in there.items())
    with pytest.raises(AdapterError, match="two tensors get the name"):
        load_peft_weights(tmp_path / "sub", key_mapping={"lora_[AB]": "lora_A"})


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_base_models_state(kind: str) -> None:
    base = tiny(kind)
    expected = {name: value.clone() for name, value in base.state_dict().items()}
    target = "q_proj" if kind == "llama" else "c_attn"
    model = peftcli.get_peft_model(base, _config(target_modules=[target]))
    model.add_adapter("other", peftcli.IA3Config(target_modules=[target], feedforward_modules=[]))
    found = get_base_model_state_dict(model)
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert set_base_model_state_dict(model, {name: value + 1 for name, value in expected.items()}) == ([], [])
    assert all(torch.equal(value, expected[name] + 1) for name, value in get_base_model_state_dict(model).items())
    assert list(get_base_model_state_dict(model.get_base_model())) == list(expected)


def test_a_state_that_is_not_the_base_models(model: PeftModel) -> None:
    state = get_base_model_state_dict(model)
    expected = copy.deepcopy(state)
    wrong = {"new.weight": torch.ones(1), **{name: value + 1 for name, value in list(state.items())[1:]}}
    with pytest.raises(RuntimeError, match=r"Missing key[\s\S]*Unexpected key\(s\) in state_dict: new.weight"):
        set_base_model_state_dict(model, wrong)
    assert all(torch.equal(get_base_model_state_dict(model)[name], value) for name, value in expected.items())
    assert set_base_model_state_dict(model, wrong, strict=False) == ([next(iter(state))], ["new.weight"])
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged"):
        set_base_model_state_dict(model, state)


def test_a_wrapped_model_still_computes() -> None:
    base = tiny("llama")
    base.model.layers[0] = Sharded(base.model.layers[0])
    model = peftcli.get_peft_model(base, _config())
    assert any(isinstance(module, AdapterLayer) for module in base.model.layers[0].modules())
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


def test_a_folder_with_weights_of_another_shape_is_loaded_if_that_is_asked_for(tmp_path: Path) -> None:
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(target_modules=["q_proj", "down_proj"]))
    randomise(model)
    model.save_pretrained(tmp_path)
    name = next(name for name in load_file(tmp_path / "adapter_model.safetensors") if "q_proj.lora_B" in name)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {name: torch.zeros(7, 8)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="lora_B"):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)
    with pytest.warns(UserWarning, match="stays as it is"):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, ignore_mismatched_sizes=True)
    with pytest.warns(UserWarning, match="stays as it is"):
        loaded.load_adapter(tmp_path, "second", ignore_mismatched_sizes=True)
    for adapter in ("default", "second"):
        found = get_peft_model_state_dict(loaded, adapter_name=adapter)
        assert not found.pop(name).any(), "B of a new adapter"
        assert all(torch.equal(value, tensors[key]) for key, value in found.items())
