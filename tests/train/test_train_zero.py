"""DeepSpeed's ZeRO trains as the loop does without it, and a run that was stopped ends with the same bytes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import trainkit
from safetensors.torch import load_file
from task_methods import settings_of
from taskkit import CASES
from test_train_processes import group, losses
from test_train_sharded import EFFICIENTLY, TEXTS, assert_same_bytes, trained
from transformers import OPTConfig, OPTForCausalLM

from peftcli.errors import UsageError
from peftcli.methods import METHODS
from peftcli.recipe import load_recipe
from peftcli.recipe.deepspeed_config import SIZES, SWITCHES
from peftcli.train.examine import examine

# make test-all installs the extra into a venv of its own and runs this file there
needs_deepspeed = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")
ZERO = ("zero2", "zero3")
EVALUATES = (
    "training.eval_strategy=steps",
    "training.eval_steps=1",
    "training.eval_on_start=true",
    "training.load_best_model_at_end=true",
)
BRIEF = ("training.verify=false", "training.max_steps=3")
AFTER_STEP = ("adalora", "adamss", "oft")
"""Methods that read gradients after a step."""


def assert_as_replicate(recipe: Path, strategy: str, *settings: str) -> None:
    """Losses and adapters are those of the loop alone. Under zero3 LoRA is computed another way, which rounds."""
    folders = [trained(recipe, each, *settings) for each in (strategy, "replicate")]
    rounds = strategy == "zero3" and "training.bf16=true" in settings
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-3 if rounds else 1e-5)
    if rounds:
        return
    tensors = [load_file(each / "adapter_model.safetensors") for each in folders]
    for each in tensors:  # whose gradient is 0 but for rounding, of which AdamW makes steps
        each.pop("base_model.model.qa_outputs.bias", None)
    # at most a thousandth of what AdamW moves a number by in three steps; here other operations compute it
    torch.testing.assert_close(*tensors, atol=2e-5 if strategy == "zero3" else 1e-5, rtol=1e-4)


def test_what_zero_is_not_for(recipe: Path, tmp_path: Path) -> None:
    adalora = f"method={json.dumps(settings_of('adalora', 'causal_lm'))}"
    for settings, said in (
        (("launch.strategy=zero2", adalora), "zero2 leaves no gradients"),
        (("launch.strategy=zero3", trainkit.PROMPT_TUNING), "zero3 is for LoRA without its variants"),
        (("launch.strategy=zero3", "method.init_lora_weights=pissa"), "zero3 is for LoRA without its variants"),
        (("launch.strategy=zero3", "method.use_dora=true"), "zero3 is for LoRA without its variants"),
        (("launch.strategy=zero3", "training.optim=adafactor"), "zero3 divides what adamw_torch and sgd remember"),
        (("launch.strategy=zero3", "base_model.quantization={type: nf4}"), "zero3 is not for nf4"),
        (("launch={strategy: zero3, cpu_offload: true, num_processes: 1}",), "one process has no part"),
        (("launch.strategy=zero2", "base_model.quantization={type: int8_weight_only}"), "zero2 is not for int8_w"),
    ):
        found = examine(load_recipe(recipe, settings))
        assert any(said in problem.message for problem in found.errors), found.errors
    (tmp_path / "pictures").mkdir()
    pictures = CASES["image_classification"].write(tmp_path / "pictures")
    with pytest.raises(UsageError, match="models of texts"):
        trainkit.run_recipe(pictures, "launch.strategy=zero3")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize(
    "settings",
    [
        EVALUATES,
        ("training.bf16=true",),
        ("training.gradient_accumulation_steps=2",),
        ("training.gradient_checkpointing=true",),
    ],
)
def test_it_trains_as_the_loop_does_alone(strategy: str, settings: tuple[str, ...], recipe: Path) -> None:
    settings = (*BRIEF, *settings, *(("training.verify=true",) if settings is EVALUATES else ()))
    assert_as_replicate(recipe, strategy, *settings)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("more", ["training.optim=adamw_torch", "training.optim_args={amsgrad: true}"])
def test_a_stopped_run_ends_with_the_same_bytes(strategy: str, more: str, recipe: Path) -> None:
    settings = (*BRIEF, "training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", more)
    folder = trained(recipe, strategy, *settings)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoints/step-000006", ignore_errors=True)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    trained(recipe, strategy, *settings)
    assert json.loads((folder / "run.json").read_text())["attempts"][-1]["from_step"] == 4
    assert (folder / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
def test_how_parts_are_sent_changes_nothing(strategy: str, recipe: Path) -> None:
    settings = dict.fromkeys(SWITCHES, False) | dict.fromkeys(SIZES, 100.0)
    assert_same_bytes(recipe, BRIEF, f"launch.zero_optimization={json.dumps(settings)}", strategy)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
def test_the_model_is_in_training_mode(strategy: str, recipe: Path) -> None:
    """Under zero3 dropout draws numbers for padding too, so it can only be told from none."""
    dropout = "method.lora_dropout=0.5"
    if strategy == "zero2":
        assert_as_replicate(recipe, strategy, *BRIEF, dropout)
        return
    with_it = losses(trained(recipe, strategy, *BRIEF, dropout))
    shutil.rmtree(recipe.parent / f"{strategy}-2")
    assert with_it[1:] != pytest.approx(losses(trained(recipe, strategy, *BRIEF))[1:], rel=1e-4)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_first_process_may_read_the_model_for_all(dtype: str, recipe: Path) -> None:
    assert_same_bytes(recipe, (*BRIEF, f"base_model.dtype={dtype}"), EFFICIENTLY, "zero3")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_weights_under_zero2(kind: str, recipe: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert_as_replicate(recipe, "zero2", *BRIEF, f"base_model.quantization={{type: {kind}}}")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_other_shapes(kind: str, strategy: str, tmp_path: Path) -> None:
    rows = trainkit.PROMPTS if kind == "t5" else trainkit.MESSAGES
    recipe = trainkit.write_recipe(tmp_path, trainkit.base_folder(kind, chat=kind != "t5"), rows)
    recipe.write_text(recipe.read_text().replace("causal_lm", "seq2seq_lm" if kind == "t5" else "causal_lm"))
    assert_as_replicate(recipe, strategy, *BRIEF)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("name", sorted({*TEXTS} - {"causal_lm", "seq2seq_lm"}))
def test_tasks_of_texts(name: str, strategy: str, tmp_path: Path) -> None:
    recipe = CASES[name].write(tmp_path)
    if (name, strategy) == ("preference", "zero3"):
        with pytest.raises(UsageError, match="compare the model with what it was"):
            trainkit.run_recipe(recipe, "launch.strategy=zero3")
        return
    assert_as_replicate(recipe, strategy, *BRIEF, "training.per_device_train_batch_size=2")


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("method", sorted({*METHODS} - {*AFTER_STEP}))
def test_methods_train_under_zero2(method: str, recipe: Path) -> None:
    settings = f"method={json.dumps(settings_of(method, 'causal_lm'))}"
    assert_as_replicate(recipe, "zero2", settings, "training.verify=false", "training.max_steps=2")


@pytest.mark.slow
@needs_deepspeed
def test_processes_may_drop_different_layers_under_zero2(tmp_path: Path) -> None:
    base = tmp_path / "base"
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 4}
    config = OPTConfig(vocab_size=300, num_attention_heads=4, max_position_embeddings=256, layerdrop=0.4, **sizes)
    OPTForCausalLM(config).save_pretrained(base)
    trainkit.tokenizer(True).save_pretrained(base)
    recipe = trainkit.write_recipe(tmp_path, base)
    folders = [trained(recipe, each, *BRIEF) for each in ("zero2", "replicate")]
    # AdamW counts a step for what has no gradient in any process, which is 0 to DeepSpeed
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-2)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("strategy", ZERO)
def test_gradients_that_are_not_finite_end_the_run(strategy: str, recipe: Path) -> None:
    settings = (f"launch.strategy={strategy}", "training.learning_rate=1e6", "training.max_grad_norm=0")
    children = group(recipe.parent, "train", recipe, *settings, count=2)
    assert [child.wait() for child in children] == [9, 9], children[0].err
    assert not (recipe.parent / "out/adapter_model.safetensors").exists()
