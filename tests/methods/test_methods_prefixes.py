"""Keys and values before those of each layer: prefix tuning, and cartridges that start from a document."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainkit
from models_tiny import CACHE, batch, checkpoint_activations, ids, labelled, logits, randomise, tiny
from torch import nn
from transformers import DynamicCache, MptConfig, MptForCausalLM

import peftcli
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.prompts.generate import generate
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods import config_from_dict
from peftcli.methods.cartridge import CartridgeConfig
from peftcli.methods.cartridge.layers import prefix_from_cache
from peftcli.methods.prefix_tuning import PrefixTuningConfig
from peftcli.peft_api import (
    PeftConfig,
    PeftModel,
    compose_cartridge_adapters,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)

N = 4


def _adapted(kind: str = "llama", base: nn.Module | None = None, **settings: Any) -> tuple[Any, PrefixTuningConfig]:
    model, config = tiny(kind) if base is None else base, PrefixTuningConfig(num_virtual_tokens=N, **settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model, config


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("kind", "width"), [("llama", 16), ("gpt2", 32), ("mixtral", 16), ("t5", 32), ("bert", 32)])
def test_keys_and_values_of_each_layers_own_heads_are_counted(kind: str, width: int) -> None:
    model, config = _adapted(kind)
    assert _size(model) == N * 2 * 2 * width
    assert (config.token_dim, config.num_layers) == (width, 2)
    assert {name: value.shape for name, value in adapter_state(model).items()} == {
        "prompt_embeddings": (N, 2 * 2 * width)
    }
    model, _ = _adapted(kind, prefix_projection=True, encoder_hidden_size=10)
    assert _size(model) == N * width + (width * 10 + 10) + (10 * 4 * width + 4 * width)
    assert adapter_state(model)["prompt_embeddings"].shape == (N, 4 * width)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "gemma3_towers"])
def test_the_prefix_is_what_a_cache_filled_with_it_is(kind: str) -> None:
    """Without our hooks: a cache that starts with the trained keys and values."""
    model, _ = _adapted(kind)
    pairs = adapter_state(model)["prompt_embeddings"].view(N, 4, 2, 8).permute(1, 2, 0, 3)[:, None]
    cache = DynamicCache()
    for layer in range(2):
        cache.update(*(pairs[2 * layer + part].expand(2, -1, -1, -1) for part in (0, 1)), layer)
    inputs = batch("llama")
    mask = torch.cat([torch.ones(2, N, dtype=torch.long), inputs["attention_mask"]], 1)
    expected = tiny(kind)(input_ids=inputs["input_ids"], attention_mask=mask, **{CACHE: cache}).logits
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_zero_starts_at_zero(projection: bool) -> None:
    model = tiny("llama")
    inject(model, PrefixTuningConfig(num_virtual_tokens=N, init_weights="zero", prefix_projection=projection))
    assert not adapter_state(model)["prompt_embeddings"].any()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_a_loaded_adapter_trains_its_keys_and_values(kind: str, tmp_path: Path) -> None:
    model, config = _adapted(kind, prefix_projection=True)
    save_adapter(model, config, tmp_path)
    again, read = tiny(kind), config_from_dict(read_config(tmp_path))
    load_adapter(again, read, tmp_path, trainable=True)
    assert [tuple(value.shape) for value in again.parameters() if value.requires_grad] == [
        tuple(adapter_state(model)["prompt_embeddings"].shape)
    ]
    assert torch.equal(logits(again, batch(kind)), logits(model, batch(kind)))


def _mpt() -> Any:
    """A model whose masks are true where they hide, and whose positions are a bias."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return MptForCausalLM(MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)).eval()


@torch.no_grad()
def test_a_mask_that_is_true_where_it_hides() -> None:
    inputs = batch("llama")
    whole = logits(_adapted(base=_mpt())[0], inputs)
    assert not torch.allclose(whole, logits(_mpt(), inputs), atol=1e-3)
    padded = {name: torch.cat([torch.zeros(2, 3, dtype=torch.long), value], 1) for name, value in inputs.items()}
    found = logits(_adapted(base=_mpt())[0], padded)[:, 3:]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mpt"])
def test_checkpointing_may_call_layers_again_after_other_batches(kind: str, reentrant: bool, projection: bool) -> None:
    """Two forward passes, padded differently, and one backward pass."""
    batches = [labelled("llama"), labelled("llama", seed=3)]
    for inputs, empty in zip(batches, (2, 5), strict=True):
        inputs["attention_mask"][0, :empty] = 0
    found = []
    for checkpointing in (False, True):
        model, _ = _adapted(base=_mpt() if kind == "mpt" else tiny(kind), prefix_projection=projection)
        model.train()
        if checkpointing:
            checkpoint_activations(model, reentrant=reentrant)
            model.enable_input_require_grads()
        (model(**batches[0]).loss + model(**batches[1]).loss).backward()
        found.append([value.grad for value in model.parameters() if value.requires_grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_prefix_for_another_shape_of_attention_does_not_fit(tmp_path: Path) -> None:
    model, config = _adapted("gpt2")
    save_adapter(model, config, tmp_path)
    with pytest.raises(AdapterError, match="num_attention_heads: the adapter's is 4, the base model's 2"):
        load_adapter(tiny("llama"), config_from_dict(read_config(tmp_path)), tmp_path)


def test_a_chunk_at_a_time_is_refused() -> None:
    model, _ = _adapted()
    with pytest.raises(AdapterError, match="prefill_chunk_size: this soft prompt is read in one piece"):
        generate(model, **batch("llama"), prefill_chunk_size=4, max_new_tokens=3)


@pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers", "ignore:`past_key_values` is deprecated")
def test_layers_with_heads_of_other_sizes_use_the_first_numbers_of_each_as_in_peft(tmp_path: Path) -> None:
    """Gemma 4: heads of global layers are larger, and the last layers borrow the keys of others."""
    gemma4 = pytest.importorskip("transformers.models.gemma4")  # which older versions lack
    settings: dict[str, Any] = {"head_dim": 8, "global_head_dim": 16, "num_kv_shared_layers": 2, "vocab_size": 96}
    config = gemma4.Gemma4TextConfig(
        **settings,
        vocab_size_per_layer_input=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=1,
        hidden_size_per_layer_input=8,
    )
    torch.manual_seed(0)
    base = gemma4.Gemma4ForCausalLM(config).eval()
    model = peftcli.get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    randomise(model)
    model.eval().save_pretrained(str(tmp_path))
    oracle = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    ids = torch.arange(3, 11).unsqueeze(0)
    torch.testing.assert_close(model(ids).logits, oracle(ids).logits)
    assert (model(ids).logits - base(ids).logits).abs().max() > 0.01
    generated = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    for _ in range(3):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


def test_the_width_of_a_network_that_is_not_there_is_said_to_be_unused() -> None:
    """As in the example of PEFT's reference, which trains a prefix without it."""
    with pytest.warns(PeftWarning, match="encoder_hidden_size is not used"):
        PrefixTuningConfig(num_virtual_tokens=N, encoder_hidden_size=10)


def _wrapped(config: Any = None, kind: str = "llama") -> PeftModel:
    config = config or CartridgeConfig(num_virtual_tokens=N, task_type="CAUSAL_LM")
    return get_peft_model(tiny(kind), config).eval()


@torch.no_grad()
def _read(model: PeftModel, tokens: torch.Tensor) -> Any:
    with model.disable_adapter():
        return model(input_ids=tokens, use_cache=True)[CACHE]


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("frozen", [0, 1, N])
def test_started_from_a_text_the_model_goes_on_as_if_it_had_read_it(kind: str, frozen: int) -> None:
    document, question = ids(1, N, seed=3), batch(kind, rows=1)
    settings: dict[str, Any] = {"num_frozen_tokens": frozen, "inference_mode": frozen == N}
    model = _wrapped(CartridgeConfig(num_virtual_tokens=N, task_type="CAUSAL_LM", **settings), kind)
    initialize_kv_prefix_from_past_key_values(model, past_key_values=_read(model, document))
    read = {"input_ids": torch.cat([document, question["input_ids"]], 1)}
    expected = logits(tiny(kind), {**read, "attention_mask": torch.ones_like(read["input_ids"])})[:, N:]
    torch.testing.assert_close(logits(model, question), expected, atol=1e-5, rtol=1e-4)


def test_a_text_is_read_as_it_is_or_as_a_system_message() -> None:
    tokenizer, text = trainkit.tokenizer(), "Reply to the word three: four. Reply to the word two: three."
    model = get_peft_model(trainkit.build("llama"), CartridgeConfig(num_virtual_tokens=N, task_type="CAUSAL_LM"))
    message = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=True, return_dict=False)
    for chat, read in ((True, message), (False, tokenizer(text)["input_ids"])):
        values = initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=chat)
        expected = prefix_from_cache(_read(model, torch.tensor([read])), N)
        assert torch.equal(values, expected)
        assert torch.equal(adapter_state(model.get_base_model())["prompt_embeddings"], expected)
    with pytest.raises(AdapterError, match="does not hold the first 4 tokens"):
        initialize_kv_prefix_from_text(model, tokenizer, text=text, max_length=3)


def test_the_first_tokens_stay_in_training_and_after_loading(tmp_path: Path) -> None:
    model, config = tiny("llama"), CartridgeConfig(num_virtual_tokens=N, num_frozen_tokens=2)
    inject(model, config)
    set_trainable(model, True)
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == 2 * 64
    for folder in ("once", "again"):
        before = adapter_state(model)["prompt_embeddings"].clone()
        optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=0.1)  # decays
        model.train()(**labelled("llama")).loss.backward()
        optimizer.step()
        after = adapter_state(model)["prompt_embeddings"]
        assert torch.equal(after[:2], before[:2])
        assert (after[2:] != before[2:]).any()
        save_adapter(model, config, tmp_path / folder)
        model = tiny("llama")
        config = config_from_dict(read_config(tmp_path / folder))  # type: ignore[assignment]
        load_adapter(model, config, tmp_path / folder, trainable=True)
        assert torch.equal(adapter_state(model)["prompt_embeddings"], after)


def test_composed_the_tokens_stand_one_after_the_other(tmp_path: Path) -> None:
    parts = []
    for number in range(2):
        model = _wrapped()
        initialize_kv_prefix_from_past_key_values(model, past_key_values=_read(model, ids(1, N, seed=number)))
        model.save_pretrained(tmp_path / str(number))
        parts.append(adapter_state(model.get_base_model())["prompt_embeddings"])
    compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both")
    config = PeftConfig.from_pretrained(tmp_path / "both")
    assert (config.peft_type, config.num_virtual_tokens, config.num_frozen_tokens) == ("CARTRIDGE", 2 * N, 1)  # type: ignore[attr-defined]
    both = PeftModel.from_pretrained(tiny("llama"), tmp_path / "both")
    assert torch.equal(adapter_state(both.get_base_model())["prompt_embeddings"], torch.cat(parts))
    _wrapped(kind="gpt2").save_pretrained(tmp_path / "other")
    _wrapped(PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "prefix")
    for wrong, message in (("other", "one cartridge has 16, another 32"), ("prefix", "not CARTRIDGE, PREFIX_TUNING")):
        with pytest.raises(AdapterError, match=message):
            compose_cartridge_adapters([tmp_path / "0", tmp_path / wrong], output_path=tmp_path / "none")


def test_a_plain_prefix_starts_so_too_and_one_that_a_network_makes_does_not() -> None:
    plain = _wrapped(PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM"))
    values = initialize_kv_prefix_from_past_key_values(plain, past_key_values=_read(plain, ids(1, 9)))
    assert torch.equal(adapter_state(plain.get_base_model())["prompt_embeddings"], values)
    made = _wrapped(PrefixTuningConfig(num_virtual_tokens=N, prefix_projection=True, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match="a network makes this prefix"):
        initialize_kv_prefix_from_past_key_values(made, past_key_values=_read(made, ids(1, 9)))


@pytest.mark.parametrize("named", [{"adapter_name": "other"}, {}])
def test_the_adapter_that_is_named_or_active_starts_though_another_has_the_same_config(named: dict[str, str]) -> None:
    config = CartridgeConfig(num_virtual_tokens=N, task_type="CAUSAL_LM")
    model = _wrapped(config)
    model.add_adapter("other", config)
    before = adapter_state(model.get_base_model(), "default")["prompt_embeddings"].clone()
    read = _read(model, ids(1, N))
    if not named:
        model.set_adapter("other")
    values = initialize_kv_prefix_from_past_key_values(model, past_key_values=read, **named)
    assert torch.equal(adapter_state(model.get_base_model(), "other")["prompt_embeddings"], values)
    assert torch.equal(adapter_state(model.get_base_model(), "default")["prompt_embeddings"], before)


@pytest.mark.parametrize(
    ("kind", "tokens", "message"),
    [
        ("llama", (2, 9), "holds 2 sequences"),
        ("llama", (1, 3), "does not hold the first 4 tokens"),
        ("gemma3", (1, 40), "does not hold the first 4 tokens"),  # a window of 16 has forgotten them
    ],
)
def test_a_cache_without_the_first_tokens_is_refused(kind: str, tokens: tuple[int, int], message: str) -> None:
    model = _wrapped(kind=kind)
    before = adapter_state(model.get_base_model())["prompt_embeddings"].clone()
    with pytest.raises(AdapterError, match=message):
        initialize_kv_prefix_from_past_key_values(model, past_key_values=_read(model, ids(*tokens)))
    assert torch.equal(adapter_state(model.get_base_model())["prompt_embeddings"], before)


def test_a_recipe_starts_from_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warned: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, text: warned.append(text))
    document = tmp_path / "document.txt"
    document.write_text("Reply to the word three: four. Reply to the word two: three.")
    recipe = trainkit.write_recipe(tmp_path)
    method = f"method={{type: cartridge, num_virtual_tokens: {N}, document: {document}}}"
    done = trainkit.run_recipe(recipe, method, "training.max_steps=1", "training.learning_rate=0")
    assert not warned, "of a name of the cache that is deprecated"
    base = trainkit.build("llama")
    tokens = torch.tensor([trainkit.tokenizer()(document.read_text())["input_ids"]])
    expected = prefix_from_cache(base(input_ids=tokens, use_cache=True)[CACHE], N)
    loaded = trainkit.build("llama")
    load_adapter(loaded, config_from_dict(read_config(done.folder)), done.folder)
    torch.testing.assert_close(adapter_state(loaded)["prompt_embeddings"], expected, atol=1e-5, rtol=1e-4)
    document.write_text("Too short")
    with pytest.raises(AdapterError, match="fewer than num_virtual_tokens"):
        trainkit.run_recipe(recipe, method.replace(": 4", ": 40"), f"training.output_dir={tmp_path}/other")


def test_a_pipe_is_no_document(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    with pytest.raises(AdapterError, match="document: cannot be read: it is a pipe, not a regular file"):
        CartridgeConfig(num_virtual_tokens=N, document=str(pipe)).prepare(lambda name: None)
