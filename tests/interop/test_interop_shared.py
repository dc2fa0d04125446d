"""Saved modules and biases whose parameters stand in a model more than once, against PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import peft.functional
import pytest
import torch
from models_tiny import VOCABULARY, ids, tiny
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import (
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

import peftcli
from peftcli.errors import AdapterError
from peftcli.peft_api import functional

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}


def roberta_classifier() -> PreTrainedModel:
    return RobertaForSequenceClassification(RobertaConfig(**_SIZES))


BASES: dict[str, Any] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**_SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**_SIZES)),
    "classifier": roberta_classifier,
    "llama": lambda: tiny("llama"),
}
CASES = [
    ("bert", {"modules_to_save": ["cls"]}),
    ("bert", {"modules_to_save": ["predictions"]}),
    ("roberta", {"modules_to_save": ["lm_head"]}),
    ("bert", {"bias": "all"}),
    ("bert", {"bias": "all", "target_modules": ["query", "decoder"]}),
    ("roberta", {"bias": "all", "target_modules": ["query", "decoder"]}),
    ("roberta", {"bias": "all"}),
    ("bert", {"bias": "lora_only", "target_modules": ["query", "decoder"]}),
    ("bert", {"modules_to_save": ["decoder"]}),
    ("classifier", {"bias": "all", "modules_to_save": ["classifier"]}),
]
UNCLEAR = [
    ("classifier", {"target_modules": ["key"], "modules_to_save": ["dense", "classifier"]}),  # a dense is in classifier
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),  # and layernorms end in norm
]


def base(kind: str) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return BASES[kind]().eval()


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids(2, 7)).logits


def made(library: Any, kind: str, settings: dict[str, Any]) -> Any:
    """A model with an adapter that one step has changed."""
    torch.manual_seed(0)
    config = library.LoraConfig(**{"target_modules": ["query"]} | settings, r=4, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.get_peft_model(base(kind), config).train()
    (model(input_ids=ids(2, 7)).logits * torch.randn(1)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(0.05 * parameter.grad.sign())
    return model.eval()


@pytest.mark.grid(keep=10)
@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize(("writer", "reader"), [(peftcli, peftcli), (peftcli, peft), (peft, peftcli)])
def test_each_reads_what_the_other_saves(
    kind: str, settings: dict[str, Any], writer: Any, reader: Any, tmp_path: Path
) -> None:
    model = made(writer, kind, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path)
        loaded = reader.PeftModel.from_pretrained(base(kind), str(tmp_path)).eval()
    torch.testing.assert_close(said(loaded), said(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "settings"), UNCLEAR)
@pytest.mark.parametrize("reader", [peftcli, peft])
def test_names_that_peft_takes_for_more_are_written_in_full(
    kind: str, settings: dict[str, Any], reader: Any, tmp_path: Path
) -> None:
    test_each_reads_what_the_other_saves(kind, settings, peftcli, reader, tmp_path)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_as_many_parameters_train_and_merging_changes_nothing(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = made(peftcli, kind, settings)
    assert model.get_nb_trainable_parameters()[0] == made(peft, kind, settings).get_nb_trainable_parameters()[0]
    expected, before = said(model), said(base(kind))
    model.merge_adapter()
    torch.testing.assert_close(said(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(said(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(said(merged), expected, rtol=0, atol=1e-5)
    assert (expected - before).abs().max() > 0.01
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(said(type(merged).from_pretrained(tmp_path).eval()), expected, rtol=0, atol=1e-5)
    if kind != "classifier" and "decoder" not in str(settings):
        head = merged.cls.predictions if kind == "bert" else merged.lm_head
        assert head.bias is head.decoder.bias


def test_a_parametrised_model_takes_a_saved_adapter(tmp_path: Path) -> None:
    config = Wav2Vec2Config(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Wav2Vec2Model(config).eval()
    settings = peftcli.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peftcli.get_peft_model(copy.deepcopy(plain), settings)
    model.eval().save_pretrained(tmp_path)
    loaded = peftcli.PeftModel.from_pretrained(plain, tmp_path).eval()
    sounds = torch.randn(1, 400)
    with torch.no_grad():
        assert torch.equal(loaded(sounds).last_hidden_state, model(sounds).last_hidden_state)


def test_a_weight_that_is_computed_from_buffers_takes_a_saved_adapter(tmp_path: Path) -> None:
    def plain() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Linear(6, 3)).eval()

    model = peftcli.get_peft_model(plain(), peftcli.LoraConfig(target_modules="^[01]$", init_lora_weights=False))
    model.eval().save_pretrained(tmp_path)
    loaded, x = peftcli.PeftModel.from_pretrained(plain(), tmp_path), torch.randn(2, 4)
    assert torch.equal(loaded(x), model(x))


def test_the_outermost_of_modules_to_save_is_saved(tmp_path: Path) -> None:
    def plain() -> Any:
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
        return ResNetForImageClassification(config).eval()

    config = peftcli.LoraConfig(
        target_modules=["convolution"], exclude_modules=".*embedder.*", modules_to_save=["embedder"]
    )
    model = peftcli.get_peft_model(plain(), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1)
    model.save_pretrained(tmp_path)
    loaded = peftcli.PeftModel.from_pretrained(plain(), tmp_path).eval()
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixels).logits
        assert torch.equal(loaded(pixels).logits, expected)
        torch.testing.assert_close(model.merge_and_unload()(pixels).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_names_of_adapters_in_names_of_tensors_are_passed_over() -> None:
    """As the states of PEFT's models have them."""
    settings = {"modules_to_save": ["classifier"]}
    theirs, model = (
        made(peft, "classifier", settings),
        peftcli.get_peft_model(
            base("classifier"), peftcli.LoraConfig(r=4, target_modules=["query"], **settings)
        ).eval(),
    )
    state = {name: value for name, value in theirs.state_dict().items() if ".default" in name}
    peftcli.set_peft_model_state_dict(model, state)
    torch.testing.assert_close(said(model), said(theirs), rtol=0, atol=1e-6)


def test_a_state_of_two_adapters_gives_each_its_own() -> None:
    theirs, model = made(peft, "bert", {}), made(peftcli, "bert", {})
    theirs.add_adapter("other", peft.LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    model.add_adapter("other", peftcli.LoraConfig(r=4, target_modules=["query"]))
    for state in (theirs.state_dict(), dict(reversed(theirs.state_dict().items()))):
        wanted = {name: value for name, value in state.items() if "lora_" in name and ".other" in name}
        peftcli.set_peft_model_state_dict(model, wanted, adapter_name="other")
        with pytest.raises(AdapterError, match=r"unexpected: .*default"):
            peftcli.set_peft_model_state_dict(
                model, {name: value for name, value in state.items() if "lora_" in name}, adapter_name="other"
            )
    theirs.set_adapter("other")
    model.set_adapter("other")
    torch.testing.assert_close(said(model), said(theirs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("library", [peftcli, peft])
def test_unloading_keeps_what_was_merged(library: Any) -> None:
    model = made(library, "bert", {})
    expected = said(model)
    model.merge_adapter()
    unloaded = said(model.unload())
    torch.testing.assert_close(unloaded, expected, rtol=0, atol=1e-6)
    assert (unloaded - said(base("bert"))).abs().max() > 1e-4


def test_bookkeeping_of_other_tools_is_read(tmp_path: Path) -> None:
    """Unsloth's note of the base model's class."""
    model = made(peftcli, "classifier", {})
    model.peft_config["default"].auto_mapping = {"base_model_class": None, "unsloth_fixed": True}
    model.save_pretrained(tmp_path)
    loaded = peftcli.PeftModel.from_pretrained(base("classifier"), tmp_path).eval()
    assert torch.equal(said(loaded), said(model))


@pytest.mark.parametrize(("given", "kept"), [([], None), (range(1), [0])])
def test_layers_to_transform_may_be_none_or_any_numbers(given: Any, kept: Any) -> None:
    config = peftcli.LoraConfig(target_modules=["query"], layers_to_transform=given)
    assert config.layers_to_transform == kept
    model: nn.Module = peftcli.get_peft_model(base("bert"), config)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == (2 if kept is None else 1)


def test_a_file_may_name_layers_that_the_model_lacks(tmp_path: Path) -> None:
    theirs = made(peft, "bert", {"layers_to_transform": [1, 2, 3]})
    theirs.save_pretrained(tmp_path)
    loaded = peftcli.PeftModel.from_pretrained(base("bert"), tmp_path).eval()
    torch.testing.assert_close(said(loaded), said(theirs), rtol=0, atol=1e-6)


def test_the_adapter_that_is_set_is_the_only_one_that_trains() -> None:
    counts = []
    for library, functions in ((peft, peft.functional), (peftcli, functional)):
        model = base("bert")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for r, name in ((2, "a"), (4, "b")):
                library.inject_adapter_in_model(library.LoraConfig(r=r, target_modules=["query"]), model, name)
        trained = [sum(each.numel() for each in model.parameters() if each.requires_grad)]
        for settings in ({}, {"inference_mode": True}):
            functions.set_adapter(model, "b", **settings)
            trained.append(sum(each.numel() for each in model.parameters() if each.requires_grad))
        counts.append(trained)
    assert counts[0] == counts[1]


def test_a_bias_of_two_layers_stays_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.other.bias = self.one.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.one(self.query(x)).relu())

    said, x = [], torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    for library in (peft, peftcli):
        torch.manual_seed(0)
        model = library.get_peft_model(Twice(), library.LoraConfig(r=2, target_modules=["query"], bias="all")).eval()
        model(x).sum().backward()
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith("bias"):
                    value.sub_(value.grad if value.grad is not None else 0)
            said += [model(x), model.merge_and_unload()(x)]
    for each in said[1:]:
        torch.testing.assert_close(each, said[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"bias": "lora_only"}, {"lora_bias": True}])
def test_a_bias_that_one_of_two_layers_trains_is_merged_there_alone(settings: dict[str, Any]) -> None:
    model: Any = nn.Sequential()
    model.query, model.other = nn.Linear(8, 8), nn.Linear(8, 8)
    model.other.bias = model.query.bias
    adapted = peftcli.get_peft_model(model, peftcli.LoraConfig(r=2, target_modules=["query"], **settings)).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.5)
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = adapted(x)
        torch.testing.assert_close(adapted.merge_and_unload()(x), expected, rtol=0, atol=1e-4)
