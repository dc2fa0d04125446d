"""The keys of transformers.TrainingArguments, which LLaMA-Factory, TRL, ms-swift and unsloth share, and their defaults.

Most have our recipe's names. Other tools' tables begin with this one and replace what they define themselves.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.drafting.peers.base import (
    By,
    Draft,
    Near,
    NotCarried,
    Rule,
    To,
    if_true,
    names,
    needless,
    number,
    one_of,
    reasons,
    truth,
    whole,
)
from peftcli.guard.files import is_file

SCHEDULES = {
    **{name: name for name in ("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt")},
    "cosine_with_restarts": Near("cosine", "peftcli's cosine does not restart"),
    "cosine_with_min_lr": Near("cosine", "peftcli's cosine ends at 0, not at a least rate"),
    "cosine_warmup_with_min_lr": Near("cosine", "peftcli's cosine ends at 0, not at a least rate"),
}
schedule = one_of(SCHEDULES, "peftcli has no schedule {}; it has linear, cosine, constant, polynomial and inverse_sqrt")

OPTIMIZERS = {
    **{
        name: name
        for name in (
            *("adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"),
            *("lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "adafactor", "sgd"),
        )
    },
    **dict.fromkeys(("adamw", "adamw_hf", "adam"), "adamw_torch"),
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw_32bit",
}
optimizer = one_of(OPTIMIZERS, "peftcli has no optimizer {}; it takes adamw_torch unless training.optim says otherwise")

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")


def trackers(value: Any) -> list[str] | None:
    """Return the trackers of ``report_to`` that we have."""
    found = names(value)
    if found == ["none"]:
        return None
    if other := [name for name in found if name not in TRACKERS]:
        raise NotCarried(f"peftcli reports to {', '.join(TRACKERS)}, not to {', '.join(other)}")
    return found


def kept(value: Any) -> Any:
    """Return the number of checkpoints to keep."""
    count = whole(value)
    return count if count >= 2 else Near(2, "peftcli keeps at least 2 checkpoints")


def strategy(value: Any) -> Any:
    """Return when to evaluate or save."""
    word = str(value).lower()
    if word in ("false", "no"):  # what YAML 1.1 makes of an unquoted no
        return "no"
    if word in ("steps", "epoch"):
        return word
    if word == "best":
        return Near("epoch", "peftcli keeps the newest checkpoints; see load_best_model_at_end")
    raise NotCarried(f"peftcli has no strategy {word}")


def precision(value: Any) -> bool | str:
    """Return bf16: true, false or auto."""
    return "auto" if str(value).lower() in ("auto", "full") else truth(value)


def float16(value: Any) -> None:
    """Accept that float16 is off; it has no place here if it is on."""
    if str(value).lower() not in ("auto",) and truth(value):
        raise NotCarried("float16 needs scaled losses, which peftcli does not do; bf16: auto decides")


def checkpointing(value: Any) -> bool:
    """Return gradient_checkpointing; unsloth's and axolotl's own kinds are ordinary checkpointing here."""
    return str(value).lower() in ("unsloth", "offload", "offload_disk") or truth(value)


def noise(value: Any) -> Any:
    """Return neftune_noise_alpha, or None for 0, which adds no noise."""
    return number(value) or None


def share_or_steps(value: Any) -> Any:
    """Return the number or share of warm-up steps; -1, another tool's default, means 0."""
    return max(0, number(value))


def attention(value: Any) -> str:
    """Return an implementation of attention that we have."""
    if str(value) not in ("eager", "sdpa", "flash_attention_2", "flex_attention"):
        raise NotCarried("peftcli has no such implementation of attention; transformers' default is used")
    return str(value)


LORA: dict[str, Rule] = {
    "lora_alpha": To("method.lora_alpha", number),
    "lora_dropout": To("method.lora_dropout", number),
    "use_dora": To("method.use_dora", truth),
    "use_rslora": To("method.use_rslora", truth),
}
"""The keys of LoRA that four tools take from PEFT."""
TABLE: dict[str, Rule] = {
    **{
        name: To(f"training.{name}", number)
        for name in (
            *("learning_rate", "num_train_epochs", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
            *("max_grad_norm", "warmup_ratio", "early_stopping_threshold"),
        )
    },
    **{
        name: To(f"training.{name}", whole)
        for name in (
            *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
            *("max_steps", "seed", "logging_steps", "eval_steps", "save_steps", "early_stopping_patience"),
        )
    },
    **{
        name: To(f"training.{name}", truth)
        for name in (
            "eval_on_start",
            "load_best_model_at_end",
            "greater_is_better",
            "torch_compile",
            "use_liger_kernel",
        )
    },
    **{name: To(f"training.{name}") for name in ("metric_for_best_model", "run_name", "output_dir")},
    "warmup_steps": To("training.warmup_steps", share_or_steps),
    "lr_scheduler_type": To("training.lr_scheduler_type", schedule),
    "optim": To("training.optim", optimizer),
    "eval_strategy": To("training.eval_strategy", strategy),
    "evaluation_strategy": To("training.eval_strategy", strategy),
    "save_strategy": To("training.save_strategy", strategy),
    "save_total_limit": To("training.save_total_limit", kept),
    "neftune_noise_alpha": To("training.neftune_noise_alpha", noise),
    "gradient_checkpointing": To("training.gradient_checkpointing", checkpointing),
    "activation_checkpointing": To("training.gradient_checkpointing", checkpointing),
    "group_by_length": To("training.train_sampling_strategy", if_true("group_by_length")),
    "train_sampling_strategy": To("training.train_sampling_strategy"),
    "dataloader_num_workers": To("training.dataloader_num_workers", whole),
    "report_to": To("training.report_to", trackers),
    "bf16": To("training.bf16", precision),
    "fp16": To("training.bf16", float16),
    "deepspeed": By("launch.deepspeed"),
    "full_determinism": "the same seed gives the same adapter here in any case",
    "data_seed": "training.seed decides the order of the data too",
    "lr_scheduler_kwargs.*": "further arguments of the schedule, which peftcli does not take",
    "optim_args": "a text of arguments; write them under training.optim_args",
    "fsdp": "how the model is divided over devices; see launch.strategy",
    "fsdp_config.*": "how the model is divided over devices; see launch.strategy",
    **needless(
        "do_train do_predict save_only_model logging_first_step ddp_timeout ddp_find_unused_parameters "
        "remove_unused_columns overwrite_output_dir resume_from_checkpoint push_to_hub hub_model_id"
    ),
    "auto_find_batch_size": "halves the batch when memory is short; see per_device_train_batch_size: auto",
    "do_eval": "evaluation runs where the recipe has evaluation data; see training.eval_strategy",
    **reasons(
        hub="hub_strategy hub_private_repo hub_always_push",
        secret="hub_token push_to_hub_token",
        speed=(
            "tf32 gradient_checkpointing_kwargs.* torch_empty_cache_steps dataloader_pin_memory "
            "dataloader_persistent_workers dataloader_prefetch_factor dataloader_drop_last bf16_full_eval "
            "fp16_full_eval torch_compile_backend torch_compile_mode eval_accumulation_steps"
        ),
        log="logging_strategy logging_dir disable_tqdm log_level include_num_input_tokens_seen",
        process="local_rank ddp_backend ddp_broadcast_buffers use_cpu no_cuda",
    ),
}
"""Key -> what becomes of it."""

DEFAULTS: dict[str, Any] = {
    "training.per_device_train_batch_size": 8,
    "training.gradient_accumulation_steps": 1,
    "training.num_train_epochs": 3,
    "training.learning_rate": 5e-5,
    "training.lr_scheduler_type": "linear",
    "training.warmup_steps": 0,
    "training.weight_decay": 0.0,
    "training.max_grad_norm": 1.0,
    "training.seed": 42,
    "training.eval_strategy": "no",
    "training.save_strategy": "steps",
    "training.save_steps": 500,
    "training.output_dir": "trainer_output",
}
"""Our key -> the default of TrainingArguments."""


def deepspeed(draft: Draft, key: str = "deepspeed") -> None:
    """Carry a configuration of DeepSpeed: its file, or the stage in the name of a file that is not there."""
    given = draft.get(key)
    if given is None:
        return
    path, name = draft.path(given), str(given).lower()
    stage = next((stage for stage in ("2", "3") if f"zero{stage}" in name or f"z{stage}" in name), None)
    if is_file(Path(path)):
        draft.put("launch.deepspeed", path, key)
    elif stage:
        draft.put("launch.strategy", f"zero{stage}", f"{key} (the file is not here; this is the stage in its name)")
        draft.settings.pop("launch.deepspeed", None)
        draft.carried[key] = "launch.strategy (the file is not here; this is the stage in its name)"
        if "offload" in name:
            draft.put("launch.cpu_offload", True, key)
    else:
        draft.settings.pop("launch.deepspeed", None)
        draft.drop(key, "its file is not here")
