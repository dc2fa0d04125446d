"""Training on a GPU: number formats, kernels, quantised bases, a divided base, and the same bytes after a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import labelled, tiny
from trainkit import at_step, run_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.errors import Interrupted
from peftcli.methods.lora import LoraConfig
from peftcli.schema import BaseModel, Dataset, Launch, Recipe, Training
from peftcli.tasks.text.fast import segments
from peftcli.train.devices.sharding import shard
from peftcli.train.forward import checkpoint_activations

pytestmark = pytest.mark.gpu


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return trainkit.write_recipe(tmp_path)


@pytest.mark.filterwarnings("ignore:inner dimension")  # of bitsandbytes, about models as small as these
@pytest.mark.parametrize(
    ("setting", "package"),
    [
        ("training.bf16=true", None),
        ("training.gradient_checkpointing=true", None),
        ("training.gradient_checkpointing=offload", None),
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


@pytest.mark.parametrize("bf16", ["true", "false"])
def test_padding_is_not_computed(bf16: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 by one kernel for all examples, in float32 with attention alone padded."""
    kernel, calls = segments.varlen_attn, list[int]()

    def watched(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        return kernel(*args, **settings)

    monkeypatch.setattr(segments, "varlen_attn", watched)
    assert run_recipe(recipe, f"training.bf16={bf16}").run["data"]["efficiency"] == 1
    assert bool(calls) == (bf16 == "true")


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("strategy", ["fsdp", "hybrid"])
def test_one_gpu_computes_with_layers_that_fsdp_gathers(strategy: str, cpu_offload: bool) -> None:
    """It has all of each layer as its part."""
    device, launch = torch.device("cuda", 0), Launch(strategy=strategy, cpu_offload=cpu_offload)
    expected, found = (gradients(device, each) for each in (None, launch))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def gradients(device: torch.device, sharded: Launch | None) -> dict[str, torch.Tensor]:
    """Those of LoRA on a tiny Llama."""
    model = tiny("llama")
    torch.manual_seed(0)
    inject(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    if sharded:
        torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        if sharded:
            shard(model, device, sharded)
        else:
            model.to(device)
        model(**{name: value.to(device) for name, value in labelled("llama").items()}).loss.backward()
    finally:
        if sharded:
            torch.distributed.destroy_process_group()
    return {name: value.grad.cpu() for name, (_, _, value) in named_tensors(model).items()}


def test_inputs_of_layers_leave_the_gpu_until_the_backward_pass() -> None:
    """After the forward pass of eight layers, whose MLPs compute in pieces, less is there: seven of their inputs."""
    kept, found = dict[bool, int](), dict[bool, dict[str, torch.Tensor]]()
    for offload in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(hidden_size=256, num_hidden_layers=8, vocab_size=100)).cuda()
        inject(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
        training = Training(output_dir="out", gradient_checkpointing="offload" if offload else True)
        dataset = Dataset(train="rows")
        recipe = Recipe(base_model=BaseModel(name="llama"), method={}, dataset=dataset, training=training)
        checkpoint_activations(model.train(), recipe)
        ids = torch.zeros(8, 512, dtype=torch.long, device="cuda")
        loss = model(input_ids=ids, labels=ids).loss
        kept[offload] = torch.cuda.memory_allocated()
        loss.backward()
        found[offload] = {name: value.grad.cpu() for name, (_, _, value) in named_tensors(model).items()}
        del model, loss
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-5)
    assert kept[False] - kept[True] >= 7 * 8 * 512 * 256 * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("strategy", ["replicate", "ddp", "fsdp", "hybrid"])
def test_two_gpus_give_the_series_of_one(strategy: str, recipe: Path) -> None:
    one = run_recipe(recipe)
    folder = recipe.parent / "two"
    words = [f"training.output_dir={folder}", "training.per_device_train_batch_size=2", "launch.num_processes=2"]
    command = [sys.executable, "-m", "peftcli", "train", str(recipe), *words, f"launch.strategy={strategy}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # a fork of this process sees no GPU
    assert done.returncode == 0, done.stderr
    assert trainkit.read_run(folder)["device"] == "cuda"
    assert [entry["loss"] for entry in trainkit.read_metrics(folder) if "loss" in entry] == pytest.approx(
        one.losses, rel=1e-3
    )
