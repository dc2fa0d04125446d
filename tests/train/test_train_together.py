"""Recipes that train together end as each does alone."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import torch
import trainkit
from trainkit import MESSAGES, PAIRS, read_metrics, read_run, reset_accelerate

from peftcli.cli.app import main
from peftcli.errors import AdapterError, Diverged, UsageError
from peftcli.recipe import load_recipe, to_yaml
from peftcli.train.events import Event, Stepped
from peftcli.train.together import Outcome, alike, train_together

EVALUATES = (
    "training.eval_strategy=steps",
    "training.eval_steps=2",
    "training.eval_on_start=true",
    "training.load_best_model_at_end=true",
)
DIFFERENT = {
    "a": ("method.lora_dropout=0.2", "training.seed=7", *EVALUATES),
    "b": (
        "method.r=8",
        "method.target_modules=[q_proj, down_proj, embed_tokens]",
        "training.learning_rate=1e-3",
        "training.max_steps=-1",
        "training.num_train_epochs=2",
        "training.per_device_train_batch_size=3",
        "training.gradient_accumulation_steps=2",
        "training.save_strategy=steps",
        "training.save_steps=2",
    ),
}


def write_recipes(folder: Path, settings: dict[str, Sequence[str]]) -> list[Path]:
    """A recipe for each name, the rows of each from another place on."""
    paths = []
    for at, (name, overrides) in enumerate(settings.items()):
        written = trainkit.write_recipe(folder / name, rows=[*MESSAGES[at:], *MESSAGES[:at]])
        paths.append(folder / f"{name}.yaml")
        paths[-1].write_text(to_yaml(load_recipe(written, overrides)))
    return paths


def together(paths: Sequence[Path], on_event: Callable[[Event], None] = lambda event: None) -> list[Outcome]:
    """Train recipes together; ``on_event`` gets what happens to the first."""
    reset_accelerate()
    recipes = {str(path): load_recipe(path) for path in paths}
    first = str(paths[0])
    outcomes = train_together(recipes, on_event=lambda name: on_event if name == first else lambda event: None)
    return list(outcomes.values())


def assert_as_alone(folder: Path, settings: dict[str, Sequence[str]], tolerance: float = 1e-5) -> None:
    """The adapters, losses and metrics in ``folder`` are those of runs alone."""
    for name, path in zip(settings, write_recipes(folder / "alone", settings), strict=True):
        alone, out = trainkit.run_recipe(path), folder / name / "out"
        expected, found = (
            safetensors.torch.load(alone.weights),
            safetensors.torch.load_file(out / "adapter_model.safetensors"),
        )
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(
                found[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
            )
        assert read_run(out)["status"] == "complete"
        for line, other in zip(read_metrics(out), alone.metrics, strict=True):
            assert line == pytest.approx(other, rel=10 * tolerance, abs=tolerance)


def test_recipes_end_together_as_alone_also_after_a_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Stepped) and event.result.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    paths = write_recipes(tmp_path, DIFFERENT)
    assert [error.exit_code for error in together(paths, stop)] == [75, 75]
    assert read_run(tmp_path / "b/out")["status"] == "interrupted"
    reset_accelerate()
    assert main(["train", *map(str, paths), "--together", "--json"]) == 0
    captured = capsys.readouterr()
    runs = json.loads(captured.out)["runs"]
    assert [run["attempts"][-1]["from_step"] for run in runs] == [3, 3]
    assert runs == [read_run(tmp_path / name / "out") for name in DIFFERENT]
    assert "[b] step 4/4" in captured.err
    assert_as_alone(tmp_path, DIFFERENT)


@pytest.mark.slow
def test_one_that_diverges_ends_alone(tmp_path: Path) -> None:
    settings = {"a": ("training.max_steps=5",), "b": ("training.learning_rate=1e6", "training.max_grad_norm=0")}
    outcomes = together(write_recipes(tmp_path, settings))
    assert isinstance(outcomes[1], Diverged)
    assert read_run(tmp_path / "b/out")["exit_code"] == 9
    assert_as_alone(tmp_path, {"a": settings["a"]})


@pytest.mark.slow
def test_in_bfloat16_with_an_adapter_alone_on_some_layers(tmp_path: Path) -> None:
    settings = {
        "a": ("training.bf16=true", "training.max_steps=3", "method={type: vera, r: 8}"),
        "b": ("training.bf16=true", "training.max_steps=2", "method.target_modules=[v_proj]"),
    }
    together(write_recipes(tmp_path, settings))
    assert_as_alone(tmp_path, settings, tolerance=2e-3)


@pytest.mark.slow
def test_new_heads_are_drawn_by_the_seed_of_each_recipe(tmp_path: Path) -> None:
    paths = []
    for seed in (1, 2):
        path = trainkit.write_recipe(tmp_path / f"{seed}")
        rows = [{"text": question, "label": ("yes", "no")[number % 2]} for number, (question, _) in enumerate(PAIRS)]
        trainkit.write_rows(path.parent / "train.jsonl", rows)
        trainkit.write_rows(path.parent / "eval.jsonl", rows[:4])
        changed = load_recipe(path, ["task=sequence_classification", f"training.seed={seed}", "training.max_steps=3"])
        paths.append(tmp_path / f"{seed}.yaml")
        paths[-1].write_text(to_yaml(changed))
    together(paths)
    for seed, path in enumerate(paths, 1):
        found = safetensors.torch.load_file(tmp_path / f"{seed}/out/adapter_model.safetensors")
        path.write_text(path.read_text().replace(f"{seed}/out", f"{seed}/alone"))
        expected = safetensors.torch.load(trainkit.run_recipe(path).weights)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_recipes_that_cannot_be_trained_together_are_named(tmp_path: Path) -> None:
    for overrides, message in {
        "base_model=gpt2": "base_model: is not that of a",
        "training.bf16=true": "training.bf16: is not that of a",
        "training.gradient_checkpointing=true": "training.gradient_checkpointing: does not work",
        "training.torch_compile=true": "training.torch_compile: does not work",
        f"training.output_dir={tmp_path}/a/out": "training.output_dir: is also that of a",
        f"training.output_dir={tmp_path}/a/out/b": "training.output_dir: and that of a are inside each other",
    }.items():
        paths = write_recipes(tmp_path, {"a": (), "b": (overrides,)})
        recipes = {path.stem: load_recipe(path) for path in paths}
        with pytest.raises(UsageError, match=f"^b: {message}"):
            alike(recipes)
    paths = write_recipes(tmp_path, {"a": (), "b": (trainkit.PROMPT_TUNING,)})
    with pytest.raises(
        AdapterError, match=r"b\.yaml: method: cannot be trained beside others: the adapter changes more"
    ):
        together(paths)
    assert read_run(tmp_path / "a/out")["status"] == "interrupted"
    assert not (tmp_path / "a/out/metrics.jsonl").exists()
