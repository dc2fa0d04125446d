"""P-tuning: the network trains, the vectors are saved, and a run goes on with the network."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import batch, labelled, logits, randomise, tiny
from torch import nn
from trainkit import run_recipe, write_recipe

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.weights import adapter_state, load_training_state, named_tensors, unsaved_state
from peftcli.errors import Interrupted
from peftcli.methods import config_from_dict
from peftcli.methods.p_tuning import PromptEncoderConfig
from peftcli.train.events import Event, Stepped

N = 4
LSTM: dict[str, Any] = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}


def _adapted(**settings: Any) -> tuple[nn.Module, PromptEncoderConfig]:
    model, config = tiny("llama"), PromptEncoderConfig(num_virtual_tokens=N, **settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model, config


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_the_network_is_counted_and_the_vectors_are_saved() -> None:
    model, _ = _adapted(encoder_hidden_size=10)
    assert _size(model) == N * 32 + (32 * 10 + 10) + (10 * 10 + 10) + (10 * 32 + 32)
    assert {name: tuple(value.shape) for name, value in adapter_state(model).items()} == {"prompt_embeddings": (N, 32)}
    model, _ = _adapted(**LSTM, encoder_num_layers=1)
    lstm = 2 * 4 * 8 * (32 + 8 + 2)
    assert _size(model) == N * 32 + lstm + (16 * 16 + 16) + (16 * 32 + 32)


def test_the_hidden_size_is_the_embeddings_unless_it_is_given() -> None:
    assert _size(_adapted()[0]) == N * 32 + 3 * (32 * 32 + 32)


@pytest.mark.parametrize("settings", [{}, LSTM])
def test_a_loaded_adapter_trains_its_vectors(settings: dict[str, Any], tmp_path: Path) -> None:
    model, config = _adapted(**settings)
    save_adapter(model, config, tmp_path)
    again, read = tiny("llama"), config_from_dict(read_config(tmp_path))
    load_adapter(again, read, tmp_path, trainable=True)
    assert [name for name, value in again.named_parameters() if value.requires_grad] == [
        "model.embed_tokens.prompt_embeddings"
    ]
    # an LSTM rounds otherwise where no gradients are wanted
    torch.testing.assert_close(logits(again, batch("llama")), logits(model, batch("llama")), atol=1e-6, rtol=1e-5)
    save_adapter(again, read, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_dropout_is_for_training_only() -> None:
    model, _ = _adapted(**LSTM, encoder_dropout=0.5)
    model.train()
    torch.manual_seed(0)
    first, second = (model(**labelled("llama")).loss.item() for _ in range(2))
    assert first != second
    assert torch.equal(adapter_state(model)["prompt_embeddings"], adapter_state(model)["prompt_embeddings"])
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(logits(model, batch("llama")), logits(model, batch("llama")))


def test_the_network_computes_in_full_precision_under_autocast() -> None:
    model, _ = _adapted(**LSTM)
    saved = adapter_state(model)["prompt_embeddings"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter_state(model)["prompt_embeddings"], saved)
        assert torch.equal(model.get_input_embeddings().table(), saved)


def test_what_the_file_leaves_out_restores_the_network() -> None:
    model, _ = _adapted()
    state = {**adapter_state(model), **unsaved_state(model)}
    assert state.keys() - adapter_state(model).keys() == named_tensors(model).keys()
    other, _ = _adapted()
    randomise(other, seed=5)
    load_training_state(other, state)
    for name, (_, _, value) in named_tensors(other).items():
        assert torch.equal(value, named_tensors(model)[name][2])


def test_a_files_settings_of_the_network_that_it_does_not_hold_change_nothing() -> None:
    settings: dict[str, Any] = {"encoder_dropout": 0.1, "encoder_num_layers": 4}
    assert [key for key, _ in PromptEncoderConfig.unchecked(**settings).problems()] == [
        "encoder_num_layers",
        "encoder_dropout",
    ]
    assert PromptEncoderConfig.unchecked(**settings, inference_mode=True).problems() == []


def _stop(event: Event) -> None:
    if isinstance(event, Stepped) and event.result.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.grid
@pytest.mark.parametrize(
    "method",
    [
        "{type: p_tuning, num_virtual_tokens: 5, encoder_reparameterization_type: LSTM, encoder_hidden_size: 8,"
        " encoder_dropout: 0.2}",
        "{type: prefix_tuning, num_virtual_tokens: 5, prefix_projection: true}",
        "{type: prefix_tuning, num_virtual_tokens: 5}",
        "{type: multitask_prompt_tuning, num_virtual_tokens: 5}",
        "{type: cartridge, num_virtual_tokens: 5, num_frozen_tokens: 2}",
        "{type: cpt, cpt_token_ids: [5, 6, 7], opt_projection_format_epsilon: 4}",
    ],
    ids=["p_tuning", "projected prefix_tuning", "prefix_tuning", "multitask_prompt_tuning", "cartridge", "cpt"],
)
def test_stopped_and_resumed_ends_with_the_same_bytes(method: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run")
    settings = (f"method={method}", "training.learning_rate=0.05")
    whole = run_recipe(recipe, *settings, f"training.output_dir={tmp_path}/whole")
    with pytest.raises(Interrupted):
        run_recipe(recipe, *settings, on_event=_stop)
    again = run_recipe(recipe, *settings)
    assert again.weights == whole.weights
    assert again.losses == whole.losses
    assert trainkit.read_run(again.folder)["steps"]["done"] == 8
    assert whole.losses[-1] < whole.losses[0]
