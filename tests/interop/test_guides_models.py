"""PEFT's pages on configs and models, the checkpoint format, custom models and troubleshooting, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from guidekit import close, part, trainer_of
from models_tiny import batch, logits, randomise, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification

Base = Callable[[str], str]

LORA_JSON = {
    "base_model_name_or_path": "facebook/opt-350m",
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 16,
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}
P_TUNING_JSON = {
    "base_model_name_or_path": "roberta-large",
    "encoder_dropout": 0.0,
    "encoder_hidden_size": 128,
    "encoder_num_layers": 2,
    "encoder_reparameterization_type": "MLP",
    "inference_mode": True,
    "num_attention_heads": 16,
    "num_layers": 24,
    "num_transformer_submodules": 1,
    "num_virtual_tokens": 20,
    "peft_type": "P_TUNING",
    "task_type": "SEQ_CLS",
    "token_dim": 1024,
}
"""The settings of the two adapters that the tutorial shows, as early versions of PEFT wrote them."""


def printed(capsys: pytest.CaptureFixture[str], model: Any) -> str:
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out


# --- configs and models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [LORA_JSON, P_TUNING_JSON], ids=["lora", "p-tuning"])
def test_a_config_is_written_in_code_or_read_from_a_file(lib: ModuleType, values: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    read = lib.PeftConfig.from_pretrained(tmp_path)
    kind = lib.LoraConfig if values is LORA_JSON else lib.PromptEncoderConfig
    given = {key: value for key, value in values.items() if key not in ("peft_type", "task_type")}
    made = kind(**given, task_type=getattr(lib.TaskType, values["task_type"]))
    assert type(read) is kind
    assert isinstance(read, lib.PeftConfig)
    for config in (read, made):
        assert config.peft_type == getattr(lib.PeftType, values["peft_type"])
        assert config.base_model_name_or_path == values["base_model_name_or_path"]
    assert read.to_dict() == made.to_dict()


def test_another_config_needs_the_model_as_it_was(lib: ModuleType) -> None:
    model = tiny("opt")
    modules = [name for name, _ in model.named_modules()]
    lib.get_peft_model(model, lib.LoraConfig(task_type="CAUSAL_LM", r=4))
    with pytest.warns(UserWarning, match="unload"):
        lib.get_peft_model(model, lib.LoraConfig(task_type="CAUSAL_LM", r=2), adapter_name="second")
    plain = lib.get_peft_model(tiny("opt"), lib.LoraConfig(task_type="CAUSAL_LM", r=4)).unload()
    assert [name for name, _ in plain.named_modules()] == modules
    again = lib.get_peft_model(plain, lib.LoraConfig(task_type="CAUSAL_LM", r=2))
    assert again.peft_config["default"].r == 2
    assert again.get_nb_trainable_parameters()[0] == 2 * 2 * 2 * (32 + 32)


# --- the checkpoint format --------------------------------------------------------------------------------------------


def test_three_files_with_pefts_names(lib: ModuleType, base: Base, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base("bert")).bert
    model = lib.get_peft_model(model, lib.LoraConfig())
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
    }
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(written)[:4] == [
        f"base_model.model.encoder.layer.0.attention.self.{name}.lora_{which}.weight"
        for name in ("query", "value")
        for which in "AB"
    ]
    assert len(written) == 8
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    for key, value in {
        "peft_type": "LORA",
        "inference_mode": True,
        "task_type": None,
        "r": 8,
        "lora_alpha": 8,
        "bias": "none",
        "base_model_name_or_path": base("bert"),
        "auto_mapping": {"base_model_class": "BertModel", "parent_library": "transformers.models.bert.modeling_bert"},
    }.items():
        assert values[key] == value, key
    assert set(values["target_modules"]) == {"query", "value"}


def test_an_ia3_of_bert_as_the_page_shows_it(lib: ModuleType, base: Base, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base("bert")).bert
    lib.get_peft_model(model, lib.IA3Config()).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(values["target_modules"]) == {"key", "value", "output.dense"}
    assert set(values["feedforward_modules"]) == {"output.dense"}
    assert (values["peft_type"], values["inference_mode"]) == ("IA3", True)


def test_a_file_converted_by_hand_needs_two_entries(lib: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = lib.get_peft_model(tiny("bert"), lib.LoraConfig())
    randomise(model)
    expected = logits(model.eval(), batch("bert"))
    tensors = {name: value.contiguous() for name, value in lib.get_peft_model_state_dict(model).items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"target_modules": ["query", "value"], "peft_type": "LORA"})
    )
    close(logits(lib.PeftModel.from_pretrained(tiny("bert"), tmp_path).eval(), batch("bert")), expected)


# --- custom models ----------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, num_units_hidden: int = 2000):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(20, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, num_units_hidden),
            nn.ReLU(),
            nn.Linear(num_units_hidden, 2),
            nn.LogSoftmax(dim=-1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


def test_a_multilayer_perceptron(lib: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = lib.LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"])
    with torch.device("meta"):
        peft_model = lib.get_peft_model(MLP(), config)
    assert "trainable params: 52,162 || all params: 4,100,164 || trainable%: 1.2722" in printed(capsys, peft_model)

    torch.manual_seed(0)
    x = torch.randn(64, 20)
    y = (x.sum(1) > 0).long()
    model = MLP(32)
    frozen = model.seq[2].weight.clone()
    peft_model = lib.get_peft_model(model, config)
    optimizer = torch.optim.Adam(peft_model.parameters(), lr=2e-2)
    losses = []
    for _ in range(20):
        loss = nn.functional.nll_loss(peft_model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(peft_model.get_base_model().seq[2].base_layer.weight, frozen)
    peft_model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    torch.randn(64, 20)
    loaded = lib.PeftModel.from_pretrained(MLP(32), tmp_path)
    close(loaded(x), peft_model(x))


def test_a_new_architecture_takes_the_targets_of_one_like_it(lib: ModuleType) -> None:
    constants = part(lib, "utils.constants")
    targets = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["mistral"]
    assert targets == ["q_proj", "v_proj"]
    model = tiny("llama")
    peft_model = lib.get_peft_model(model, lib.LoraConfig(target_modules=targets))
    names = peft_model.targeted_module_names
    assert names == [f"model.layers.{n}.self_attn.{leaf}" for n in (0, 1) for leaf in ("q_proj", "v_proj")]


# --- troubleshooting --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["by hand", "cast_mixed_precision_params"])
def test_half_precision_weights_train_under_autocast(lib: ModuleType, how: str, tmp_path: Path) -> None:
    config = lib.LoraConfig(task_type="CAUSAL_LM")
    peft_model = lib.get_peft_model(tiny("llama").bfloat16(), config, autocast_adapter_dtype=False)
    assert {p.dtype for p in peft_model.parameters()} == {torch.bfloat16}
    if how == "by hand":
        for param in peft_model.parameters():
            if param.requires_grad:
                param.data = param.data.float()
    else:
        lib.cast_mixed_precision_params(peft_model, dtype=torch.bfloat16)
    for param in peft_model.parameters():
        assert param.dtype == (torch.float32 if param.requires_grad else torch.bfloat16)
    trainer = trainer_of(peft_model, tmp_path, bf16=True, max_steps=2, save_strategy="no")
    assert trainer.train().training_loss > 0


def test_eval_mode_gives_the_same_again_and_get_peft_model_does_not_load(lib: ModuleType, tmp_path: Path) -> None:
    model = lib.get_peft_model(tiny("llama"), lib.LoraConfig(lora_dropout=0.5, init_lora_weights=False))
    inputs = batch("llama")
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    model.eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.save_pretrained(tmp_path)
    config = lib.PeftConfig.from_pretrained(tmp_path)
    close(logits(lib.PeftModel.from_pretrained(tiny("llama"), tmp_path, config=config), inputs), logits(model, inputs))
    fresh = lib.get_peft_model(tiny("llama"), lib.LoraConfig()).eval()
    close(logits(fresh, inputs), logits(tiny("llama"), inputs))


def test_a_random_head_is_saved_with_the_task_or_with_modules_to_save(lib: ModuleType, tmp_path: Path) -> None:
    def with_random_head(seed: int) -> Any:
        model = tiny("bert")
        nn.init.normal_(model.classifier.weight, generator=torch.Generator().manual_seed(seed))
        return model

    for name, settings, same in (
        ("task", {"task_type": "SEQ_CLS"}, True),
        ("by name", {"modules_to_save": ["classifier"]}, True),
        ("forgotten", {}, False),
    ):
        model = lib.get_peft_model(with_random_head(1), lib.LoraConfig(**settings)).eval()
        model.save_pretrained(tmp_path / name)
        loaded = lib.PeftModel.from_pretrained(with_random_head(2), tmp_path / name).eval()
        found, expected = logits(loaded, batch("bert")), logits(model, batch("bert"))
        assert torch.allclose(found, expected, atol=1e-4) == same, name
