"""What Trainer finds in a model: the arguments of the model inside, as with PEFT, and AdaMSS's callback."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from guidekit import token_rows, trainer_of
from models_tiny import labelled, tiny
from torch import nn
from transformers import Trainer

import peftcli
from peftcli.methods.adamss.layers import AdamssLinear
from peftcli.peft_api.for_libraries import AdamssAsaCallback


def _trainer(model: nn.Module, folder: Path) -> Trainer:
    rows = [{**row, "extra": row["labels"]} for row in token_rows()]
    return trainer_of(model, folder, rows, {"eval_dataset": rows}, max_steps=1, save_strategy="no")


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("llama", None),
        ("bert", None),
        ("llama", "CAUSAL_LM"),
        ("t5", "SEQ_2_SEQ_LM"),
        ("bert", "SEQ_CLS"),
        ("bert", "TOKEN_CLS"),
        ("bert", "QUESTION_ANS"),
        ("bert", "FEATURE_EXTRACTION"),
    ],
)
def test_trainer_finds_the_columns_and_labels_that_it_finds_with_peft(
    kind: str, task: str | None, tmp_path: Path
) -> None:
    found = []
    for lib in (peftcli, peft):
        trainer = _trainer(lib.get_peft_model(tiny(kind), lib.LoraConfig(r=2, task_type=task)), tmp_path)
        trainer._set_signature_columns_if_needed()
        found.append((trainer.label_names, sorted(trainer._signature_columns)))
    assert found[0] == found[1]
    assert "labels" in found[0][0]


def test_the_arguments_of_a_model_with_a_task_are_shown_in_the_order_in_which_it_takes_them() -> None:
    model = peftcli.get_peft_model(tiny("gpt2"), peftcli.LoraConfig(r=2, task_type="CAUSAL_LM"))
    shown = inspect.signature(model.forward).bind(1, 2, labels=3).arguments
    assert shown == {"input_ids": 1, "attention_mask": 2, "labels": 3}


def test_trainer_trains_and_evaluates_a_model_without_a_task(tmp_path: Path) -> None:
    trainer = _trainer(peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(r=2)), tmp_path)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_model_that_shows_arguments_is_copied_and_pickled_as_before() -> None:
    model: Any = peftcli.get_peft_model(tiny("llama"), peftcli.LoraConfig(r=2)).eval()
    expected = model(**labelled("llama")).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward.args[0] is other
        torch.testing.assert_close(other(**labelled("llama")).logits, expected)


@pytest.mark.parametrize("task", peftcli.MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
def test_a_model_with_a_task_takes_arguments_without_names_in_pefts_order(task: str) -> None:
    ours, theirs = (
        [*inspect.signature(lib.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task].forward).parameters] for lib in (peftcli, peft)
    )
    assert ours[:-1] == theirs[: len(ours) - 1]


def _training_subspaces(model: Any, folder: Path, *callbacks: AdamssAsaCallback) -> int:
    trainer_of(model, folder, more={"callbacks": list(callbacks)}, max_steps=5, save_strategy="no").train()
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
