"""AdaMSS: how its subspaces are found, and how the number of them that train goes down."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, tiny
from oracle import loaded_here, ours, saved_by_peft, theirs, written_by_us
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from torch import nn
from trainkit import run_recipe, write_recipe

from peftcli.core.files import load_adapter, read_config
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import outermost
from peftcli.core.protocols import after_step
from peftcli.core.weights import load_training_state, training_state
from peftcli.errors import AdapterError, Interrupted
from peftcli.methods import config_from_dict
from peftcli.methods.adamss import AdamssConfig
from peftcli.methods.adamss import layers as subspaces
from peftcli.methods.adamss.layers import AdamssLinear, after_resume
from peftcli.peft_api import get_peft_model
from peftcli.train.events import Event, Stepped

SETTINGS: dict[str, Any] = {"r": 8, "num_subspaces": 3, "subspace_rank": 2}
ASA: dict[str, Any] = {
    **SETTINGS, "use_asa": True, "asa_target_subspaces": 5, "init_warmup": 1, "final_warmup": 6, "mask_interval": 2,
}  # fmt: skip


def _asa_layers(model: nn.Module) -> list[AdamssLinear]:
    return [layer for layer in adapter_layers(model).values() if isinstance(layer, AdamssLinear)]


@pytest.mark.parametrize(("outputs", "inputs", "count"), [(96, 32, 3), (300, 40, 10), (2048, 64, 5)])
def test_the_clusters_are_scikit_learns(outputs: int, inputs: int, count: int) -> None:
    torch.manual_seed(outputs)
    left, _ = subspaces.decompose(torch.randn(outputs, inputs), 16, 0)
    expected = KMeans(count, init="random", n_init=1, max_iter=10, random_state=123456789).fit_predict(left.numpy())
    assert subspaces.cluster(left, count).tolist() == expected.tolist()


def test_a_cluster_that_loses_its_points_gets_the_farthest_one() -> None:
    points = torch.tensor([[0.0], [1.0], [10.0]])
    labels, before = torch.tensor([0, 0, 0]), torch.tensor([[0.0], [-5.0]])
    assert subspaces._centres(points, labels, before).flatten().tolist() == [0.5, 10.0]


def test_our_file_says_the_subspaces_so_that_nothing_is_decomposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = written_by_us(("adamss", "llama", SETTINGS), tmp_path)
    monkeypatch.setattr("peftcli.methods.adamss.layers.decompose", None)
    assert torch.equal(logits(loaded_here("llama", folder), batch("llama")), logits(model, batch("llama")))


def test_pefts_file_is_merged_into_a_base_model_that_is_streamed(tmp_path: Path) -> None:
    oracle = theirs("opt", "adamss", **SETTINGS)
    folder, empty = saved_by_peft(oracle, tmp_path), tiny("opt").to("meta")
    load_adapter(empty, config_from_dict(read_config(folder)), folder)
    for path, layer in outermost(empty).items():
        base = tiny("opt").get_submodule(path).state_dict()
        with torch.no_grad():
            merged = layer.folded(base)
        theirs_layer = oracle.base_model.model.get_submodule(path)
        expected = base["weight"] + theirs_layer.get_delta_weight("default")
        torch.testing.assert_close(merged["weight"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(merged["bias"], base["bias"] + theirs_layer.get_delta_bias("default"))


def test_pefts_file_is_refused_where_its_subspaces_cannot_be_found_again(tmp_path: Path) -> None:
    folder = saved_by_peft(theirs("llama", "adamss", **SETTINGS), tmp_path / "other-base")
    with pytest.raises(AdapterError, match="other directions than the file"):
        load_adapter(tiny("llama", seed=5), config_from_dict(read_config(folder)), folder)
    folder = saved_by_peft(theirs("llama", "adamss", **SETTINGS | {"r": 32}), tmp_path / "all-directions")
    model = tiny("llama")
    with pytest.raises(AdapterError, match="r is not below the layer's outputs"):
        load_adapter(model, config_from_dict(read_config(folder)), folder)
    assert not adapter_layers(model)


@pytest.mark.parametrize("row", [0, 999, -1])
def test_rows_that_are_no_order_of_the_outputs_are_refused(row: int, tmp_path: Path) -> None:
    _, folder = written_by_us(("adamss", "llama", SETTINGS), tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("adamss_rows"))
    tensors[name][tensors[name].argmax()] = row
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="does not give each output a row of its own"):
        loaded_here("llama", folder)


def _steps(model: nn.Module, config: AdamssConfig, first: int, last: int) -> list[list[list[int]]]:
    """Which subspaces of each layer train after each step."""
    found = []
    for step in range(first, last + 1):
        model.zero_grad(set_to_none=True)
        model(**labelled("llama", seed=step)).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        after_step(model, config, step, last)
        found.append([layer.training_subspaces() for layer in _asa_layers(model)])
    return found


def test_the_least_important_subspaces_stop_training() -> None:
    model, config = ours("llama", "adamss", **ASA)
    every = [0, 1, 2]
    first, *_, last = _steps(model, config, 1, 7)
    assert first == [every] * 4
    assert sum(map(len, last)) == config.asa_target_subspaces
    for layer, left in zip(_asa_layers(model), last, strict=True):
        for tensors in (layer.adamss_A, layer.adamss_B):
            assert [number for number, value in enumerate(tensors) if value.requires_grad] == left
            assert [number for number, value in enumerate(tensors) if value.grad is not None] == left


def test_the_last_subspaces_are_frozen_at_the_end_of_the_warmup_whatever_the_interval() -> None:
    model, config = ours("llama", "adamss", **ASA | {"mask_interval": 4, "asa_schedule_exponent": 1.0})
    *_, last = _steps(model, config, 1, 6)
    assert sum(map(len, last)) == config.asa_target_subspaces


def test_importance_and_the_schedule_are_pefts() -> None:
    """PEFT keeps one subspace fewer than it says, so ours is told to keep one fewer."""
    start, oracle = ours("llama", "adamss", **ASA)[0], theirs("llama", "adamss", **ASA)
    config = AdamssConfig(**ASA | {"mask_interval": 6, "asa_target_subspaces": 4})
    model = tiny("llama")
    inject(model, config)
    for layer, theirs_layer in zip(_asa_layers(model), _asa_layers(start), strict=True):
        for name, value in layer.own_tensors().items():
            value.data.copy_(theirs_layer.own_tensors()[name])
    oracle.peft_config["default"].mask_interval = 6
    for path, layer in adapter_layers(model).items():
        other = oracle.base_model.model.get_submodule(path)
        for name in ("adamss_A", "adamss_B"):
            for value, same in zip(getattr(layer, name), getattr(other, name)["default"], strict=True):
                same.data.copy_(value)
    for step in range(1, 7):
        oracle.zero_grad(set_to_none=True)
        oracle(**labelled("llama", seed=step)).loss.backward()
        with torch.no_grad():
            for parameter in oracle.parameters():
                if parameter.grad is not None:
                    parameter -= 1e-3 * parameter.grad
        oracle.base_model.update_and_allocate(step)
    left = _steps(model, config, 1, 6)[-1]
    expected = [
        [number for number, value in enumerate(oracle.base_model.model.get_submodule(path).adamss_A["default"])
         if value.requires_grad]
        for path in adapter_layers(model)
    ]  # fmt: skip
    assert left == expected
    assert sum(map(len, left)) == 4, "PEFT was to keep 5"


def test_a_resumed_run_keeps_what_was_frozen_frozen() -> None:
    straight, config = ours("llama", "adamss", **ASA)
    before = _steps(straight, config, 1, 4)[-1]
    state = {name: value.clone() for name, value in training_state(straight).items()}
    expected = _steps(straight, config, 5, 7)
    resumed, again = ours("llama", "adamss", seed=3, **ASA)
    load_training_state(resumed, state)
    after_resume(resumed, again, 4, 7)
    assert [layer.training_subspaces() for layer in _asa_layers(resumed)] == before
    assert any(not value.requires_grad for layer in _asa_layers(resumed) for value in layer.adamss_A)
    assert _steps(resumed, again, 5, 7) == expected
    for name, value in training_state(straight).items():
        assert torch.equal(value, training_state(resumed)[name]), name


def test_a_run_that_stops_ends_the_same(tmp_path: Path) -> None:
    recipe = (
        "method={type: adamss, r: 8, num_subspaces: 3, target_modules: [q_proj, v_proj], use_asa: true, "
        "asa_target_subspaces: 4, init_warmup: 1, final_warmup: 6, mask_interval: 2}"
    )

    def stop(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = run_recipe(write_recipe(tmp_path / "whole"), recipe)
    path = write_recipe(tmp_path / "stopped")
    with pytest.raises(Interrupted):
        run_recipe(path, recipe, on_event=stop)
    assert run_recipe(path, recipe).weights == whole.weights


def test_a_second_adapter_has_a_budget_of_its_own() -> None:
    model: Any = get_peft_model(tiny("llama"), AdamssConfig(**ASA))
    model.add_adapter("other", AdamssConfig(**ASA | {"asa_target_subspaces": 1, "mask_interval": 1}))
    model(**labelled("llama")).loss.backward()
    model.base_model.update_and_allocate(6)
    counts: dict[str, int] = {"default": 0, "other": 0}
    for layer in _asa_layers(model):
        counts[layer.adapter] += len(layer.training_subspaces())
    assert counts == {"default": 5, "other": 12}, "the other one does not train"


def test_update_and_allocate_from_python_and_without_gradients() -> None:
    model: Any = get_peft_model(tiny("llama"), AdamssConfig(**ASA))
    with pytest.raises(AdapterError, match="before they are cleared"):
        model.base_model.update_and_allocate(2)
    model(**labelled("llama")).loss.backward()
    model.base_model.update_and_allocate(2)
    assert sum(len(layer.training_subspaces()) for layer in _asa_layers(model)) == 8, "5 + 7 * (4 / 5) ** 3"


def test_a_run_must_be_long_enough_to_freeze_them() -> None:
    AdamssConfig(**ASA).check_steps(6)
    with pytest.raises(AdapterError, match="final_warmup: 6 is above the run's 5 steps"):
        AdamssConfig(**ASA).check_steps(5)
    assert not AdamssConfig(mask_interval=0, init_weights=False).problems()
