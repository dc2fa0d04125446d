"""``peftcli combine``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from safetensors.torch import load_file, save_file
from taskkit import CASES
from trainkit import run_recipe

import peftcli
from peftcli.cli.combine import Method
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.methods import config_from_dict
from peftcli.methods.combinations import COMBINATIONS


@pytest.fixture
def pair(tmp_path: Path) -> list[str]:
    """a=0.7 and b=-0.4, of other r and other modules."""
    targets = {"a": ["q_proj", "v_proj"], "b": ["q_proj", "k_proj"]}
    for seed, (name, modules) in enumerate(targets.items(), 1):
        model = tiny("llama")
        config = peftcli.LoraConfig(
            r=2 + 2 * seed, target_modules=modules, base_model_name_or_path="org/base", task_type="CAUSAL_LM"
        )
        inject(model, config)
        randomise(model, seed)
        save_adapter(model, config, tmp_path / name)
    return [f"{tmp_path}/a=0.7", f"{tmp_path}/b=-0.4"]


def _expected(tmp_path: Path) -> torch.Tensor:
    model = tiny("llama")
    for name, weight in (("a", 0.7), ("b", -0.4)):
        one = tiny("llama")
        load_adapter(one, config_from_dict(read_config(tmp_path / name)), tmp_path / name)
        for path, layer in adapter_layers(one).items():
            model.get_submodule(path).weight.data += weight * layer.delta().detach()
    return logits(model, batch("llama"))


def test_the_default_is_the_weighted_sum(cli: Callable[..., Any], pair: list[str], tmp_path: Path) -> None:
    output = tmp_path / "new" / "sum"
    ran = cli("combine", *pair, "--output", output, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found == {
        "output": str(output),
        "adapters": [{"adapter": f"{tmp_path}/a", "weight": 0.7}, {"adapter": f"{tmp_path}/b", "weight": -0.4}],
        "method": "cat",
        "r": 10,
        "modules": 6,
        "parameters": sum(value.numel() for value in load_file(output / "adapter_model.safetensors").values()),
        "bytes": (output / "adapter_model.safetensors").stat().st_size,
        "error": 0.0,
        "worst_module": {"module": found["worst_module"]["module"], "error": 0.0},
    }
    assert {path.name for path in output.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert [path.name for path in output.parent.iterdir()] == ["sum"]
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (10, 10, "org/base")
    model = tiny("llama")
    load_adapter(model, config_from_dict(config), output)
    torch.testing.assert_close(logits(model, batch("llama")), _expected(tmp_path), atol=1e-4, rtol=1e-4)


def test_the_error_is_said(cli: Callable[..., Any], pair: list[str], tmp_path: Path) -> None:
    first = cli("combine", *pair, "--output", tmp_path / "exact")
    assert first.out.splitlines()[0] == "equals the weighted sum exactly"
    assert first.out.endswith(f'next:\n  peftcli generate {tmp_path}/exact --prompt "Hello"\n')
    ran = cli("combine", *pair, "--output", tmp_path / "svd", "--method", "svd", "--r", 2)
    assert ran.out.startswith("relative error of the weighted sum 0.")
    assert "in model.layers." in ran.out
    assert f"{tmp_path}/svd: r 2, 6 modules, " in ran.out


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("method", COMBINATIONS)
def test_every_way_runs_and_repeats(method: str, cli: Callable[..., Any], pair: list[str], tmp_path: Path) -> None:
    alike = [pair[0], pair[0].replace("0.7", "0.3")]
    density = [] if method in ("cat", "svd", "linear") else ["--density", 0.5]
    for name in ("one", "two"):
        ran = cli("combine", *alike, "--output", tmp_path / name, "--method", method, *density, "--json")
        assert ran.code == 0, ran.err
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    if "dare" in method:
        cli("combine", *alike, "--output", tmp_path / "other", "--method", method, *density, "--seed", 7)
        files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other")]
        assert files[0] != files[1]


def test_the_commands_ways_are_the_cores() -> None:
    assert Method.__args__ == COMBINATIONS


REFUSED: dict[str, tuple[list[object], int, str]] = {
    "no weight": (["{a}"], 2, "must have the form ADAPTER=WEIGHT, such as outputs/a=0.7"),
    "no number": (["{a}=much"], 2, "must have the form ADAPTER=WEIGHT"),
    "no adapter": (["=0.5"], 2, "must have the form ADAPTER=WEIGHT"),
    "not finite": (["{a}=nan"], 2, "the weight must be finite"),
    "more than 32 bits hold": (["{a}=1e39"], 2, "the weight must be finite, and at most 3.4e+38"),
    "nowhere": (["no such=0.5"], 4, "neither a folder nor a hub id"),
    "unknown way": (["{a}=1", "--method", "sum"], 2, "'--method': 'sum' is not one of 'cat', 'svd'"),
    "no density": (["{a}=1", "--method", "ties"], 2, "--density: ties needs the share of values to keep"),
    "useless density": (["{a}=1", "--density", 0.5], 2, "--density: cat drops nothing"),
    "useless r": (["{a}=1", "--r", 4], 2, "--r: cat chooses its own"),
    "another r": (["{a}=1", "{b}=1", "--method", "linear"], 4, "needs adapters of one r"),
    "not empty": (["{a}=1", "--output", "{a}"], 2, "exists and is not empty"),
    "cannot write": (["{a}=1", "--output", "/proc/peftcli/x"], 7, "cannot write"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, cli: Callable[..., Any], pair: list[str], tmp_path: Path) -> None:
    args, code, message = REFUSED[case]
    given = [str(arg).format(a=tmp_path / "a", b=tmp_path / "b") for arg in args]
    ran = cli("combine", *given, *([] if "--output" in given else ["--output", tmp_path / "new"]))
    assert ran.code == code, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert ran.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_classifiers_are_combined_with_their_classes_and_others_not(cli: Callable[..., Any], tmp_path: Path) -> None:
    folders = []
    for name, labels in (("one", "[good, bad]"), ("other", "[bad, good]")):
        (tmp_path / name).mkdir()
        recipe = CASES["sequence_classification"].write(tmp_path / name)
        folders.append(run_recipe(recipe, f"task.labels={labels}", "training.max_steps=1").folder)
    ran = cli("combine", f"{folders[0]}=0.5", f"{folders[1]}=0.5", "--output", tmp_path / "both")
    assert ran.code == 4
    assert "have different files task.json" in ran.err
    assert cli("combine", f"{folders[0]}=0.5", f"{folders[0]}=0.5", "--output", tmp_path / "same").code == 0
    assert (tmp_path / "same/task.json").read_bytes() == (folders[0] / "task.json").read_bytes()
    answers = [cli("predict", folder, "sun tea", "--json").out for folder in (folders[0], tmp_path / "same")]
    assert answers[0] == answers[1]
    shutil.copytree(folders[0], tmp_path / "longer")
    task = json.loads((folders[0] / "task.json").read_text())
    task["settings"] |= {"max_length": 77, "class_weights": {"bad": 2.0}}
    (tmp_path / "longer/task.json").write_text(json.dumps(task))
    ran = cli("combine", f"{folders[0]}=0.5", f"{tmp_path}/longer=0.5", "--output", tmp_path / "first")
    assert ran.code == 0, ran.err
    assert (tmp_path / "first/task.json").read_bytes() == (folders[0] / "task.json").read_bytes()


def test_broken_and_foreign_adapters_are_refused(cli: Callable[..., Any], pair: list[str], tmp_path: Path) -> None:
    path = tmp_path / "b/adapter_config.json"
    good = path.read_text()
    for changed, message in (
        (good.replace("org/base", "org/other"), f"{tmp_path}/a is for org/base, {tmp_path}/b is for org/other"),
        (
            '{"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": []}',
            f"{tmp_path}/b is IA3; only LoRA adapters can be combined",
        ),
    ):
        path.write_text(changed)
        ran = cli("combine", *pair, "--output", tmp_path / "new")
        assert ran.code == 4
        assert message in ran.err
    path.write_text(good)
    weights = tmp_path / "b/adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * torch.nan}, weights)
    ran = cli("combine", *pair, "--output", tmp_path / "new")
    assert ran.code == 4
    assert f"not finite: {name}" in ran.err
    assert not (tmp_path / "new").exists()


def test_what_corrects_the_error_of_quantised_weights_is_refused(
    cli: Callable[..., Any], pair: list[str], tmp_path: Path
) -> None:
    (tmp_path / "b/run.json").write_text('{"makes_up_for_quantization": true}')
    ran = cli("combine", *pair, "--output", tmp_path / "new")
    assert ran.code == 4
    assert f"{tmp_path}/b: corrects the error of the quantised weights" in ran.err
    assert f"peftcli merge {tmp_path}/b --output OUTPUT --dequantize" in ran.err
