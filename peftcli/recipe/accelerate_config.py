"""Settings of a run from a file of ``accelerate config`` or DeepSpeed, or the variables of ``accelerate launch``.

A request that peftcli does not fulfil is a problem, so that none is ignored silently.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from peftcli.errors import UsageError
from peftcli.guard.files import read_small
from peftcli.recipe.deepspeed_config import read_deepspeed
from peftcli.schema import USED_BY, Recipe, Training
from peftcli.system.outputs import expand_user

_LARGEST = 100_000
_DEVICES = Path("/dev")
_STRATEGIES = {"NO": "replicate", "MULTI_CPU": "replicate", "MULTI_GPU": "replicate", "FSDP": "fsdp"}
_REQUEST = "PEFTCLI_ACCELERATE"
"""The variable in which the request of ``accelerate launch`` is noted: FSDP or DEEPSPEED."""
_OF_DIVIDED = ("cpu_offload", "cpu_ram_efficient_loading")
"""Settings for strategies that divide the base model."""
_OF_ZERO = ("cpu_offload", "zero_optimization")
"""Settings that a configuration of DeepSpeed gives, beside strategy and precision."""
_ZERO_VARIABLES = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "zero_stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offload_optimizer_device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offload_param_device",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
"""Variable of ``accelerate launch`` -> the file's key."""
_ZERO_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
_ZERO_FIELDS = "ACCELERATE_CONFIG_DS_FIELDS"
"""Keys that accelerate's own file has beside DeepSpeed's; accelerate does not take both."""
_OTHER_VARIABLES = {
    "ACCELERATE_MIXED_PRECISION": "mixed_precision",
    "ACCELERATE_DYNAMO_BACKEND": "dynamo_backend",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
}
"""The same without FSDP and DeepSpeed, too. By default they are unset, or ``no``."""
_NOTHING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("fp8_config", "megatron_lm_config"), ({}, None)),
    **dict.fromkeys(("dynamo_config", "mpirun_config", "tpu_env", "commands", "command_file"), ({}, [], None)),
    "compute_environment": ("LOCAL_MACHINE", None),
    "enable_cpu_affinity": (False, None),
    "gpu_ids": ("all", None),
    "dynamo_backend": (None,),
}
"""Key -> the values that ask for nothing."""
_OF_FSDP1 = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
_ONLY_FSDP: dict[str, tuple[Any, ...]] = {
    "fsdp_version": (2,),
    "fsdp_reshard_after_forward": (True, False, *_OF_FSDP1, None),
    "fsdp_sharding_strategy": (*_OF_FSDP1, 1, 2, 4, 5, None),
    "fsdp_auto_wrap_policy": ("TRANSFORMER_BASED_WRAP", None),
    "fsdp_ignored_modules": (None,),
}
"""Key -> the values that are what peftcli does."""
_KEEPS_WHOLE = (False, "SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2", 2, 5)
"""Values of the two that let layers stay whole until the backward pass."""
_HYBRID = ("HYBRID_SHARD", "HYBRID_SHARD_ZERO2", 4, 5)
"""Those that divide the base model within a machine."""
_GROUPS, _GROUP_SIZE, _OTHER_SIZES = "dp_replicate_size", "dp_shard_size", ("tp_size", "cp_size", "sp_size")
"""Keys of ``parallelism_config``, behind a prefix of this name; variables of ``accelerate launch`` in capitals."""
_READ_FSDP = (*_ONLY_FSDP, "fsdp_offload_params", "fsdp_cpu_ram_efficient_loading", "fsdp_activation_checkpointing")
"""Keys of ``fsdp_config`` that are looked at; variables of ``accelerate launch`` have their names in capitals."""
_ONLY_ZERO: dict[str, tuple[Any, ...]] = {
    "zero_stage": (2, 3),
    "offload_optimizer_device": ("none", "None", None),
    "offload_param_device": ("none", "None", None, "cpu"),
    **dict.fromkeys(("deepspeed_hostfile", "deepspeed_inclusion_filter", "deepspeed_exclusion_filter"), (None,)),
}
"""The same of DeepSpeed."""
_WRONG = (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError, yaml.YAMLError)
"""What a file with something else in it ends in."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader without aliases, by which a short file can describe a very large value."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has an alias")
        return super().compose_node(parent, index)


def with_engine_files(recipe: Recipe, given: Collection[str], report: Callable[[Sequence[str], str], None]) -> Recipe:
    """Return the recipe with what its files of accelerate's and DeepSpeed's say, but for the keys ``given`` in it."""
    zero = recipe.launch.zero_optimization
    for name, read, kind in (
        ("accelerate_config", _read_accelerate, "no file that accelerate wrote"),
        ("deepspeed", read_deepspeed, "no configuration of DeepSpeed"),
    ):
        path, key = getattr(recipe.launch, name), f"launch.{name}"
        if path is None:
            continue
        try:
            said, problems = read(path, recipe.training)
            found = _settings(said, recipe)
            problems += _problems(said, recipe)
        except _WRONG as error:
            report((key,), f"{path} is {kind}: {str(error)[:200]}")
            continue
        for problem in problems:
            report((key,), f"{path} asks for {problem[:200]}")
        if name == "deepspeed":  # which knows nothing of machines
            found = {each: found[each] for each in ("strategy", "bf16", *_OF_ZERO) if each in found}
        own = {each: value for each, value in found.items() if f"launch.{each}" not in given}
        own["zero_optimization"] = found.get("zero_optimization", {}) | zero
        recipe = _with_launch(recipe, {name: None, **own})
    return recipe


def _read_accelerate(path: str, training: Training) -> tuple[Any, list[str]]:
    """Return what a file says, with that of DeepSpeed that it names; and what of that a run would not fulfil."""
    said = _unquoted(yaml.load(read_small(expand_user(Path(path)), _LARGEST), _Loader))
    if not isinstance(said, dict):
        return said, []
    if said.get("distributed_type") is False:
        said["distributed_type"] = "NO"  # which YAML reads as false without quotes
    zero = said.get("deepspeed_config") or {}
    if said.get("distributed_type") != "DEEPSPEED" or (file := zero.get("deepspeed_config_file")) is None:
        return said, []
    try:
        asked, problems = read_deepspeed(file, training)
    except _WRONG as error:
        return said, [f"{file}, no configuration of DeepSpeed: {str(error)[:200]}"]
    return said | asked | {"deepspeed_config": zero | asked["deepspeed_config"]}, problems


def with_accelerate_launch(recipe: Recipe, variables: MutableMapping[str, str]) -> Recipe:
    """Return the recipe with the strategy and the precision that ``accelerate launch`` requests.

    FSDP and DeepSpeed are removed from the variables, and noted there under a name of peftcli's: accelerate and
    transformers would act on them too.

    Raises:
        UsageError: it requests something else than the recipe, or what peftcli does not do.
    """
    for kind, name in (("FSDP", "ACCELERATE_USE_FSDP"), ("DEEPSPEED", "ACCELERATE_USE_DEEPSPEED")):
        if variables.pop(name, "") == "true":
            variables[_REQUEST] = kind
    variables.pop("ACCELERATE_USE_PARALLELISM_CONFIG", None)
    said, more = _read_variables(variables, recipe.training)
    found, problems = _settings(said, recipe), more + _problems(said, recipe)
    if _REQUEST not in variables:
        del found["strategy"]
    elif recipe.launch.strategy not in ("auto", "replicate", found["strategy"]):
        problems.append(f"{found['strategy']}, and the recipe for {recipe.launch.strategy}")
    if recipe.launch.shard_size not in ("auto", size := found.get("shard_size", recipe.launch.shard_size)):
        problems.append(f"groups of {size}, and the recipe for launch.shard_size {recipe.launch.shard_size}")
    if problems:
        hint = "start accelerate without it; the recipe has launch.strategy, training.bf16 and training.torch_compile"
        raise UsageError(f"accelerate launch asks for {problems[0]}", key="launch", hint=hint)
    either = {name: found.get(name) or getattr(recipe.launch, name) for name in _OF_DIVIDED}
    either["zero_optimization"] = found.get("zero_optimization", {}) | recipe.launch.zero_optimization
    either["reshard_after_forward"] = found.get("reshard_after_forward", True) and recipe.launch.reshard_after_forward
    others = {name: found[name] for name in ("strategy", "bf16", "shard_size") if name in found}
    return _with_launch(recipe, either | others)


def _read_variables(variables: MutableMapping[str, str], training: Training) -> tuple[dict[str, Any], list[str]]:
    """Return what ``accelerate launch`` requests, as its file would; and what of a file that it names is in vain."""
    engine, more = variables.get(_REQUEST), list[str]()
    variables.pop(_ZERO_FIELDS, None)
    said: dict[str, Any] = {"distributed_type": engine or "NO"}
    if engine == "FSDP":
        said["fsdp_config"] = {key: _value(variables, key.upper(), str.upper) for key in _READ_FSDP}
    elif engine == "DEEPSPEED":
        read = ((key, _value(variables, name, str.lower)) for name, key in _ZERO_VARIABLES.items())
        said["deepspeed_config"] = {key: value for key, value in read if value is not None}
        if (path := _value(variables, _ZERO_FILE, str)) is not None:
            try:
                asked, more = read_deepspeed(path, training)
            except _WRONG as error:
                text = f"accelerate launch names {path}, no configuration of DeepSpeed: {str(error)[:200]}"
                raise UsageError(text, key="launch") from None
            said |= asked | {"deepspeed_config": said["deepspeed_config"] | asked["deepspeed_config"]}
    others = ((key, _value(variables, name, str.lower)) for name, key in _OTHER_VARIABLES.items())
    said = {key: value for key, value in others if value not in (None, False)} | said
    sizes = (f"parallelism_config_{key}" for key in (_GROUPS, _GROUP_SIZE, *_OTHER_SIZES))
    said["parallelism_config"] = {key: _value(variables, key.upper(), str.lower) for key in sizes}
    return said, more


def _value(variables: Mapping[str, str], name: str, spelled: Callable[[str], str]) -> Any:
    """Return the value that a variable would have in the file; None if it is not set."""
    value = _unquoted(variables.get(name, "none"))
    return None if value in ("", "none", "None") else spelled(value) if isinstance(value, str) else value


def _unquoted(value: Any) -> Any:
    """Return what accelerate takes a value for: numbers and words such as ``false`` mean the same with quotes."""
    if isinstance(value, dict):
        return {key: _unquoted(each) for key, each in value.items()}
    if not isinstance(value, str) or ":" in value:  # which YAML may take for minutes and seconds
        return value
    try:
        found = yaml.load(value, _Loader)
    except (ValueError, yaml.YAMLError):
        return value
    return found if isinstance(found, bool | int | float) else value


def _with_launch(recipe: Recipe, found: dict[str, Any]) -> Recipe:
    """Return the recipe with what was found, as far as it is for its strategy and its base model."""
    own, training = dict(found), recipe.training
    bf16 = own.pop("bf16", "auto")
    if training.bf16 == "auto":
        training = replace(training, bf16=bf16)
    strategy = own.get("strategy", recipe.launch.strategy)  # the recipe may want another one than the file
    own = {name: value for name, value in own.items() if strategy in USED_BY.get(name, (strategy,))}
    if recipe.base_model.quantization is not None:  # as accelerate does
        own.pop("cpu_ram_efficient_loading", None)
    return replace(recipe, training=training, launch=replace(recipe.launch, **own))


def _settings(said: Any, recipe: Recipe) -> dict[str, Any]:
    """Return the file's settings of ``launch`` and bf16; raise TypeError or ValueError for another file."""
    if not isinstance(said, dict) or "distributed_type" not in said:
        raise ValueError("it has no distributed_type")
    machines, processes = int(said.get("num_machines") or 1), int(said.get("num_processes") or -1)
    if processes > 0 and processes % machines:
        raise ValueError(f"{processes} processes cannot be divided equally among {machines} machines")
    kind = said["distributed_type"]
    found: dict[str, Any] = {
        "num_processes": processes // machines if processes > 0 else "auto",
        "num_machines": machines,
        "machine_rank": int(said.get("machine_rank") or 0),
        "strategy": _STRATEGIES.get(str(kind), recipe.launch.strategy),
    }
    if kind == "DEEPSPEED":
        zero = said.get("deepspeed_config") or {}
        stage = zero.get("zero_stage", 2)
        found["strategy"] = f"zero{int(stage) if isinstance(stage, float) else stage}"
        found["cpu_offload"] = zero.get("offload_param_device") == "cpu"
        found["zero_optimization"] = zero.get("zero_optimization") or {}
    if kind == "FSDP":
        fsdp = said.get("fsdp_config") or {}
        found["cpu_offload"] = bool(fsdp.get("fsdp_offload_params"))
        found["cpu_ram_efficient_loading"] = bool(fsdp.get("fsdp_cpu_ram_efficient_loading"))
        asked = (fsdp.get("fsdp_reshard_after_forward"), fsdp.get("fsdp_sharding_strategy"))
        found["reshard_after_forward"] = not any(value in _KEEPS_WHOLE for value in asked)
        groups, size = _groups(said)
        if groups > 1 and size > 1:
            found["shard_size"] = size
        if groups > 1 or recipe.launch.strategy == "hybrid" or any(value in _HYBRID for value in asked):
            found["strategy"] = "hybrid"
    if "mixed_precision" in said:
        found["bf16"] = said["mixed_precision"] == "bf16"
    if said.get("main_process_ip"):
        found["main_process_ip"] = str(said["main_process_ip"])
    if said.get("main_process_port"):
        found["main_process_port"] = int(said["main_process_port"])
    return found


def _groups(said: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many groups of how many processes a file's ``parallelism_config`` asks for; 1 and 1: for none."""
    sizes = said.get("parallelism_config") or {}
    groups, size = (int(sizes.get(f"parallelism_config_{key}") or 1) for key in (_GROUPS, _GROUP_SIZE))
    return groups, size


def _problems_of_groups(said: Mapping[str, Any]) -> list[str]:
    """Describe what a file's ``parallelism_config`` asks for in vain."""
    (groups, size), processes = _groups(said), int(said.get("num_processes") or -1)
    sizes = said.get("parallelism_config") or {}
    keys = [f"parallelism_config_{key}" for key in _OTHER_SIZES]
    problems = [f"{key}: {sizes[key]}; 1 can be had" for key in keys if (sizes.get(key) or 1) != 1]
    if groups * size > 1 and said["distributed_type"] != "FSDP":
        problems.append("parallelism_config without FSDP")
    elif groups > 1 and size == 1:
        problems.append("groups of one process; distributed_type: MULTI_GPU does the same")
    elif groups * size > 1 and processes > 0 and groups * size != processes:
        problems.append(f"{groups} groups of {size}, and num_processes: {processes}")
    return problems


def _problems(said: Mapping[str, Any], recipe: Recipe) -> list[str]:
    """Describe each request of the file that a run would not fulfil."""
    kind, fsdp, zero = said["distributed_type"], said.get("fsdp_config") or {}, said.get("deepspeed_config") or {}
    problems = [key for key, values in _NOTHING.items() if said.get(key) not in values] + _problems_of_groups(said)
    known = {**_STRATEGIES, "DEEPSPEED": None}
    if kind not in known:
        problems.append(f"distributed_type: {kind}; {', '.join(known)} can be had")
    if kind == "DEEPSPEED":
        for key, values in _ONLY_ZERO.items():
            if (value := zero.get(key, 2 if key == "zero_stage" else None)) not in values:
                problems.append(f"{key}: {value}; {values[0]} can be had")
    elif zero:
        problems.append("deepspeed_config")
    for key, own in (
        ("gradient_clipping", recipe.training.max_grad_norm),
        ("gradient_accumulation_steps", recipe.training.gradient_accumulation_steps),
    ):
        if (value := zero.get(key, said.get(key))) not in ("auto", None, own):
            problems.append(f"{key}: {value}, and the recipe has {own}")
    if said.get("use_cpu") and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(_DEVICES.glob("nvidia[0-9]*")):
        problems.append("use_cpu; CUDA_VISIBLE_DEVICES= in the environment hides the GPUs")
    if kind == "FSDP":
        for key, values in _ONLY_FSDP.items():
            missing = 1 if key == "fsdp_version" else None  # as accelerate has it
            if (value := fsdp.get(key, missing)) not in values:
                problems.append(f"{key}: {value}; {values[0]} can be had")
        if fsdp.get("fsdp_activation_checkpointing") and recipe.training.gradient_checkpointing is False:
            problems.append("fsdp_activation_checkpointing; set training.gradient_checkpointing: true, too")
    precision = said.get("mixed_precision", "bf16" if recipe.training.bf16 is True else "no") or "no"
    wanted = {"bf16": True, "no": False}.get(str(precision))
    if wanted is None:
        problems.append(f"mixed_precision: {precision}; bf16 and no can be had")
    elif recipe.training.bf16 not in (wanted, "auto"):
        problems.append(f"mixed_precision: {precision}, and training.bf16 is {str(recipe.training.bf16).lower()}")
    return problems
