"""A recipe that begins from an adapter: SFT then DPO, and training that goes on with other data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import trainkit
from safetensors.torch import load_file, save_file
from taskkit import CASES
from test_train_processes import group
from trainkit import MESSAGES, Trained, read_run, run_recipe, run_until, write_recipe

from peftcli.adapters.merge import merge_adapter
from peftcli.adapters.proof.verify import verify_adapter
from peftcli.errors import AdapterError, DataError, PeftcliError, UsageError
from peftcli.recipe import load_recipe
from peftcli.train.evaluate_adapter import measure
from peftcli.train.preview import deep_check

EVALUATES = ("training.eval_strategy=epoch", "training.eval_on_start=true")


@pytest.fixture
def sft(tmp_path: Path) -> Trained:
    """A finished run on conversations."""
    return run_recipe(write_recipe(tmp_path / "sft"))


def dpo(folder: Path, start: Path | str) -> Path:
    """A recipe of pairs that begins from an adapter and takes all settings of the method from it."""
    folder.mkdir()
    recipe = CASES["preference"].write(folder)
    text = recipe.read_text().replace("{type: lora, r: 4, lora_alpha: 8, target_modules: all-linear}", "{type: lora}")
    recipe.write_text(f"{text}  init_adapter_from: {start}\n")
    return recipe


def first_loss(run: Trained) -> float:
    return float(run.losses[0])


def test_after_sft_the_reference_is_the_sft_adapter(sft: Trained, tmp_path: Path) -> None:
    recipe = dpo(tmp_path / "dpo", sft.folder)
    run = run_recipe(recipe, *EVALUATES)
    assert first_loss(run) == pytest.approx(math.log(2), rel=1e-5), "no answer is preferred as training begins"
    assert run.run["eval"]["first"]["eval_reward_margin"] == pytest.approx(0, abs=1e-5)
    assert run.run["task"]["reference"] == "start"
    against_base = run_recipe(recipe, "task.reference=base", f"training.output_dir={tmp_path}/base")
    assert first_loss(against_base) != pytest.approx(math.log(2), rel=1e-3)
    measured = measure(load_recipe(run.folder / "recipe.yaml"), str(run.folder))
    assert measured["eval"]["last"] == pytest.approx(run.run["eval"]["last"], rel=1e-4)
    assert run.run["eval"]["last"]["eval_reward_margin"] > 0
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (sft.folder, run.folder)]
    assert configs[0] == configs[1], "it is a usual adapter of the base model"


def test_names_that_the_file_has_in_full_are_those_of_the_recipe(tmp_path: Path) -> None:
    recipe, short = write_recipe(tmp_path), "training.max_steps=1"
    method = "method={type: lora, r: 4, target_modules: [q_proj], modules_to_save: [norm]}"
    first = run_recipe(recipe, method, short)
    names = json.loads((first.folder / "adapter_config.json").read_text())["modules_to_save"]
    assert names == ["model.norm"], "PEFT would take norm for more"
    begins = (f"training.init_adapter_from={first.folder}", f"training.output_dir={tmp_path}/second", short)
    assert run_recipe(recipe, method, *begins).run["status"] == "complete"
    with pytest.raises(AdapterError, match="target_modules"):
        run_recipe(recipe, method.replace("q_proj", "v_proj"), *begins)


@pytest.mark.slow
def test_the_reference_is_the_merged_base_after_sft_is_merged(sft: Trained, tmp_path: Path) -> None:
    merge_adapter(str(sft.folder), tmp_path / "merged")
    recipe = CASES["preference"].write(tmp_path)
    run = run_recipe(recipe, *EVALUATES, f"base_model={tmp_path}/merged")
    assert first_loss(run) == pytest.approx(math.log(2), rel=1e-5)
    assert run.run["task"]["reference"] == "base"
    measured = measure(run.recipe, str(run.folder))
    assert measured["eval"]["last"] == pytest.approx(run.run["eval"]["last"], rel=1e-4)
    kept = run_recipe(dpo(tmp_path / "kept", sft.folder))
    assert kept.losses == pytest.approx(run.losses, abs=0.1), "much the same as training on"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preference", "causal_lm"])
def test_a_resumed_run_ends_with_the_same_bytes(sft: Trained, tmp_path: Path, name: str) -> None:
    recipe = dpo(tmp_path / "run", sft.folder) if name == "preference" else go_on(tmp_path / "run", sft.folder)
    saves = ("training.save_strategy=steps", "training.save_steps=2", *EVALUATES)
    resumed, whole = trainkit.resumed_and_whole(recipe, *saves, step=3)
    assert resumed.run["attempts"][-1]["from_step"] == 3
    for file in trainkit.PRODUCT[:3]:
        assert (resumed.folder / file).read_bytes() == (whole.folder / file).read_bytes(), file


@pytest.mark.slow
def test_a_run_is_not_resumed_with_another_start(sft: Trained, tmp_path: Path) -> None:
    recipe = dpo(tmp_path / "dpo", sft.folder)
    run_until(3, recipe)
    assert str(sft.folder) in read_run(tmp_path / "dpo/out")["identity"]["data"]
    scale(sft.folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="holds a run of another recipe or other data") as caught:
        run_recipe(recipe)
    assert f"data.{sft.folder}: " in str(caught.value)


@pytest.mark.slow
def test_training_goes_on_with_other_data(sft: Trained, tmp_path: Path) -> None:
    more = run_recipe(go_on(tmp_path / "more", sft.folder), *EVALUATES)
    measured = measure(more.recipe, str(sft.folder))["eval"]["last"]
    assert more.run["eval"]["first"] == pytest.approx(measured, rel=1e-5)
    assert more.run["recipe"]["method"]["r"] == 4, "run.json has every setting"
    again = run_recipe(more.folder / "recipe.yaml", f"training.output_dir={tmp_path}/again")
    assert again.weights == more.weights, "the saved recipe says the same"


@pytest.mark.slow
def test_rows_of_new_tokens_go_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    base = f"base_model={{name: {trainkit.base_folder()}, new_tokens: [<a>, <b>]}}"
    first = run_recipe(recipe, base, *EVALUATES)
    more = run_recipe(recipe, base, *EVALUATES, *begins(first.folder, tmp_path / "more"))
    assert more.run["eval"]["first"] == pytest.approx(first.run["eval"]["last"], rel=1e-5)


@pytest.mark.slow
def test_dropout_and_patterns_are_the_recipes_own(sft: Trained, tmp_path: Path) -> None:
    own = ("method.lora_dropout=0.5", "method.target_modules=all-linear", "method.r=4")
    run = run_recipe(go_on(tmp_path / "more", sft.folder), *own)
    assert run.run["recipe"]["method"]["lora_dropout"] == 0.5
    assert run.run["recipe"]["method"]["lora_alpha"] == 8


REFUSED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "another r": (("method.r=8",), "method.r", "r is 8, and 4 in "),
    "two settings": (("method.r=8", "method.lora_alpha=2"), "method.r", "lora_alpha is 2"),
    "a start of its own": (("method.init_lora_weights=pissa",), "method.init_lora_weights", "'pissa', and True"),
    "another method": (("method.type=ia3",), "method.type", "is ia3, and "),
    "other modules": (("method.target_modules=[q_proj]",), "method.target_modules", "['q_proj'], and "),
    "a pattern of others": (("method.target_modules=.*q_proj",), "training.init_adapter_from", "unexpected: "),
    "no folder": (("training.init_adapter_from=nowhere",), "training.init_adapter_from", "neither a folder nor a hub"),
    "no adapter": (("training.init_adapter_from=/tmp",), "training.init_adapter_from", "no adapter_config.json"),
    "another model": (
        (f"base_model={trainkit.base_folder('gpt2')}",),
        "training.init_adapter_from",
        f"was trained on {trainkit.base_folder()}, not {trainkit.base_folder('gpt2')}: no module of GPT2LMHeadModel",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_check_and_train(sft: Trained, tmp_path: Path, case: str) -> None:
    overrides, key, message = REFUSED[case]
    recipe = go_on(tmp_path / "more", sft.folder)
    found = deep_check(load_recipe(recipe, overrides))
    assert [problem.key for problem in found.errors][:1] == [key]
    assert message in found.errors[0].message
    with pytest.raises(PeftcliError, match=r"\S"):
        run_recipe(recipe, *overrides)


@pytest.mark.slow
def test_a_folder_without_weights_is_refused_by_check_and_train(sft: Trained, tmp_path: Path) -> None:
    recipe = go_on(tmp_path / "more", sft.folder)
    (sft.folder / "adapter_model.safetensors").unlink()
    assert [problem.key for problem in deep_check(load_recipe(recipe)).errors] == ["training.init_adapter_from"]
    with pytest.raises(AdapterError, match=r"no adapter_model\.safetensors here"):
        run_recipe(recipe)


@pytest.mark.slow
def test_check_is_not_kept_for_another_adapter(sft: Trained, tmp_path: Path) -> None:
    recipe = load_recipe(go_on(tmp_path / "more", sft.folder))
    found = deep_check(recipe)
    assert not found.errors
    assert found.would["parameters"]["trainable"] == sft.run["parameters"]["trainable"]
    shutil.rmtree(sft.folder)
    assert deep_check(recipe).errors


@pytest.mark.slow
def test_an_adapter_of_another_base_model_of_the_same_shape_is_refused(sft: Trained, tmp_path: Path) -> None:
    other = shutil.copytree(trainkit.base_folder(), tmp_path / "other")
    scale(other / "model.safetensors")
    with pytest.raises(AdapterError, match=r"was trained on .*, whose files differ from those of "):
        run_recipe(go_on(tmp_path / "more", sft.folder), f"base_model={other}")


@pytest.mark.slow
def test_an_adapter_that_began_elsewhere_is_not_measured_against_this_start(sft: Trained, tmp_path: Path) -> None:
    run = run_recipe(dpo(tmp_path / "dpo", sft.folder))
    scale(sft.folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"began from .*, which was another adapter"):
        measure(run.recipe, str(run.folder))
    with pytest.raises(PeftcliError, match="not kept") as caught:
        measure(load_recipe(CASES["preference"].write(tmp_path)), str(run.folder))
    assert "training.init_adapter_from" in str(caught.value.hint)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preference", "causal_lm"])
def test_two_processes_give_the_series_of_one(sft: Trained, tmp_path: Path, name: str) -> None:
    recipe = dpo(tmp_path / "run", sft.folder) if name == "preference" else go_on(tmp_path / "run", sft.folder)
    one, two = run_recipe(recipe), tmp_path / "two"
    halves = (f"training.output_dir={two}", "training.per_device_train_batch_size=2")
    children = group(tmp_path, "train", recipe, *halves)
    assert [child.wait() for child in children] == [0, 0], children[0].err
    assert Trained(one.recipe, read_run(two), []).run["processes"] == 2
    losses = [entry["loss"] for entry in trainkit.read_metrics(two) if "loss" in entry]
    assert losses == pytest.approx(one.losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequence_classification", "reward"])
def test_a_head_goes_on_where_it_was(tmp_path: Path, name: str) -> None:
    first = run_recipe(CASES[name].write(tmp_path), *EVALUATES)
    config = first.folder / "adapter_config.json"
    described = json.loads(config.read_text())
    config.write_text(json.dumps({**described, "modules_to_save": ["classifier", "score"]}))  # as PEFT writes it
    more = run_recipe(tmp_path / "recipe.yaml", *EVALUATES, *begins(first.folder, tmp_path / "more"))
    assert more.run["eval"]["first"] == pytest.approx(first.run["eval"]["last"], rel=1e-5)
    head = [each for each in load_file(first.folder / "adapter_model.safetensors") if "lora_" not in each]
    assert set(head) < set(load_file(more.folder / "adapter_model.safetensors"))


@pytest.mark.slow
def test_a_head_of_other_classes_is_refused(tmp_path: Path) -> None:
    recipe = CASES["sequence_classification"].write(tmp_path)
    first = run_recipe(recipe)
    turned = ("task={type: sequence_classification, labels: [bad, good]}", *begins(first.folder, tmp_path / "more"))
    with pytest.raises(DataError, match=r"are \['bad', 'good'\], and \['good', 'bad'\] in ") as caught:
        run_recipe(recipe, *turned)
    assert caught.value.key == "task.labels"
    assert [problem.key for problem in deep_check(load_recipe(recipe, turned)).errors] == ["task.labels"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ia3", "vera", "prompt_tuning", "prefix_tuning", "trainable_tokens"])
def test_other_methods_go_on_too(tmp_path: Path, method: str) -> None:
    own = {"prompt_tuning": "num_virtual_tokens: 3", "prefix_tuning": "num_virtual_tokens: 3"}
    own["trainable_tokens"] = "token_indices: [5, 6, 7]"
    recipe = write_recipe(tmp_path)
    text = recipe.read_text().replace(
        "{type: lora, r: 4, lora_alpha: 8, target_modules: all-linear}", f"{{type: {method}, {own.get(method, '')}}}"
    )
    recipe.write_text(text)
    first = run_recipe(recipe, *EVALUATES)
    recipe.write_text(text.replace(own.get(method, "nothing"), ""))
    more = run_recipe(recipe, *EVALUATES, *begins(first.folder, tmp_path / "more"))
    assert more.run["eval"]["first"] == pytest.approx(first.run["eval"]["last"], rel=1e-5)


@pytest.mark.slow
def test_a_method_whose_file_is_computed_cannot_go_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    given = "{type: lora, r: 4, lora_alpha: 8, target_modules: all-linear}"
    recipe.write_text(recipe.read_text().replace(given, "{type: p_tuning, num_virtual_tokens: 3}"))
    first = run_recipe(recipe)
    with pytest.raises(AdapterError, match="holds what P_TUNING computes"):
        run_recipe(recipe, *begins(first.folder, tmp_path / "more"))
    found = deep_check(load_recipe(recipe, begins(first.folder, tmp_path / "more"))).errors
    assert [problem.key for problem in found] == ["training.init_adapter_from"]


@pytest.mark.slow
def test_a_residual_start_goes_on_as_the_lora_that_its_file_is(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    first = run_recipe(recipe, "method.init_lora_weights=pissa", *EVALUATES)
    recipe.write_text(recipe.read_text().replace(", r: 4, lora_alpha: 8, target_modules: all-linear", ""))
    more = run_recipe(recipe, *EVALUATES, *begins(first.folder, tmp_path / "more"))
    assert more.run["recipe"]["method"]["r"] == 8
    assert more.run["eval"]["first"] == pytest.approx(first.run["eval"]["last"], rel=1e-4)


@pytest.mark.slow
def test_recipes_that_train_together_begin_from_adapters(sft: Trained, tmp_path: Path) -> None:
    from peftcli.train.together import train_together

    recipes = {name: load_recipe(go_on(tmp_path / name, sft.folder)) for name in ("one", "other")}
    alone = run_recipe(go_on(tmp_path / "alone", sft.folder))
    trainkit.reset_accelerate()
    train_together(recipes)
    for name in recipes:
        losses = [entry["loss"] for entry in trainkit.read_metrics(tmp_path / name / "out") if "loss" in entry]
        assert losses == pytest.approx(alone.losses, rel=1e-4)


@pytest.mark.slow
def test_the_saved_folder_is_the_model(sft: Trained, tmp_path: Path) -> None:
    run = run_recipe(dpo(tmp_path / "dpo", sft.folder), "training.verify=true")
    verify_adapter(str(run.folder))


@pytest.mark.slow
def test_layers_whose_size_training_has_changed_cannot_go_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    recipe.write_text(recipe.read_text().replace(", r: 4, lora_alpha: 8, target_modules: all-linear", ""))
    first = run_recipe(recipe, "method.type=adalora")
    with pytest.raises(AdapterError, match="gives its layers sizes of their own"):
        run_recipe(recipe, "method.type=adalora", *begins(first.folder, tmp_path / "more"))


def go_on(folder: Path, start: Path | str) -> Path:
    """A recipe of other conversations that begins from an adapter."""
    recipe = write_recipe(folder, rows=MESSAGES[::-1])
    text = recipe.read_text().replace("{type: lora, r: 4, lora_alpha: 8, target_modules: all-linear}", "{type: lora}")
    recipe.write_text(f"{text}  init_adapter_from: {start}\n")
    return recipe


def begins(start: Path, out: Path) -> tuple[str, str]:
    """Overrides for a run in another folder that begins from an adapter."""
    return f"training.init_adapter_from={start}", f"training.output_dir={out}"


def scale(path: Path) -> None:
    """Change the weights of a file."""
    save_file({name: value * 1.5 for name, value in load_file(path).items()}, path, {"format": "pt"})
