"""What a configuration file of DeepSpeed asks for, said as a file of ``accelerate config`` says it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftcli.guard.files import read_small
from peftcli.schema import Training
from peftcli.system.outputs import expand_user

SWITCHES = ("allgather_partitions", "contiguous_gradients", "overlap_comm", "reduce_scatter", "round_robin_gradients")
"""Settings of ``zero_optimization`` that are true or false. Like the sizes they change no result."""
SIZES = (
    "allgather_bucket_size",
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
"""Settings of ``zero_optimization`` that are a number of elements."""
_NOT_READ = ("steps_per_print", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer")
_ZERO_NOT_READ = (
    "ignore_unused_parameters",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
)
"""Of how the whole model is saved, and what is so for peftcli anyway."""
_IN_RECIPE = {
    "optimizer": "training.optim",
    "scheduler": "training.lr_scheduler_type",
    "train_batch_size": "training.per_device_train_batch_size",
}
"""Key -> the setting of a recipe that says it."""


def zero_problem(name: str, value: Any) -> str | None:
    """Describe what is wrong with a setting of ``zero_optimization``; None if nothing is."""
    if name in SWITCHES:
        return None if isinstance(value, bool) else f"{name} must be true or false, not {value!r}"
    if name in SIZES:
        is_size = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63
        return None if is_size and value == int(value) else f"{name} must be a number of elements, not {value!r}"
    return f"{name} is not among {', '.join(sorted((*SWITCHES, *SIZES)))}"


def read_deepspeed(path: str, training: Training) -> tuple[dict[str, Any], list[str]]:
    """Return what the file asks for, and each request that a run would not fulfil.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no configuration of DeepSpeed's ZeRO.
    """
    said = _without_auto(json.loads(read_small(expand_user(Path(path)), 100_000)))
    if not isinstance(said, dict) or not isinstance(zero := said.pop("zero_optimization", None), dict):
        raise ValueError("it has no zero_optimization")
    config: dict[str, Any] = {"zero_stage": zero.pop("stage", None) or 0}
    for name in ("offload_optimizer", "offload_param"):
        config[f"{name}_device"] = (zero.pop(name, None) or {}).get("device")
    for name in ("gradient_accumulation_steps", "gradient_clipping"):
        config[name] = said.pop(name, None)
    config = {name: value for name, value in config.items() if value is not None}  # accelerate may say the others
    known = {name: zero.pop(name) for name in (*SWITCHES, *SIZES) if name in zero}
    wrong = {name: text for name, value in known.items() if (text := zero_problem(name, value)) is not None}
    config["zero_optimization"] = {name: value for name, value in known.items() if name not in wrong}
    problems = [*wrong.values()]
    enabled = {name: (said.pop(name, None) or {}).get("enabled") for name in ("fp16", "bf16")}
    asked: dict[str, Any] = {"distributed_type": "DEEPSPEED", "deepspeed_config": config}
    if any(enabled.values()) or enabled["bf16"] is not None:
        asked["mixed_precision"] = next((name for name, value in enabled.items() if value), "no")
    batch, own = said.pop("train_micro_batch_size_per_gpu", None), training.per_device_train_batch_size
    if batch not in (None, own):
        problems.append(f"train_micro_batch_size_per_gpu: {batch}, and the recipe has {own}")
    is_adamw = said.get("optimizer") in ({"type": "AdamW"}, {"type": "Adam"})  # and all else of it is auto
    for name, value in said.items():
        if value and name not in _NOT_READ and not (name == "optimizer" and is_adamw and "adamw" in training.optim):
            problems.append(f"{name}; the recipe has {_IN_RECIPE[name]}" if name in _IN_RECIPE else name)
    problems += [f"zero_optimization.{name}" for name, value in zero.items() if value and name not in _ZERO_NOT_READ]
    return asked, problems


def _without_auto(value: Any) -> Any:
    """Return the value without what is ``auto``: that is as the recipe says."""
    if not isinstance(value, dict):
        return value
    kept = {name: _without_auto(each) for name, each in value.items() if each != "auto"}
    return {name: each for name, each in kept.items() if each != {}}
