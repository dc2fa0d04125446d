"""PEFT's callback that lets AdaMSS choose its subspaces under Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from models_tiny import ids, tiny
from transformers import Trainer, TrainingArguments

import peftcli
from peftcli.methods.adamss.layers import AdamssLinear
from peftcli.peft_api.for_libraries import AdamssAsaCallback


def _training_subspaces(model: Any, folder: Path, *callbacks: AdamssAsaCallback) -> int:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": one, "labels": one} for one in ids(8, 6)]
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)).train()
    return sum(len(layer.training_subspaces()) for layer in model.modules() if isinstance(layer, AdamssLinear))


@pytest.mark.slow
def test_under_the_callback_the_config_has_its_number_of_subspaces_in_the_end(tmp_path: Path) -> None:
    schedule = {"asa_target_subspaces": 6, "init_warmup": 1, "final_warmup": 4, "mask_interval": 1}
    config = peftcli.AdamssConfig(
        task_type="CAUSAL_LM", r=8, num_subspaces=4, target_modules=["q_proj", "v_proj"], use_asa=True, **schedule
    )
    model = peftcli.get_peft_model(tiny("llama"), config)
    twin = copy.deepcopy(model)
    assert _training_subspaces(model, tmp_path, AdamssAsaCallback()) == 6
    assert _training_subspaces(twin, tmp_path) == 4 * 4
