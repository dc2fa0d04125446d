"""The wheel and the sdist: what is in them, and what works where only the wheel is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist of the files that git knows: build writes into its source folder."""
    source, dist = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [wheel], [sdist] = dist.glob("*.whl"), dist.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_and_sdist_hold_the_package_and_the_wheel_no_test(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    assert wheel.name == f"peftcli-{PROJECT['version']}-py3-none-any.whl"
    listed = subprocess.run(["git", "ls-files", "peftcli"], cwd=ROOT, check=True, capture_output=True, text=True)
    ours = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == ours
    with tarfile.open(sdist) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert ours | {"README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md", "configs/quickstart.yaml"} <= inside
    assert not any(name.startswith("tests/") for name in inside)


def test_the_pythons_that_are_named_agree() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    kinds = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name}
    assert kinds == {"3.11", "3.12", "3.13"}
    for name in ("README.md", "CONTRIBUTING.md", "Makefile", "CHANGELOG.md"):
        assert set(re.findall(r"Python 3\.\d+ to 3\.\d+", (ROOT / name).read_text(encoding="utf-8"))) == {
            "Python 3.11 to 3.13"
        }, name


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    lines = (ROOT / "tests/oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", need).groups() for need in PROJECT["dependencies"])  # type: ignore[union-attr]
    padded = {name: version.split(".") for name, version in pinned.items()}
    assert {name: ".".join(padded[name][: len(bound.split("."))]) for name, bound in bounds.items()} == bounds


def test_the_page_of_licences_has_every_dependency() -> None:
    page = (ROOT / "docs/licences.md").read_text(encoding="utf-8")
    extras = PROJECT["optional-dependencies"]
    needs = [*PROJECT["dependencies"], *extras["audio"], *extras["metrics"]]
    assert [need for need in needs if f"| {re.split('[>=]', need)[0]} |" not in page] == []
    assert "not said" not in page


TINY = """
import sys
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
inner = Tokenizer(models.BPE({token: at for at, token in enumerate(alphabet)}, []))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
inner.add_special_tokens([AddedToken(token, special=True) for token in alphabet[:2]])
PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>").save_pretrained("tiny")
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = LlamaConfig(vocab_size=258, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
LlamaForCausalLM(config).save_pretrained("tiny")
"""
RECIPE = """
base_model: tiny
task: causal_lm
method: {type: lora, r: 4, target_modules: all-linear}
dataset: {train: mine.csv, eval_fraction: 0.25}
training: {output_dir: out, max_steps: 3, per_device_train_batch_size: 2}
"""
COMMANDS = {
    "--version": PROJECT["version"],
    "--help": "Recipes:",
    "skill": "# peftcli for coding agents",
    "schema": "json-schema.org",
    "info tasks": "causal_lm",
    "info methods": "lora",
    "check mine.yaml": "ok: mine.yaml",
    "check --deep mine.yaml": "ok: mine.yaml",
    "inspect mine.yaml --html page.html": "",
    "train mine.yaml": "adapter",
    "status out": "complete",
    "generate out --prompt hello --max-new-tokens 3": "",
    "predict out hello": "",
    "verify out": "",
    "merge out --output merged": "",
    "push out USER/NAME --base-model-id USER/BASE --dry-run": "adapter_model.safetensors",
}
"""Command -> what it prints, where only the wheel is there."""


@pytest.mark.slow  # installs torch
@pytest.mark.timeout(1800)
def test_the_wheel_alone_trains_on_a_file_of_the_users(built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    run(sys.executable, "-m", "venv", "empty")
    bin_ = tmp_path / "empty/bin"
    run(str(bin_ / "pip"), "install", "--quiet", "--disable-pip-version-check", str(built[0]))
    assert "No broken requirements" in run(str(bin_ / "pip"), "check")
    where = run(str(bin_ / "python"), "-c", "import peftcli; print(peftcli.__file__)")
    assert str(tmp_path) in where
    run(str(bin_ / "python"), "-c", TINY)
    rows = "".join(f"what is {n} plus one?,{n + 1}\n" for n in range(16))
    (tmp_path / "mine.csv").write_text(f"prompt,completion\n{rows}", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    for command, printed in COMMANDS.items():
        assert printed in run(str(bin_ / "peftcli"), *command.split()), command
    assert json.loads((tmp_path / "out/run.json").read_text(encoding="utf-8"))["status"] == "complete"
