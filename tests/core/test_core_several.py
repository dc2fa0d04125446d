"""Several adapters on one base model: each is what it is alone, and nothing of one leaks into another."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, randomise, tiny
from safetensors.torch import load_file
from torch import nn

import peftcli
from peftcli.core.inject import inject, meta_copy, set_active
from peftcli.core.layer import adapter_layers
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.peft_api import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

CONFIGS: dict[str, Any] = {
    "plain": lambda: peftcli.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "wide": lambda: peftcli.LoraConfig(r=6, target_modules=["q_proj", "k_proj", "up_proj"], use_rslora=True),
    "factors": lambda: peftcli.IA3Config(),
    "head": lambda: peftcli.LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"]),
}


def several(*names: str, kind: str = "llama") -> PeftModel:
    """A model with these adapters of random weights, the first one active."""
    model = get_peft_model(tiny(kind), CONFIGS[names[0]](), names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[name]())
    for number, name in enumerate(names):
        model.set_adapter(name)
        randomise(model, seed=number + 1)
    model.set_adapter(names[0])
    return model.eval()


def alone(model: PeftModel, name: str, kind: str = "llama") -> nn.Module:
    """A model with nothing but one of the adapters."""
    single = get_peft_model(tiny(kind), CONFIGS[name](), name).eval()
    set_peft_model_state_dict(single, get_peft_model_state_dict(model, adapter_name=name))
    return single


def _base_logits() -> torch.Tensor:
    return logits(tiny("llama"), batch("llama"))


@pytest.fixture(scope="module")
def shared() -> PeftModel:
    """Not to be changed by a test."""
    return several(*CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_active_adapter_is_what_it_is_alone(shared: PeftModel, name: str) -> None:
    model = copy.deepcopy(shared)
    model.set_adapter(name)
    assert model.active_adapter == name
    assert model.active_adapters == [name]
    assert model.active_peft_config is model.peft_config[name]
    assert torch.equal(logits(model, batch("llama")), logits(alone(model, name), batch("llama")))
    assert not torch.allclose(logits(model, batch("llama")), _base_logits(), atol=1e-2)


def test_two_active_adapters_add_up(shared: PeftModel) -> None:
    model = copy.deepcopy(shared)
    model.set_adapter(["plain", "wide"])
    assert model.active_adapter == ["plain", "wide"]
    expected = tiny("llama")
    for name in ("plain", "wide"):
        for path, layer in adapter_layers(alone(model, name).get_base_model()).items():
            expected.get_submodule(path).weight.data += layer.delta()
    torch.testing.assert_close(logits(model, batch("llama")), logits(expected, batch("llama")), atol=1e-4, rtol=1e-4)


def test_no_active_adapter_is_the_base_model(shared: PeftModel) -> None:
    model = copy.deepcopy(shared)
    model.set_adapter([])
    assert torch.equal(logits(model, batch("llama")), _base_logits())
    with pytest.raises(AdapterError, match="no adapter is active"):
        _ = model.active_peft_config
    with shared.disable_adapter():
        assert torch.equal(logits(shared, batch("llama")), _base_logits())
    assert not torch.equal(logits(shared, batch("llama")), _base_logits())


def test_one_trains_while_the_others_stay(shared: PeftModel) -> None:
    model = copy.deepcopy(shared)
    model.set_adapter("wide")
    before = {name: get_peft_model_state_dict(model, adapter_name=name) for name in CONFIGS}
    before = {name: {key: value.clone() for key, value in tensors.items()} for name, tensors in before.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(**labelled("llama")).loss.backward()
    optimizer.step()
    for name, tensors in before.items():
        same = [
            torch.equal(value, get_peft_model_state_dict(model, adapter_name=name)[key])
            for key, value in tensors.items()
        ]
        assert not any(same) if name == "wide" else all(same)


def test_an_active_frozen_adapter_below_one_that_trains(shared: PeftModel) -> None:
    model = copy.deepcopy(shared)
    model.set_adapter(["plain", "wide"])
    model.set_requires_grad("plain", False)
    model(**labelled("llama")).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    owned = {id(p) for layer in adapter_layers(model, "wide").values() for p in layer.own_tensors().values()}
    assert {id(model.get_parameter(name)) for name in trained} == owned


def test_a_new_adapter_is_neither_active_nor_trained(shared: PeftModel) -> None:
    model = copy.deepcopy(shared)
    expected = logits(model, batch("llama"))
    model.add_adapter("new", peftcli.LoraConfig(init_lora_weights=False))
    assert torch.equal(logits(model, batch("llama")), expected)
    assert not any(
        p.requires_grad for layer in adapter_layers(model, "new").values() for p in layer.own_tensors().values()
    )
    model.set_adapter("new", inference_mode=True)
    assert not torch.equal(logits(model, batch("llama")), expected)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_deleting_one_leaves_the_others(shared: PeftModel, name: str) -> None:
    model = copy.deepcopy(shared)
    left = [other for other in CONFIGS if other != name]
    expected = {other: logits(alone(model, other), batch("llama")) for other in left}
    model.set_adapter(left[-1])
    model.delete_adapter(name)
    assert list(model.peft_config) == left
    assert model.active_adapter == left[-1]
    for other in left:
        model.set_adapter(other)
        assert torch.equal(logits(model, batch("llama")), expected[other])


def test_deleting_the_active_one_makes_the_next_active(shared: PeftModel) -> None:
    model = copy.deepcopy(shared)
    model.set_adapter("wide")
    with pytest.warns(UserWarning, match="wide was active; now plain is"):
        model.delete_adapter("wide")
    assert model.active_adapter == "plain"
    for name in ("factors", "head"):
        model.delete_adapter(name)
    model.delete_adapter("plain")
    assert model.active_adapters == []
    assert torch.equal(logits(model, batch("llama")), _base_logits())
    model.add_adapter("again", CONFIGS["plain"]())
    assert model.active_adapters == []


def test_each_is_saved_in_a_folder_of_its_own_and_loaded_beside_others(shared: PeftModel, tmp_path: Path) -> None:
    model = copy.deepcopy(shared)
    model.save_pretrained(tmp_path, selected_adapters=["wide", "head"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["head", "wide"]
    assert (
        load_file(tmp_path / "wide/adapter_model.safetensors").keys()
        == adapter_state(alone(model, "wide").get_base_model()).keys()
    )
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "head", "first")
    before = logits(loaded, batch("llama"))
    loaded.load_adapter(tmp_path / "wide", "second")
    assert torch.equal(logits(loaded, batch("llama")), before)
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, was in (("second", "wide"), ("first", "head")):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, batch("llama")), logits(alone(model, was), batch("llama")))


def test_default_is_saved_at_the_top(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), CONFIGS["plain"]())
    model.add_adapter("other", CONFIGS["wide"]())
    model.save_pretrained(tmp_path)
    files = {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {*files, "other"}
    assert {path.name for path in (tmp_path / "other").iterdir()} == files


def test_loading_under_a_name_in_use_replaces_that_one(shared: PeftModel, tmp_path: Path) -> None:
    model = copy.deepcopy(shared)
    model.save_pretrained(tmp_path)
    expected = {name: logits(alone(model, name), batch("llama")) for name in CONFIGS}
    parameter = next(iter(adapter_layers(model, "plain").values())).lora_A.weight
    with torch.no_grad():
        parameter.add_(1)
    model.load_adapter(tmp_path / "plain", "plain")
    assert next(iter(adapter_layers(model, "plain").values())).lora_A.weight is parameter
    model.load_adapter(tmp_path / "factors", "wide")  # another method under that name
    assert model.active_adapter == "plain"
    for name, now in (("plain", "plain"), ("factors", "wide"), ("head", "head")):
        model.set_adapter(now)
        assert torch.allclose(logits(model, batch("llama")), expected[name], atol=1e-6)


def test_an_adapter_that_cannot_take_anothers_place_leaves_it(tmp_path: Path) -> None:
    get_peft_model(tiny("gpt2"), peftcli.LoraConfig()).save_pretrained(tmp_path)
    model = several("plain", "wide")
    model.set_adapter(["plain", "wide"])
    expected = logits(model, batch("llama"))
    with pytest.raises(AdapterError, match="target_modules"):
        model.load_adapter(tmp_path, "wide")
    with pytest.raises(AdapterError, match="target_modules"):
        model.load_adapter(tmp_path, "third")
    assert list(model.peft_config) == ["plain", "wide"]
    assert torch.equal(logits(model, batch("llama")), expected)


def test_state_dict_holds_the_adapters_only_and_goes_back(shared: PeftModel) -> None:
    model, other = copy.deepcopy(shared), copy.deepcopy(shared)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert sum(value.numel() for value in state.values()) == sum(
        value.numel() for name in CONFIGS for value in get_peft_model_state_dict(model, adapter_name=name).values()
    )
    for layer in adapter_layers(other).values():
        for parameter in layer.own_tensors().values():
            parameter.data.zero_()
    other.load_state_dict(state)
    for name in CONFIGS:
        for each in (model, other):
            each.set_adapter(name)
        assert torch.equal(logits(other, batch("llama")), logits(model, batch("llama")))


def test_names_in_the_file_do_not_depend_on_the_other_adapters(shared: PeftModel) -> None:
    for name in CONFIGS:
        tensors = get_peft_model_state_dict(shared, adapter_name=name)
        assert tensors.keys() == get_peft_model_state_dict(alone(shared, name)).keys()
        assert not any("base_layer" in key for key in tensors)


def test_a_name_may_hold_a_blank(tmp_path: Path) -> None:
    model = several("plain")
    model.add_adapter("the other", CONFIGS["wide"]())
    model.save_pretrained(tmp_path)
    assert (
        peftcli.PeftModel.from_pretrained(tiny("llama"), tmp_path / "the other", "the other").active_adapter
        == "the other"
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "unknown": (lambda model: model.set_adapter("wdie"), "Adapter wdie does not exist; there are: plain, wide"),
    "one of two": (lambda model: model.set_adapter(["plain", "x"]), "Adapter x does not exist"),
    "delete": (lambda model: model.delete_adapter("x"), "Adapter x does not exist"),
    "save": (lambda model: model.save_pretrained("x", selected_adapters=["x"]), "Adapter x does not exist"),
    "train": (lambda model: model.set_requires_grad("x"), "Adapter x does not exist"),
    "state": (lambda model: get_peft_model_state_dict(model, adapter_name="x"), "Adapter x does not exist"),
    "set state": (lambda model: set_peft_model_state_dict(model, {}, "x"), "Adapter x does not exist"),
    "taken": (lambda model: model.add_adapter("wide", CONFIGS["wide"]()), "an adapter called 'wide' already"),
    "a path": (lambda model: model.add_adapter("../x", CONFIGS["wide"]()), "'../x' is not a valid name"),
    "a blank at the end": (lambda model: model.add_adapter("x ", CONFIGS["wide"]()), "'x ' is not a valid name"),
    "empty": (lambda model: model.add_adapter("", CONFIGS["wide"]()), "'' is not a valid name"),
    "base": (lambda model: model.add_adapter("__base__", CONFIGS["wide"]()), "'__base__' is not a valid name"),
    "no fit": (lambda model: model.add_adapter("x", peftcli.LoraConfig(target_modules=["q_porj"])), "closest: q_proj"),
    "no room": (lambda model: model.add_adapter("x", peftcli.VeraConfig(r=10**5)), "r: 100,000 is far larger"),
    "tensors": (lambda model: set_peft_model_state_dict(model, {}), "missing: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_change_nothing(case: str) -> None:
    model = several("plain", "wide")
    expected, names = logits(model, batch("llama")), [name for name, _ in model.named_parameters()]
    act, message = REFUSED[case]
    with pytest.raises(AdapterError, match=message):
        act(model)
    assert torch.equal(logits(model, batch("llama")), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.peft_config) == ["plain", "wide"]


def test_several_active_ones_must_be_named() -> None:
    model = several("plain", "wide")
    model.set_adapter(["plain", "wide"])
    for act in (get_peft_model_state_dict, lambda m: m.load_adapter("nowhere"), lambda m: m.push_to_hub("a/b")):
        with pytest.raises(AdapterError, match=r"2 adapters are active; name one|neither a folder"):
            act(model)


HIDING: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "two copies": ("llama", {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, True),
    "a copy over an update": ("llama", {"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}, True),
    "an update over a copy": ("llama", {"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head"]}, False),
    "two biases": ("gpt2", {"bias": "lora_only"}, {"bias": "lora_only"}, True),
    "a bias and an update": ("gpt2", {"bias": "lora_only"}, {}, False),
    "an update and a bias": ("gpt2", {}, {"bias": "lora_only"}, False),
    "copies of two modules": ("bert", {"modules_to_save": ["pooler"]}, {"modules_to_save": ["classifier"]}, False),
    "the same tokens": ("llama", {"trainable_token_indices": [1]}, {"trainable_token_indices": [1, 2]}, True),
    "other tokens": ("llama", {"trainable_token_indices": [1, 3]}, {"trainable_token_indices": [2]}, False),
}


@pytest.mark.parametrize("case", HIDING)
def test_adapters_are_active_together_unless_one_hides_the_other(case: str) -> None:
    kind, one, two, hides = HIDING[case]
    model = get_peft_model(tiny(kind), peftcli.LoraConfig(init_lora_weights=False, **one), "a")
    model.add_adapter("b", peftcli.LoraConfig(init_lora_weights=False, **two))
    if hides:
        with pytest.raises(AdapterError, match=r"b replaces .*, which a changes too; only one of them can be active"):
            model.set_adapter(["a", "b"])
        assert model.active_adapter == "a"
        model.set_adapter("b")
        return
    model.set_adapter(["a", "b"])
    randomise(model)
    both = logits(model.eval(), batch(kind))
    for one_of_them in "ab":
        model.set_adapter(one_of_them)
        assert not torch.allclose(logits(model, batch(kind)), both, atol=1e-4)


OLD: dict[str, Any] = {
    "draws what its file does not hold": lambda: peftcli.VeraConfig(r=4, save_projection=False),
    "trains more than its file holds": lambda: peftcli.AdaLoraConfig(total_step=10),
    "starts elsewhere": lambda: peftcli.LoraConfig(init_lora_weights="pissa"),
    "a soft prompt": lambda: peftcli.PromptTuningConfig(num_virtual_tokens=3),
    "a head": CONFIGS["head"],
}


@pytest.mark.grid(keep=5)
@pytest.mark.parametrize("case", OLD)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_failed_replacement_brings_everything_back(case: str, loaded: bool, tmp_path: Path) -> None:
    get_peft_model(tiny("gpt2"), peftcli.LoraConfig()).save_pretrained(tmp_path / "bad")
    model = get_peft_model(tiny("llama"), OLD[case]())
    randomise(model)
    if loaded:
        model.save_pretrained(tmp_path / "good")
        model = PeftModel.from_pretrained(tiny("llama"), tmp_path / "good", is_trainable=True)
    expected, config = logits(model.eval(), batch("llama")), model.active_peft_config.file_dict()
    trains, names = model.get_nb_trainable_parameters(), [name for name, _ in model.named_parameters()]
    with pytest.raises(AdapterError, match="target_modules"):
        model.load_adapter(tmp_path / "bad")
    assert torch.equal(logits(model, batch("llama")), expected)
    assert [name for name, _ in model.named_parameters()] == names
    assert model.get_nb_trainable_parameters() == trains
    assert model.active_peft_config.file_dict() == config


@pytest.mark.parametrize("kind", ["llama_tied", "t5", "whisper"])
def test_a_skeleton_takes_no_memory_and_leaves_the_model_alone(kind: str) -> None:
    model = tiny(kind)
    inject(model, peftcli.LoraConfig(target_modules=["k_proj"] if kind != "t5" else ["k"]), "below")
    before = [(name, id(value), value.requires_grad) for name, value in model.named_parameters()]
    modules = [(name, id(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()]
    copied = meta_copy(model)
    assert all(value.is_meta for value in copied.parameters())
    assert [name for name, _ in copied.named_parameters()] == [name for name, _, _ in before]
    if kind == "llama_tied":
        assert copied.get_input_embeddings().weight is copied.get_output_embeddings().weight
        inject(copied, peftcli.PromptTuningConfig(num_virtual_tokens=4), "hooked")
    inject(copied, peftcli.LoraConfig(r=100, target_modules="all-linear"), "above")
    assert [(name, id(value), value.requires_grad) for name, value in model.named_parameters()] == before
    assert [(name, id(module), len(module._forward_pre_hooks)) for name, module in model.named_modules()] == modules


def test_a_skeleton_of_a_divided_layer() -> None:
    class Divided(nn.Linear):
        """As FSDP2 leaves a layer: ``__new__`` makes one of the layer's own class."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            made: Any = object.__new__(nn.Linear)
            made.__init__(*args, **kwargs)
            return made

    model = nn.Sequential(nn.Linear(4, 4))
    model[0].__class__ = Divided
    copied: Any = meta_copy(model)
    assert type(copied[0]) is Divided
    assert copied[0].weight.is_meta


def test_set_active_works_without_a_peft_model() -> None:
    model = tiny("llama")
    for name in "ab":
        inject(model, peftcli.LoraConfig(init_lora_weights=False), name)
    set_active(model, ["b"])
    assert {layer.adapter: layer.enabled for layer in adapter_layers(model).values()} == {"a": False, "b": True}
