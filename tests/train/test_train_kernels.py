"""Layers that torch compiles, and those of liger-kernel."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest
import torch
import trainkit
from trainkit import run_recipe, stopped_copy

from peftcli.errors import ModelError, UsageError
from peftcli.train.forward import compile_layers

COMPILED = "training.torch_compile=true"


def test_the_layers_of_each_stack_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, expected in {"llama": ["LlamaDecoderLayer"] * 2, "t5": ["T5Block"] * 4}.items():
        compiled: list[str] = []
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda layer, into=compiled, **_: into.append(type(layer).__name__)
        )
        compile_layers(trainkit.build(kind))
        assert compiled == expected
    with pytest.raises(ModelError, match="no stack of layers"):
        compile_layers(torch.nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch speaks up of itself while it compiles
def test_compiled_layers_learn_what_others_do_and_resume_to_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    plain = run_recipe(recipe, f"training.output_dir={tmp_path}/plain")
    compiled = run_recipe(recipe, COMPILED, f"training.output_dir={tmp_path}/compiled")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    stopped_copy(recipe, (COMPILED,))
    assert run_recipe(recipe, COMPILED).weights == compiled.weights


def test_compiling_needs_a_compiler(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"training\.torch_compile: needs a C\+\+ compiler"):
        run_recipe(recipe, COMPILED)


def test_liger_kernel_needs_its_package_and_a_gpu(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "training.use_liger_kernel=true"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    with pytest.raises(UsageError, match=r"pip install 'peftcli\[liger\]'"):
        run_recipe(recipe, wanted)
    there = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there if name == "liger_kernel" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"training\.use_liger_kernel: needs a GPU"):
        run_recipe(recipe, wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's compiler recommends TF32
@pytest.mark.parametrize("setting", [COMPILED, "training.use_liger_kernel=true"])
def test_other_kernels_learn_the_same_on_a_gpu(recipe: Path, tmp_path: Path, setting: str) -> None:
    plain = run_recipe(recipe)
    other = run_recipe(recipe, setting, f"training.output_dir={tmp_path}/other")
    assert other.losses == pytest.approx(plain.losses, rel=1e-3)
