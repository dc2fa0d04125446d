"""The virtual tokens of soft prompts under PEFT's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, tiny

import peftcli
from peftcli.errors import AdapterError

_PROMPTS: list[tuple[str, dict[str, Any]]] = [
    ("PromptTuningConfig", {}),
    ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8}),
    ("PromptEncoderConfig", {"encoder_hidden_size": 8}),
    ("MultitaskPromptTuningConfig", {"num_ranks": 1, "num_tasks": 2}),
    ("CartridgeConfig", {"num_frozen_tokens": 1}),
    ("CPTConfig", {"cpt_token_ids": [4, 5, 6], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}),
]


@pytest.mark.parametrize(("name", "settings"), _PROMPTS, ids=[name for name, _ in _PROMPTS])
def test_a_prompt_encoder_has_pefts_weights(name: str, settings: dict[str, Any]) -> None:
    found = []
    for lib in (peft, peftcli):
        config = getattr(lib, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
        model: Any = lib.get_peft_model(tiny("llama"), config)
        weights = {key: tuple(value.shape) for key, value in model.prompt_encoder.named_parameters()}
        found.append((weights, model.get_prompt_embedding_to_save("default").shape))
    assert found[0] == found[1]


def test_a_prompt_encoder_holds_the_weights_that_train() -> None:
    model: Any = peftcli.get_peft_model(tiny("llama"), peftcli.PromptTuningConfig(task_type="CAUSAL_LM"))
    weight = model.prompt_encoder.default.embedding.weight
    model(**batch("llama"))[0].sum().backward()
    assert weight.grad is not None
    weight.data.fill_(3.0)
    torch.testing.assert_close(model.get_prompt_embedding_to_save("default"), torch.full_like(weight, 3.0))


@pytest.mark.parametrize(("name", "settings"), _PROMPTS, ids=[name for name, _ in _PROMPTS])
def test_the_prompt_of_each_row_is_pefts(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    config = getattr(peftcli, name)(task_type="CAUSAL_LM", num_virtual_tokens=3, **settings)
    model = peftcli.get_peft_model(tiny("llama"), config).eval()
    if name in ("PrefixTuningConfig", "CartridgeConfig"):
        with pytest.raises(
            AdapterError, match=r"no virtual tokens that stand for embeddings\n.*to_save gives the keys"
        ):
            model.get_prompt(2)
        return
    model.save_pretrained(tmp_path)
    tasks = {"task_ids": torch.tensor([1, 0])} if "num_tasks" in settings else {}
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path).get_prompt(2, **tasks)
        torch.testing.assert_close(model.get_prompt(2, **tasks), expected)


def test_other_adapters_have_no_prompt() -> None:
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig())
    with pytest.raises(AttributeError, match="prompt_encoder"):
        _ = model.prompt_encoder
    with pytest.raises(AdapterError, match="'default' has no virtual tokens"):
        model.get_prompt_embedding_to_save("default")


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        (
            "bert",
            "PromptTuningConfig",
            {"task_type": "SEQ_CLS", "num_virtual_tokens": 3, "modules_to_save": ["classifier"]},
        ),
        ("llama", "PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}),
        ("llama", "CartridgeConfig", {"num_virtual_tokens": 3, "num_frozen_tokens": 1}),
        ("llama", "AdaptionPromptConfig", {"adapter_len": 2, "adapter_layers": 1}),
        ("llama", "LoraConfig", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
)
def test_a_new_adapter_for_inference_trains_what_it_trains_in_peft(
    kind: str, name: str, settings: dict[str, Any]
) -> None:
    """As after ``get_peft_model(base, PeftConfig.from_pretrained(folder))``."""
    counts = []
    for lib in (peft, peftcli):
        config = getattr(lib, name)(**{"task_type": "CAUSAL_LM", "inference_mode": True, **settings})
        counts.append(lib.get_peft_model(tiny(kind), config).get_nb_trainable_parameters())
    assert counts[0] == counts[1]
