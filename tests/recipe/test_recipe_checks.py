from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from peftcli.errors import UsageError
from peftcli.recipe import gate_holds, parse_gate


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["method.lora_dropout=1"], "method.lora_dropout", "must be in [0, 1), not 1.0"),
        (["dataset.eval=null", "dataset.eval_fraction=1"], "dataset.eval_fraction", "must be below 1, not 1.0"),
        (["training.learning_rate=-1"], "training.learning_rate", "must not be negative, found -1.0"),
        (["training.warmup_steps=1.5"], "training.warmup_steps", "must be a whole number or below 1, not 1.5"),
        (
            ["training.lr_scheduler_type=constant", "training.warmup_steps=3"],
            "training.lr_scheduler_type",
            "constant has no warm-up",
        ),
        (
            ["training.eval_strategy=no", "training.eval_on_start=true"],
            "training.eval_on_start",
            "does nothing where training.eval_strategy is no",
        ),
        (["training.seed=4294967296"], "training.seed", "must be at most 4,294,967,295, found 4294967296"),
        (
            ["training.weight_decay=1e39"],
            "training.weight_decay",
            "must be at most 3.4e+38, the largest number of float32",
        ),
        (
            ["training.gradient_accumulation_steps=100000", "training.per_device_train_batch_size=1000"],
            "training.per_device_train_batch_size",
            "and gradient_accumulation_steps make a batch of 100,000,000 examples; at most 10,000,000",
        ),
        (["method.r=4294967296"], "method.r", "must be at most 2147483647, found 4294967296"),
        (["method.alpha_pattern={q_proj: 1e300}"], "method.alpha_pattern.q_proj", "the largest number of float32"),
        (["method={type: poly, n_tasks: 2}"], "method.n_tasks", "must be 1 in a recipe"),
        (
            ["method={type: multitask_prompt_tuning, num_virtual_tokens: 4, num_tasks: 2}"],
            "method.num_tasks",
            "must be 1 in a recipe",
        ),
        (
            ["training.load_best_model_at_end=true", "dataset.eval=null"],
            "training.load_best_model_at_end",
            "needs evaluation data",
        ),
        (
            ["training.load_best_model_at_end=true", "training.eval_strategy=no"],
            "training.load_best_model_at_end",
            "needs evaluations",
        ),
        (["gates.eval_loss=< 1", "dataset.eval=null"], "gates.eval_loss", "needs evaluation data"),
        (["gates.eval_loss=< 1", "training.eval_strategy=no"], "gates.eval_loss", "needs an evaluation"),
        (["base_model.trust_remote_code=true"], "base_model.trust_remote_code", "base_model.revision must name"),
        (["base_model=.", "base_model.revision=v2"], "base_model.revision", "applies to hub models"),
        (
            ["launch={strategy: fsdp, cpu_ram_efficient_loading: true}", "base_model.quantization=nf4"],
            "launch.cpu_ram_efficient_loading",
            "is not for weights that are quantised while they are loaded",
        ),
        (["launch.num_machines=2"], "launch.num_machines", "above 1 needs launch.main_process_port"),
        (["launch.cpu_offload=true"], "launch.cpu_offload", "is for fsdp, hybrid and zero3, not replicate"),
        (["launch={strategy: fsdp, shard_size: 2}"], "launch.shard_size", "is for hybrid, not fsdp"),
        (
            ["launch={strategy: hybrid, num_processes: 8, shard_size: 3}"],
            "launch.shard_size",
            "must divide the 8 processes of a machine, and is 3",
        ),
        (["launch.zero_optimization={overlap_comm: true}"], "launch.zero_optimization", "is for zero2 and zero3, not"),
        (
            ["launch={strategy: zero2, zero_optimization: {stage: 2}}"],
            "launch.zero_optimization",
            "stage is not among allgather_bucket_size, ",
        ),
        (["task=CAUSAL_LM"], "task", "unknown task: 'CAUSAL_LM'"),
        *(([f"base_model={name}"], "base_model.name", "no such file or folder") for name in ("./x", "~/x", "x.gguf")),
    ],
)
def test_what_settings_mean_together(problem, overrides: list[str], key: str, message: str) -> None:
    found = problem("", *overrides)
    assert found.key == key
    assert message in found.message


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset.eval=null", "dataset.eval_fraction=0.1", "training.load_best_model_at_end=true"],
        ["training.num_train_epochs=0", "training.max_steps=5"],
        ["training.learning_rate=0"],
        ["training.max_grad_norm=0"],
        ["launch.num_machines=2", "launch.machine_rank=1", "launch.main_process_port=29500"],
        ["base_model.trust_remote_code=true", "base_model.revision=abc"],
        ["base_model.trust_remote_code=true", "base_model=."],
        ["method.init_lora_weights=gaussian"],
        ["method.layers_to_transform=3"],
        ["training.metric_for_best_model=anything at all"],
        ["training.per_device_train_batch_size=10000", "training.gradient_accumulation_steps=1000"],
        ["method.target_modules=.*\\.(q|v)_proj"],
        ["method.lora_alpha=3e38"],
    ],
)
def test_valid_recipes_are_not_refused(load, overrides: list[str]) -> None:
    load("", *overrides)


def test_a_check_says_nothing_about_what_could_not_be_read(problem) -> None:
    assert problem("", "dataset.eval_fraction=x", "gates.eval_loss=< 1").key == "dataset.eval_fraction"
    assert problem("", "launch.num_machines=x", "launch.machine_rank=4").key == "launch.num_machines"


def test_missing_data_files_have_a_near_name(problem, load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/train.jsonl").touch()
    found = problem("", "dataset.train=data/trian.jsonl")
    assert (found.message, found.suggestion) == ("no such file: data/trian.jsonl", "data/train.jsonl")
    assert load("", "dataset.train=data/train.jsonl").dataset.train == "data/train.jsonl"
    assert problem("", "dataset.train=[data/train.jsonl]").suggestion == "dataset.mix"
    assert problem("", "dataset.train=" + "x" * 5000 + ".json").message.startswith("no such file")


@pytest.mark.parametrize(
    ("text", "op", "bound"),
    [("<= 1.2", "<=", 1.2), (">0", ">", 0.0), ("== 1e-3", "==", 0.001), ("  < -.5 ", "<", -0.5), (">= 2.", ">=", 2.0)],
)
def test_gates(text: str, op: str, bound: float) -> None:
    assert parse_gate(text) == (op, bound)


@pytest.mark.parametrize("text", ["", "1.2", "=< 1", "<= x", "<= 1 2", "!= 1", "<= nan", "<= 1e400", "<" + " " * 9999])
def test_what_is_no_gate(text: str) -> None:
    with pytest.raises(UsageError, match="expected an operator"):
        parse_gate(text)


def test_gate_holds() -> None:
    assert gate_holds("<=", 1.0, 1.0)
    assert not gate_holds("<", 1.0, 1.0)
    assert gate_holds(">=", 1.0, 1.0)
    assert not gate_holds(">", 1.0, 1.0)
    assert gate_holds("==", 1.0, 1.0)
    assert not any(gate_holds(op, math.nan, 1.0) for op in ("<=", "<", ">=", ">", "=="))


def test_a_link_that_leads_nowhere_is_not_suggested_in_its_own_place(problem, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").symlink_to(tmp_path / "gone")
    found = problem("", f"dataset.train={tmp_path}/data.jsonl")
    assert (found.message, found.suggestion) == (f"no such file: {tmp_path}/data.jsonl", None)


@pytest.mark.parametrize("name", ["", "checkpoints/step-000100", "previous-1"])
def test_a_run_does_not_begin_from_what_it_writes(problem, load, tmp_path: Path, name: str) -> None:
    (tmp_path / "out" / name).mkdir(parents=True)
    settings = (f"training.output_dir={tmp_path}/out", f"training.init_adapter_from={tmp_path}/out/{name}")
    if name == "previous-1":  # it stays as it is
        assert load("", *settings)
    else:
        assert "is in training.output_dir" in problem("", *settings).message


def test_a_template_that_is_a_folder_or_a_pipe(problem, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").mkdir()
    os.mkfifo(tmp_path / "b.jinja")
    for name in ("a.jinja", "b.jinja"):
        assert "not a regular file" in problem("", f"base_model.chat_template={tmp_path}/{name}").message
