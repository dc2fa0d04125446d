"""mlx-lm: the YAML file and options of ``mlx_lm.lora``; its data are a folder of train, valid and test files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.drafting.peers.base import COMMAND, By, Draft, Peer, Rule, To, first_columns, number, reasons, truth, whole
from peftcli.errors import UsageError
from peftcli.guard.files import is_file, is_folder, read_json_object

_RANK, _SCALE = 8, 20.0
_LAST = 16
_MAX_CONFIG = 4_000_000

TABLE: dict[str, Rule] = {
    COMMAND: By("task.type"),
    "model": By("base_model.name"),
    "train": "peftcli train trains in any case",
    "test": "run `peftcli evaluate` with the test rows",
    "test_batches": "run `peftcli evaluate` with the test rows",
    "fine_tune_type": By("method.type"),
    "train_type": By("method.type"),
    "train_mode": By("task.type"),
    "training_mode": By("task.type"),
    "data": By("dataset.train"),
    "hf_dataset": "expected a mapping with path",
    "hf_dataset.path": By("dataset.train"),
    "hf_dataset.name": By("dataset.train"),
    "hf_dataset.config.name": By("dataset.name"),
    "hf_dataset.train_split": By("dataset.split"),
    "hf_dataset.valid_split": By("dataset.eval_split"),
    "hf_dataset.text_feature": By("dataset.columns"),
    "hf_dataset.prompt_feature": By("dataset.columns"),
    "hf_dataset.completion_feature": By("dataset.columns"),
    "hf_dataset.chat_feature": By("dataset.columns"),
    "hf_dataset.*": "a detail of the dataset that dataset.train does not have",
    "mask_prompt": By("dataset.train_on"),
    "max_seq_length": To("dataset.max_length", whole),
    "trust_remote_code": To("base_model.trust_remote_code", truth),
    "reference_model_path": "another reference model; peftcli compares with the base model, adapter off",
    "seed": To("training.seed", whole),
    "num_layers": By("method.layers_to_transform"),
    "lora_layers": By("method.layers_to_transform"),
    "lora_parameters.rank": To("method.r", whole),
    "lora_parameters.scale": By("method.lora_alpha"),
    "lora_parameters.alpha": By("method.lora_alpha"),
    "lora_parameters.dropout": To("method.lora_dropout", number),
    "lora_parameters.keys": By("method.target_modules"),
    "batch_size": To("training.per_device_train_batch_size", whole),
    "grad_accumulation_steps": To("training.gradient_accumulation_steps", whole),
    "iters": To("training.max_steps", whole),
    "learning_rate": To("training.learning_rate", number),
    "lr_schedule.name": By("training.lr_scheduler_type"),
    "lr_schedule.warmup": To("training.warmup_steps", whole),
    "lr_schedule.arguments": By("training.learning_rate"),
    "lr_schedule.*": "a detail of the schedule that peftcli does not have",
    "optimizer": By("training.optim"),
    "optimizer_config.*": "arguments of the optimizer; write them under training.optim_args",
    "steps_per_report": To("training.logging_steps", whole),
    "steps_per_eval": To("training.eval_steps", whole),
    "save_every": To("training.save_steps", whole),
    "val_batches": "peftcli evaluates on all evaluation rows",
    "adapter_path": To("training.output_dir"),
    "resume_adapter_file": "weights of mlx-lm's own names; convert the adapter, and set training.init_adapter_from",
    "grad_checkpoint": To("training.gradient_checkpointing", truth),
    "wandb": By("training.report_to"),
    "report_to": By("training.report_to"),
    "project_name": "the project's name is WANDB_PROJECT in the environment",
    "config": By("the file that it names, which was read"),
    "beta": "a setting of a preference loss; write it under task",
    **reasons(speed="clear_cache_threshold", export="fuse"),
}


def _build(draft: Draft) -> None:
    kind = str(draft.get("fine_tune_type", "train_type", default="lora"))
    if kind == "full":
        draft.refuse_full("fine_tune_type: full")
    mode = str(draft.get("training_mode", "train_mode", default="sft"))
    if mode not in ("sft", "normal"):
        draft.refuse(
            f"training_mode: {mode} cannot be imported", "Name the task in a recipe of yours: task: {type: preference}."
        )
    draft.say("task.type", "causal_lm", "mlx-lm: supervised training")
    draft.say("method.type", "lora", "from: fine_tune_type" if draft.get("fine_tune_type") else "mlx-lm's default")
    if kind == "dora":
        draft.put("method.use_dora", True, "fine_tune_type")
    if (model := draft.get("model")) is not None:
        draft.put("base_model.name", draft.path(model), "model")
        if str(model).startswith("mlx-community/"):
            draft.notes.append(f"model: {model}: files of MLX; name the model that they were made from")
    _strength(draft)
    _layers(draft)
    _data(draft)
    _schedule(draft)


def _strength(draft: Draft) -> None:
    rank, scale = draft.settings.get("method.r"), draft.get("lora_parameters.scale")
    if draft.get("lora_parameters.alpha") is not None and scale is None:
        draft.put("method.lora_alpha", number(draft.get("lora_parameters.alpha")), "lora_parameters.alpha")
        return
    if "lora_parameters.alpha" in draft.carried:
        draft.drop("lora_parameters.alpha", "scale decides where both are given")
    strength = number(_SCALE if scale is None else scale) * (rank.value if rank else _RANK)
    source = (
        "from: lora_parameters.scale, times rank"
        if scale is not None
        else f"mlx-lm's default scale {_SCALE}, times rank"
    )
    draft.say("method.lora_alpha", strength, source)
    keys = draft.get("lora_parameters.keys")
    if keys is None:
        draft.say("method.target_modules", "all-linear", "mlx-lm's default: every linear layer of a block")
    else:
        found = list(dict.fromkeys(str(key).rpartition(".")[2] for key in keys))
        draft.put("method.target_modules", found, "lora_parameters.keys")


def _layers(draft: Draft) -> None:
    key = "num_layers" if draft.get("num_layers") is not None else "lora_layers"
    count = whole(draft.get("num_layers", "lora_layers", default=_LAST))
    if count < 0:
        draft.carried[key] = "method.layers_to_transform (unset: all layers)"
        return
    config = (
        Path(str(draft.settings["base_model.name"].value)) / "config.json"
        if "base_model.name" in draft.settings
        else None
    )
    whose = key if draft.get(key) is not None else f"num_layers (mlx-lm's default {_LAST})"
    if config is None or not is_file(config):
        draft.drop(
            whose,
            f"the last {count} layers alone; set method.layers_to_transform to their numbers, or without it all "
            "layers train",
            count,
        )
        return
    total = read_json_object(config, _MAX_CONFIG, UsageError).get("num_hidden_layers")
    if isinstance(total, int) and 0 < count < total <= 10_000:
        draft.say("method.layers_to_transform", list(range(total - count, total)), f"from: {whose}")
    elif whose in draft.carried:
        draft.carried[whose] = "method.layers_to_transform (unset: all layers)"


def _data(draft: Draft) -> None:
    folder, hub = draft.get("data"), draft.get("hf_dataset.path", "hf_dataset.name")
    if hub is not None:
        features = {
            "prompt": "prompt_feature",
            "completion": "completion_feature",
            "text": "text_feature",
            "messages": "chat_feature",
        }
        given = {ours: draft.values.get(f"hf_dataset.{key}") for ours, key in features.items()}
        columns = {ours: str(theirs) for ours, theirs in given.items() if theirs}
        draft.add_source(
            "hf_dataset", train=draft.path(hub), name=draft.get("hf_dataset.config.name"), **_form([*columns], columns)
        )
        for key, ours in (("train_split", "split"), ("valid_split", "eval_split")):
            split = draft.get(f"hf_dataset.{key}")
            if split is not None and "[" in str(split):
                draft.drop(f"hf_dataset.{key}", "a slice of a split; see dataset.limit and dataset.eval_fraction")
            elif split is not None:
                draft.put(f"dataset.{ours}", split, f"hf_dataset.{key}")
    elif folder is not None:
        _folder(draft, draft.path(folder))
    whole_text = draft.get("mask_prompt")
    masked = whole_text is not None and truth(whole_text)
    draft.say(
        "dataset.train_on",
        "answers" if masked else "all",
        "from: mask_prompt" if whole_text is not None else "mlx-lm's default: prompts are trained too",
    )


def _folder(draft: Draft, path: str) -> None:
    """Write the files of a data folder, and the form of their rows."""
    train, valid = Path(path) / "train.jsonl", Path(path) / "valid.jsonl"
    if not is_file(train):
        draft.add_source("data", train=path if not is_folder(Path(path)) else train.as_posix())
        return
    draft.add_source("data", train=train.as_posix(), **_form(first_columns(str(train)), {}))
    if is_file(valid):
        draft.put("dataset.eval", valid.as_posix(), "data: its valid.jsonl")


def _form(found: list[str], columns: dict[str, str]) -> dict[str, Any]:
    """Return format and columns: a prompt becomes the user's turn in the chat template, as mlx-lm does it."""
    if {"prompt", "completion"} <= {*found}:
        return {
            "format": "alpaca",
            "columns": {
                "instruction": columns.get("prompt", "prompt"),
                "output": columns.get("completion", "completion"),
            },
        }
    form = next((name for name in ("messages", "text") if name in found), None)
    return (
        {"format": form, "columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs}}
        if form
        else {}
    )


def _schedule(draft: Draft) -> None:
    name = str(draft.get("lr_schedule.name", default=""))
    ours = {"cosine_decay": "cosine", "linear_schedule": "linear"}.get(name)
    if ours:
        draft.put("training.lr_scheduler_type", ours, "lr_schedule.name")
    elif name:
        draft.drop("lr_schedule.name", "peftcli has no such schedule; the rate stays constant")
    arguments = draft.get("lr_schedule.arguments")
    if arguments:
        draft.put("training.learning_rate", number(arguments[0]), "lr_schedule.arguments, which replace learning_rate")
        if len(arguments) > 2 and number(arguments[2]):
            draft.notes.append("lr_schedule.arguments: the rate ends at 0, not at the last one")
    optimizer = str(draft.get("optimizer", default="adam")).lower()
    known = {"adam": "adamw_torch", "adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor"}
    if optimizer in known:
        draft.say(
            "training.optim",
            known[optimizer],
            "from: optimizer" if draft.get("optimizer") else "mlx-lm's default: adam",
        )
    else:
        draft.drop("optimizer", "peftcli has no such optimizer; adamw_torch is used")
    if "training.weight_decay" not in draft.settings:
        draft.say("training.weight_decay", 0.01 if optimizer == "adamw" else 0.0, f"mlx-lm's default of {optimizer}")
    tracker = draft.get("report_to", default="wandb" if draft.get("wandb") else None)
    if tracker in ("wandb", "tensorboard", "mlflow", "trackio"):
        draft.put("training.report_to", [tracker], "wandb" if draft.get("wandb") else "report_to")
    elif tracker is not None:
        draft.drop("report_to", "peftcli reports to tensorboard, wandb, mlflow and trackio")


PEER = Peer(
    name="mlx-lm",
    label="mlx-lm",
    table=TABLE,
    signs=(
        "fine_tune_type",
        "iters",
        "adapter_path",
        "lora_parameters",
        "steps_per_eval",
        "num_layers",
        "lora_layers",
        "grad_checkpoint",
        "mask_prompt",
        "steps_per_report",
        "val_batches",
        "save_every",
    ),
    build=_build,
    defaults={
        "method.r": _RANK,
        "method.lora_dropout": 0.0,
        "dataset.max_length": 2048,
        "training.per_device_train_batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 1000,
        "training.learning_rate": 1e-5,
        "training.lr_scheduler_type": "constant",
        "training.max_grad_norm": 0,
        "training.seed": 0,
        "training.eval_strategy": "steps",
        "training.eval_steps": 200,
        "training.save_strategy": "steps",
        "training.save_steps": 100,
        "training.logging_steps": 10,
        "training.output_dir": "adapters",
    },
)
