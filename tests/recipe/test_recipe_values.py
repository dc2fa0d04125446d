from __future__ import annotations

import pytest

from peftcli.recipe.values import read_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0o17", 15),
        ("0.1", 0.1),
        ("007", "007"),
        ("-0123", "-0123"),
        ("+010", "+010"),
        ("1__0", "1__0"),
        ("2024-01-31", "2024-01-31"),
        ("12:30", "12:30"),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("", None),
        ("~", None),
        ("null", None),
        ("e5", "e5"),
        ("-", "-"),
        (".", "."),
        ("nan", "nan"),
        ("9" * 60, float("9" * 60)),
        ("9" * 100_000, "9" * 100_000),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    found = read_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_words_are_what_the_setting_says(load, problem) -> None:
    words = "  bf16: no\n  gradient_checkpointing: On\n  eval_strategy: no\n"
    recipe = load(words, "training.optim_args={a: no, b: 'no', c: 1}")
    assert (recipe.training.bf16, recipe.training.gradient_checkpointing) == (False, True)
    assert recipe.training.eval_strategy == "no"
    assert recipe.training.optim_args == {"a": False, "b": "no", "c": 1}
    for word in ("no", "false"):
        assert load("", f"method={{type: adamss, init_weights: {word}}}").method["init_weights"] is False
    assert "found 'yes'" in problem('  gradient_checkpointing: "yes"\n').message


def test_digits_are_text_where_text_is_wanted(load) -> None:
    recipe = load("", "base_model.revision=1234567", "dataset.revision=0123", "method.target_modules=[0, 1e3]")
    assert recipe.base_model.revision == "1234567"
    assert recipe.dataset.revision == "0123"
    assert recipe.method["target_modules"] == ["0", "1e3"]


def test_an_integer_is_a_number(load) -> None:
    assert load("  num_train_epochs: 2\n").training.num_train_epochs == 2.0


def test_base_model_is_a_name_or_a_mapping(load, good) -> None:
    short = load(text=good)
    long = load(text=good.replace("org/model", "{name: org/model}"))
    assert short == long


@pytest.mark.parametrize("section", ["launch:", "gates:", "launch: {}"])
def test_an_empty_section_is_its_defaults(load, section: str) -> None:
    assert load(section + "\n") == load()


def test_environment(load, problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_T_LR", "3e-5")
    monkeypatch.setenv("PEFTCLI_T_DIR", "out")
    monkeypatch.delenv("PEFTCLI_T_NONE", raising=False)
    recipe = load(
        "  seed: ${PEFTCLI_T_NONE:-7}\ngates: {'${PEFTCLI_T_DIR}': '> 1'}\n",
        "training.learning_rate=${PEFTCLI_T_LR}",
        'training.output_dir="${PEFTCLI_T_DIR}/$${x}/${PEFTCLI_T_NONE:-a}"',
    )
    assert recipe.training.learning_rate == 3e-5
    assert recipe.training.output_dir == "out/${x}/a"
    assert recipe.training.seed == 7
    assert list(recipe.gates) == ["${PEFTCLI_T_DIR}"]
    found = problem("  metric_for_best_model: a${PEFTCLI_T_NONE}b\n")
    assert "PEFTCLI_T_NONE is not set" in found.message
    assert (found.line, found.key) == (8, "training.metric_for_best_model")
    assert "is not set" in problem("", "base_model=${PEFTCLI_T_NONE}").message
    assert "is not set" in problem("", "training.seed=${PEFTCLI_T_NONE}").message
    assert "literal ${" in problem("  metric_for_best_model: ${1}\n").message


@pytest.mark.parametrize("token", ["hf_" + "aB3" * 11, "https://me:secret@host/x"])
def test_a_token_is_refused_and_never_shown(problems, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_T_VALUE", token)
    secret = token.removeprefix("hf_") if token.startswith("hf_") else "secret"
    for value in (token, "${PEFTCLI_T_VALUE}"):
        for line in (f'  seed: "{value}"\n', f'  metric_for_best_model: "x {value}"\n'):
            found = problems(line)
            assert "a recipe must not contain" in found[0].message
            assert secret not in "".join(map(str, found))
    assert secret not in "".join(map(str, problems(f'  "{token}": 1\n')))


def test_secret_variables_are_not_read(problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTCLI_T_API_KEY", "hunter2")
    found = problem("  metric_for_best_model: ${PEFTCLI_T_API_KEY}\n")
    assert "is a secret" in found.message
    assert "hunter2" not in str(found)
    monkeypatch.setenv("PEFTCLI_T_API_KEY", "0123456789abcdef-and-more")
    assert "(from the environment variable PEFTCLI_T_API_KEY)" in problem("", "base_model=0123456789abcdef").message
