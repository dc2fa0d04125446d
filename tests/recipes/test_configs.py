"""Every recipe that ships is valid, and trains at tiny size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import classifierkit
import pytest
import trainkit
from taskkit import CASES

from peftcli.adapters.proof.verify import verify_adapter
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.methods import METHODS
from peftcli.methods.lora import LoraConfig
from peftcli.recipe import read
from peftcli.schema import Launch, Recipe
from peftcli.tasks import row_of

ROOT = Path(__file__).parents[2]
FETCHED = {
    **{"docstring-texts": "masked_lm", "docstring-choices": "multiple_choice"},
    **{"garments": "semantic_segmentation", "kjv": "token_classification"},
    **{"questions": "question_answering", "docstrings": "reward", "pronunciations": "seq2seq_lm"},
    **{"asterisk": "speech_recognition", "code-search": "feature_extraction", "translations": "causal_lm"},
    **{"garment-words": "image_text_to_text", "garment-boxes": "object_detection"},
    **{"spoken-languages": "audio_classification", "spelled-prompts": "speech_recognition"},
}
"""Folder that configs/tasks/fetch.py makes -> a task whose tiny rows stand for it."""
BASES = {"models/ctc-flite": "letters of sounds"}
"""Base models of another kind than those by which their task's tiny one was made -> the case that has its kind."""
PROFILES = sorted((ROOT / "configs/launch").glob("*.yaml"))
"""Parts of recipes, which a recipe extends."""
RECIPES = sorted({*(ROOT / "configs").rglob("*.yaml")} - {*PROFILES})


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout, with a little data where configs/tasks/fetch.py puts what it fetches."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data/spam").mkdir(parents=True)
    for part in ("train", "eval"):
        trainkit.write_rows(folder / f"data/spam/{part}.jsonl", classifierkit.ROWS)
        pictures = classifierkit.write_pictures(folder / f"data/fashion-mnist/{part}", 4)
        (pictures / "red").rename(pictures / "bag")
        for name, task in FETCHED.items():
            (folder / "data" / name).mkdir(exist_ok=True)
            trainkit.write_rows(folder / f"data/{name}/{part}.jsonl", CASES[task].rows())
    return folder


@pytest.fixture(autouse=True)
def _at_the_root(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where README and Makefile run the recipes; ``${...}`` keep their defaults."""
    monkeypatch.chdir(checkout)


def test_there_are_recipes() -> None:
    assert RECIPES
    assert ROOT / "configs/quickstart.yaml" in RECIPES


def test_every_method_has_a_recipe() -> None:
    recipes = [read(path).recipe for path in RECIPES]
    assert {recipe.method["type"] for recipe in recipes if recipe} == set(METHODS)


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_a_recipe_can_extend_a_profile(path: Path, tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path)
    recipe.write_text(f"extends: {path}\n{recipe.read_text()}")
    reading = read(recipe)
    assert not reading.problems, reading.problems
    assert reading.recipe is not None
    assert reading.recipe.launch != Launch() or reading.recipe.launch.strategy != "replicate"
    assert path.read_text().startswith("#")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_explains_itself(path: Path) -> None:
    reading = read(path)
    assert not reading.problems, reading.problems
    assert path.read_text().startswith("#"), "a recipe reads like a document: it begins by saying what it does"


@pytest.mark.grid(each=lambda path: path.parent.name)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains_a_few_steps_of_a_tiny_model(path: Path, tmp_path: Path) -> None:
    recipe = read(path).recipe
    assert recipe is not None
    if recipe.base_model.quantization:
        pytest.importorskip("bitsandbytes")
    base = _base(recipe)
    settings = [f"base_model={base}", f"training.output_dir={tmp_path}/out", "training.max_steps=3"]
    settings += ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1"]
    settings += [] if path.parent.name == "tasks" else ["dataset.max_length=192"]
    settings += ["method.context=[{prompt: Say hello., completion: Hello.}]"] if "context" in recipe.method else []
    settings += [f"task.miner={base}"] if "miner" in (recipe.task or {}) else []
    settings += (
        ["task.context=Be brief."] if "context" in (recipe.task or {}) else []
    )  # the tiny model reads few tokens
    settings += ["method.adapter_layers=2"] if "adapter_layers" in recipe.method else []  # it has no more
    settings += ["gates={}", "training.load_best_model_at_end=false"]
    settings.append("dataset.allow=[answers_cut]")  # the tiny tokenizer makes several times as many tokens of a row
    if recipe.method["type"] == "xlora":
        settings.append(f"method.adapters={json.dumps(_experts(tmp_path, list(recipe.method['adapters'])))}")
    if recipe.dataset.mix:  # each dataset has a limit of its own
        few = [asdict(source) | {"limit": 12} for source in recipe.dataset.mix]
        settings.append(f"dataset.mix={json.dumps(few)}")
    else:
        settings.append("dataset.limit=12")
        settings += _local_data(recipe, tmp_path)
    done = trainkit.run_recipe(path, *settings)
    assert done.run["status"] == "complete"
    assert done.run["steps"] == {"done": 3, "total": 3}
    config = json.loads((done.folder / "adapter_config.json").read_text())
    assert config["peft_type"] == METHODS[recipe.method["type"]].config_class().peft_type
    assert config["task_type"] == row_of(recipe).task_type
    assert verify_adapter(str(done.folder))["tensors"]


def _experts(folder: Path, names: list[str]) -> dict[str, str]:
    """LoRA adapters of the tiny base model."""
    for name in names:
        model, config = trainkit.build("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        inject(model, config)
        save_adapter(model, config, folder / name)
    return {name: str(folder / name) for name in names}


def _base(recipe: Recipe) -> Path:
    """A tiny base model for the recipe's task."""
    task = (recipe.task or {})["type"]
    case = BASES.get(recipe.base_model.name, task)
    if case in CASES:
        return CASES[case].base()
    return trainkit.base_folder("t5", chat=False) if recipe.task == {"type": "seq2seq_lm"} else trainkit.base_folder()


def _local_data(recipe: Recipe, folder: Path) -> list[str]:
    """Settings that put local rows in the place of a hub dataset, which no test can reach, and take back its own."""
    dataset, rows = recipe.dataset, trainkit.PROMPTS if recipe.task == {"type": "seq2seq_lm"} else trainkit.MESSAGES
    if Path(dataset.train or "").exists():
        return []
    settings = ["dataset.name=null", "dataset.revision=null", "dataset.split=train", "dataset.streaming=false"]
    for key, part in (("train", rows[:10]), ("eval", rows[10:])):
        if getattr(dataset, key) is not None:
            settings.append(f"dataset.{key}={trainkit.write_rows(folder / f'{key}.jsonl', part)}")
    return settings
