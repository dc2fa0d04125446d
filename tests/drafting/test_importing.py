"""Recipes of other tools become ours. The files in ``recipes/`` have the keys and values of the tools' examples."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from trainkit import base_folder

from peftcli.cli.app import main
from peftcli.drafting.foreign import read_foreign
from peftcli.drafting.importing import import_recipe
from peftcli.drafting.peers import COMMAND, PEERS
from peftcli.drafting.peers.base import To
from peftcli.errors import PeftcliError, UsageError
from peftcli.methods import METHODS
from peftcli.output_schemas import output_schema
from peftcli.recipe import explain
from peftcli.tasks.settings import PreferenceSettings

ROOT = Path(__file__).parents[2]
RECIPES = Path(__file__).parent / "recipes"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NF4 = {"type": "nf4", "double_quant": True}

IMPORTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "axolotl/lora-alpaca.yml": (
        "axolotl",
        {
            "base_model.attn_implementation": "flash_attention_2",
            "dataset.format": "alpaca",
            "dataset.packing": True,
            "dataset.max_length": 2048,
            "dataset.eval_fraction": 0.1,
            "dataset.train_on": "answers",
            "training.optim": "adamw_8bit",
            "training.per_device_train_batch_size": 2,
            "training.warmup_steps": 10,
            "training.eval_strategy": "epoch",
        },
        "strict dataset_prepared_path eval_sample_packing pad_to_sequence_len tf32 loss_watchdog_threshold "
        "loss_watchdog_patience special_tokens.pad_token evals_per_epoch",
    ),
    "axolotl/qlora-chat.yml": (
        "axolotl",
        {
            "base_model.quantization": NF4,
            "dataset.format": "sharegpt",
            "method.target_modules": "all-linear",
            "method.use_rslora": True,
            "training.use_liger_kernel": True,
            "training.neftune_noise_alpha": 5,
            "launch.strategy": "zero2",
            "training.warmup_ratio": 0.1,
        },
        "hub_model_id datasets[0].ds_type lora_mlp_kernel gradient_checkpointing_kwargs.use_reentrant",
    ),
    "axolotl/dpo.yml": (
        "axolotl",
        {"task.type": "preference", "task.loss": "dpo", "task.beta": 0.2, "dataset.eval_fraction": 0.05},
        "model_type tokenizer_type",
    ),
    "llama_factory/sft.yaml": (
        "llama-factory",
        {
            "method.lora_alpha": 16,
            "dataset.mix": [
                {"train": "data/alpaca.jsonl", "format": "alpaca", "limit": 1000},
                {"train": "data/chat.jsonl", "format": "messages", "limit": 1000},
            ],
            "training.gradient_checkpointing": True,
        },
        "do_train template overwrite_cache preprocessing_num_workers plot_loss overwrite_output_dir save_only_model "
        "ddp_timeout trust_remote_code",
    ),
    "llama_factory/qlora.yaml": (
        "llama-factory",
        {
            "base_model.quantization": NF4,
            "method.use_dora": True,
            "method.target_modules": ["q_proj", "v_proj"],
            "dataset.columns": {"instruction": "query", "output": "response"},
            "dataset.packing": True,
            "dataset.train_on": "last_answer",
            "training.learning_rate": 1e-4,
            "training.lr_scheduler_type": "linear",
        },
        "do_train template use_swanlab",
    ),
    "llama_factory/dpo.yaml": (
        "llama-factory",
        {"task.loss": "orpo", "task.beta": 0.1, "dataset.train": "data/pairs.jsonl", "method.r": 8},
        "do_train template",
    ),
    "trl/sft.yaml": (
        "trl",
        {
            "base_model.dtype": "bfloat16",
            "dataset.eval_split": "test",
            "dataset.max_length": 1024,
            "dataset.train_on": "answers",
            "method.lora_dropout": 0.05,
            "training.report_to": ["wandb"],
        },
        "push_to_hub",
    ),
    "trl/sft.sh": (
        "trl",
        {
            "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "dataset.train_on": "all",
            "dataset.max_length": 512,
            "method.lora_alpha": 32,
            "training.output_dir": "outputs/sft",
            "training.per_device_train_batch_size": 2,
        },
        "run_name environment.CUDA_VISIBLE_DEVICES",
    ),
    "trl/dpo.sh": (
        "trl",
        {"task.loss": "ipo", "task.beta": 0.05, "base_model.quantization": "nf4", "training.max_steps": 1000},
        "launcher.config_file remove_unused_columns",
    ),
    "ms_swift/sft.sh": (
        "ms-swift",
        {
            "dataset.mix": [
                {"train": "AI-ModelScope/alpaca-gpt4-data-en", "limit": 500},
                {
                    "train": "data/query.jsonl",
                    "format": "alpaca",
                    "columns": {"instruction": "query", "output": "response"},
                },
            ],
            "dataset.overlong": "drop",
            "training.lr_scheduler_type": "cosine",
            "training.adam_beta2": 0.95,
            "training.weight_decay": 0.1,
        },
        "system model_author model_name eval_steps environment.CUDA_VISIBLE_DEVICES",
    ),
    "ms_swift/kto.yaml": (
        "ms-swift",
        {"task.loss": "kto", "launch.strategy": "zero2", "dataset.overlong": "truncate", "dataset.eval_fraction": 0.01},
        "",
    ),
    "unsloth/config.yaml": (
        "unsloth",
        {
            "method.r": 64,
            "method.target_modules": PROJECTIONS,
            "dataset.train_on": "answers",
            "training.warmup_steps": 5,
            "training.report_to": ["tensorboard"],
            "training.seed": 3407,
        },
        "lora.vision_all_linear lora.use_loftq logging.wandb_project logging.tensorboard_dir",
    ),
    "unsloth/notebook.py": (
        "unsloth",
        {
            "dataset.train": "data/chat.jsonl",
            "dataset.train_on": "answers",
            "dataset.max_length": 1024,
            "method.r": 16,
            "training.max_steps": 60,
            "training.gradient_checkpointing": True,
        },
        "from_pretrained.token get_chat_template.chat_template SFTTrainer.model SFTTrainer.tokenizer "
        "SFTTrainer.train_dataset SFTConfig.fp16 SFTConfig.bf16 SFTTrainer.dataset_text_field",
    ),
    "torchtune/lora.yaml": (
        "torchtune",
        {
            "dataset.train": "yahma/alpaca-cleaned",
            "dataset.train_on": "all",
            "method.target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            "training.max_grad_norm": 0,
            "training.lr_scheduler_type": "cosine",
        },
        "tokenizer._component_ tokenizer.path tokenizer.max_seq_len checkpointer._component_ "
        "checkpointer.checkpoint_files checkpointer.model_type checkpointer.output_dir "
        "resume_from_checkpoint save_adapter_weights_only "
        "optimizer.fused metric_logger.log_dir log_peak_memory_stats device enable_activation_offloading "
        "profiler._component_ profiler.enabled profiler.output_dir profiler.cpu",
    ),
    "torchtune/qlora-chat.yaml": (
        "torchtune",
        {
            "base_model.quantization": "nf4",
            "dataset.format": "sharegpt",
            "dataset.train": "data/sharegpt.jsonl",
            "training.max_steps": 20,
            "training.optim": "paged_adamw_32bit",
        },
        "checkpointer._component_",
    ),
    "mlx_lm/lora.yaml": (
        "mlx-lm",
        {
            "dataset.train": "mlx_lm/rows/train.jsonl",
            "dataset.eval": "mlx_lm/rows/valid.jsonl",
            "dataset.columns": {"instruction": "prompt", "output": "completion"},
            "method.lora_alpha": 160,
            "training.max_steps": 1000,
            "training.lr_scheduler_type": "cosine",
        },
        "train val_batches test test_batches lr_schedule.warmup_init num_layers",
    ),
    "mlx_lm/lora.sh": (
        "mlx-lm",
        {"method.use_dora": True, "method.lora_alpha": 160, "training.max_steps": 600, "dataset.train_on": "answers"},
        "train",
    ),
}
"""File -> the tool, some of our settings, and the keys that have a value and are not carried."""


@pytest.fixture(autouse=True)
def _in_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES)


def _at(recipe: dict[str, Any], key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = value[name]
    return value


@pytest.mark.parametrize("file", IMPORTED)
def test_a_recipe(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool, settings, left_out = IMPORTED[file]
    output = tmp_path / "recipe.yaml"
    assert main(["import", file, "--output", str(output), "--json"]) == 0
    printed, log = capsys.readouterr()
    found = json.loads(printed)
    jsonschema.validate(found, output_schema("import"))
    assert found["tool"] == tool
    assert found["recipe"] == output.read_text()
    assert found["recipe"].startswith("# yaml-language-server: $schema=")
    assert {key: _at(yaml.safe_load(found["recipe"]), key) for key in settings} == settings
    empty = "has no value, and so no effect"
    named = {each["key"] for each in found["not_carried"] if each["reason"] != empty}
    assert named == set(left_out.split())
    assert all(f"{key}: " in log and f"#   {key}: " in found["recipe"] for key in named)
    given = {key.removeprefix("no_") for key in read_foreign(Path(file)).values}
    assert given <= {*found["carried"], *(each["key"] for each in found["not_carried"]), COMMAND}
    assert "hf_abc" not in printed + log
    assert not Path("executed").exists()
    assert main(["check", str(output)]) == 0


def _write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


_AXOLOTL = "base_model: a/b\nsequence_len: 10\nmicro_batch_size: 1\ndatasets: [{path: c/d, type: alpaca}]\n"
_TORCHTUNE = (
    "model: {_component_: x.lora_y}\ncheckpointer: {checkpoint_dir: a/b}\n"
    "optimizer: {_component_: torch.optim.SGD, lr: 1e-3}"
)


@pytest.mark.parametrize(
    ("name", "text", "options", "message"),
    [
        ("a.yml", "a: [1, 2\nb: }", (), "not valid YAML"),
        ("a.yml", "- 1\n- 2\n", (), "expected a mapping"),
        ("a.yml", "!!python/object/apply:os.system ['touch executed']", (), "YAML tag"),
        (
            "a.yml",
            "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 30)),
            (),
            "20000",
        ),
        ("a.yml", "a: " + "x" * 1_000_001, (), "bytes"),
        ("a.yml", "colour: red\n", (), "do not say which tool"),
        ("a.yml", "colour: red\n", ("--from", "spellbook"), "no importer for 'spellbook'"),
        ("a.yml", _AXOLOTL, (), "full fine-tuning"),
        ("a.yml", f"{_AXOLOTL}adapter: lora\nrl: grpo\n", (), "rl: grpo: learning from sampled answers"),
        ("a.yml", f"{_AXOLOTL.replace('base_model: a/b', '')}adapter: lora\n", (), "names no base model"),
        ("a.yml", "model_name_or_path: a/b\nstage: sft\ndataset: x\ncutoff_len: 5\n", (), "dataset_info.json"),
        ("a.yml", f"{_TORCHTUNE}\ndataset: [{{_component_: x.alpaca_dataset}}]\n", (), "a list of datasets"),
        ("a.sh", "ls -l\n", (), "no command of a tool"),
        ("a.sh", "trl sft --model 'x\n", (), "never closed"),
        (
            "a.sh",
            "trl grpo --model_name_or_path a/b --use_peft --dataset_name c/d\n",
            (),
            "grpo: learning from sampled",
        ),
        ("a.py", "x = (", (), "not a program"),
        ("a.py", "print(1)", (), "no call that can be imported"),
        ("a.ipynb", "{}", (), "not a notebook"),
        ("a.yml", None, (), "no such file"),
    ],
)
def test_a_file_that_cannot_be_imported(
    name: str,
    text: str | None,
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name if text is None else _write(tmp_path, name, text)
    assert main(["import", str(path), *options]) == 2
    printed, log = capsys.readouterr()
    assert printed == ""
    assert message in log
    assert len(log.splitlines()) <= 6
    assert not Path("executed").exists()


_NOTEBOOK = json.dumps(
    {
        "cells": [
            {"cell_type": "code", "source": ["%%capture\n", "!touch executed"]},
            {
                "cell_type": "code",
                "source": "r = 4\n"
                "m, t = FastLanguageModel.from_pretrained('a/b-bnb-4bit')\n"
                "m = FastLanguageModel.get_peft_model(m, r=r, **more)\n"
                "d = load_dataset('c/d', split='train[:10%]')\n"
                "SFTTrainer(model=m, args=SFTConfig(num_train_epochs=2))",
            },
        ]
    }
)
_LLAMA_FACTORY = "llamafactory-cli train --stage rm --model_name_or_path a/b --dataset_dir ONLINE --dataset c/d"


@pytest.mark.parametrize(
    ("name", "text", "settings", "left_out"),
    [
        (
            "a.ipynb",
            _NOTEBOOK,
            {
                "base_model.quantization": "nf4",
                "method.r": 4,
                "training.learning_rate": 2e-5,
                "training.per_device_train_batch_size": 8,
            },
            {"load_dataset.split", "get_peft_model.**", "SFTTrainer.model"},
        ),
        (
            "a.sh",
            f"{_LLAMA_FACTORY} --lora_rank 4\nllamafactory-cli export merge.yaml\n",
            {"task": "reward", "method.r": 4, "method.lora_alpha": 8, "dataset.train": "c/d"},
            set(),
        ),
        (
            "a.yml",
            f"{_AXOLOTL}adapter: lora\nfsdp: [full_shard]\nfsdp_config: {{fsdp_offload_params: true, other: 1}}\n"
            "lr_scheduler: cosine_with_min_lr\nrl: kto\nval_set_size: 50\n",
            {
                "launch.strategy": "fsdp",
                "launch.cpu_offload": True,
                "task.loss": "kto",
                "training.lr_scheduler_type": "cosine",
            },
            {"fsdp_config.other", "val_set_size"},
        ),
        (
            "a.yml",
            f"{_AXOLOTL}adapter: lora\nfsdp_config: {{sharding_strategy: HYBRID_SHARD}}\n",
            {"launch.strategy": "hybrid"},
            {"fsdp_config.sharding_strategy"},
        ),
        (
            "a.yaml",
            "model: a/b\nfine_tune_type: lora\niters: 7\nhf_dataset: {path: c/d, text_feature: body}\n",
            {"dataset.columns": {"text": "body"}, "method.lora_alpha": 160, "training.max_steps": 7},
            {"num_layers (mlx-lm's default 16)"},
        ),
        (
            "a.yml",
            f"{_AXOLOTL}adapter: lora\nlr_scheduler: constant\nrl: simpo\ntrl: {{beta: 0.3}}\n",
            {
                "training.lr_scheduler_type": "constant",
                "task": {"type": "preference", "loss": "simpo", "beta": 0.3},
                "dataset.overlong": "drop",
            },
            {"cpo_alpha (axolotl's default)"},
        ),
        (
            "a.yml",
            f"{_AXOLOTL.replace('alpaca', 'chat_template.default')}adapter: lora\nrl: dpo\n",
            {"dataset.columns": {"prompt": "messages"}, "task.beta": 0.1},
            set(),
        ),
        (
            "a.sh",
            "swift rlhf --rlhf_type simpo --model a/b --dataset c/d --lr_scheduler_type constant --warmup_ratio 0.1",
            {"task.beta": 2.0, "task.simpo_gamma": 1.0, "training.lr_scheduler_type": "constant"},
            {"cpo_alpha (ms-swift's default)", "warmup_ratio"},
        ),
        (
            "a.yaml",
            "model_name_or_path: a/b\nuse_peft: true\ndatasets: [{path: json, data_files: data/chat.jsonl}]\n",
            {"dataset.train": "data/chat.jsonl", "dataset.train_on": "all"},
            set(),
        ),
        (
            "a.yaml",
            "model_name_or_path: a/b\nstage: sft\ncutoff_len: 8\ndataset_dir: ONLINE\ndataset: c/d,e/f\n"
            "mix_strategy: interleave_under\n",
            {"dataset.mix": [{"train": "c/d", "weight": 1}, {"train": "e/f", "weight": 1}]},
            set(),
        ),
        (
            "a.sh",
            "swift sft --model a/b --dataset c/d#500 --packing true --max_length 5 # a comment, don't read it",
            {"dataset.train": "c/d", "dataset.limit": 500, "dataset.packing": True, "dataset.max_length": 5},
            set(),
        ),
        (
            "a.py",
            "if True:\n    FastLanguageModel.from_pretrained('a/b')\nd = load_dataset('c/d')\nv = load_dataset('e/f')\n"
            "FastLanguageModel.from_pretrained('my_lora')",
            {"base_model.name": "a/b", "dataset.train": "c/d"},
            {"load_dataset (line 4)", "FastLanguageModel.from_pretrained (line 5)"},
        ),
        (
            "a.sh",
            "llamafactory-cli train --model_name_or_path a/b --dataset_dir ONLINE --dataset c/d "
            "--disable_gradient_checkpointing true",
            {"training.gradient_checkpointing": False},
            set(),
        ),
        (
            "a.yaml",
            f"{_TORCHTUNE}\ndataset: {{_component_: torchtune.datasets.wikitext_dataset}}\n",
            {"dataset.name": "wikitext-103-v1", "training.weight_decay": 0.0},
            {"tokenizer.max_seq_len"},
        ),
    ],
)
def test_defaults_and_what_goes_together(
    name: str, text: str, settings: dict[str, Any], left_out: set[str], tmp_path: Path
) -> None:
    found = import_recipe(_write(tmp_path, name, text))
    recipe = yaml.safe_load(found.recipe)
    assert {key: _at(recipe, key) for key in settings} == settings
    assert left_out <= {*found.not_carried}
    assert not left_out & {*found.carried}


def test_nothing_of_a_shell_script_is_executed(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "a.sh",
        "NAME=a/b; touch executed\n"
        "trl sft --model_name_or_path $NAME --use_peft --dataset_name c/d --seed `touch executed` "
        "--run_name $(touch executed) --lora_r $RANK --output_dir ${OUT:-runs}/x; touch executed\n",
    )
    found = import_recipe(path)
    assert not Path("executed").exists()
    assert {"seed", "run_name", "lora_r"} <= {*found.not_carried}
    assert yaml.safe_load(found.recipe)["training"]["output_dir"] == "runs/x"
    assert yaml.safe_load(found.recipe)["base_model"] == "a/b"


def test_what_the_check_refuses_is_not_carried(tmp_path: Path) -> None:
    text = f"{_AXOLOTL}adapter: lora\nlora_r: -3\nlora_alpha: [1]\nnew_key: 1\nlr_scheduler: rex\nhub_token: hf_x\n"
    text += f"output_dir: [1]\nmax_steps: .inf\nlora_model_dir: {'x' * 3000}\n"
    found = import_recipe(_write(tmp_path, "a.yml", text))
    assert {"lora_r", "lora_alpha", "new_key", "lr_scheduler", "hub_token", "max_steps"} <= {*found.not_carried}
    assert yaml.safe_load(found.recipe)["training"]["output_dir"] == "model-out"
    assert found.not_carried["new_key"][1] == "unknown to this importer"
    assert "hf_x" not in found.recipe
    assert found.problems == []


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    output = _write(tmp_path, "mine.yaml", "mine")
    assert main(["import", "mlx_lm/lora.yaml", "--output", str(output)]) == 2
    assert output.read_text() == "mine"


def test_a_file_beside_the_recipe_is_found_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = import_recipe(RECIPES / "llama_factory/dpo.yaml")
    assert Path(yaml.safe_load(found.recipe)["dataset"]["train"]).samefile(RECIPES / "data/pairs.jsonl")
    assert found.problems == []


def test_the_keys_of_one_tool_are_not_anothers() -> None:
    with pytest.raises(UsageError, match="full fine-tuning"):
        import_recipe(RECIPES / "mlx_lm/lora.yaml", "trl")
    with pytest.raises(PeftcliError):
        import_recipe(RECIPES / "data")


@pytest.mark.parametrize("name", PEERS)
def test_tables_name_settings_that_exist(name: str) -> None:
    peer = PEERS[name]
    keys = {rule.key for rule in peer.table.values() if isinstance(rule, To)} | {*peer.defaults}
    configs = (METHODS["lora"].config_class, METHODS["oft"].config_class)
    known = {
        "method": {each.name for config in configs for each in dataclasses.fields(config())},
        "task": {each.name for each in dataclasses.fields(PreferenceSettings)},
    }
    for key in keys:
        section, _, setting = key.partition(".")
        assert setting in known[section] if section in known else explain(key).kind == "setting"


def test_the_page_of_imported_recipes_is_current() -> None:
    ran = subprocess.run(
        [sys.executable, str(ROOT / "docs/importing.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")


_TRAINED = "trl/sft.sh unsloth/config.yaml unsloth/notebook.py axolotl/dpo.yml llama_factory/dpo.yaml mlx_lm/lora.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("file", _TRAINED.split())
def test_an_imported_recipe_trains(file: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert main(["import", file, "--output", str(recipe)]) == 0
    here = {
        "base_model.name": base_folder(),
        "training.output_dir": tmp_path / "run",
        "training.max_steps": 3,
        "training.bf16": "false",
        "training.report_to": "[]",
        "dataset.max_length": 64,
    }
    assert main(["train", str(recipe), *(f"{key}={value}" for key, value in here.items())]) == 0
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["status"] == "complete"
    assert (tmp_path / "run/adapter_model.safetensors").is_file()
