"""Prefix tuning: keys and values of each layer, and the network that may make them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import CACHE, batch, checkpoint_activations, labelled, logits, randomise, tiny
from torch import nn
from transformers import DynamicCache, MptConfig, MptForCausalLM

import peftcli
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.prompts.generate import generate
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods import config_from_dict
from peftcli.methods.prefix_tuning import PrefixTuningConfig

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
