"""Prompt tuning: PEFT as oracle of the file and of the forward pass; not of ``generate``."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import PAD, batch, ids, logits, tiny
from oracle import adapter_size, file_of, loaded_by_peft, ours, saved_by_peft, silence, theirs
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.prompts.generate import generate
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods.prompt_tuning import PromptTuningConfig

N = 4
KINDS = ("llama", "gpt2", "opt", "qwen2", "gemma3", "bloom", "t5")


def _task(kind: str) -> str:
    return "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"


def _settings(kind: str) -> dict[str, Any]:
    return {"task_type": _task(kind), "num_virtual_tokens": N}


def _peft_settings(kind: str) -> dict[str, Any]:
    # PEFT takes hidden_size, which is not the size of this model's input embedding
    return {**_settings(kind), **({"token_dim": 16} if kind == "opt" else {})}


def _read(kind: str, folder: Path) -> nn.Module:
    model = tiny(kind)
    load_adapter(model, config_from_dict(read_config(folder)), folder)
    return model


def _real(kind: str, output: torch.Tensor) -> torch.Tensor:
    """The logits of the real tokens, which are all of a decoder's positions in an encoder-decoder model."""
    return output if kind == "t5" else output[:, N:]


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_peft_reads(kind: str, tmp_path: Path) -> None:
    model, config = ours(kind, "prompt_tuning", **_settings(kind))
    save_adapter(model, config, tmp_path)
    oracle = loaded_by_peft(kind, tmp_path)
    got, expected = logits(model, batch(kind)), logits(oracle, batch(kind))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(_real(kind, got), logits(tiny(kind), batch(kind)), atol=1e-2)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_writes_we_read(kind: str, tmp_path: Path) -> None:
    oracle = theirs(kind, "prompt_tuning", **_peft_settings(kind))
    saved_by_peft(oracle, tmp_path)
    got = logits(_read(kind, tmp_path), batch(kind))
    torch.testing.assert_close(got, logits(oracle, batch(kind)), atol=1e-5, rtol=1e-5)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", KINDS)
def test_names_shapes_and_counts_are_pefts(kind: str) -> None:
    model, _ = ours(kind, "prompt_tuning", **_settings(kind))
    oracle = theirs(kind, "prompt_tuning", **_peft_settings(kind), num_transformer_submodules=1)
    here = {name: tuple(value.shape) for name, value in adapter_state(model).items()}
    assert here == {name: tuple(value.shape) for name, value in peft.get_peft_model_state_dict(oracle).items()}
    assert adapter_size(model) == oracle.get_nb_trainable_parameters()[0]


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "t5"])
def test_forward_and_loss_of_right_padded_rows_are_pefts(kind: str, tmp_path: Path) -> None:
    model, config = ours(kind, "prompt_tuning", **_settings(kind))
    save_adapter(model, config, tmp_path)
    oracle = loaded_by_peft(kind, tmp_path)
    inputs = batch(kind)
    inputs["attention_mask"][1, 5:] = 0
    inputs["input_ids"][1, 5:] = PAD
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        here, there = model(**inputs), oracle(**inputs)
    seen = torch.cat([torch.ones(2, N, dtype=torch.long), inputs["attention_mask"]], 1).bool()
    torch.testing.assert_close(here.logits[seen], there.logits[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(here.loss, there.loss, atol=1e-6, rtol=1e-6)


def test_forward_of_an_encoder_decoder_with_padding_and_labels_is_pefts(tmp_path: Path) -> None:
    model, config = ours("t5", "prompt_tuning", **_settings("t5"))
    save_adapter(model, config, tmp_path)
    oracle = loaded_by_peft("t5", tmp_path)
    inputs = batch("t5")
    inputs["attention_mask"][1, 5:] = 0
    labels = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        here, there = model(**inputs, labels=labels), oracle(**inputs, labels=labels)
    torch.testing.assert_close(here.logits, there.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(here.loss, there.loss, atol=1e-6, rtol=1e-6)


def test_forward_of_an_encoder_is_pefts(tmp_path: Path) -> None:
    def base() -> BertModel:
        return tiny("bert").bert

    model, config = base(), PromptTuningConfig(num_virtual_tokens=N, task_type="FEATURE_EXTRACTION")
    inject(model, config)
    save_adapter(model, config, tmp_path)
    with silence():
        oracle = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    inputs = batch("bert")
    inputs["attention_mask"][1, 5:] = 0
    with torch.no_grad():
        here, there = model(**inputs).last_hidden_state, oracle(**inputs).last_hidden_state
    seen = torch.cat([torch.ones(2, N, dtype=torch.long), inputs["attention_mask"]], 1).bool()
    torch.testing.assert_close(here[seen], there[seen], atol=1e-5, rtol=1e-5)


def test_pefts_two_halves_of_an_encoder_decoders_prompt_are_read_and_one_is_written(tmp_path: Path) -> None:
    saved_by_peft(theirs("t5", "prompt_tuning", **_settings("t5")), tmp_path / "theirs")
    config, tensors = file_of(tmp_path / "theirs")
    assert tuple(tensors["prompt_embeddings"].shape) == (2 * N, 32)
    assert config["num_transformer_submodules"] == 2
    model, read = tiny("t5"), config_from_dict(read_config(tmp_path / "theirs"))
    load_adapter(model, read, tmp_path / "theirs")
    torch.testing.assert_close(adapter_state(model)["prompt_embeddings"], tensors["prompt_embeddings"][:N])
    save_adapter(model, read, tmp_path / "ours")
    config, tensors = file_of(tmp_path / "ours")
    assert tuple(tensors["prompt_embeddings"].shape) == (N, 32)
    assert config["num_transformer_submodules"] == 1


def test_three_times_the_rows_do_not_fit(tmp_path: Path) -> None:
    saved_by_peft(theirs("llama", "prompt_tuning", **_settings("llama")), tmp_path)
    save_file({"prompt_embeddings": torch.zeros(3 * N, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"shape: prompt_embeddings is \(12, 32\), the model needs \(4, 32\)"):
        _read("llama", tmp_path)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "answer", "the", "question", "<unk>"])}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("text", ["answer the question", "the", "answer the question answer the question the"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_a_prompt_that_starts_from_text_starts_where_pefts_does(
    kind: str, text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
    oracle = peft.get_peft_model(
        tiny(kind),
        peft.PromptTuningConfig(**_peft_settings(kind), **settings, tokenizer_name_or_path=tokenizer.name_or_path),
    )
    model, config = tiny(kind), PromptTuningConfig(**_settings(kind), **settings)
    config.prepare(lambda name: tokenizer)
    inject(model, config)
    torch.testing.assert_close(
        adapter_state(model)["prompt_embeddings"], peft.get_peft_model_state_dict(oracle)["prompt_embeddings"]
    )


def test_a_prompt_from_text_is_written_so_that_peft_reads_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = PromptTuningConfig(
        **_settings("llama"),
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="the answer",
        tokenizer_name_or_path=tokenizer.name_or_path,
    )
    config.prepare(lambda name: tokenizer)
    model = tiny("llama")
    inject(model, config)
    save_adapter(model, config, tmp_path)
    assert "init_token_ids" not in file_of(tmp_path)[0]
    oracle = loaded_by_peft("llama", tmp_path)
    torch.testing.assert_close(logits(model, batch("llama")), logits(oracle, batch("llama")), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(_read("llama", tmp_path), batch("llama")), logits(model, batch("llama")))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_a_prompt_from_the_vocabulary_holds_what_the_embedding_gives(kind: str) -> None:
    model, base = tiny(kind), tiny(kind)
    inject(model, PromptTuningConfig(**_settings(kind), prompt_tuning_init="SAMPLE_VOCAB"))
    every = base.get_input_embeddings()(torch.arange(96)).detach()
    for vector in adapter_state(model)["prompt_embeddings"]:
        assert (every == vector).all(-1).any()


def test_interop_3_1_pefts_generate_repeats_the_prompt_and_ours_does_not(tmp_path: Path) -> None:
    """The forward passes agree, and still PEFT's tokens differ from a greedy loop over its own forward.

    On transformers 5.3 they do not: PEFT looks for ``past_key_values``, which later versions call ``cache``.
    """
    differs = {}
    for kind in ("llama", "qwen2", "gpt2", "opt"):
        model, config = ours(kind, "prompt_tuning", **_settings(kind))
        save_adapter(model, config, tmp_path / kind)
        oracle = loaded_by_peft(kind, tmp_path / kind)
        inputs = {"input_ids": ids(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
        settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        expected = inputs["input_ids"]
        for _ in range(10):
            step = logits(oracle, {"input_ids": expected, "attention_mask": torch.ones_like(expected)})
            expected = torch.cat([expected, step[:, -1].argmax(-1, keepdim=True)], 1)
        assert torch.equal(generate(model, **inputs, **settings), expected)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                differs[kind] = not torch.equal(oracle.generate(**inputs, **settings), expected)
        except (IndexError, RuntimeError) as error:
            differs[kind] = type(error).__name__
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters:
        assert all(differs.values()), f"PEFT generates as it should on some: {differs}; this comparison can go"
