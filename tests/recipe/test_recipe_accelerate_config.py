"""A file that ``accelerate config`` wrote says where a recipe is trained, and what it asks for in vain is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trainkit
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from peftcli.errors import UsageError
from peftcli.recipe import accelerate_config, read
from peftcli.recipe.accelerate_config import with_accelerate_launch
from peftcli.schema import Launch, Recipe

FSDP: dict[str, Any] = {
    "distributed_type": "FSDP",
    "num_processes": 8,
    "num_machines": 2,
    "machine_rank": 1,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29500,
    "mixed_precision": "bf16",
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": True,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_offload_params": False,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
}


def fsdp(**more: Any) -> dict[str, Any]:
    return {**FSDP, "fsdp_config": {**FSDP["fsdp_config"], **more}}


def grouped(groups: int, size: int, **sizes: int) -> dict[str, Any]:
    named = {"dp_replicate_size": groups, "dp_shard_size": size, "tp_size": 1, "cp_size": 1, **sizes}
    return {**FSDP, "parallelism_config": {f"parallelism_config_{name}": value for name, value in named.items()}}


def zero(**more: Any) -> dict[str, Any]:
    return {"distributed_type": "DEEPSPEED", "num_processes": 2, "deepspeed_config": more}


def written(folder: Path, said: dict[str, Any]) -> Path:
    """A recipe with a file that accelerate itself has written."""
    values = {"compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "use_cpu": False, "debug": False, **said}
    ClusterConfig(**values).to_yaml_file(folder / "accelerate.yaml")
    recipe = trainkit.write_recipe(folder)
    with recipe.open("a") as file:
        file.write(f"launch: {{accelerate_config: {folder}/accelerate.yaml}}\n")
    return recipe


def test_processes_machines_and_fsdp_are_as_it_says(tmp_path: Path) -> None:
    recipe = read(written(tmp_path, FSDP), ["training.bf16=true"]).recipe
    assert recipe is not None
    assert recipe.launch == Launch(
        num_processes=4,
        num_machines=2,
        machine_rank=1,
        main_process_ip="10.0.0.1",
        main_process_port=29500,
        strategy="fsdp",
    )


def test_deepspeed_and_offloading_are_as_it_says(tmp_path: Path) -> None:
    quantised = "base_model.quantization={type: nf4}"
    efficient = fsdp(fsdp_offload_params=True, fsdp_cpu_ram_efficient_loading=True) | {"mixed_precision": "no"}
    for said, more, expected in (
        (zero(zero_stage=3, offload_param_device="cpu", offload_optimizer_device="none"), [], ("zero3", True, False)),
        (zero(zero_stage="3.0", offload_param_device="cpu"), [], ("zero3", True, False)),
        (zero(), [], ("zero2", False, False)),
        (efficient, [], ("fsdp", True, True)),
        (efficient, [quantised], ("fsdp", True, False)),
        (fsdp(fsdp_offload_params="false") | {"mixed_precision": "no"}, [], ("fsdp", False, False)),
        (efficient, ["launch.strategy=ddp"], ("ddp", False, False)),
    ):
        launch = read(written(tmp_path, said), more).recipe.launch
        assert (launch.strategy, launch.cpu_offload, launch.cpu_ram_efficient_loading) == expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, True),
        ({"fsdp_reshard_after_forward": False}, False),
        ({"fsdp_reshard_after_forward": "SHARD_GRAD_OP"}, False),
        ({"fsdp_reshard_after_forward": None, "fsdp_sharding_strategy": 2}, False),
    ],
)
def test_layers_stay_whole_until_the_backward_pass_if_it_says_so(
    asked: dict[str, Any], expected: bool, tmp_path: Path
) -> None:
    recipe = read(written(tmp_path, fsdp(**asked)), ["training.bf16=true"]).recipe
    assert recipe is not None
    assert recipe.launch.reshard_after_forward is expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (fsdp(fsdp_sharding_strategy="HYBRID_SHARD"), ("hybrid", "auto", True)),
        (fsdp(fsdp_reshard_after_forward="HYBRID_SHARD_ZERO2"), ("hybrid", "auto", False)),
        (fsdp(fsdp_sharding_strategy=4), ("hybrid", "auto", True)),
        (grouped(2, 4), ("hybrid", 4, True)),
        (grouped(4, 2), ("hybrid", 2, True)),
        (grouped(1, 8), ("fsdp", "auto", True)),
        (grouped(1, 1), ("fsdp", "auto", True)),
    ],
)
def test_the_base_is_divided_within_groups_if_it_says_so(
    said: dict[str, Any], expected: tuple[str, int | str, bool], tmp_path: Path
) -> None:
    recipe = read(written(tmp_path, said), ["training.bf16=true"]).recipe
    assert recipe is not None
    launch = recipe.launch
    assert (launch.strategy, launch.shard_size, launch.reshard_after_forward) == expected


AUTO: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
"""The form in which a configuration of DeepSpeed is handed to a trainer that fills in what is auto."""
OF_AUTO = Launch(
    num_processes=2,
    strategy="zero3",
    cpu_offload=True,
    zero_optimization={"overlap_comm": True, "stage3_prefetch_bucket_size": 50_000_000, "sub_group_size": 1e9},
)


def of_deepspeed(folder: Path, **more: Any) -> str:
    """The setting that names a configuration of DeepSpeed."""
    (folder / "zero.json").write_text(json.dumps(AUTO | more))
    return f"launch.deepspeed={folder}/zero.json"


def test_a_configuration_of_deepspeed_may_be_the_recipes_or_accelerates(tmp_path: Path) -> None:
    own = of_deepspeed(tmp_path)
    (tmp_path / "named").mkdir()
    named = written(tmp_path / "named", zero(deepspeed_config_file=f"{tmp_path}/zero.json"))
    for path, settings in ((named, []), (trainkit.write_recipe(tmp_path), [own, "launch.num_processes=2"])):
        recipe = read(path, ["training.bf16=auto", *settings]).recipe
        assert recipe is not None
        assert recipe.launch == OF_AUTO
    words = ("--use_deepspeed", "--deepspeed_config_file", f"{tmp_path}/zero.json")
    assert launched(tmp_path, *words, settings=("launch.num_processes=2",))[0].launch == OF_AUTO
    of_deepspeed(tmp_path, bf16={"enabled": True})
    assert read(named, ["training.bf16=auto"]).recipe.training.bf16 is True
    assert read(named, ["launch.strategy=ddp", "training.bf16=true"]).recipe.launch == Launch(
        num_processes=2, strategy="ddp"
    )


def test_a_configuration_of_deepspeed_without_fp16_leaves_bf16_to_the_recipe(tmp_path: Path) -> None:
    for precision, own, expected in (("auto", "true", True), ("auto", "auto", "auto"), (False, "auto", False)):
        said = of_deepspeed(tmp_path, fp16={"enabled": False}, bf16={"enabled": precision})
        recipe = read(trainkit.write_recipe(tmp_path), [said, f"training.bf16={own}"]).recipe
        assert recipe is not None
        assert recipe.training.bf16 == expected


def test_a_recipe_changes_one_setting_of_a_configuration_of_deepspeed(tmp_path: Path) -> None:
    own = ["launch.zero_optimization={overlap_comm: false}", "training.bf16=auto"]
    recipe = read(trainkit.write_recipe(tmp_path), [of_deepspeed(tmp_path), *own]).recipe
    assert recipe is not None
    assert recipe.launch.zero_optimization == OF_AUTO.zero_optimization | {"overlap_comm": False}


def test_a_wrong_file_that_accelerate_names_is_the_one_named(tmp_path: Path) -> None:
    of_deepspeed(tmp_path, zero_optimization={})
    named = written(tmp_path, zero(deepspeed_config_file=f"{tmp_path}/zero.json"))
    (found,) = read(named, ["training.bf16=auto"]).problems
    assert "zero.json, no configuration of DeepSpeed: it has no zero_optimization" in found.message


def test_what_accelerate_says_beside_a_configuration_of_deepspeed_is_not_ignored(tmp_path: Path) -> None:
    of_deepspeed(tmp_path)
    named = {"deepspeed_config_file": f"{tmp_path}/zero.json"}
    for key, value in (("gradient_accumulation_steps", 7), ("gradient_clipping", 0.3)):
        (found,) = read(written(tmp_path, zero(**named, **{key: value})), ["training.bf16=auto"]).problems
        assert f"{key}: {value}, and the recipe has" in found.message
        words = ("--use_deepspeed", "--deepspeed_config_file", named["deepspeed_config_file"], f"--{key}", str(value))
        with pytest.raises(UsageError, match=f"{key}: {value}, and the recipe has"):
            launched(tmp_path, *words)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"zero_optimization": {"stage": 1}}, "zero_stage: 1; 2 can be had"),
        ({"zero_optimization": {}}, "it has no zero_optimization"),
        ({"zero_optimization": {"stage": 3, "overlap_comm": 1}}, "overlap_comm must be true or false, not 1"),
        ({"zero_optimization": {"stage": 3, "sub_group_size": -1}}, "sub_group_size must be a number of elements"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_optimization.zero_hpz_partition"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer_device: cpu"),
        ({"fp16": {"enabled": True}}, "mixed_precision: fp16"),
        ({"gradient_clipping": 0.3}, "gradient_clipping: 0.3, and the recipe has 1.0"),
        ({"train_micro_batch_size_per_gpu": 64}, "train_micro_batch_size_per_gpu: 64, and the recipe has"),
        ({"optimizer": {"type": "Lion"}}, "optimizer; the recipe has training.optim"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler; the recipe has training.lr_scheduler_type"),
        ({"data_efficiency": {"enabled": True}}, "asks for data_efficiency"),
    ],
)
def test_what_a_configuration_of_deepspeed_asks_for_in_vain_is_said(
    more: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (found,) = read(trainkit.write_recipe(tmp_path), [of_deepspeed(tmp_path, **more)]).problems
    assert problem in found.message
    assert found.key == "launch.deepspeed"


@pytest.mark.parametrize(("precision", "expected"), [("no", False), ("bf16", True)])
def test_the_precision_is_as_it_says_where_the_recipe_leaves_it_open(
    precision: str, expected: bool, tmp_path: Path
) -> None:
    path = written(tmp_path, {"distributed_type": "NO", "num_processes": 1, "mixed_precision": precision})
    assert read(path, ["training.bf16=auto"]).recipe.training.bf16 is expected


def test_the_recipe_comes_before_it(tmp_path: Path) -> None:
    path = written(tmp_path, {"distributed_type": "MULTI_CPU", "num_processes": 2})
    recipe = read(path, ["launch.num_processes=auto", "launch.strategy=ddp"]).recipe
    assert recipe is not None
    assert (recipe.launch.num_processes, recipe.launch.strategy) == ("auto", "ddp")


@pytest.mark.parametrize(
    ("said", "settings", "problem"),
    [
        ({**FSDP, "fsdp_config": {}}, ["training.bf16=true"], "fsdp_version: 1; 2 can be had"),
        (fsdp(fsdp_sharding_strategy="NO_SHARD"), ["training.bf16=true"], "fsdp_sharding_strategy: NO_SHARD"),
        (grouped(2, 4, cp_size=2), ["training.bf16=true"], "parallelism_config_cp_size: 2; 1 can be had"),
        (grouped(8, 1), ["training.bf16=true"], "groups of one process"),
        (grouped(2, 2), ["training.bf16=true"], "2 groups of 2, and num_processes: 8"),
        ({**grouped(2, 4), "distributed_type": "MULTI_GPU"}, ["training.bf16=true"], "parallelism_config without FSDP"),
        (fsdp(fsdp_activation_checkpointing=True), ["training.bf16=true"], "training.gradient_checkpointing: true"),
        ({"distributed_type": "NO", "num_processes": 1, "enable_cpu_affinity": True}, [], "enable_cpu_affinity"),
        ({"distributed_type": "NO", "compute_environment": "AMAZON_SAGEMAKER"}, [], "compute_environment"),
        ({"distributed_type": "MEGATRON_LM", "num_processes": 2}, [], "distributed_type: MEGATRON_LM"),
        (zero(gradient_clipping=0.3), [], "gradient_clipping: 0.3, and the recipe has 1.0"),
        (zero(zero_stage=1), [], "zero_stage: 1; 2 can be had"),
        (zero(offload_optimizer_device="nvme"), [], "offload_optimizer_device: nvme"),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "fp16"}, [], "mixed_precision: fp16"),
        (
            {"distributed_type": "MULTI_GPU", "mixed_precision": "bf16"},
            ["training.bf16=false"],
            "training.bf16 is false",
        ),
        ({"distributed_type": "MULTI_GPU", "num_processes": 3, "num_machines": 2}, [], "3 processes"),
    ],
)
def test_what_it_asks_for_in_vain_is_said(
    said: dict[str, Any], settings: list[str], problem: str, tmp_path: Path
) -> None:
    reading = read(written(tmp_path, said), settings)
    (found,) = reading.problems
    assert problem in found.message
    assert found.key == "launch.accelerate_config"
    assert found.line


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU"])
def test_the_cpu_is_asked_for_in_vain_where_a_gpu_is_visible(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, {"distributed_type": kind, "num_processes": 2, "use_cpu": True})
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(accelerate_config, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = read(path).problems
    assert "use_cpu; CUDA_VISIBLE_DEVICES= in the environment hides the GPUs" in found.message
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert read(path).recipe


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1]",
        "a: 1",
        "distributed_type: [",
        "{distributed_type: NO, num_processes: x}",
        "{distributed_type: FSDP, fsdp_config: x}",
        "distributed_type: []",
        "[" * 5000,
        "{distributed_type: NO, num_processes: .inf}",
        "{distributed_type: NO, num_processes: 2, num_machines: .5}",
        "{distributed_type: NO, gpu_ids: &a [x], mixed_precision: *a}",
    ],
)
def test_another_file_is_refused(content: str, tmp_path: Path) -> None:
    path = written(tmp_path, {"distributed_type": "NO", "num_processes": 1})
    (tmp_path / "accelerate.yaml").write_text(content)
    (found,) = read(path).problems
    assert "is no file that accelerate wrote" in found.message


@pytest.mark.parametrize("path", ["none.yaml", "~nobody-of-this-name/accelerate.yaml"])
def test_a_missing_file_is_said(path: str, tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path)
    (found,) = read(recipe, [f"launch.accelerate_config={path}"]).problems
    assert "No such file" in found.message


@pytest.mark.parametrize("text", ["10:30", "[1,2]", "{a: b}"])
def test_quoted_text_stays_text(tmp_path: Path, text: str) -> None:
    recipe = read(written(tmp_path, {**FSDP, "main_process_ip": text}), ["training.bf16=true"]).recipe
    assert recipe is not None
    assert recipe.launch.main_process_ip == text


def test_no_without_quotes_is_one_process(tmp_path: Path) -> None:
    path = written(tmp_path, {"distributed_type": "NO", "num_processes": 1})
    (tmp_path / "accelerate.yaml").write_text("distributed_type: NO\n")
    assert read(path).recipe.launch == Launch()


def test_a_long_value_is_cut(tmp_path: Path) -> None:
    path = written(tmp_path, {"distributed_type": "NO", "num_processes": 1})
    (tmp_path / "accelerate.yaml").write_text(f"distributed_type: NO\nmixed_precision: {'x' * 50_000}\n")
    (found,) = read(path).problems
    assert len(found.message) < 500


FSDP2 = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_reshard_after_forward", "true")
GROUPS = (*FSDP2, "--use_parallelism_config", "--parallelism_config_dp_replicate_size", "2")
GROUPS += ("--parallelism_config_dp_shard_size", "2")
ZERO3 = ("--use_deepspeed", "--zero_stage", "3")
SINGLE = (
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--machine_rank",
    "0",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
)


def launched(folder: Path, *words: str, settings: tuple[str, ...] = ()) -> tuple[Recipe, dict[str, str]]:
    """A recipe as a process trains it that ``accelerate launch`` has started with words, and the variables left."""
    given = launch_command_parser().parse_args([*SINGLE, *words, "train.py"])
    given.deepspeed_fields_from_accelerate_config = ""
    variables = prepare_deepspeed_cmd_env(given)[1] if given.use_deepspeed else prepare_multi_gpu_env(given)
    return with_accelerate_launch(read(trainkit.write_recipe(folder), list(settings)).recipe, variables), variables


def test_what_accelerate_launch_is_told_is_the_strategy(tmp_path: Path) -> None:
    offload = ("--fsdp_offload_params", "true", "--fsdp_cpu_ram_efficient_loading", "false")
    for words, settings, expected in (
        (("--multi_gpu",), (), ("replicate", False, False)),
        (("--multi_gpu",), ("launch.strategy=zero2",), ("zero2", False, False)),
        (FSDP2, (), ("fsdp", False, True)),  # as accelerate launch has it, if it is told no more
        ((*FSDP2, *offload), ("launch.strategy=auto",), ("fsdp", True, False)),
        (FSDP2, ("launch.strategy=fsdp", "launch.cpu_offload=true"), ("fsdp", True, True)),
        (FSDP2, ("launch.strategy=hybrid",), ("hybrid", False, True)),
        (GROUPS, (), ("hybrid", False, True)),
        (GROUPS, ("launch.strategy=hybrid", "launch.shard_size=2"), ("hybrid", False, True)),
        ((*ZERO3, "--offload_param_device", "cpu"), (), ("zero3", True, False)),
        (("--use_deepspeed",), (), ("zero2", False, False)),
    ):
        recipe, variables = launched(tmp_path, *words, settings=settings)
        launch = recipe.launch
        assert (launch.strategy, launch.cpu_offload, launch.cpu_ram_efficient_loading) == expected, words
        engines = {f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG")}
        assert not engines & variables.keys()
        again = with_accelerate_launch(read(trainkit.write_recipe(tmp_path), list(settings)).recipe, variables)
        assert again.launch == launch, "another run of the process has it too"


@pytest.mark.parametrize("engine", [("--multi_gpu",), FSDP2, ("--use_deepspeed",)])
@pytest.mark.parametrize(
    ("precision", "asked", "expected"),
    [
        ("no", "true", True),
        ("no", "false", False),
        ("no", "auto", "auto"),
        ("bf16", "true", True),
        ("bf16", "auto", True),
    ],
)
def test_accelerates_usual_precision_asks_for_nothing(
    engine: tuple[str, ...], precision: str, asked: str, expected: bool | str, tmp_path: Path
) -> None:
    words = (*engine, "--mixed_precision", precision)
    assert launched(tmp_path, *words, settings=(f"training.bf16={asked}",))[0].training.bf16 == expected


@pytest.mark.parametrize(
    ("words", "settings", "problem"),
    [
        (FSDP2, ("launch.strategy=zero2",), "fsdp, and the recipe for zero2"),
        (GROUPS, ("launch.strategy=fsdp",), "hybrid, and the recipe for fsdp"),
        (GROUPS, ("launch={strategy: hybrid, shard_size: 4}",), "groups of 2, and the recipe for launch.shard_size 4"),
        (("--use_fsdp",), (), "fsdp_version: 1; 2 can be had"),
        ((*ZERO3, "--gradient_clipping", "0.3"), (), "gradient_clipping: 0.3, and the recipe has 1.0"),
        ((*ZERO3, "--offload_optimizer_device", "cpu"), (), "offload_optimizer_device: cpu"),
        ((*FSDP2, "--mixed_precision", "bf16"), ("training.bf16=false",), "mixed_precision: bf16"),
        ((*FSDP2, "--mixed_precision", "fp16"), (), "mixed_precision: fp16"),
        (("--multi_gpu", "--mixed_precision", "bf16"), ("training.bf16=false",), "mixed_precision: bf16"),
        (("--multi_gpu", "--mixed_precision", "fp16"), (), "mixed_precision: fp16"),
        (("--multi_gpu", "--dynamo_backend", "inductor"), (), "dynamo_backend"),
    ],
)
def test_what_accelerate_launch_asks_for_in_vain_is_said(
    words: tuple[str, ...], settings: tuple[str, ...], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=problem):
        launched(tmp_path, *words, settings=settings)


def test_the_number_of_micro_batches_must_be_the_recipes(tmp_path: Path) -> None:
    recipe = read(trainkit.write_recipe(tmp_path), ["training.gradient_accumulation_steps=2"]).recipe
    assert with_accelerate_launch(recipe, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}) == recipe
    with pytest.raises(UsageError, match="gradient_accumulation_steps: 4, and the recipe has 2"):
        with_accelerate_launch(recipe, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"})
