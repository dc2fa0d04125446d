"""A base model that is divided among the processes trains as one that each process holds whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import trainkit
from safetensors.torch import load_file
from task_methods import settings_of
from taskkit import CASES
from test_train_processes import group, losses
from trainkit import read_metrics, read_run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig, OPTForCausalLM

from peftcli.errors import UsageError
from peftcli.methods import METHODS
from peftcli.recipe import load_recipe
from peftcli.train.examine import examine

TEXTS = (
    *("causal_lm", "seq2seq_lm", "sequence_classification", "a decoder", "question_answering", "preference", "reward"),
    "token_classification",
)
VERIFIED = "verification.json"
STEPS = (
    "training.max_steps=4",
    "training.per_device_train_batch_size=3",  # of 10 rows: in an epoch's last step one process has none
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.verify=true",
)


def trained(recipe: Path, strategy: str, *settings: str, count: int = 2, folder: Path | None = None) -> Path:
    folder = folder or recipe.parent / f"{strategy}-{count}"
    given = (*STEPS, f"training.output_dir={folder}", f"launch.strategy={strategy}", *settings)
    children = group(recipe.parent, "train", recipe, *given, count=count)
    assert [child.wait() for child in children] == [0] * count, children[0].err
    return folder


def assert_alike(recipe: Path, *settings: str) -> None:
    """Runs with both strategies end alike, rounding aside: adapters, metrics, and what the model says at the end."""
    assert_same_end(*(trained(recipe, strategy, *settings) for strategy in ("fsdp", "replicate")))


def assert_same_end(one: Path, other: Path) -> None:
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    torch.testing.assert_close(*tensors, atol=1e-5, rtol=1e-5)
    for here, there in zip(read_metrics(one), read_metrics(other), strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-5)
    said = [json.loads(path.read_text()) for path in (one / VERIFIED, other / VERIFIED) if path.exists()]
    for name in ("scores", "probe") if said else ():
        here, there = (each.get(name) or {"values": []} for each in said)
        assert here["values"] == pytest.approx(there["values"], rel=1e-3, abs=1e-4)


def interrupt(folder: Path) -> None:
    """Make of a complete run of four steps one that was stopped after two."""
    shutil.rmtree(folder / "checkpoints/step-000004", ignore_errors=True)
    record = read_run(folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))


def assert_same_bytes(recipe: Path, settings: Sequence[str], more: str, strategy: str = "fsdp") -> None:
    """A setting changes nothing of the adapter."""
    folder = trained(recipe, strategy, *settings, more)
    found = (folder / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder)
    assert (trained(recipe, strategy, *settings) / "adapter_model.safetensors").read_bytes() == found


SHORT = ("training.verify=false", "training.max_steps=2")
"""A fresh interpreter takes seconds."""


def in_one_process(recipe: Path, *settings: str) -> Path:
    """The folder of a run with the batches of two processes."""
    output = f"training.output_dir={recipe.parent}/one"
    return trainkit.run_recipe(recipe, *STEPS, "training.per_device_train_batch_size=6", *settings, output).folder


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe, and its short run with the base model divided between two processes."""
    recipe = trainkit.write_recipe(tmp_path_factory.mktemp("divided"))
    return recipe, trained(recipe, "fsdp", *SHORT)


def test_it_trains_as_with_the_whole_model(divided: tuple[Path, Path]) -> None:
    recipe, folder = divided
    assert_same_end(folder, in_one_process(recipe, *SHORT))


def test_towers_stay_whole_which_batches_without_pictures_do_not_run(tmp_path: Path) -> None:
    recipe = CASES["image_text_to_text"].write(tmp_path)
    settings, size = ("training.verify=false", "task.connector=trained"), "training.per_device_train_batch_size"
    with pytest.raises(UsageError, match="run a part of the model alone"):
        trainkit.run_recipe(recipe, "launch.strategy=zero3")
    divided = trained(recipe, "fsdp", *settings, f"{size}=1")  # in a third of the batches no picture
    assert_same_end(divided, in_one_process(recipe, *settings, f"{size}=2"))


@pytest.mark.slow
def test_layers_may_stay_whole_until_the_backward_pass(recipe: Path) -> None:
    settings = (*SHORT, "training.eval_strategy=steps", "training.eval_steps=1", "training.verify=true")
    assert_same_bytes(recipe, settings, "launch.reshard_after_forward=false")


@pytest.mark.slow
def test_what_was_forgotten_is_measured_together(recipe: Path) -> None:
    settings = (*SHORT, "training.learning_rate=0.05", "gates.forgetting=<= 9")
    runs = [read_run(folder) for folder in (trained(recipe, "fsdp", *settings), in_one_process(recipe, *settings))]
    divided, whole = (run["forgetting"] for run in runs)
    assert divided["texts"] == 200
    assert divided["kl"] > 1e-3
    for name in ("base_loss", "adapter_loss", "kl"):
        assert divided[name] == pytest.approx(whole[name], abs=1e-3)


@pytest.mark.slow
def test_parts_that_wait_in_the_memory_of_the_cpu(recipe: Path) -> None:
    """On a CPU nothing moves: this shows that such a run ends, and ends alike."""
    assert_same_bytes(recipe, SHORT, "launch.cpu_offload=true")


EFFICIENTLY = "launch.cpu_ram_efficient_loading=true"


def test_the_first_process_may_read_the_model_for_all(divided: tuple[Path, Path], tmp_path: Path) -> None:
    recipe, folder = divided
    again = trained(recipe, "fsdp", *SHORT, EFFICIENTLY, folder=tmp_path / "out")
    name = "adapter_model.safetensors"
    assert (again / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.slow
def test_the_first_process_may_read_a_model_in_bfloat16_for_all(recipe: Path) -> None:
    assert_same_bytes(recipe, (*SHORT, "base_model.dtype=bfloat16"), EFFICIENTLY)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_first_process_may_read_the_model_of_every_method(method: str, recipe: Path) -> None:
    settings = (f"method={json.dumps(settings_of(method, 'causal_lm'))}", "training.verify=false")
    if method == "adamss":
        children = group(recipe.parent, "train", recipe, *settings, "launch.strategy=fsdp", EFFICIENTLY)
        assert [child.wait() for child in children] == [4, 4]
        assert "shapes depend on the base model's weights" in children[0].err
        return
    assert_same_bytes(recipe, settings, EFFICIENTLY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    ["method.modules_to_save=[lm_head]", "base_model.new_tokens=[<new>]", "training.gradient_checkpointing=true"],
)
def test_the_first_process_may_read_a_model_of_which_more_trains(more: str, recipe: Path) -> None:
    assert_same_bytes(recipe, ("training.verify=false", "training.max_steps=2", more), EFFICIENTLY)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequence_classification", "token_classification", "reward", "preference"])
def test_the_first_process_may_read_a_model_with_a_new_head(name: str, tmp_path: Path) -> None:
    assert_same_bytes(CASES[name].write(tmp_path), ("training.verify=false", "training.max_steps=2"), EFFICIENTLY)


@pytest.mark.slow
def test_the_first_process_may_read_the_model_of_a_run_that_goes_on(recipe: Path) -> None:
    settings = ("training.verify=false", "training.save_strategy=steps", "training.save_steps=2")
    folder = trained(recipe, "fsdp", *settings, EFFICIENTLY)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    interrupt(folder)
    assert (trained(recipe, "fsdp", *settings, EFFICIENTLY) / "adapter_model.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_run_goes_on_with_the_model_divided_among_more_processes(recipe: Path) -> None:
    settings = ("training.verify=false", "training.save_strategy=steps", "training.save_steps=2")
    folder = trained(recipe, "replicate", *settings, "training.per_device_train_batch_size=4", count=1)
    whole = load_file(folder / "adapter_model.safetensors")
    interrupt(folder)
    changed = ("training.per_device_train_batch_size=2", f"training.output_dir={folder}", "launch.strategy=fsdp")
    keys = ("processes", "launch.strategy", "training.per_device_train_batch_size")
    allowed = [word for key in keys for word in ("--allow-change", key)]
    children = group(recipe.parent, "train", recipe, *STEPS, *settings, *changed, *allowed)
    assert [child.wait() for child in children] == [0, 0], children[0].err
    torch.testing.assert_close(load_file(folder / "adapter_model.safetensors"), whole, atol=1e-5, rtol=1e-5)
    run = read_run(folder)
    assert (run["attempts"][-1]["from_step"], run["processes"]) == (2, 2)
    assert not run["exact"]


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", ["true", "false"])
@pytest.mark.parametrize("use_dora", ["false", "true"])  # DoRA reads the weights
def test_quantised_weights_of_four_bits_are_divided(use_dora: str, double_quant: str, recipe: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantization = f"base_model.quantization={{type: nf4, double_quant: {double_quant}}}"
    assert_alike(recipe, quantization, f"method.use_dora={use_dora}")


@pytest.mark.slow
def test_they_are_where_they_are_stored_so(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = AutoModelForCausalLM.from_pretrained(
        trainkit.base_folder(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    quantised.save_pretrained(tmp_path / "stored")
    trainkit.tokenizer().save_pretrained(tmp_path / "stored")
    assert_alike(recipe, f"base_model={tmp_path}/stored")


def test_stored_weights_that_cannot_be_divided_are_refused_before_they_are_read(recipe: Path, tmp_path: Path) -> None:
    shutil.copytree(trainkit.base_folder(), tmp_path / "stored")
    config = json.loads((tmp_path / "stored/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "stored/config.json").write_text(json.dumps(config))
    found = examine(load_recipe(recipe, ["launch.strategy=fsdp", f"base_model={tmp_path}/stored"]))
    assert any("fsdp is not for int8" in problem.message for problem in found.errors), found.errors


@pytest.mark.parametrize("kind", ["int8", "int8_weight_only"])
def test_other_quantised_weights_are_refused(kind: str, recipe: Path) -> None:
    found = examine(load_recipe(recipe, ["launch.strategy=fsdp", f"base_model.quantization={{type: {kind}}}"]))
    assert any(f"fsdp is not for {kind}" in problem.message for problem in found.errors), found.errors


DRAWN = ("training.bf16=true", "method.lora_dropout=0.5")
"""One process rounds, and draws, otherwise than two."""


@pytest.mark.parametrize(
    "setting",
    [
        "training.gradient_accumulation_steps=2",
        pytest.param("training.gradient_checkpointing=true", marks=pytest.mark.slow),
        *(pytest.param(setting, marks=pytest.mark.slow) for setting in DRAWN),
    ],
)
def test_ddp_trains_as_the_loop_does_without_it(setting: str, recipe: Path) -> None:
    settings = ("training.verify=false", "training.max_steps=3", setting)
    other = trained(recipe, "replicate", *settings) if setting in DRAWN else in_one_process(recipe, *settings)
    folders = [trained(recipe, "ddp", *settings), other]
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-5)
    torch.testing.assert_close(
        *(load_file(each / "adapter_model.safetensors") for each in folders), atol=1e-5, rtol=1e-4
    )


def test_ddp_refuses_a_task_that_compares_rows(tmp_path: Path) -> None:
    recipe = CASES["feature_extraction"].write(tmp_path)
    with pytest.raises(UsageError, match="ddp is not for tasks"):
        trainkit.run_recipe(recipe, "launch.strategy=ddp")


@pytest.mark.parametrize("name", ["image_classification", "feature_extraction"])
def test_other_models_are_refused(name: str, tmp_path: Path) -> None:
    recipe = CASES[name].write(tmp_path)
    with pytest.raises(UsageError, match="models of texts"):
        trainkit.run_recipe(recipe, "launch.strategy=fsdp")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["launch={strategy: fsdp, num_processes: 2}"], "drops layers of its own"),
        (["training.optim_args={beta: 1}"], "has no such argument"),
        (["training.use_liger_kernel=true"], "liger"),
        (["launch={strategy: auto, cpu_offload: true, num_processes: 1}"], None),
    ],
)
def test_a_deep_check_says_what_the_run_would(settings: list[str], said: str | None, tmp_path: Path) -> None:
    sizes = {"vocab_size": 400, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = tmp_path / "base"
    shutil.copytree(trainkit.base_folder(), base)
    for file in base.glob("*.safetensors"):
        file.unlink()
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, layerdrop=0.1)).save_pretrained(base)
    found = examine(load_recipe(trainkit.write_recipe(tmp_path, base), settings))
    messages = [problem.message for problem in found.errors]
    assert any(said in message for message in messages) if said else not messages, messages


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXTS)
def test_every_task_trains_as_with_the_whole_model(name: str, tmp_path: Path) -> None:
    recipe = CASES[name].write(tmp_path)
    assert_alike(recipe)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*CASES} - {"feature_extraction"}))
def test_every_task_trains_under_ddp(name: str, tmp_path: Path) -> None:
    recipe = CASES[name].write(tmp_path)
    settings = ("training.verify=false", "training.per_device_train_batch_size=2")
    folders = [trained(recipe, strategy, *settings) for strategy in ("ddp", "replicate")]
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adalora", "adamss", "frod", "xlora"])
def test_methods_that_act_after_a_step_train_under_ddp(method: str, recipe: Path) -> None:
    settings = (f"method={json.dumps(settings_of(method, 'causal_lm'))}", "training.verify=false")
    folders = [trained(recipe, strategy, *settings) for strategy in ("ddp", "replicate")]
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_as_with_the_whole_model(method: str, recipe: Path) -> None:
    settings = f"method={json.dumps(settings_of(method, 'causal_lm'))}"
    assert_alike(recipe, settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2"])
@pytest.mark.parametrize(
    "setting",
    ["training.gradient_checkpointing=true", "training.bf16=true", "method.modules_to_save=[lm_head]"],
)
def test_every_shape_trains_as_with_the_whole_model(kind: str, setting: str, tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path, trainkit.base_folder(kind))
    assert_alike(recipe, setting)


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
    for strategy, count in [(each, count) for each in ("replicate", "ddp", "fsdp") for count in (2, 4)]:
        size = f"training.per_device_train_batch_size={8 // count}"
        folder = trained(recipe, strategy, size, *settings, count=count)
        assert losses(folder) == pytest.approx(one.losses, rel=1e-5)
        torch.testing.assert_close(load_file(folder / "adapter_model.safetensors"), wanted, atol=1e-5, rtol=1e-5)
