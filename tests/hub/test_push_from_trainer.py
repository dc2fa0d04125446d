"""``push_to_hub=True`` of transformers.Trainer: the adapter and its card reach the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub_server import Hub
from huggingface_hub import ModelCard, constants
from models_tiny import ids, tiny
from transformers import Trainer, TrainingArguments
from transformers.utils import hub as transformers_hub

import peftcli


@pytest.mark.filterwarnings("ignore:Cannot enable progress bars")
@pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")
def test_trainer_pushes_the_adapter_with_its_card(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # Trainer's client does not ask the environment
    monkeypatch.setattr(transformers_hub, "_hf_api", None)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    model = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(task_type="CAUSAL_LM", r=4))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        hub_model_id="alice/my-adapter",
        push_to_hub=True,
        max_steps=1,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": one, "labels": one} for one in ids(4, 6)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    at = hub.repos["alice/my-adapter"].at("main")
    assert at is not None
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert at.files[name] == (tmp_path / "run" / name).read_bytes()
    card = ModelCard(at.files["README.md"].decode())
    assert card.data.library_name == "peft"
    assert {"lora", "generated_from_trainer"} <= set(card.data.tags)
