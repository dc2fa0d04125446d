"""``PeftModel`` around models of all kinds, set and called as scripts do with PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_tiny import tiny
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, ViTConfig, ViTForImageClassification

import peftcli


class _Checkpointed(nn.Module):
    """A model of nobody's library, which checkpoints its block in training."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block = nn.Embedding(5, 4), nn.Linear(4, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: torch.Tensor) -> Any:
        embedded = self.embedding(ids)
        return checkpoint(self.block, embedded, use_reentrant=True) if self.training else self.block(embedded)


@pytest.mark.parametrize("kind", ["vit", "custom"])
def test_gradients_reach_adapters_in_blocks_with_reentrant_checkpointing(kind: str) -> None:
    base: nn.Module
    if kind == "vit":
        base = ViTForImageClassification(
            ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=32)
        ).train()
        getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)({"use_reentrant": True})
        config, inputs = peftcli.LoraConfig(target_modules=r".*attention.*\.(query|q_proj)"), torch.randn(1, 3, 32, 32)
    else:
        base, config, inputs = _Checkpointed(), peftcli.LoraConfig(target_modules=["block"]), torch.tensor([[1, 2]])
    model = peftcli.get_peft_model(base, config)
    output = model(inputs)
    (output.logits if kind == "vit" else output).sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_a_model_of_nobodys_library_is_as_it_was_without_its_adapter() -> None:
    base, ids = _Checkpointed(), torch.tensor([[1, 2]])
    for name in ("merge_and_unload", "unload"):
        model = peftcli.get_peft_model(base, peftcli.LoraConfig(target_modules=["block"], inference_mode=True))
        assert not model.eval()(ids).requires_grad
        base = getattr(model, name)()
        assert not base.embedding._forward_hooks


def _without_embeddings(model: nn.Module) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("get_input_embeddings", [lambda model: None, _without_embeddings])
def test_a_model_without_embeddings_takes_an_adapter(
    get_input_embeddings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Checkpointed, "get_input_embeddings", get_input_embeddings)
    peftcli.get_peft_model(_Checkpointed(), peftcli.LoraConfig(target_modules=["block"]))


def test_a_state_that_lacks_what_is_beside_the_model_is_an_error() -> None:
    lm = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig())
    whole = nn.ModuleDict({"v_head": nn.Linear(2, 2), "lm": lm, "z_head": nn.Linear(2, 2)})
    state = whole.state_dict()
    whole.load_state_dict(state)
    for name in ("v_head.weight", "z_head.bias", next(name for name in state if "lora_A" in name)):
        with pytest.raises(RuntimeError, match=name):
            whole.load_state_dict({key: value for key, value in state.items() if key != name})


def test_generate_follows_the_generation_config_that_a_script_sets() -> None:
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(task_type="CAUSAL_LM")).eval()
    model.generation_config = GenerationConfig(min_new_tokens=3, max_new_tokens=3, pad_token_id=0)
    assert model.generate(input_ids=torch.tensor([[3, 4]])).shape == (1, 5)
    assert model.generation_config is model.get_base_model().generation_config


def test_the_class_of_a_task_trains_and_saves_its_head_whatever_the_config_says() -> None:
    first, second = peftcli.LoraConfig(target_modules=["query"]), peftcli.LoraConfig(target_modules=["value"])
    model = peftcli.PeftModelForSequenceClassification(tiny("bert"), first)
    model.add_adapter("other", second)
    assert (first.task_type, second.task_type) == (None, None)  # the class of another model may fill them in
    for name in ("default", "other"):
        assert "base_model.model.classifier.weight" in peftcli.get_peft_model_state_dict(model, adapter_name=name)
        assert model.peft_config[name].task_type == "SEQ_CLS"
