"""Embedding and head of the base model in an adapter's file, as PEFT writes them when the vocabulary was resized."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
import trainkit
from models_tiny import batch, logits, randomise, tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peftcli
from peftcli.adapters.merge import merge_adapter
from peftcli.errors import AdapterError


@pytest.fixture(params=["llama", "llama_tied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tiny(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _resized(folder: Path, seed: int) -> Any:
    """The base model with three more tokens, whose rows are drawn anew each time."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    return model


def _adapted(lib: ModuleType, folder: Path, **settings: Any) -> Any:
    config = lib.LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"], **settings})
    model = lib.get_peft_model(_resized(folder, 0), config)
    randomise(model)
    return model.eval()


def _saved(model: Any, folder: Path, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells what it does
        model.save_pretrained(folder, **options)
    return folder


def _inputs(folder: Path) -> dict[str, torch.Tensor]:
    inputs = batch("llama")
    inputs["input_ids"][:, -1] = AutoModelForCausalLM.from_pretrained(folder).config.vocab_size + 1
    return inputs


@pytest.mark.grid(keep=4)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("writer", "targets"),
    [(peft, ["q_proj"]), (peftcli, ["q_proj"]), (peftcli, ["q_proj", "embed_tokens"])],  # PEFT leaves out its head
)
@pytest.mark.parametrize("reader", [peft, peftcli])
def test_the_rows_of_a_resized_vocabulary_are_saved_and_loaded(
    writer: ModuleType, reader: ModuleType, targets: list[str], folder: Path, tmp_path: Path
) -> None:
    model = _adapted(writer, folder, target_modules=targets)
    adapter = _saved(model, tmp_path / "adapter")
    loaded = reader.PeftModel.from_pretrained(_resized(folder, 1), adapter).eval()
    torch.testing.assert_close(logits(loaded, _inputs(folder)), logits(model, _inputs(folder)), atol=1e-5, rtol=1e-5)


def test_unload_gives_the_base_models_rows_back(folder: Path, tmp_path: Path) -> None:
    adapter, base = _saved(_adapted(peftcli, folder), tmp_path / "adapter"), _resized(folder, 1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    loaded = peftcli.PeftModel.from_pretrained(base, adapter)
    rows = loaded.get_input_embeddings().weight
    assert not torch.equal(rows, before["model.embed_tokens.weight"])
    assert all(torch.equal(value, before[name]) for name, value in loaded.unload().state_dict().items())


def test_unload_of_a_merged_adapter_keeps_its_rows(folder: Path, tmp_path: Path) -> None:
    model = _adapted(peftcli, folder)
    loaded = peftcli.PeftModel.from_pretrained(_resized(folder, 1), _saved(model, tmp_path / "adapter")).eval()
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded.unload(), _inputs(folder)), logits(model, _inputs(folder)))


def test_those_of_a_model_with_an_adapter_in_it_are_saved_too(folder: Path) -> None:
    model = _resized(folder, 0)
    config = peftcli.LoraConfig(r=4, target_modules=["q_proj"], base_model_name_or_path=str(folder))
    peftcli.inject_adapter_in_model(config, model)
    wanted = _adapted(peftcli, folder).get_base_model().get_input_embeddings().weight
    assert torch.equal(peftcli.get_peft_model_state_dict(model)["model.embed_tokens.weight"], wanted)


def test_the_same_tensors_as_pefts(folder: Path, tmp_path: Path) -> None:
    for number, options in enumerate([{}, {"save_embedding_layers": True}, {"save_embedding_layers": False}]):
        found = []
        for lib in (peft, peftcli):
            saved = _saved(_adapted(lib, folder), tmp_path / f"{lib.__name__}{number}", **options)
            found.append(load_file(saved / "adapter_model.safetensors"))
        theirs, ours = found
        tied = AutoModelForCausalLM.from_pretrained(folder).config.tie_word_embeddings
        head = {"base_model.model.lm_head.weight"} if tied else set()  # one weight is written once
        assert theirs.keys() - head == ours.keys()


def test_a_target_is_written_and_a_vocabulary_as_it_was_is_not(folder: Path, tmp_path: Path) -> None:
    def names(targets: list[str], **settings: Any) -> set[str]:
        config = peftcli.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets, **settings)
        model = peftcli.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
        saved = _saved(model, tmp_path / "-".join(targets))
        return {name for name in load_file(saved / "adapter_model.safetensors") if "lora" not in name}

    assert names(["q_proj"]) == set()
    assert names(["q_proj", "embed_tokens"]) == {"base_model.model.model.embed_tokens.base_layer.weight"}
    copied = names(["v_proj"], modules_to_save=["embed_tokens"])  # once, whether the head shares it or not
    assert copied == {"base_model.model.model.embed_tokens.weight"}


def test_the_command_merges_them_in(folder: Path, tmp_path: Path) -> None:
    trainkit.tokenizer().save_pretrained(folder)
    model = _adapted(peft, folder)
    merge_adapter(str(_saved(model, tmp_path / "adapter")), tmp_path / "merged", verify=False, base=str(folder))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, _inputs(folder)), logits(model, _inputs(folder)), atol=1e-4, rtol=1e-4)


def test_another_value_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="save_embedding_layers: is 'always'"):
        _adapted(peftcli, folder).save_pretrained(tmp_path / "adapter", save_embedding_layers="always")
