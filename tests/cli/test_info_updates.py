"""``peftcli info ADAPTER``: how much each weight is changed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import randomise, tiny
from safetensors.torch import load_file, save_file

import peftcli
from peftcli.core.config import AdapterConfig
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers

WEIGHTS = "adapter_model.safetensors"


def write(folder: Path, config: AdapterConfig | None = None, kind: str = "llama") -> torch.nn.Module:
    """An adapter folder for a tiny model, and the model."""
    model, config = tiny(kind), config or peftcli.LoraConfig(r=4)
    inject(model, config)
    randomise(model)
    save_adapter(model, config, folder)
    return model


def change(folder: Path, part: str, value: float) -> list[str]:
    """Multiply the tensors whose name holds ``part``."""
    tensors = load_file(folder / WEIGHTS)
    names = [name for name in tensors if part in name]
    save_file({n: t * value if n in names else t for n, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return names


@pytest.fixture
def updates(cli: Callable[..., Any], tmp_path: Path) -> Callable[[], dict[str, Any]]:
    def updates() -> dict[str, Any]:
        ran = cli("info", tmp_path, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)["updates"]

    return updates


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*": 30}, "use_rslora": True}),
    "embedding": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "convolutions": ("convnet", {"target_modules": ["convolution"], "r": 4}),
    "with others": ("bert", {"modules_to_save": ["classifier"], "bias": "all"}),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_norm_and_effective_r_are_those_of_the_dense_update(
    case: str, updates: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    kind, settings = SETTINGS[case]
    model = write(tmp_path, peftcli.LoraConfig(**settings), kind)
    found = updates()
    layers = {path: layer for path, layer in adapter_layers(model).items() if hasattr(layer, "delta")}
    assert [entry["module"] for entry in found["modules"]] == sorted(layers)
    for entry in found["modules"]:
        layer = layers[entry["module"]]
        values = torch.linalg.svdvals(layer.delta().detach().double().flatten(1))
        share = values[values > 1e-9] / values.sum()
        assert entry["r"] == layer.r
        assert entry["norm"] == pytest.approx(float(values.norm()), rel=1e-5)
        assert entry["effective_r"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-4)
    assert found["norm"] == pytest.approx(math.hypot(*(entry["norm"] for entry in found["modules"])))
    assert found["dead"] == []


def test_adalora_tells_its_updates_too(updates: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    model = write(tmp_path, peftcli.AdaLoraConfig(total_step=10))
    layers = adapter_layers(model)
    for entry in updates()["modules"]:
        dense = layers[entry["module"]].delta().detach()
        assert entry["norm"] == pytest.approx(float(dense.norm()), rel=1e-5)
        assert entry["r"] == 12


def test_dead_modules_are_named(cli: Callable[..., Any], updates: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path)
    change(tmp_path, "layers.0.self_attn.q_proj.lora_B", 0.0)
    change(tmp_path, "layers.1.self_attn.v_proj.lora_A", 1e-7)
    change(tmp_path, "layers.1.self_attn.q_proj.lora_A", 1e-5)
    dead = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]
    assert updates()["dead"] == dead
    text = cli("info", tmp_path).out
    assert f"dead modules: {', '.join(dead)}\n" in text
    assert "model.layers.0.self_attn.q_proj  4  0" in text
    change(tmp_path, "lora_B", 0.0)
    assert len(updates()["dead"]) == 4
    assert updates()["norm"] == 0.0


def test_text_starts_with_the_facts_and_ends_with_a_table(cli: Callable[..., Any], tmp_path: Path) -> None:
    write(tmp_path)
    lines = cli("info", tmp_path).out.splitlines()
    assert lines[0] == f"adapter: {tmp_path}"
    assert "dead modules: none" in lines
    assert lines[-5].split() == ["module", "r", "norm", "effective", "r"]
    assert [line.split()[0].split(".")[-1] for line in lines[-4:]] == ["q_proj", "v_proj"] * 2
    short = cli("info", tmp_path, "--no-updates").out.splitlines()
    assert short == lines[: len(short)]
    assert not any("norm" in line for line in short)


CANNOT: dict[str, tuple[Callable[[], AdapterConfig], str]] = {
    "ia3": (lambda: peftcli.IA3Config(), "what IA3 changes cannot be told from its file without the base model"),
    "dora": (lambda: peftcli.LoraConfig(use_dora=True), "what DoRA adds depends on the base model's weights"),
    "prompt": (lambda: peftcli.PromptTuningConfig(num_virtual_tokens=3), "what PROMPT_TUNING changes cannot be told"),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_cannot_be_told_is_said(
    case: str, cli: Callable[..., Any], updates: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    make, reason = CANNOT[case]
    write(tmp_path, make())
    assert reason in updates()["reason"]
    assert f"updates: cannot be computed: {reason}" in cli("info", tmp_path).out


@pytest.mark.parametrize("factor", [1e200, 1e152])
def test_what_no_number_holds_is_said(factor: float, updates: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    write(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: value.double() * factor for name, value in tensors.items()}, tmp_path / WEIGHTS)
    found = updates()
    assert "too large for numbers of 64 bits" in found["reason"] if factor > 1e153 else math.isfinite(found["norm"])


def test_what_cannot_be_loaded_is_not_shown(
    cli: Callable[..., Any], updates: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    write(tmp_path)
    path = tmp_path / "adapter_config.json"
    good = path.read_text()
    refused = {'"LORA"': ('"NEWER"', "no method is called 'NEWER'"), '"r": 4': ('"r": 7', "4 rows; the config says 7")}
    for old, (new, said) in refused.items():
        path.write_text(good.replace(old, new))
        ran = cli("info", tmp_path, "--json")
        assert ran.code == 4
        assert said in ran.err
        assert said in json.loads(ran.out)["error"]["message"]
    path.write_text(good)
    assert updates()["norm"] > 0
    name = change(tmp_path, "0.self_attn.q_proj.lora_A", math.nan)[0]
    ran = cli("info", tmp_path, "--json")
    assert ran.code == 4
    assert f"not finite: {name}" in ran.err


def test_a_large_file_still_shows_the_facts(
    cli: Callable[..., Any], updates: Callable[[], dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    monkeypatch.setattr("peftcli.adapters.diff._MAX_ANALYSED", 10)
    assert updates() == {"reason": "the file is larger than 1 GB"}
    assert cli("info", tmp_path).out.startswith("adapter: ")


def test_without_updates_nothing_slow_is_imported(tmp_path: Path) -> None:
    write(tmp_path)
    script = (
        "import sys; from peftcli.cli.app import main; code = main(['info', sys.argv[1], '--no-updates']);"
        "slow = {'torch', 'transformers', 'numpy'} & set(sys.modules); sys.exit(code or sorted(slow) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=trainkit.subprocess_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
