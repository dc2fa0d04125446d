"""Layers that PEFT does not load, because it converts their names as those of older checkpoints, are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from models_tiny import ids, logits, randomise

import peftcli
from peftcli.errors import PeftWarning

_SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 1,
    "head_dim": 8,
}
_PROJECTIONS = ["down_proj", "gate_proj", "up_proj"]


def _model(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**_SIZES, **settings)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")  # of PEFT, and those below
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    ("kind", "settings", "lost"),
    [
        ("Glm4Moe", {"n_routed_experts": 2, "first_k_dense_replace": 1}, _PROJECTIONS),
        ("Laguna", {"num_experts": 2}, [f"shared_experts.{name}" for name in _PROJECTIONS]),
    ],
)
def test_layers_that_peft_does_not_load_are_named_when_an_adapter_is_saved(
    kind: str, settings: dict[str, Any], lost: list[str], tmp_path: Path
) -> None:
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"this transformers has no {kind}")
    targets = {"target_modules": ["q_proj", *_PROJECTIONS]}
    model = peftcli.get_peft_model(_model(kind, **settings), peftcli.LoraConfig(**targets))
    with pytest.warns(PeftWarning, match=rf"PEFT, .* does not load .*; .* exclude_modules: \[{', '.join(lost)}\]"):
        model.save_pretrained(tmp_path)
    model = peftcli.get_peft_model(_model(kind, **settings), peftcli.LoraConfig(**targets, exclude_modules=lost)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(_model(kind, **settings), str(tmp_path))
    inputs = {"input_ids": ids(2, 5)}
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
