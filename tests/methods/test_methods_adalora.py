"""AdaLoRA: what it computes, whom it takes directions from and when, and that a run can stop anywhere."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainkit
from models_tiny import batch, labelled, logits, tiny
from oracle import file_of, ours, silence
from torch import nn
from trainkit import run_recipe, write_recipe

import peftcli
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import adapter_layers
from peftcli.core.protocols import after_step, describe
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError, Interrupted
from peftcli.methods import config_from_dict
from peftcli.methods.adalora import AdaLoraConfig
from peftcli.methods.adalora.layers import AdaLoraLayer, penalty, wrap
from peftcli.train.events import Event, Stepped

SCHEDULE: dict[str, Any] = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1}
RECIPE = "method={type: adalora, init_r: 4, target_r: 2, tinit: 1, tfinal: 2, target_modules: all-linear}"


def _steps(model: nn.Module, config: AdaLoraConfig, first: int, last: int, total: int = 8) -> None:
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for step in range(first, last + 1):
        model(**labelled("llama")).loss.backward()
        optimizer.step()
        after_step(model, config, step, total)
        optimizer.zero_grad()


def _zeros(model: nn.Module) -> int:
    return sum(int((value == 0).sum()) for name, value in adapter_state(model).items() if name.endswith("lora_E"))


def test_the_update_of_a_convolution_is_computed_in_the_adapters_dtype() -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, init_lora_weights=False, lora_dropout=0.3)
    layer = wrap(nn.Conv2d(5, 7, 3), "x", config).bfloat16().train()
    x = torch.randn(2, 5, 6, 6, dtype=torch.bfloat16)
    torch.manual_seed(0)
    update = nn.functional.conv2d(nn.functional.dropout(x, 0.3), layer.delta())
    torch.manual_seed(0)
    assert torch.equal(layer(x), layer.base_layer(x) + update)


def test_the_penalty_is_the_mean_deviation_from_orthogonal() -> None:
    model, config = ours("llama", "adalora", init_r=3, target_r=3, orth_reg_weight=0.25)
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, AdaLoraLayer)]
    norms = [
        (square - torch.eye(3)).square().sum().sqrt()
        for layer in layers
        for square in (layer.lora_A @ layer.lora_A.T, layer.lora_B.T @ layer.lora_B)
    ]
    found = penalty(model, config)
    assert found is not None
    torch.testing.assert_close(found, 0.25 * sum(norms) / len(norms))
    found.backward()
    assert all(layer.lora_A.grad.any() and layer.lora_E.grad is None for layer in layers)
    config.orth_reg_weight = 0
    assert penalty(model, config) is None


def test_nothing_is_taken_away_until_tinit_and_everything_is_decided_at_tfinal(tmp_path: Path) -> None:
    model, config = ours("llama", "adalora", **SCHEDULE)
    _steps(model, config, 1, 1)
    assert _zeros(model) == 0
    assert config.total_step == 8
    budgets = []
    for step in range(2, 6):
        _steps(model, config, step, step)
        budgets.append(16 - _zeros(model))
        assert not config.rank_pattern
    assert budgets == [int(8 * (1 - (step - 1) / 5) ** 3 + 8) for step in range(2, 6)]
    _steps(model, config, 6, 6)
    kept = {name: list(mask) for name, mask in config.rank_pattern.items()}
    assert sum(map(sum, kept.values())) == 8
    assert sum(len(value) for name, value in adapter_state(model).items() if name.endswith("lora_E")) == 8
    _steps(model, config, 7, 8)
    assert config.rank_pattern == kept
    save_adapter(model, config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    torch.testing.assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")), atol=1e-5, rtol=1e-5)


def test_a_layer_that_a_step_leaves_out_keeps_its_averages() -> None:
    model, config = ours("llama", "adalora", **SCHEDULE)
    _steps(model, config, 1, 1)
    first, *others = (layer for layer in adapter_layers(model).values() if isinstance(layer, AdaLoraLayer))
    before = [layer.scores().clone() for layer in (first, others[0])]
    model(**labelled("llama")).loss.backward()
    first.lora_A.grad = first.lora_E.grad = first.lora_B.grad = None
    after_step(model, config, 2, 8)
    assert torch.equal(first.scores(), before[0])
    assert not torch.equal(others[0].scores(), before[1])
    model.zero_grad()
    with pytest.raises(AdapterError, match="AdaLoRA needs the gradients of the step"):
        after_step(model, config, 3, 8)


def test_a_run_of_one_step_keeps_as_many_directions_as_it_may() -> None:
    model, config = ours("llama", "adalora", init_r=4, target_r=2)
    _steps(model, config, 1, 1, total=1)
    assert sum(map(sum, config.rank_pattern.values())) == 8


def test_delta_t_skips_steps() -> None:
    model, config = ours("llama", "adalora", **SCHEDULE | {"deltaT": 3})
    _steps(model, config, 1, 2)
    assert _zeros(model) == 0
    _steps(model, config, 3, 3)
    assert _zeros(model) > 0


def test_a_loaded_adapter_trains_on_with_the_directions_it_has(tmp_path: Path) -> None:
    model, config = ours("llama", "adalora", **SCHEDULE)
    _steps(model, config, 1, 8)
    save_adapter(model, config, tmp_path)
    again, read = tiny("llama"), config_from_dict(read_config(tmp_path))
    assert isinstance(read, AdaLoraConfig)
    load_adapter(again, read, tmp_path, trainable=True)
    before = {name: value.clone() for name, value in adapter_state(again).items()}
    _steps(again, read, 1, 8)
    after = adapter_state(again)
    assert {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}
    assert not any(torch.equal(value, before[name]) for name, value in after.items() if value.numel())


def test_the_file_says_the_ranks_of_the_tensors_in_it(tmp_path: Path) -> None:
    """They may be those of an earlier step, from before anything was decided."""
    model, config = ours("llama", "adalora", **SCHEDULE)
    early = {name: value.clone() for name, value in adapter_state(model).items()}
    _steps(model, config, 1, 8)
    assert "rank_pattern" not in describe(config, early)
    late = adapter_state(model)
    assert describe(config, late)["rank_pattern"] == config.rank_pattern
    config.rank_pattern = {}  # a run that was resumed after its last step does not know which ones
    counts = {name: sum(mask) for name, mask in describe(config, late)["rank_pattern"].items()}
    assert counts == {name.removeprefix("base_model.model."): len(v) for name, v in late.items() if "lora_E" in name}


def test_equal_start_and_target_take_nothing_away() -> None:
    model, config = ours("llama", "adalora", init_r=2, target_r=2)
    _steps(model, config, 1, 8)
    assert _zeros(model) == 0


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(AdapterError, match="leave no step of 4") as caught:
        AdaLoraConfig(tinit=2, tfinal=2, total_step=4).check()
    assert caught.value.key == "tinit"
    model, config = ours("llama", "adalora", tinit=5, tfinal=3)
    with pytest.raises(AdapterError, match="leave no step of 8"):
        _steps(model, config, 1, 1)


def test_gradients_that_are_gone_are_asked_for() -> None:
    model, config = ours("llama", "adalora", total_step=8)
    with pytest.raises(AdapterError, match="before they are cleared"):
        after_step(model, config, 1, 8)


def test_a_frozen_second_adapter_is_left_alone() -> None:
    model, config = ours("llama", "adalora", **SCHEDULE)
    set_trainable(model, False)
    other = AdaLoraConfig(**SCHEDULE)
    inject(model, other, "other")
    before = {name: value.clone() for name, value in adapter_state(model, "default").items()}
    _steps(model, other, 1, 8)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state(model, "default").items())
    assert other.rank_pattern.keys() == {f"{name}.lora_E" for name in _names(model)}
    assert config.rank_pattern == {}


def _names(model: nn.Module) -> set[str]:
    return {name for name in adapter_layers(model, "other") if not name.endswith("base_layer")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> trainkit.Trained:
    return run_recipe(write_recipe(tmp_path_factory.mktemp("whole")), RECIPE)


@pytest.mark.grid
@pytest.mark.parametrize("step", [3, 6, 7])
def test_a_run_that_stops_before_at_or_after_the_decision_ends_the_same(
    whole: trainkit.Trained, step: int, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    recipe = write_recipe(tmp_path)
    with pytest.raises(Interrupted):
        run_recipe(recipe, RECIPE, on_event=stop)
    done = run_recipe(recipe, RECIPE)
    assert done.weights == whole.weights
    assert file_of(done.folder)[0] == file_of(whole.folder)[0]
    assert sum(map(sum, file_of(done.folder)[0]["rank_pattern"].values())) == 2 * 14


def test_the_best_adapter_from_before_the_decision_is_whole(tmp_path: Path) -> None:
    settings = ("training.eval_strategy=steps", "training.eval_steps=2", "training.save_strategy=steps")
    best = ("training.save_steps=2", "training.load_best_model_at_end=true", "training.greater_is_better=true")
    done = run_recipe(write_recipe(tmp_path), RECIPE, *settings, *best)
    assert done.run["eval"]["best_step"] == 2, "the best must lie before the decision"
    written, tensors = file_of(done.folder)
    assert "rank_pattern" not in written
    assert {len(value) for name, value in tensors.items() if name.endswith("lora_E")} == {4}


def _trained(library: Any, start: dict[str, torch.Tensor] | None) -> tuple[Any, list[float], Any]:
    """A loop as PEFT's documentation has it: the state before, the losses, the state after."""
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], "total_step": 8}
    losses = []
    torch.manual_seed(0)
    with silence():
        model: Any = library.get_peft_model(tiny("llama"), library.AdaLoraConfig(**settings, **SCHEDULE)).train()
    if start is not None:
        library.set_peft_model_state_dict(model, start)
    before = copy.deepcopy(library.get_peft_model_state_dict(model))
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.05)
    for step in range(1, 9):
        loss = model(**labelled("llama")).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, where nothing is left of a layer
        return before, losses, library.get_peft_model_state_dict(model)


def test_a_loop_of_ones_own_trains_as_in_peft() -> None:
    start, expected, after = _trained(peft, None)
    _, losses, found = _trained(peftcli, start)
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, after, atol=1e-5, rtol=1e-4)


def test_the_loss_of_an_evaluation_has_no_penalty() -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", total_step=8, **SCHEDULE)
    model = peftcli.get_peft_model(tiny("llama"), config).train()
    trained = model(**labelled("llama")).loss.item()
    assert trained - model.eval()(**labelled("llama")).loss.item() > 0.1


def test_code_of_ones_own_says_how_many_steps_there_are() -> None:
    with pytest.raises(ValueError, match="total_step: is needed"):
        peftcli.get_peft_model(tiny("llama"), AdaLoraConfig())
