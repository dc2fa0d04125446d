"""Trainable tokens train rows, and those of what shares them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from torch import nn
from torch.nn.utils import parametrize

from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods.trainable_tokens import TrainableTokensConfig


def _adapted(kind: str, **settings: Any) -> tuple[Any, TrainableTokensConfig]:
    model, config = tiny(kind), TrainableTokensConfig(**{"token_indices": [79, 58], **settings})
    inject(model, config)
    set_trainable(model, True)
    return model, config


@pytest.mark.parametrize(
    ("kind", "targets", "layers"),
    [
        ("llama", ["model.embed_tokens"], ["model.embed_tokens"]),
        ("llama_tied", ["model.embed_tokens"], ["model.embed_tokens", "lm_head"]),
        ("gpt2", ["transformer.wte"], ["transformer.wte", "lm_head"]),
        ("bert", ["bert.embeddings.word_embeddings"], ["bert.embeddings.word_embeddings"]),
        ("t5", ["shared"], ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
    ],
)
def test_the_input_embedding_and_what_shares_it(kind: str, targets: list[str], layers: list[str]) -> None:
    model, config = _adapted(kind)
    assert config.target_modules == targets
    found = adapter_layers(model)
    assert list(found) == layers
    assert len({id(layer.trainable_tokens_delta) for layer in found.values()}) == 1
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 1


def test_rows_take_the_place_of_the_base_models() -> None:
    model, config = _adapted("llama_tied")
    base = tiny("llama_tied").get_input_embeddings().weight
    ours, theirs = logits(model, batch("llama_tied")), logits(tiny("llama_tied"), batch("llama_tied"))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)  # a product of other shape is summed otherwise
    randomise(model)
    rows = model.model.embed_tokens.trainable_tokens_delta
    embedded = model.get_input_embeddings()(torch.tensor([58, 5, 79]))
    assert torch.equal(embedded, torch.stack([rows[1], base[5], rows[0]]))
    merge(model, config)
    assert torch.equal(model.lm_head.weight[58], rows[1])
    assert torch.equal(model.lm_head.weight[5], base[5])
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_random_rows_differ_from_the_base_models() -> None:
    model, _ = _adapted("llama", init_weights=False)
    assert not torch.equal(logits(model, batch("llama")), logits(tiny("llama"), batch("llama")))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_indices": []}, "names no token"),
        ({"token_indices": [3, -1]}, "ids count from 0, not -1"),
        ({"token_indices": [96]}, "has the tokens 0 to 95, not 96"),
        ({"token_indices": [3, 3]}, "names token 3 twice"),
        ({"target_modules": "all-linear"}, "names no embedding"),
        ({"target_modules": ["norm"]}, "rows of Embedding and Linear can be trained"),
    ],
)
def test_what_names_no_rows_is_an_error(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        _adapted("llama", **settings)


def test_weights_that_are_computed_at_each_read_are_different_ones() -> None:
    model = nn.ModuleDict({name: nn.Embedding(8, 4) for name in "abc"})
    for module in model.values():
        parametrize.register_parametrization(module, "weight", nn.Tanh())
    config = TrainableTokensConfig(target_modules=["a", "b", "c"], token_indices=[1])
    inject(model, config)
    assert set(adapter_layers(model)) == {"a", "b", "c"}


def test_a_model_without_an_embedding_needs_a_name() -> None:
    with pytest.raises(AdapterError, match="has no input embedding; name the module"):
        _adapted("convnet")
