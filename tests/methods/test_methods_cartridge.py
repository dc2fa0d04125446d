"""Cartridges: their start from a document, the tokens that stay, and several as one."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import CACHE, batch, ids, labelled, logits, tiny

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
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


def test_more_frozen_tokens_than_tokens_are_refused() -> None:
    with pytest.raises(AdapterError, match="num_frozen_tokens: cannot be more than the 4 virtual tokens"):
        inject(tiny("llama"), CartridgeConfig(num_virtual_tokens=N, num_frozen_tokens=N + 1))
