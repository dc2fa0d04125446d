from __future__ import annotations

from pathlib import Path

import pytest

from peftcli.errors import Problem
from peftcli.recipe import load_recipe, read
from peftcli.schema import Quantization


def test_overrides(load) -> None:
    recipe = load(
        "",
        "training.learning_rate=5e-5",
        "method.target_modules=[a, b]",
        "method.rank_pattern.layers.0.q_proj=2",
        "launch.num_processes=2",
        "gates.eval_accuracy=>= 0.5",
        'training.output_dir="a: b"',
        "training.output_dir=c: d # e",
        "base_model=other/model",
    )
    assert recipe.training.learning_rate == 5e-5
    assert recipe.method["target_modules"] == ["a", "b"]
    assert recipe.method["rank_pattern"] == {"layers.0.q_proj": 2}
    assert recipe.launch.num_processes == 2
    assert recipe.gates == {"eval_accuracy": ">= 0.5"}
    assert recipe.training.output_dir == "c: d # e"
    assert recipe.base_model.name == "other/model"


def test_a_section_that_is_given_keeps_its_other_settings(load) -> None:
    recipe = load("", "training.seed=7", "training={output_dir: other}", 'method.rank_pattern."layers.0.q_proj"=2')
    assert (recipe.training.seed, recipe.training.output_dir) == (7, "other")
    assert recipe.method["rank_pattern"] == {"layers.0.q_proj": 2}
    other = load("", "method={type: ia3}", "gates.eval_loss=<= 2", "gates={}")
    assert (other.method["type"], other.gates) == ("ia3", {})


def test_base_model_overrides(load, good: str) -> None:
    mapping = good.replace("org/model", "{name: org/model, dtype: float32}")
    recipe = load("", "base_model=x/y", text=mapping)
    assert (recipe.base_model.name, recipe.base_model.dtype) == ("x/y", "float32")
    recipe = load("", "base_model.dtype=float16")
    assert (recipe.base_model.name, recipe.base_model.dtype) == ("org/model", "float16")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("training.learning_rat=1", "command line: training.learning_rat: unknown key; did you mean 'learning_rate'?"),
        ("nothing", "command line: expected KEY=VALUE, found 'nothing'"),
        ("=1", "command line: expected KEY=VALUE, found '=1'"),
        ("training..seed=1", "command line: expected KEY=VALUE, found 'training..seed=1'"),
        ("extends=x.yaml", "command line: extends: cannot be overridden"),
        (
            "method.r=[1\nx: 2",
            "command line: method.r: not valid YAML: a [ or { that is never closed, or a missing comma",
        ),
        ("base_model={name: ${B}}", "command line: base_model: not valid YAML: quote ${NAME} within [ ] or { }"),
        (
            "training.output_dir='a' b",
            "command line: training.output_dir: not valid YAML: text after a closing quote or bracket, or a line that "
            "does not fit the indentation of those above",
        ),
        ("training={seed: 1, seed: 1}", "command line: training.seed: given twice; first in line 1"),
        ("method.target_modules=[a]\nx: 2", "command line: method.target_modules: expected one value"),
    ],
)
def test_bad_overrides(problem, override: str, text: str) -> None:
    assert str(problem("", override)) == text


def test_extends(write, good: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(name="base/root.yaml")
    write(text="extends: root.yaml\ntraining: {seed: 1, save_steps: 5}\n", name="base/mid.yaml")
    path = write(text="extends: base/mid.yaml\ntraining:\n  seed: 2\nmethod: {r: 32}\n", name="top.yaml")
    recipe = load_recipe(path)
    assert (recipe.training.seed, recipe.training.save_steps, recipe.training.learning_rate) == (2, 5, 1e-4)
    assert (recipe.method["r"], recipe.method["target_modules"]) == (32, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("inherited", "own"),
    [
        ("base_model: {name: a/b, quantization: nf4}\ntask: {type: causal_lm, overlong: drop}", "base_model: c/d"),
        ("base_model: {name: a/b, quantization: nf4}\ntask: {type: causal_lm, overlong: drop}", "task: causal_lm"),
        ("base_model: c/d\ntask: causal_lm", "base_model: {quantization: nf4}\ntask: {overlong: drop}"),
    ],
)
def test_a_name_alone_leaves_the_settings_beside_it(write, inherited: str, own: str) -> None:
    write(text=f"{inherited}\nmethod: {{type: lora, r: 4}}\n", name="base.yaml")
    rest = "method: {type: prompt_tuning}\ndataset: {train: org/data}\ntraining: {output_dir: x}\n"
    recipe = load_recipe(write(text=f"extends: base.yaml\n{own}\n{rest}"), ["task=causal_lm", "base_model=c/d"])
    assert (recipe.base_model.name, recipe.dataset.overlong) == ("c/d", "drop")
    assert recipe.base_model.quantization is not None
    assert "r" not in recipe.method


def test_a_type_alone_can_be_extended(write, good: str) -> None:
    base = write(text=good.replace("org/model", "{name: org/model, quantization: nf4}"), name="base.yaml")
    extended = write(text="extends: base.yaml\nbase_model: {quantization: {double_quant: true}}\n")
    one, other = load_recipe(extended), load_recipe(base, ["base_model.quantization.double_quant=true"])
    assert one.base_model == other.base_model
    assert one.base_model.quantization == Quantization(type="nf4", double_quant=True)
    assert load_recipe(extended, ["base_model.quantization=int8"]).base_model.quantization == Quantization(type="int8")


def test_another_base_model_inherits_no_trust_and_nothing_is_nothing(write) -> None:
    spec = "{name: a/b, revision: main, trust_remote_code: true, dtype: float32}"
    write(text=f"base_model: {spec}\ntask: {{type: causal_lm, overlong: drop}}\n", name="base.yaml")
    rest = "method: {type: lora}\ndataset: {train: org/data}\ntraining: {output_dir: x}\n"
    by_name = ["base_model.name=c/d", "task=null"]
    for own, overrides in (("base_model: c/d\ntask: null\n", []), ("", ["base_model=c/d", "task=null"]), ("", by_name)):
        recipe = load_recipe(write(text=f"extends: base.yaml\n{own}{rest}"), overrides)
        base = recipe.base_model
        assert (base.name, base.revision, base.trust_remote_code, base.dtype) == ("c/d", None, False, "float32")
        assert recipe.task is None
    recipe = load_recipe(write(text=f"extends: base.yaml\n{rest}"), ["base_model.revision=v2", "base_model=c/d"])
    assert recipe.base_model.revision == "v2"


def test_a_problem_is_shown_in_the_file_that_holds_it(write) -> None:
    base = write("  sede: 1\n", name="base.yaml")
    path = write(text="extends: base.yaml\ntraining: {seed: x}\n")
    found = read(path).problems
    assert {(p.file, p.line, p.key) for p in found} == {
        (str(base), 8, "training.sede"),
        (str(path), 2, "training.seed"),
    }


def test_extends_and_its_suggestion_expand_the_home(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(name="base.yaml")
    assert read(write(text="extends: ~/base.yaml\n")).recipe
    (found,) = read(write(text="extends: ~/bas.yaml\n")).problems
    assert found.suggestion == str(tmp_path / "base.yaml")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("recipe.yaml", "extends itself"),
        ("other.yaml", "extends itself"),
        ("bas.yaml", "no such file"),
        ("[a]", "expected the path of a recipe, found a list"),
        (".", "is a folder"),
    ],
)
def test_bad_extends(write, target: str, message: str) -> None:
    write(name="base.yaml")
    write(text="extends: recipe.yaml\n", name="other.yaml")
    path = write(text=f"extends: {target}\n")
    (found,) = read(path).problems
    assert message in found.message
    assert found.line == 1
    if target == "bas.yaml":
        assert found.suggestion == str(path.parent / "base.yaml")


def test_a_long_chain_ends(write) -> None:
    for index in range(40):
        write(text=f"extends: r{index + 1}.yaml\n", name=f"r{index}.yaml")
    (found,) = read(write(text="extends: r0.yaml\n")).problems
    assert "extend one another" in found.message


def test_merge_keys_and_anchors(load) -> None:
    recipe = load(
        text="base_model: &m org/model\ntask: causal_lm\n"
        "method: &a {type: lora, r: 4}\n"
        "dataset: {train: *m}\n"
        "training: {<<: {seed: 3, save_steps: 7}, output_dir: x, seed: 5}\n"
    )
    assert recipe.dataset.train == "org/model"
    assert (recipe.training.seed, recipe.training.save_steps) == (5, 7)


def test_places(write) -> None:
    reading = read(write(), ["training.seed=3"])
    keys = ("method.target_modules", "method.bias", "training.seed", "launch.num_machines")
    located = [reading.locate(Problem("", file="", key=key)) for key in keys]
    assert [(Path(each.file).name, each.line) for each in located] == [
        ("recipe.yaml", 3),
        ("recipe.yaml", 3),
        ("command line", None),
        ("recipe.yaml", None),
    ]
