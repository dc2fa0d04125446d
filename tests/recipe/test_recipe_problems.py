from __future__ import annotations

import re

import pytest

from peftcli.errors import RecipeError
from peftcli.methods import METHODS
from peftcli.recipe import load_recipe, method_config
from peftcli.recipe.names import ALIASES, REMEDIES, TASK_ALIASES
from peftcli.recipe.parse import _keys_by_name
from peftcli.recipe.settings import method_settings, sections, settings, task_settings
from peftcli.tasks import TASKS


def test_everything_at_once_each_at_its_place(tmp_path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "base_model: {name: org/model, dtyp: auto}\n"
        "task: causl_lm\n"
        "learning_rate: 3\n"
        "method: {type: lora, lora_r: 16, target_modules: [q, true]}\n"
        "dataset: {train: org/data, max_length: eight}\n"
        "training:\n"
        "  seed: 1.5\n"
        "  eval_strategy: epochs\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert [(p.line, p.column, p.key, p.message, p.suggestion) for p in caught.value.problems] == [
        (1, 31, "base_model.dtyp", "unknown key", "dtype"),
        (2, 7, "task", f"unknown task: 'causl_lm'; known: {', '.join(TASKS)}", "causal_lm"),
        (3, 1, "learning_rate", "belongs in the section training", "training.learning_rate"),
        (4, 22, "method.lora_r", "unknown key", "r"),
        (4, 54, "method.target_modules[1]", "expected a string, found true", None),
        (5, 40, "dataset.max_length", "expected an integer, found 'eight'", None),
        (6, 1, "training.output_dir", "is required", None),
        (7, 9, "training.seed", "expected an integer, found 1.5", None),
        (8, 18, "training.eval_strategy", "expected no, steps or epoch, found 'epochs'", "epoch"),
    ]
    assert {p.file for p in caught.value.problems} == {str(path)}
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.r=eight", "expected an integer, found 'eight'"),
        ("method.r=8.5", "expected an integer, found 8.5"),
        ("method.r=true", "expected an integer, found true"),
        ("method={type: adamss, init_weights: true}", "expected orthogonal or false, found true"),
        ("method.r=", "expected an integer, found nothing"),
        ("method.r='8'", "expected an integer, found '8' in quotes; remove the quotes"),
        ("method.r=[8]", "expected an integer, found a list"),
        ("method.r=99999999999999999999", "expected an integer, found 99999999999999999999, which is too large"),
        ("method.lora_alpha=true", "expected a number, found true"),
        ("training.learning_rate=abc", "expected a number or auto, found 'abc'"),
        ("training.learning_rate=.nan", "expected a number or auto, found .nan, which is not finite"),
        ("training.learning_rate=-.inf", "expected a number or auto, found -.inf, which is not finite"),
        ("training.learning_rate=1e999", "expected a number or auto, found 1e999, which is not finite"),
        ("training.verify=1", "expected true or false, found 1"),
        ("training.bf16=sometimes", "expected true, false or auto, found 'sometimes'"),
        ("method.rank_pattern={a: b}", "expected an integer, found 'b'"),
        ("method.target_modules={a: b}", "expected a list of strings or a string, found a mapping"),
        ("base_model=null", "is required"),
        ("base_model=[a]", "expected a mapping of settings, found a list"),
        (
            "base_model.quantization=[nf4]",
            "expected nf4, fp4, int8, int8_weight_only, int4_weight_only or a mapping, found a list",
        ),
        ("training=5", "expected a mapping of settings, found 5"),
        ("task.x=5", "unknown key"),
        ("task=[a]", "expected a mapping of settings, found a list"),
        ("task={type: 5, x: 1}", f"unknown task: '5'; known: {', '.join(TASKS)}"),
        ("gates.loss=low", "expected an operator (<=, <, >=, > or ==) and a number, as in '<= 1.2', found 'low'"),
    ],
)
def test_types_are_strict(problem, override: str, message: str) -> None:
    assert problem("", override).message == message


def test_each_gate_has_a_place(problems) -> None:
    found = problems("gates:\n  eval_loss: <= 3\n  eval_wer: 4\n", "gates.eval_loss=5")
    assert [(p.file.rpartition("/")[2], p.line, p.column, p.key) for p in found] == [
        ("command line", None, None, "gates.eval_loss"),
        ("recipe.yaml", 10, 13, "gates.eval_wer"),
    ]


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("training.report_to=wandb", "[wandb]"),
        ("training.report_to=none", "[]"),
        ("training.report_to=wanbd", None),
        ("dataset.allow=no_targets", "[no_targets]"),
    ],
)
def test_a_word_for_a_list_is_suggested_in_one(problem, override: str, suggestion: str | None) -> None:
    assert problem("", override).suggestion == suggestion


def test_every_wrong_item_of_a_list(problems) -> None:
    found = problems("", "method.target_modules=[q, true, v, null]")
    assert [p.key for p in found] == ["method.target_modules[1]", "method.target_modules[3]"]


@pytest.mark.parametrize(
    ("more", "key", "suggestion"),
    [
        ("model_name_or_path: x", "model_name_or_path", "base_model"),
        ("lora_rank: 3", "lora_rank", "method.r"),
        ("sequence_len: 3", "sequence_len", "dataset.max_length"),
        ("micro_batch_size: 3", "micro_batch_size", "training.per_device_train_batch_size"),
        ("adapter: lora", "adapter", "method.type"),
        ("lora_alpha: 3", "lora_alpha", "method.lora_alpha"),
        ("gate: {}", "gate", "gates"),
        ("pref_beta: 1", "pref_beta", "task.beta"),
        ("  deepspeed: x", "training.deepspeed", "launch.deepspeed"),
        ("  do_train: true", "training.do_train", None),
        ("  lr: 3", "training.lr", "learning_rate"),
        ("  sede: 3", "training.sede", "seed"),
        ("  max_length: 3", "training.max_length", "dataset.max_length"),
        ("  gates: {}", "training.gates", "gates"),
        ("zzzzzz: 3", "zzzzzz", None),
    ],
)
def test_unknown_keys_say_what_is_meant(problem, more: str, key: str, suggestion: str | None) -> None:
    found = problem(more + "\n")
    assert (found.key, found.suggestion, found.line) == (key, suggestion, 8)


def test_a_key_without_equivalent_says_what_to_do(problem) -> None:
    message = problem("", "training.overwrite_output_dir=true").message
    assert message == "unknown key; give --overwrite on the command line"


def test_another_name_of_the_base_models_name(problems) -> None:
    found = problems("", "base_model={model_name_or_path: org/model}")
    assert ("base_model.model_name_or_path", "name") in [(p.key, p.suggestion) for p in found]


@pytest.mark.parametrize("method", ["qlora", "{type: QLoRA}"])
def test_qlora_is_lora_and_quantization(problem, method: str) -> None:
    assert problem("", f"method={method}").suggestion == "{type: lora} with base_model.quantization: nf4"


@pytest.mark.parametrize(
    ("method", "suggestion"),
    [("{type: boft, dropout: 0.1}", "boft_dropout"), ("{type: ia3, rank: 4}", None), ("{type: oft, rank: 4}", "r")],
)
def test_a_suggestion_is_a_setting_of_the_method(problem, method: str, suggestion: str | None) -> None:
    assert problem("", f"method={method}").suggestion == suggestion


def test_another_methods_setting_is_named(problem) -> None:
    assert problem("", "method.num_virtual_tokens=3").message == (
        "not a setting of lora, only of prompt_tuning, multitask_prompt_tuning, p_tuning, prefix_tuning, cartridge"
    )
    message = problem("", "method.num_vectors=3").message
    assert message == "not a setting of lora, only of vblora"
    assert re.fullmatch(
        r"not a setting of prompt_tuning, only of (\w+, ){3}\w+ and \d+ other methods",
        problem("", "method={type: prompt_tuning, target_modules: [q_proj]}").message,
    )


def test_aliases_are_true() -> None:
    known = {"base_model", "task", "method.type"}
    known |= {f"{section}.{name}" for section, cls in sections().items() for name in settings(cls)}
    known |= {f"task.{name}" for task in TASKS for name in task_settings(task)}
    known |= {f"method.{name}" for method in METHODS for name in method_settings(method)}
    known |= {"dataset.train_on: last_answer", "training.train_sampling_strategy: group_by_length"}
    for alias, key in ALIASES.items():
        assert key in known, key
        # of a method's own setting, the others' users are told what they have instead
        assert _keys_by_name().get(alias, "method.").startswith("method."), f"{alias} is a key of ours"
    assert not REMEDIES.keys() & {*ALIASES, *_keys_by_name()}
    for task in TASK_ALIASES.values():
        name, _, setting = task.partition(".")
        assert name in TASKS
        assert not setting or setting.partition(":")[0] in task_settings(name)


def test_an_unknown_method(problem) -> None:
    found = problem("", "method.type=Lora", "method.anything=1")
    assert found.message == f"unknown method: 'Lora'; known: {', '.join(METHODS)}"
    assert found.suggestion == "lora"


def test_missing_sections_and_keys(problems) -> None:
    found = problems(text="task: causal_lm\nmethod:\n  r: 8\n")
    assert [(p.key, p.line) for p in found] == [
        ("base_model", 1),
        ("dataset", 1),
        ("training", 1),
        ("method.type", 2),
    ]


@pytest.mark.parametrize("more", ["", "  init_adapter_from: org/adapter\n"])
def test_a_bare_method_name(problem, good: str, more: str) -> None:
    text = good.replace("{type: lora, r: 4, target_modules: [q_proj, v_proj]}", "lora")
    assert problem(more, text=text).suggestion == "{type: lora}"


def test_method_config_is_built(load) -> None:
    config = method_config(load("", "method.lora_alpha=12"))
    assert (config.peft_type, config.r, config.lora_alpha, config.target_modules) == (
        "LORA",
        4,
        12,
        {"q_proj", "v_proj"},
    )


def test_problems_are_bounded(problems) -> None:
    found = problems("".join(f"k{i}: 1\n" for i in range(500)))
    assert len(found) == 101
    assert found[-1].message == "400 more problems"


def test_recipes_share_no_defaults(load) -> None:
    load().method["rank_pattern"]["x"] = 1
    load().gates["x"] = "> 1"
    assert load().method["rank_pattern"] == {}
    assert load().gates == {}
