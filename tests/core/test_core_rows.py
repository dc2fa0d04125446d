"""A different adapter for each row of a batch: every row is what it is alone, or the batch is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models_tiny import PAD, batch, ids, logits, randomise, tiny
from torch import nn

import peftcli
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.errors import AdapterError
from peftcli.methods.lora.initialisations import LoftQConfig
from peftcli.methods.lora.variants import KasaConfig
from peftcli.peft_api import PeftModel, get_peft_model
from peftcli.peft_api.mixed_batch import adapted_by_row

ROWS = ["b", "__base__", "a", "c", "a", "b"]
DENSE = {"target_modules": "all-linear", "r": 3}
ROUNDED = {"init_lora_weights": "loftq", "loftq_config": LoftQConfig()}
CONV = {"target_modules": ["convolution"]}

SETS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "llama": ("llama", [{}, DENSE, {"target_modules": ["k_proj"]}]),
    "gpt2": ("gpt2", [{}, {"target_modules": ["c_attn", "c_fc", "wte"]}, {"bias": "all"}]),
    "t5": ("t5", [{}, DENSE, {"target_modules": ["embed_tokens", "v"]}]),
    "heads": (
        "bert",
        [
            {"modules_to_save": ["classifier"]},
            {"modules_to_save": ["classifier", "pooler"]},
            {"bias": "lora_only", "target_modules": ["query", "output.dense"]},
        ],
    ),
    "embeddings and tokens": (
        "llama_tied",
        [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [5, 6, 7]}, {"use_dora": True}],
    ),
    "convolutions": ("convnet", [CONV, {**CONV, "modules_to_save": ["classifier"]}, {**CONV, "r": 2}]),
    "weak directions": ("llama", [ROUNDED, {"kasa_config": KasaConfig()}, {"kasa_config": KasaConfig(), "r": 3}]),
    "rounded": ("llama", [ROUNDED, ROUNDED, {}]),
    "whisper": ("whisper", [{}, {"target_modules": ["fc1", "conv1"]}, DENSE]),
}


def _several(kind: str, *settings: dict[str, Any]) -> PeftModel:
    """A model with the LoRA adapters a, b, ... of random weights."""
    model = get_peft_model(tiny(kind), peftcli.LoraConfig(**settings[0]), "a")
    for name, more in zip("bcd", settings[1:], strict=False):
        model.add_adapter(name, peftcli.LoraConfig(**more))
    for number, name in enumerate(model.peft_config):
        model.set_adapter(name)
        randomise(model, seed=number + 1)
    return model.eval()


def _use(model: PeftModel, name: str) -> PeftModel:
    model.set_adapter([] if name == "__base__" else name)
    return model


@pytest.fixture(scope="module", params=SETS)
def case(request: pytest.FixtureRequest) -> tuple[str, PeftModel]:
    """Not to be changed by a test."""
    kind, settings = SETS[request.param]
    return kind, _several(kind, *settings)


@pytest.fixture(scope="module")
def llama() -> PeftModel:
    """Not to be changed by a test."""
    return _several("llama", *SETS["llama"][1])


@pytest.mark.grid(keep=5)
def test_each_row_is_what_it_is_alone(case: tuple[str, PeftModel]) -> None:
    kind, model = case
    inputs, single = batch(kind, rows=len(ROWS)), copy.deepcopy(model)
    with torch.no_grad():
        found = model(**inputs, adapter_names=ROWS).logits
        base = model(**inputs, adapter_names=["__base__"] * len(ROWS)).logits
    assert torch.equal(base, logits(tiny(kind), inputs))
    for row, name in enumerate(ROWS):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        expected = logits(_use(single, name), own)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)
        assert torch.allclose(found[row], base[row], atol=1e-3) == (name == "__base__")


def test_which_adapter_is_active_makes_no_difference_and_stays(llama: PeftModel) -> None:
    inputs, model = batch("llama", rows=len(ROWS)), copy.deepcopy(llama)
    with torch.no_grad():
        expected = model(**inputs, adapter_names=ROWS).logits
        for active in ("a", "c", "__base__"):
            _use(model, active)
            alone = logits(model, inputs)
            assert torch.equal(model(**inputs, adapter_names=ROWS).logits, expected)
            assert torch.equal(logits(model, inputs), alone)
    assert not any("forward" in vars(layer) for layer in adapter_layers(model).values())


def test_gradients_of_a_row_go_to_its_adapter(llama: PeftModel) -> None:
    inputs, model = batch("llama", rows=3), copy.deepcopy(llama)
    model.set_requires_grad(["a", "b", "c"])
    model(**inputs, adapter_names=["a", "__base__", "b"]).logits.square().sum().backward()
    touched = {
        layer.adapter
        for layer in adapter_layers(model).values()
        for value in layer.own_tensors().values()
        if value.grad is not None
    }
    assert touched == {"a", "b"}


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generated_text_is_what_each_row_gives_alone(kind: str, how: dict[str, Any]) -> None:
    model, rows = _several(kind, *SETS[kind][1]), ["b", "a", "__base__", "c"]
    prompts = ids(4, 7)
    mask = torch.ones_like(prompts)
    prompts[1, :3], mask[1, :3] = PAD, 0
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **how}
    found = model.generate(input_ids=prompts, attention_mask=mask, adapter_names=rows, **options)
    each = how.get("num_return_sequences", 1)
    assert len(found) == 4 * each
    for row, name in enumerate(rows):
        one = {"input_ids": prompts[row : row + 1], "attention_mask": mask[row : row + 1]}
        expected = _use(model, name).generate(**one, **options)
        assert torch.equal(found[row * each : (row + 1) * each], expected)


def test_beams_of_the_generation_config_count_too(llama: PeftModel) -> None:
    model, rows = copy.deepcopy(llama), ["b", "a"]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids(2, 7), adapter_names=rows, num_beams=3, **options)
    model.get_base_model().generation_config.num_beams = 3
    assert torch.equal(model.generate(input_ids=ids(2, 7), adapter_names=rows, **options), expected)


def test_other_methods_and_soft_prompts() -> None:
    model = _several("llama", {})
    for name, config in (("b", peftcli.IA3Config()), ("p", peftcli.PromptTuningConfig(num_virtual_tokens=3))):
        model.add_adapter(name, config)
        model.set_adapter(name)
        randomise(model)
    inputs, rows = batch("llama", rows=3), ["b", "a", "__base__"]
    with torch.no_grad():
        found = model.eval()(**inputs, adapter_names=rows).logits
    for row, name in enumerate(rows):
        torch.testing.assert_close(found[row], logits(_use(model, name), inputs)[row], atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # a whole batch is no matter of rows
        whole = model(**inputs, adapter_names=["p"] * 3).logits
    assert torch.equal(whole, logits(_use(model, "p"), inputs))
    with pytest.raises(AdapterError, match=r"p changes more than the outputs of layers; .* whole batches"):
        model(**inputs, adapter_names=["p", "a", "a"])


REFUSED: dict[str, tuple[list[str], str]] = {
    "unknown": (["a", "x"], "Trying to infer with non-existing adapter\\(s\\): x; there are: a, b, c"),
    "too many": (["a"] * 1 + ["b"] * 2, "the same as the number of inputs, but got 3 and 2"),
    "too many that are alike": (["a"] * 3, "the same as the number of inputs, but got 3 and 2"),
    "one for all rows": (["__base__"], "the same as the number of inputs, but got 1 and 2"),
    "none": ([], "the same as the number of inputs, but got 0 and 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_do_not_fit_are_refused(llama: PeftModel, name: str) -> None:
    names, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        llama(**batch("llama"), adapter_names=names)
    with pytest.raises(AdapterError, match=message):
        llama.generate(batch("llama")["input_ids"], adapter_names=names, max_new_tokens=2)
    assert not any("forward" in vars(layer) for layer in adapter_layers(llama).values())


def test_the_state_of_the_model_may_forbid_it(llama: PeftModel) -> None:
    model, asked = copy.deepcopy(llama), {**batch("llama"), "adapter_names": ["a", "b"]}
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**asked).logits, logits(model, batch("llama"))), "none is on: names say nothing"
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged adapters, please call `unmerge_adapter`"):
        model(**asked)
    model.unmerge_adapter()
    with pytest.raises(AdapterError, match="when the model is in training mode"):
        model.train()(**asked)


class Flat(nn.Module):
    """(B, T, D) to a layer that sees tokens, not rows."""

    def __init__(self, view: str):
        super().__init__()
        self.view = view
        self.layer = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.view == "attention":
            return self.attention(x, x, x)[0]
        return self.layer({"tokens": x.flatten(0, 1), "time first": x.transpose(0, 1), "scalar": x.sum()}[self.view])


@pytest.mark.parametrize("view", ["tokens", "time first", "attention"])
def test_a_layer_that_sees_no_rows_is_refused_unless_all_are_alike(view: str) -> None:
    model = Flat(view).eval()
    targets = ["attention"] if view == "attention" else ["layer"]
    inject(model, peftcli.LoraConfig(target_modules=targets, init_lora_weights=False, r=2), "a")
    x = torch.randn(3, 5, 4) if view != "attention" else torch.randn(3, 3, 4)
    reason = "more than one input" if view == "attention" else r"no batch of 3 rows; one adapter at a time works here"
    with adapted_by_row(model, ["a", "__base__", "a"]), pytest.raises(AdapterError, match=reason):
        model(x)
    expected = model(x)
    with adapted_by_row(model, ["a"] * 3):
        assert torch.equal(model(x), expected)


def test_experts_and_families_that_put_time_first_are_refused() -> None:
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])}).eval()
    inject(model, peftcli.LoraConfig(target_modules=["experts.0"]), "a")
    with pytest.raises(AdapterError, match="sees the tokens of all rows"), adapted_by_row(model, ["a", "__base__"]):
        pass
    longformer = tiny("bert")
    inject(longformer, peftcli.LoraConfig(), "a")
    longformer.config.model_type = "longformer"
    with pytest.raises(AdapterError, match="does not keep rows apart"), adapted_by_row(longformer, ["a", "__base__"]):
        pass
