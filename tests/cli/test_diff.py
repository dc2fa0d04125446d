"""``peftcli diff``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import randomise, tiny
from safetensors.torch import load_file, save_file

import peftcli
from peftcli.core.config import AdapterConfig
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers

WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, config: AdapterConfig, seed: int = 1, kind: str = "llama") -> dict[str, torch.Tensor]:
    """An adapter folder for a tiny model, and the dense updates."""
    model = tiny(kind)
    inject(model, config)
    randomise(model, seed)
    save_adapter(model, config, folder)
    layers = adapter_layers(model).items()
    return {path: layer.delta().detach().double() for path, layer in layers if hasattr(layer, "delta")}


@pytest.fixture
def diff(cli: Callable[..., Any], tmp_path: Path) -> Callable[[], dict[str, Any]]:
    """``peftcli diff a b --json``."""

    def diff() -> dict[str, Any]:
        ran = cli("diff", tmp_path / "a", tmp_path / "b", "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)

    return diff


def test_equal_adapters(cli: Callable[..., Any], diff: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path / "a", peftcli.LoraConfig(r=4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = diff()
    assert found["equal"] is True
    assert (found["difference"], found["cosine"]) == (0.0, pytest.approx(1.0))
    assert (found["config"], found["only_a"], found["only_b"], found["reason"]) == ([], [], [], None)
    assert {row["difference"] for row in found["modules"]} == {0.0}
    assert [row["cosine"] for row in found["modules"]] == pytest.approx([1.0] * 4)
    ran = cli("diff", tmp_path / "a", tmp_path / "b")
    assert (ran.code, ran.out) == (0, "the adapters are equal\n")


def test_updates_are_compared_as_what_they_add(diff: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    a = write(tmp_path / "a", peftcli.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    settings = {"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"layers.0.*": 2}, "use_rslora": True}
    b = write(tmp_path / "b", peftcli.LoraConfig(r=6, **settings), seed=2)
    found = diff()
    assert found["equal"] is False
    assert found["only_a"] == sorted(a.keys() - b.keys())
    assert found["only_b"] == sorted(b.keys() - a.keys())
    assert {row["module"] for row in found["modules"]} == a.keys() & b.keys()
    for row in found["modules"]:
        one, two = a[row["module"]], b[row["module"]]
        assert row["difference"] == pytest.approx(float((one - two).norm() / max(one.norm(), two.norm())), rel=1e-5)
        assert row["cosine"] == pytest.approx(float((one * two).sum() / one.norm() / two.norm()), rel=1e-4)
    zero = torch.zeros(1).double()
    whole = [
        torch.cat([each.get(path, zero.expand(len({**a, **b}[path].flatten()))).flatten() for path in {**a, **b}])
        for each in (a, b)
    ]
    expected = (whole[0] - whole[1]).norm() / max(whole[0].norm(), whole[1].norm())
    assert found["difference"] == pytest.approx(float(expected), rel=1e-5)
    assert found["cosine"] == pytest.approx(float(torch.cosine_similarity(*whole, dim=0)), rel=1e-4)
    changed = {row["key"]: (row["a"], row["b"]) for row in found["config"]}
    assert changed == {
        "target_modules": (["q_proj", "v_proj"], ["k_proj", "q_proj"]),
        "r": (4, 6),
        "rank_pattern": ({}, {"layers.0.*": 2}),
        "use_rslora": (False, True),
    }


def test_the_same_update_in_other_factors_is_the_same(diff: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path / "a", peftcli.LoraConfig(r=4, lora_alpha=4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    turned = {name: 2 * value if "lora_A" in name else value / 2 for name, value in tensors.items()}
    save_file(turned, tmp_path / "b" / WEIGHTS, {"format": "pt"})
    found = diff()
    assert all(row["difference"] < 1e-12 for row in found["modules"])
    opposite = {name: value if "lora_A" in name else -value for name, value in tensors.items()}
    save_file(opposite, tmp_path / "b" / WEIGHTS, {"format": "pt"})
    found = diff()
    assert found["cosine"] == pytest.approx(-1.0)
    assert found["difference"] == pytest.approx(2.0)


def test_a_new_adapter_has_no_direction(diff: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path / "a", peftcli.LoraConfig(r=4))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / WEIGHTS)
    save_file({n: 0 * v if "lora_B" in n else v for n, v in tensors.items()}, tmp_path / "b" / WEIGHTS)
    found = diff()
    assert (found["difference"], found["cosine"]) == (pytest.approx(1.0), None)


def test_heads_and_biases_are_compared_by_value(diff: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    for seed, name in enumerate("ab", 1):
        write(tmp_path / name, peftcli.LoraConfig(modules_to_save=["classifier"]), seed, kind="bert")
    found = diff()
    a, b = (load_file(tmp_path / name / WEIGHTS)["base_model.model.classifier.weight"] for name in "ab")
    row = next(row for row in found["tensors"] if row["tensor"] == "classifier.weight")
    assert row["difference"] == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())), rel=1e-5)
    assert not any("lora" in row["tensor"] for row in found["tensors"])


@pytest.mark.parametrize("other", ["ia3", "lora"])
def test_methods_whose_files_do_not_tell_are_compared_by_value(
    other: str, cli: Callable[..., Any], diff: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    write(tmp_path / "a", peftcli.IA3Config())
    write(tmp_path / "b", peftcli.IA3Config() if other == "ia3" else peftcli.LoraConfig(), seed=2)
    found = diff()
    assert found["reason"] == "what IA3 changes cannot be told from its file without the base model"
    assert found["modules"] == []
    assert bool(found["tensors"]) == (other == "ia3")
    assert bool(found["only_b"]) == (other == "lora")
    ran = cli("diff", tmp_path / "a", tmp_path / "b")
    assert ran.code == 0
    assert "stored values are compared, not updates: what IA3 changes" in ran.err


def test_what_no_number_holds_is_null(diff: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, peftcli.LoraConfig(r=4))
    path = tmp_path / "b/adapter_model.safetensors"
    save_file({name: value.double() * 1e200 for name, value in load_file(path).items()}, path)
    found = diff()
    assert {(row["difference"], row["cosine"]) for row in found["modules"]} == {(None, None)}
    assert (found["equal"], found["difference"], found["cosine"]) == (False, None, None)


def test_text(cli: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "a", peftcli.LoraConfig(r=4))
    write(tmp_path / "b", peftcli.LoraConfig(r=4, target_modules=["q_proj"]), seed=2)
    lines = cli("diff", tmp_path / "a", tmp_path / "b").out.splitlines()
    assert lines[0].split() == ["setting", "A", "B"]
    assert lines[1].split() == ["target_modules", "q_proj,", "v_proj", "q_proj"]
    assert "only in A: model.layers.0.self_attn.v_proj" in lines
    assert lines[-1].split()[0] == "all"
    assert "\x1b" not in "".join(lines)


def test_what_is_no_adapter(cli: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path / "a", peftcli.LoraConfig(r=4))
    (tmp_path / "b").mkdir()
    for args in ((tmp_path / "a", tmp_path / "b"), (tmp_path / "b", tmp_path / "a"), (tmp_path / "a", "no such")):
        ran = cli("diff", *args, "--json")
        assert ran.code == 4
        assert json.loads(ran.out)["error"]["exit_code"] == 4
    assert cli("diff", tmp_path / "a").code == 2
