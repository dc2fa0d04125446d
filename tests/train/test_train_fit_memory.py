"""Settings that are auto follow from the memory there is, and change nothing of what is learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trainkit
from taskkit import CASES

from peftcli.errors import ModelError, UsageError
from peftcli.models.open import open_base
from peftcli.recipe import load_recipe
from peftcli.schema import Recipe
from peftcli.tasks import open_task
from peftcli.train.data import load_data
from peftcli.train.memory import fit as module
from peftcli.train.memory.estimate import Estimate

SIZE, STEPS = "training.per_device_train_batch_size=auto", "training.gradient_accumulation_steps=4"
CHECKPOINTING, STRATEGY = "training.gradient_checkpointing=auto", "launch={strategy: auto, num_processes: 2}"
PADDED = "base_model.attn_implementation=eager"
"""Else a CPU computes micro-batches in parts, and their size makes no difference."""
NEEDS = Estimate("cpu", packages=0, weights=0, file=0, adapter=0, step=1, evaluation=0, saving=0)
"""Where it does not matter what a step needs, if only it is something."""


@pytest.fixture
def fit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[dict[str, Any], int]]:
    """Choose settings for so much memory, without a number for any. Returns what a step needs, too."""
    real, known = module._estimate, dict[str, Any]()

    def once(made: Recipe, base: Any, data: Any, processes: int) -> Estimate | None:
        """An estimate takes a third of a second, and a search asks for the same ones again."""
        key = f"{module.settings_of(made)} {processes}"
        if key not in known:
            known[key] = real(made, base, data, processes)
        return known[key]

    monkeypatch.setattr(module, "_estimate", once)

    def chosen(
        *settings: str, memory: float = 1e12, processes: int = 1, path: Path = recipe
    ) -> tuple[dict[str, Any], int]:
        made = load_recipe(path, [*settings] if path != recipe else [PADDED, *settings])
        base = open_base(made.base_model)
        task = open_task(made, base)
        monkeypatch.setattr(module, "_memory", lambda recipe, processes: memory)
        monkeypatch.setattr("peftcli.train.memory.estimate.resident_memory", lambda: 0)
        found, needs = module.choose_settings(made, base, load_data(made, task), processes)
        return module.settings_of(found), 0 if needs is None else module._in_step(needs)

    return chosen


def test_the_fastest_settings_that_fit_are_chosen(fit) -> None:
    everything = [SIZE, STEPS, CHECKPOINTING]
    sizes = {size: fit(f"training.per_device_train_batch_size={size}", CHECKPOINTING)[1] for size in (1, 2, 4)}
    assert sizes[1] < sizes[2] < sizes[4]
    for size, needs in sizes.items():
        found, peak = fit(*everything, memory=needs)
        assert (found["per_device_train_batch_size"], found["gradient_checkpointing"]) == (size, False)
        assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 4
        assert peak == needs
    found, again = fit(*everything, memory=sizes[1] - 1)
    assert found["gradient_checkpointing"]
    assert again < sizes[1]


def test_the_model_is_divided_only_where_it_must_be(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(STRATEGY)[0]["strategy"] == "replicate"  # one process, without an estimate
    found, whole = fit(STRATEGY, processes=8)
    assert found["strategy"] == "replicate"
    monkeypatch.setattr(
        "peftcli.train.memory.estimate._held_by_others",
        lambda model, count, saved: count.bit_length() - 1,
    )  # of two small layers nothing is saved
    found, divided = fit(STRATEGY, processes=8, memory=whole - 1)
    assert (found["strategy"], divided) == ("fsdp", whole - 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for memory, expected in ((whole, "replicate"), (whole - 2, "hybrid"), (whole - 3, "fsdp")):
        assert fit(STRATEGY, processes=8, memory=memory)[0]["strategy"] == expected


def test_a_run_with_chosen_settings_learns_the_same_and_keeps_them(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = f"training.output_dir={tmp_path / 'usual'}"
    usual = trainkit.run_recipe(recipe, "training.per_device_train_batch_size=4", folder)
    monkeypatch.setattr(module, "_memory", lambda recipe, processes: 0)
    auto = trainkit.run_recipe(recipe, SIZE, STEPS, CHECKPOINTING)
    training = auto.run["recipe"]["training"]
    sizes = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    assert (*sizes, training["gradient_checkpointing"]) == (1, 4, True)
    assert auto.run["train_loss"] == pytest.approx(usual.run["train_loss"], rel=1e-4)
    monkeypatch.setattr(module, "_memory", lambda recipe, processes: 1e12)
    monkeypatch.setattr(module, "_estimate", lambda *given: NEEDS)
    again = trainkit.run_recipe(recipe, SIZE, STEPS, CHECKPOINTING)
    assert again.run["artefacts"] == auto.run["artefacts"]
    for changed in ("training.gradient_accumulation_steps=8", "training.gradient_checkpointing=false"):
        with pytest.raises(UsageError, match="of another recipe"):
            trainkit.run_recipe(recipe, SIZE, STEPS, CHECKPOINTING, changed)


@pytest.mark.usefixtures("short")
def test_a_run_that_replaces_another_chooses_for_itself(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_estimate", lambda *given: NEEDS)
    monkeypatch.setattr(module, "_memory", lambda recipe, processes: 0)
    assert trainkit.run_recipe(recipe, SIZE, STEPS).run["recipe"]["training"]["per_device_train_batch_size"] == 1
    monkeypatch.setattr(module, "_memory", lambda recipe, processes: 1e12)
    for settings, size in (((), 1), (("method.lora_alpha=3",), 4)):
        replaced = trainkit.run_recipe(recipe, SIZE, STEPS, *settings, overwrite=True)
        assert replaced.run["recipe"]["training"]["per_device_train_batch_size"] == size


@pytest.mark.usefixtures("short")
def test_a_damaged_recipe_in_run_json_chooses_nothing(recipe: Path) -> None:
    done = trainkit.run_recipe(recipe)
    wanted = load_recipe(recipe, [SIZE, STEPS])
    for damaged in ({}, {"training": "x"}, {"training": {}}):
        (done.folder / "run.json").write_text(json.dumps(done.run | {"recipe": damaged}))
        for overwrite in (False, True):
            assert module._settings_of_begun_run(wanted, overwrite) is None


def test_a_model_that_cannot_compute_again_says_so(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: object, recipe: object) -> None:
        raise ModelError("cannot compute its activations again")

    monkeypatch.setattr(module, "checkpoint_activations", refuse)
    with pytest.raises(ModelError, match="cannot compute its activations again"):
        fit(SIZE, STEPS, "training.gradient_checkpointing=true")


def test_what_cannot_be_chosen_is_refused(fit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"auto divides training\.gradient_accumulation_steps, which is 1"):
        fit(SIZE)
    monkeypatch.setattr(module, "estimate", lambda *given: None)
    with pytest.raises(UsageError, match="the memory that this model needs cannot be estimated"):
        fit(SIZE, STEPS)
    with pytest.raises(UsageError, match="auto is not for a task that compares the rows of a batch"):
        fit(SIZE, STEPS, path=CASES["feature_extraction"].write(tmp_path))


def test_it_says_what_was_chosen_and_why(recipe: Path, fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(strategy: str, processes: int, *settings: str, needs: Estimate | None = None) -> str:
        asked = load_recipe(recipe, [STRATEGY, *settings])
        chosen = replace(asked, launch=replace(asked.launch, strategy=strategy))
        return module._account(asked, chosen, needs, 2.0**30, processes)

    assert said("replicate", 1).endswith("the base model whole in each process, since there is only one")
    assert said("replicate", 2).endswith("the base model whole in each process, since it cannot be divided")
    assert "the base model whole in each process, since it fits: about" in said("replicate", 2, needs=NEEDS)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert said("fsdp", 2).endswith("the base model divided, since it does not fit whole")
    assert said("fsdp", 4).endswith("does not fit whole nor within a machine: every layer crosses the network")
    groups = "the base model divided among each 2 processes, since it does not fit whole: only the adapter's gradients"
    assert said("hybrid", 4).endswith(f"{groups} leave such a group")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(module, "free_memory", lambda: 8.0)
    monkeypatch.setattr(module, "resident_memory", lambda: 0.0)
    one, two = (load_recipe(recipe, [f"launch={{num_machines: {n}, main_process_port: 29500}}"]) for n in (1, 2))
    assert module._memory(two, 4) == 2 * module._memory(one, 4), "each machine has memory of its own"
