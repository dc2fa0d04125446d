"""X-LoRA: PEFT as oracle of scalings, loss, gradients, counts and of our file; its own file lacks the classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, labelled, logits, randomise, tiny
from oracle import file_of, loaded_by_peft, loaded_here, ours, same_logits, saved_by_peft, theirs
from promises import experts
from torch import nn

from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.errors import AdapterError
from peftcli.methods.xlora import XLoraConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise, deep": {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 7, "xlora_dropout_p": 0.0},
    "top k": {"top_k_lora": 1, "softmax_temperature": 0.5, "scaling_pass_value": 0.5, "global_scaling_weight": 1.5},
    "softmax of the top k": {"top_k_lora": 1, "enable_softmax": False, "enable_softmax_topk": True},
}


def _settings(**settings: Any) -> dict[str, Any]:
    return {"adapters": experts("llama"), "hidden_size": 32, "task_type": "CAUSAL_LM", **settings}


def _classifier(model: nn.Module) -> list[nn.Parameter]:
    return [value for name, value in model.named_parameters() if "mixture." in name or "xlora_classifier." in name]


def _with_the_same_classifier(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Our model and PEFT's."""
    oracle, (model, _) = theirs("llama", "xlora", **settings), ours("llama", "xlora", **settings)
    with torch.no_grad():
        for own, its in zip(_classifier(model), _classifier(oracle), strict=True):
            own.copy_(its)
    return model, oracle


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_scalings_loss_gradients_and_counts_are_pefts(settings: dict[str, Any]) -> None:
    model, oracle = _with_the_same_classifier(_settings(**settings))
    same_logits("llama", model, oracle)
    losses = [each(**labelled("llama")).loss for each in (model, oracle)]
    torch.testing.assert_close(*losses, atol=1e-6, rtol=1e-6)
    for loss in losses:
        loss.backward()
    for own, its in zip(_classifier(model), _classifier(oracle), strict=True):
        torch.testing.assert_close(own.grad, its.grad, atol=1e-6, rtol=1e-4)
    trainable, total = oracle.get_nb_trainable_parameters()
    assert trainable == sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert total == sum(value.numel() for value in model.parameters())


@pytest.mark.grid
@pytest.mark.parametrize("trained", [False, True])
def test_peft_loads_our_file_with_the_adapters_as_they_were_trained(trained: bool, tmp_path: Path) -> None:
    adapters = dict(zip("ab", experts("llama").values(), strict=True))  # PEFT knows them by numbers only
    model, config = ours("llama", "xlora", **_settings(adapters=adapters, use_trainable_adapters=trained))
    save_adapter(model, config, tmp_path)
    assert list(file_of(tmp_path)[0]["adapters"]) == ["0", "1"]
    same_logits("llama", loaded_by_peft("llama", tmp_path), model)


def test_pefts_file_lacks_what_it_needs_itself(tmp_path: Path) -> None:
    """It takes the classifier's first layer, ``layers.0``, for a part of the adapter that it calls 0."""
    oracle = theirs("llama", "xlora", **_settings())
    saved_by_peft(oracle, tmp_path)
    assert not file_of(tmp_path)[1]
    assert not torch.allclose(logits(loaded_by_peft("llama", tmp_path), batch("llama")), logits(oracle, batch("llama")))
    with pytest.raises(AdapterError, match=r"missing: base_model.internal_xlora_classifier.layers.0.weight"):
        loaded_here("llama", tmp_path)


def test_adapters_of_an_embedding_are_mixed_over_their_own_base_model_only(tmp_path: Path) -> None:
    adapters = {}
    for number in range(2):
        model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules=["embed_tokens"]))
        randomise(model, number)
        saved_by_peft(model, tmp_path / str(number))
        adapters[str(number)] = str(tmp_path / str(number))
    same_logits("llama", *_with_the_same_classifier(_settings(adapters=adapters)))
    other = tiny("llama", seed=7)
    with pytest.raises(AdapterError, match=r"other weights of model\.embed_tokens"):
        inject(other, XLoraConfig(adapters=adapters))
