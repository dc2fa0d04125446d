"""A run whose base model is on the hub."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import classifierkit
import datasets
import pytest
import safetensors.torch
import torch
import trainkit
from diffusionkit import pipeline_base
from hub_server import Commit, Hub, Repo
from huggingface_hub import constants
from taskkit import CASES
from trainkit import at_step, read_run, run_recipe, write_recipe

from peftcli.adapters.merge import merge_adapter
from peftcli.cli.app import main
from peftcli.errors import DataError, HubError, Interrupted, ModelError
from peftcli.models import hub_files
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.train import fresh_process
from peftcli.train.runs import checkpoint

NAME = "acme/tiny"
_MODULES = {"": "Transformer", "1_Pooling": "Pooling"}


def _commit(hub: Hub, files: dict[str, bytes]) -> None:
    repo = hub.repos.setdefault(NAME, Repo(private=False))
    repo.refs["main"].append(Commit("files", files))


def test_it_goes_on_with_the_commit_that_it_began_with(hub: Hub, tmp_path: Path) -> None:
    files = {path.name: path.read_bytes() for path in trainkit.base_folder().iterdir()}
    _commit(hub, files)
    first = hub.repos[NAME].refs["main"][-1].oid
    recipe, base = write_recipe(tmp_path), f"base_model={NAME}"
    whole = run_recipe(recipe, base, f"training.output_dir={tmp_path}/whole")
    with pytest.raises(Interrupted):
        run_recipe(recipe, base, on_event=at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    tensors = safetensors.torch.load(files["model.safetensors"])
    other = {name: torch.zeros_like(value) for name, value in tensors.items()}
    _commit(hub, {**files, "model.safetensors": safetensors.torch.save(other, {"format": "pt"})})
    hub_files._folders.clear()  # as another process
    shutil.copytree(tmp_path / "out", tmp_path / "changed")
    change = "base_model.attn_implementation"
    run_recipe(recipe, base, f"{change}=eager", f"training.output_dir={tmp_path}/changed", allow_change=[change])
    assert read_run(tmp_path / "changed")["base_model"]["revision"] == first
    shutil.copytree(tmp_path / "out", tmp_path / "older")
    settings, path = (base, f"training.output_dir={tmp_path}/older"), tmp_path / "older/checkpoints/step-000004"
    manifest = checkpoint.read_manifest(path) | {"recipe_sha256": "of another recipe"}
    (path / "MANIFEST.json").write_bytes(checkpoint._as_json(checkpoint._sealed(manifest)))
    run_recipe(recipe, *settings, resume=str(path), allow_change=["recipe"])
    assert read_run(tmp_path / "older")["base_model"]["revision"] == first
    done = run_recipe(recipe, base)
    assert done.weights == whole.weights
    assert read_run(tmp_path / "out")["base_model"]["revision"] == first
    assert len(done.run["base_model"]["sha256"]) == 64
    assert first not in (tmp_path / "out/recipe.yaml").read_text()
    assert first not in (tmp_path / "out/adapter_config.json").read_text()
    hub_files._folders.clear()
    assert run_recipe(recipe, base, f"training.output_dir={tmp_path}/new").weights != whole.weights


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_commands_of_a_run_find_its_base_model(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fresh: bool
) -> None:
    """Whose vocabulary has a word that is also a key of the hub's own answers."""
    files = {path.name: path.read_bytes() for path in trainkit.base_folder().iterdir()}
    _commit(hub, {**files, "vocab.json": b'{"sha": 24818}'})
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    settings = (f"base_model={NAME}", "training.max_steps=1", "training.verify=true")
    if not fresh:  # an interpreter takes seconds
        monkeypatch.setattr(fresh_process, "verify_run", lambda folder, on_event: None)
    assert main(["train", str(recipe), *settings]) == 0, capsys.readouterr().err
    assert not fresh or "verified" in capsys.readouterr().err
    assert main(["verify", str(out)]) == 0, capsys.readouterr().err
    assert main(["generate", str(out), "--prompt", "x", "--max-new-tokens", "1"]) == 0
    assert main(["merge", str(out), "--output", str(tmp_path / "merged")]) == 0


@pytest.mark.parametrize("on_hub", [False, True])
def test_a_model_without_weights_is_found_by_the_deep_check(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], on_hub: bool
) -> None:
    recipe, base = write_recipe(tmp_path), tmp_path / "bare"
    shutil.copytree(trainkit.base_folder(), base, ignore=shutil.ignore_patterns("*.safetensors*"))
    _commit(hub, {path.name: path.read_bytes() for path in base.iterdir()})
    name = NAME if on_hub else str(base)
    assert main(["check", str(recipe), "--deep", f"base_model={name}"]) == ModelError.exit_code
    out = capsys.readouterr().out
    assert f"base_model: {name}: contains neither model.safetensors nor model.safetensors.index.json" in out
    assert "1 problem" in out


@pytest.fixture
def datasets_of_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repo:
    """A repository of a dataset, ``acme/rows``, where ``datasets`` and ``huggingface_hub`` look for it."""
    for module, name, value in (
        (constants, "ENDPOINT", hub.url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        (datasets.config, "HF_ENDPOINT", hub.url),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets"),
        (datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"),
    ):
        monkeypatch.setattr(module, name, value)
    repo = hub.repos["datasets/acme/rows"] = Repo(private=False)
    return repo


def test_init_reads_a_dataset_of_the_hub(datasets_of_hub: Repo, tmp_path: Path, capsys: Any) -> None:
    words = ["good camera", "bad battery", "fine food", "slow service"]
    rows = [{"text": f"{words[at % 4]} number {at * at}", "label": "np"[at % 2]} for at in range(200)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    datasets_of_hub.refs["main"].append(Commit("rows", {"train.jsonl": content}))
    recipe, base = tmp_path / "recipe.yaml", trainkit.base_folder()
    assert main(["init", "acme/rows", "--base", str(base), "--output", str(recipe), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["task"], made["rows"], made["train"]) == ("sequence_classification", 200, ["acme/rows"])
    assert main(["check", str(recipe)]) == 0
    assert main(["init", "acme/nothing", "--output", str(tmp_path / "no.yaml")]) == HubError.exit_code


def test_it_goes_on_with_the_dataset_that_it_began_with(hub: Hub, datasets_of_hub: Repo, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    rows, eval_rows = ((tmp_path / name).read_bytes() for name in ("train.jsonl", "eval.jsonl"))
    repo = datasets_of_hub
    repo.refs["main"] += [Commit("old", {"train.jsonl": eval_rows}), Commit("rows", {"train.jsonl": rows})]
    _, old, first = (commit.oid for commit in repo.refs["main"])
    mix = f"[{{train: acme/rows, revision: {old}}}, {{train: acme/rows}}]"
    both = f"dataset={{train: null, mix: {mix}, max_length: 128}}"
    for each, count in (("dataset.train=acme/rows", 10), (both, 13)):
        out = f"training.output_dir={tmp_path}/{len(each)}"
        with pytest.raises(Interrupted):
            run_recipe(recipe, each, out, on_event=at_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        repo.refs["main"].append(Commit(each, {"train.jsonl": eval_rows}))
        done = run_recipe(recipe, each, out)
        assert (done.run["exact"], done.run["changes"], done.run["data"]["rows"]) == (True, [], count)
        assert first not in (done.folder / "recipe.yaml").read_text()
        del repo.refs["main"][-1]
    with pytest.raises(DataError, match="no split 'tset'") as caught:
        run_recipe(recipe, "dataset.train=acme/rows", "dataset.eval=acme/rows", "dataset.eval_split=tset")
    assert caught.value.key == "dataset.eval_split"


@pytest.mark.slow
def test_training_begins_from_an_adapter_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    recipe, start = write_recipe(tmp_path), tmp_path / "start"
    run_recipe(recipe, f"training.output_dir={start}")
    hub.repos[NAME] = Repo(private=False)
    _commit(hub, {name: (start / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")})
    local = run_recipe(recipe, f"training.init_adapter_from={start}", f"training.output_dir={tmp_path}/local")
    run = run_recipe(recipe, f"training.init_adapter_from={NAME}")
    assert run.weights == local.weights
    assert run.run["identity"]["data"][NAME] == local.run["identity"]["data"][str(start)]


def test_files_in_a_folder_of_the_base_model_are_read_where_a_task_asks(hub: Hub) -> None:
    """How a text's embedding is made."""
    files = {path.name: path.read_bytes() for path in classifierkit.classifier_base("bert").iterdir()}
    kinds = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in _MODULES.items()]
    files |= {"modules.json": json.dumps(kinds).encode(), "1_Pooling/config.json": b'{"pooling_mode": "cls"}'}
    _commit(hub, {**files, "onnx/config.json": b"{}"})
    row = TASKS["feature_extraction"]
    with open_base(BaseModel(name=NAME)) as base:
        assert row.open(row.settings(), base).settings.pooling == "cls"
        assert not (base.folder / "onnx").exists()


@pytest.mark.slow
def test_a_pipeline_comes_part_by_part(hub: Hub, tmp_path: Path) -> None:
    """Without pickles, weights in other forms and what is not loaded."""
    from diffusers import DiffusionPipeline

    base = pipeline_base("sd")
    files = {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    more = ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "v1.safetensors")
    index = json.loads(files["model_index.json"]) | {"safety_checker": ["stable_diffusion", "SafetyChecker"]}
    _commit(hub, {**files, **dict.fromkeys(more, b"not fetched"), "model_index.json": json.dumps(index).encode()})
    recipe = CASES["text_to_image"].write(tmp_path)
    run = run_recipe(recipe, f"base_model={NAME}")
    folder = hub_files.snapshot(BaseModel(name=NAME))
    assert folder is not None
    assert not any((folder / name).exists() for name in more)
    assert len(run.run["base_model"]["sha256"]) == 64
    merge_adapter(str(run.folder), tmp_path / "merged")
    assert DiffusionPipeline.from_pretrained(tmp_path / "merged").safety_checker is None
