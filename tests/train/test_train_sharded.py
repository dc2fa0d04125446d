"""A base model that is divided among the processes trains as one that each process holds whole: to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from safetensors.torch import load_file
from task_methods import settings_of
from taskkit import CASES
from test_train_processes import group, losses
from trainkit import read_metrics, read_run

from peftcli.methods import METHODS

TEXTS = [name for name in CASES if name not in ("feature_extraction", "text_to_image", "norms with statistics")]
STEPS = (
    "training.max_steps=4",
    "training.per_device_train_batch_size=3",  # of 10 rows: in an epoch's last step one process has none
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.verify=true",
)


def trained(recipe: Path, strategy: str, *settings: str, count: int = 2) -> Path:
    folder = recipe.parent / f"{strategy}-{count}"
    given = (*STEPS, f"training.output_dir={folder}", f"launch.strategy={strategy}", *settings)
    children = group(recipe.parent, "train", recipe, *given, count=count)
    assert [child.wait() for child in children] == [0] * count, children[0].err
    return folder


def product(folder: Path) -> dict[str, Any]:
    """All that a run has made, but for what is drawn and what names folders and times."""
    recorded = folder / "verification.json"
    saved = json.loads(recorded.read_text()) if recorded.exists() else {}
    return {
        "adapter": (folder / "adapter_model.safetensors").read_bytes(),
        "metrics": read_metrics(folder),
        "said": {name: saved.get(name) for name in ("inputs", "scores", "probe")},
        "parameters": read_run(folder)["parameters"],
    }


def test_it_trains_as_with_the_whole_model(recipe: Path) -> None:
    settings = ("training.verify=false", "training.max_steps=2")  # a fresh interpreter takes seconds
    assert product(trained(recipe, "fsdp", *settings)) == product(trained(recipe, "replicate", *settings))


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_every_task_trains_as_with_the_whole_model(name: str, tmp_path: Path) -> None:
    recipe = CASES[name].write(tmp_path)
    assert product(trained(recipe, "fsdp")) == product(trained(recipe, "replicate"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_with_the_whole_model(method: str, recipe: Path) -> None:
    settings = f"method={json.dumps(settings_of(method, 'causal_lm'))}"
    assert product(trained(recipe, "fsdp", settings)) == product(trained(recipe, "replicate", settings))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize(
    "setting",
    ["training.gradient_checkpointing=true", "training.bf16=true", "method.modules_to_save=[lm_head]"],
)
def test_every_shape_trains_as_with_the_whole_model(kind: str, setting: str, tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path, trainkit.base_folder(kind))
    assert product(trained(recipe, "fsdp", setting)) == product(trained(recipe, "replicate", setting))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_any_number_of_processes_gives_one_series(kind: str, method: str, tmp_path: Path) -> None:
    """With LoRA or a soft prompt, and for BERT a new head: losses and adapters of 1, 2 and 4 processes."""
    if kind == "bert":
        recipe = CASES["sequence_classification"].write(tmp_path)
    else:
        rows = trainkit.PROMPTS if kind == "t5" else trainkit.MESSAGES
        recipe = trainkit.write_recipe(tmp_path, trainkit.base_folder(kind, chat=kind != "t5"), rows)
        recipe.write_text(recipe.read_text().replace("causal_lm", "seq2seq_lm" if kind == "t5" else "causal_lm"))
    settings = [trainkit.PROMPT_TUNING] if method == "prompt_tuning" else []
    one = trainkit.run_recipe(recipe, *STEPS, "training.per_device_train_batch_size=8", *settings)
    wanted = load_file(one.folder / "adapter_model.safetensors")
    for strategy, count in [("replicate", 2), ("replicate", 4), ("fsdp", 2), ("fsdp", 4)]:
        size = f"training.per_device_train_batch_size={8 // count}"
        folder = trained(recipe, strategy, size, *settings, count=count)
        assert losses(folder) == pytest.approx(one.losses, rel=1e-5)
        torch.testing.assert_close(load_file(folder / "adapter_model.safetensors"), wanted, atol=1e-5, rtol=1e-5)
