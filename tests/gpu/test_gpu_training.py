"""Training on a GPU: number formats, kernels, quantised bases, a divided base, and the same bytes after a stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import trainkit
from trainkit import at_step, run_recipe

from peftcli.errors import Interrupted

pytestmark = pytest.mark.gpu


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return trainkit.write_recipe(tmp_path)


@pytest.mark.parametrize(
    ("setting", "package"),
    [
        ("training.bf16=true", None),
        ("training.gradient_checkpointing=true", None),
        ("base_model.attn_implementation=flash_attention_2", "flash_attn"),
        ("base_model.quantization=nf4", "bitsandbytes"),
        ("training.optim=paged_adamw_8bit", "bitsandbytes"),
    ],
)
def test_a_setting_learns_what_float32_learns(setting: str, package: str | None, recipe: Path) -> None:
    if package is not None:
        pytest.importorskip(package)
    plain = run_recipe(recipe, "training.bf16=false", f"training.output_dir={recipe.parent}/plain")
    other = run_recipe(recipe, *(["training.bf16=true"] if "bf16" not in setting else []), setting)
    assert other.losses == pytest.approx(plain.losses, rel=0.05)
    assert other.losses[-1] < other.losses[0]


def test_a_run_that_is_stopped_ends_with_the_same_bytes(recipe: Path) -> None:
    settings = ("training.save_strategy=steps", "training.save_steps=2", "training.bf16=true")
    whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole")
    with pytest.raises(Interrupted):
        run_recipe(recipe, *settings, on_event=at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    again = run_recipe(recipe, *settings)
    assert len(again.run["attempts"]) == 2
    one, other = (each.folder / "adapter_model.safetensors" for each in (whole, again))
    assert one.read_bytes() == other.read_bytes()


def test_rows_without_padding_give_the_losses_of_padded_ones(recipe: Path) -> None:
    one = run_recipe(recipe, "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4")
    four = run_recipe(recipe, f"training.output_dir={recipe.parent}/four")
    assert four.losses == pytest.approx(one.losses, rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["replicate", "ddp", "fsdp"])
def test_two_gpus_give_the_series_of_one(strategy: str, recipe: Path) -> None:
    one = run_recipe(recipe)
    folder = recipe.parent / "two"
    words = [f"training.output_dir={folder}", "training.per_device_train_batch_size=2", "launch.num_processes=2"]
    child = trainkit.Child(recipe.parent, "train", recipe, *words, f"launch.strategy={strategy}")
    assert child.wait() == 0, child.err
    assert [entry["loss"] for entry in trainkit.read_metrics(folder) if "loss" in entry] == pytest.approx(
        one.losses, rel=1e-3
    )
