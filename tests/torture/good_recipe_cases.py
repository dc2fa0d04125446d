"""Recipes that look odd and are in order, each with what some of its settings must mean."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bad_recipe_cases import GOOD

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Valid:
    """A recipe that must be accepted."""

    text: str | bytes
    means: dict[str, Any] = field(default_factory=dict)
    """Settings, and the values that they must have."""
    args: tuple[str, ...] = ()
    setup: Callable[[Path], object] = lambda folder: None
    env: dict[str, str] = field(default_factory=dict)


def more(text: str, **means: Any) -> Valid:
    return Valid(GOOD + text, _keys(means))


def instead(old: str, new: str, **means: Any) -> Valid:
    assert old in GOOD
    return Valid(GOOD.replace(old, new), _keys(means))


def override(*args: str, **means: Any) -> Valid:
    return Valid(GOOD, _keys(means), args)


def _keys(means: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in means.items()}


METHOD = "{type: lora, r: 4, target_modules: [q_proj, v_proj]}"
DATASET = "{train: org/data, eval: org/held-out}"

WRITTEN = {
    "as it is": Valid(
        GOOD, {"training.learning_rate": 1e-4, "method.r": 4, "method.target_modules": ["q_proj", "v_proj"]}
    ),
    "no task, which is found from base model and data": instead("task: causal_lm\n", "", task=None),
    "lines that end as on Windows": Valid(GOOD.replace("\n", "\r\n"), {"training.learning_rate": 1e-4}),
    "lines that end as on an old Macintosh": Valid(GOOD.replace("\n", "\r"), {"training.learning_rate": 1e-4}),
    "a byte order mark": Valid(codecs.BOM_UTF8 + GOOD.encode(), {"base_model.name": "org/model"}),
    "no newline at the end": Valid(GOOD.rstrip(), {"training.learning_rate": 1e-4}),
    "a mark at the beginning": Valid("---\n" + GOOD, {"base_model.name": "org/model"}),
    "marks at both ends": Valid("---\n" + GOOD + "...\n", {"base_model.name": "org/model"}),
    "a version": Valid("%YAML 1.2\n---\n" + GOOD, {"base_model.name": "org/model"}),
    "comments everywhere": Valid(
        "# first\n" + GOOD.replace("\n", "  # x: y {[\n") + "# last", {"base_model.name": "org/model"}
    ),
    "blank lines": Valid(GOOD.replace("\n", "\n\n\n"), {"training.learning_rate": 1e-4}),
    "JSON": Valid(
        '{"base_model": "org/model", "task": "causal_lm", "method": {"type": "lora"}, "dataset": {"train": "org/data"},'
        ' "training": {"output_dir": "out", "learning_rate": 0.0001}}',
        {"training.learning_rate": 1e-4, "method.type": "lora"},
    ),
    "all in braces": Valid(
        "{base_model: org/model, task: causal_lm, method: {type: lora}, dataset: {train: org/data}, "
        "training: {output_dir: out}}",
        {"training.output_dir": "out"},
    ),
    "every key in quotes": Valid(
        '"base_model": org/model\n\'task\': causal_lm\n"method": {\'type\': lora}\n"dataset": {"train": org/data}\n'
        "'training': {\"output_dir\": out}\n",
        {"task.type": "causal_lm"},
    ),
    "a key by an escape": more('"\\x67ates": {eval_loss: "< 1"}\n', gates={"eval_loss": "< 1"}),
    "a question mark before a key": more("? gates\n: eval_loss: '< 1'\n", gates={"eval_loss": "< 1"}),
    "a trailing comma": instead(METHOD, "{type: lora, target_modules: [q_proj, v_proj, ], }", method__r=8),
    "lists by dashes": instead(
        METHOD, "\n  type: lora\n  target_modules:\n  - q_proj\n  - v_proj", method__target_modules=["q_proj", "v_proj"]
    ),
    "a folded text": instead("out\n", ">-\n    out\n    put\n", training__output_dir="out put"),
    "a text of lines": instead("out\n", "|-\n    out\n", training__output_dir="out"),
    "a plain text over two lines": instead("out\n", "out\n    put\n", training__output_dir="out put"),
    "deep indentation": Valid(GOOD.replace("\n  ", "\n                    "), {"training.learning_rate": 1e-4}),
    "sections in another order": Valid(
        "".join(reversed(GOOD.partition("training:\n")[0].splitlines(True))) + "training:\n  output_dir: out\n",
        {"task.type": "causal_lm"},
    ),
    "60 levels that are a comment": more("# " + "[" * 1000 + "\n"),
    "nearly a megabyte": more("#" * 990_000 + "\n"),
    "an emoji": instead("out\n", "\U0001f680/é\n", training__output_dir="\U0001f680/é"),
    "right-to-left writing": instead("out\n", "خروجی\n", training__output_dir="خروجی"),
    "letters with loose accents": instead("out\n", "e\u0301\n", training__output_dir="e\u0301"),
    "a tab in a text": instead("out\n", '"a\\tb"\n', training__output_dir="a\tb"),
}

ANCHORS = {
    "an anchor used twice": Valid(
        GOOD.replace("org/data", "&d org/data").replace("org/held-out", "*d"), {"dataset.eval": "org/data"}
    ),
    "an anchor nobody uses": Valid(GOOD.replace("causal_lm", "&x causal_lm"), {"task.type": "causal_lm"}),
    "a merge key": more("  <<: {seed: 3, save_steps: 7}\n", training__seed=3, training__save_steps=7),
    "a merge key under its own settings": more(
        "  <<: {learning_rate: 1, seed: 3}\n", training__learning_rate=1e-4, training__seed=3
    ),
    "a merge key of several": more(
        "  <<: [{seed: 3}, {seed: 4, save_steps: 9}]\n", training__seed=3, training__save_steps=9
    ),
    "a merge key of an anchor": Valid(
        GOOD.replace("org/model", "{name: org/model, <<: &b {dtype: float32}}"), {"base_model.dtype": "float32"}
    ),
    "some aliases of some aliases": instead(
        "[q_proj, v_proj]", "[&a q_proj, &b *a ]".replace("&b *a ", "*a "), method__target_modules=["q_proj", "q_proj"]
    ),
}

NUMBERS = {
    text: Valid(GOOD.replace("1e-4", text), {"training.learning_rate": value})
    for text, value in {
        "1e-4": 1e-4,
        "1E-4": 1e-4,
        "0.0001": 1e-4,
        ".0001": 1e-4,
        "1.e-4": 1e-4,
        "+1e-4": 1e-4,
        "0": 0.0,
        "1": 1.0,
        "1_000e-7": 1e-4,
        "0x1": 1.0,
        "0o17": 15.0,
        "-0.0": -0.0,
        "1e-300": 1e-300,
        "0.10000000000000000001": 0.1,
    }.items()
} | {
    "an integer with underscores": more("  max_steps: 1_000_000\n", training__max_steps=1_000_000),
    "a hexadecimal integer": more("  seed: 0xFF\n", training__seed=255),
    "the largest seed": more("  seed: 4294967295\n", training__seed=2**32 - 1),
    "an integer for a number": more("  num_train_epochs: 2\n", training__num_train_epochs=2.0),
    "a part of an epoch": more("  num_train_epochs: 0.01\n", training__num_train_epochs=0.01),
    "no epochs, since steps decide": more("  num_train_epochs: 0\n  max_steps: 5\n", training__max_steps=5),
    "the largest of numbers": more("  max_grad_norm: 3e38\n", training__max_grad_norm=3e38),
    "a clip of 0": more("  max_grad_norm: 0\n", training__max_grad_norm=0.0),
    "digits where text is wanted": instead(
        "org/model", "{name: org/model, revision: 1234567}", base_model__revision="1234567"
    ),
    "a number with a leading zero as text": instead(
        "org/model", "{name: org/model, revision: 0123}", base_model__revision="0123"
    ),
    "an exponent as text": instead("org/model", "{name: org/model, revision: 1e10}", base_model__revision="1e10"),
    "a date as text": instead("out\n", "2024-01-31\n", training__output_dir="2024-01-31"),
    "a number in quotes as text": instead("out\n", "'7'\n", training__output_dir="7"),
    "no as text": more("  eval_strategy: no\n", training__eval_strategy="no"),
    "off in quotes as text": instead("out\n", "'off'\n", training__output_dir="off"),
    "null in quotes as text": instead("out\n", "'null'\n", training__output_dir="null"),
    "numbers as names": instead("[q_proj, v_proj]", "[0, 1e3, q]", method__target_modules=["0", "1e3", "q"]),
}

WORDS = {
    "yes": more("  gradient_checkpointing: yes\n", training__gradient_checkpointing=True),
    "Off": more("  gradient_checkpointing: Off\n", training__gradient_checkpointing=False),
    "TRUE": more("  gradient_checkpointing: TRUE\n", training__gradient_checkpointing=True),
    "no for bf16": more("  bf16: no\n", training__bf16=False),
    "auto for bf16": more("  bf16: auto\n", training__bf16="auto"),
    "null for what may be unset": instead("org/model", "{name: org/model, revision: null}", base_model__revision=None),
    "a tilde for what may be unset": instead("org/model", "{name: org/model, revision: ~}", base_model__revision=None),
    "nothing for a list": instead("org/model", "{name: org/model, new_tokens: }", base_model__new_tokens=[]),
    "a section of nothing": more("launch:\ngates:\n", gates={}),
    "an empty section": more("launch: {}\ngates: {}\n", gates={}),
    "a base model of another case": instead(
        "org/model", "{name: ORG/Model.v1-2_x}", base_model__name="ORG/Model.v1-2_x"
    ),
    "a base model by a relative path": instead("org/model", "./model", base_model__name="./model"),
    "quantisation by its type alone": instead("org/model", "{name: a/b, quantization: nf4}", base_model__name="a/b"),
    "quantisation as a mapping": instead(
        "org/model",
        "{name: a/b, quantization: {type: nf4, double_quant: true, compute_dtype: bfloat16}}",
        base_model__name="a/b",
    ),
    "foreign code of a named commit": instead(
        "org/model", "{name: a/b, revision: 0a1b2c3, trust_remote_code: true}", base_model__trust_remote_code=True
    ),
    "new tokens": instead("org/model", "{name: a/b, new_tokens: [<x>, '{y}']}", base_model__new_tokens=["<x>", "{y}"]),
    "chatml": instead("org/model", "{name: a/b, chat_template: chatml}", base_model__chat_template="chatml"),
    "gates of every operator": more(
        "gates: {eval_loss: '<= 1.2', eval_accuracy: '>=.5', train_loss: ' < 1e1 ', x: '== +3', y: '> -1.5E-2'}\n",
        gates={"eval_loss": "<= 1.2", "eval_accuracy": ">=.5", "train_loss": " < 1e1 ", "x": "== +3", "y": "> -1.5E-2"},
    ),
    "every time": more("  max_time: 1d2h3m4s\n", training__max_time="1d2h3m4s"),
    "a time with spaces": more("  max_time: 3h 30m\n", training__max_time="3h 30m"),
    "a mix": instead(DATASET, "{mix: [{train: a/b, weight: 3}, {train: c/d, weight: 1e-1}]}", dataset__train=None),
    "a mix by names": instead(DATASET, "{mix: [a/b, c/d]}", dataset__train=None),
    "a mix of one": instead(DATASET, "{mix: [a/b]}", dataset__train=None),
    "a share to evaluate on": instead(DATASET, "{train: a/b, eval_fraction: 0.1}", dataset__eval_fraction=0.1),
    "columns by other names": instead(
        DATASET,
        '{train: a/b, columns: {prompt: \'my question\', completion: "ans\\"wer"}}',
        dataset__columns={"prompt": "my question", "completion": 'ans"wer'},
    ),
    "findings that are allowed": instead(DATASET, "{train: a/b, allow: [double_bos]}", dataset__allow=["double_bos"]),
    "two machines": more(
        "launch: {num_machines: 2, machine_rank: 1, main_process_port: 29500, main_process_ip: '::1'}\n",
        launch__machine_rank=1,
    ),
    "the best of the evaluations": more(
        "  load_best_model_at_end: true\n  eval_strategy: steps\n", training__eval_strategy="steps"
    ),
    "a pattern for target modules": instead(
        "[q_proj, v_proj]", r"'.*\.(q|v)_proj'", method__target_modules=r".*\.(q|v)_proj"
    ),
    "ranks by pattern": instead(
        METHOD,
        r"{type: lora, rank_pattern: {'layers\.[0-3]\..*q_proj': 2}}",
        method__rank_pattern={r"layers\.[0-3]\..*q_proj": 2},
    ),
    "a method's section": instead(
        METHOD, "{type: lora, init_lora_weights: eva, eva_config: {rho: 2.0}}", method__init_lora_weights="eva"
    ),
    "true where a word may stand too": instead(
        METHOD, "{type: lora, init_lora_weights: true}", method__init_lora_weights=True
    ),
    "a long output_dir": instead(
        "out\n", "x" * 200 + "/" + "y" * 200 + "\n", training__output_dir="x" * 200 + "/" + "y" * 200
    ),
    "a long list": instead("[q_proj, v_proj]", str([f"m{n}" for n in range(5000)]), method__type="lora"),
    "a hundred gates": more("gates:\n" + "".join(f"  m{n}: '> {n}'\n" for n in range(100)), method__type="lora"),
}

ENVIRONMENT = {
    "a variable": Valid(
        GOOD.replace("1e-4", "${PEFTCLI_X}"), {"training.learning_rate": 3e-5}, env={"PEFTCLI_X": "3e-5"}
    ),
    "a variable in a text": Valid(
        GOOD.replace("out\n", "a/${PEFTCLI_X}/b\n"), {"training.output_dir": "a/x y/b"}, env={"PEFTCLI_X": "x y"}
    ),
    "a default": Valid(GOOD.replace("1e-4", "${PEFTCLI_NOT_SET:-2e-4}"), {"training.learning_rate": 2e-4}),
    "an empty default": Valid(GOOD.replace("out\n", "out${PEFTCLI_NOT_SET:-}\n"), {"training.output_dir": "out"}),
    "a literal dollar": Valid(GOOD.replace("out\n", "$${x}/$y\n"), {"training.output_dir": "${x}/$y"}),
    "a variable that holds YAML": Valid(
        GOOD.replace("out\n", "${PEFTCLI_X}\n"), {"training.output_dir": "{a: [b]}"}, env={"PEFTCLI_X": "{a: [b]}"}
    ),
    "a variable in quotes is text": Valid(
        GOOD.replace("org/model", "{name: a/b, revision: '${PEFTCLI_X}'}"),
        {"base_model.revision": "12"},
        env={"PEFTCLI_X": "12"},
    ),
    "a secret in the environment": Valid(GOOD, {"base_model.name": "org/model"}, env={"HF_TOKEN": "hf_" + "Zz9" * 12}),
}

OVERRIDES = {
    "a number": override("training.learning_rate=5e-5", training__learning_rate=5e-5),
    "white space around it": override("  training.seed = 7 ", training__seed=7),
    "an equals sign in the value": override("training.output_dir=a=b", training__output_dir="a=b"),
    "a colon in the value": override("training.output_dir=C: out", training__output_dir="C: out"),
    "a hash in the value": override("training.output_dir=a #b", training__output_dir="a #b"),
    "quotes": override('training.output_dir="a: b"', training__output_dir="a: b"),
    "a list": override("method.target_modules=[a, 'b c']", method__target_modules=["a", "b c"]),
    "an empty list": override("dataset.allow=[]", dataset__allow=[]),
    "a mapping": override("method={type: prompt_tuning, num_virtual_tokens: 3}", method__type="prompt_tuning"),
    "dots in a name": override("method.rank_pattern.layers.0.q_proj=2", method__rank_pattern={"layers.0.q_proj": 2}),
    "a section that was not there": override("launch.num_machines=1", launch__num_machines=1),
    "a gate": override("gates.eval_loss=<= 1.5", gates={"eval_loss": "<= 1.5"}),
    "the base model": override("base_model=x/y", base_model__name="x/y"),
    "a setting of a base model that is a name": override("base_model.dtype=float16", base_model__dtype="float16"),
    "null takes a value away": override("dataset.eval=null", dataset__eval=None),
    "nothing takes a value away": override("dataset.eval=", dataset__eval=None),
    "the last of two counts": override("training.seed=1", "training.seed=2", training__seed=2),
    "twenty at once": override(*(f"gates.m{n}=> {n}" for n in range(20)), method__type="lora"),
    "a variable": Valid(GOOD, {"training.seed": 9}, ("training.seed=${PEFTCLI_X}",), env={"PEFTCLI_X": "9"}),
    "another type of method leaves the old settings": Valid(
        GOOD.replace(METHOD, "{type: lora}"), {"method.type": "ia3"}, ("method.type=ia3",)
    ),
}


def _files(**texts: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, text in texts.items():
            path = folder / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return make


EXTENDS = {
    "another recipe": Valid(
        "extends: base.yaml\ntraining: {seed: 3}\n",
        {"training.seed": 3, "training.output_dir": "out"},
        setup=_files(base=GOOD),
    ),
    "one in another folder": Valid(
        "extends: in/base.yaml\n", {"training.output_dir": "out"}, setup=_files(in__base=GOOD)
    ),
    "one that extends another beside it": Valid(
        "extends: in/mid.yaml\n",
        {"training.seed": 4},
        setup=_files(in__mid="extends: base.yaml\ntraining: {seed: 4}\n", in__base=GOOD),
    ),
    "a chain of 15": Valid(
        "extends: r1.yaml\n",
        {"task.type": "causal_lm"},
        setup=_files(**{f"r{n}": f"extends: r{n + 1}.yaml\n" for n in range(1, 15)}, r15=GOOD),
    ),
    "one by way of two": Valid(
        "extends: a.yaml\n",
        {"training.seed": 1},
        setup=_files(a="extends: base.yaml\n", b="extends: base.yaml\n", base=GOOD + "  seed: 1\n"),
    ),
    "another method shares nothing": Valid(
        "extends: base.yaml\nmethod: {type: prompt_tuning}\n", {"method.type": "prompt_tuning"}, setup=_files(base=GOOD)
    ),
    "a name with spaces": Valid(
        "extends: 'my base.yaml'\n",
        {"task.type": "causal_lm"},
        setup=lambda folder: (folder / "my base.yaml").write_text(GOOD),
    ),
    "a link": Valid(
        "extends: link.yaml\n",
        {"task.type": "causal_lm"},
        setup=lambda folder: (_files(base=GOOD)(folder), (folder / "link.yaml").symlink_to("base.yaml")),
    ),
    "a mistake that is written over": Valid(
        "extends: base.yaml\ntraining: {seed: 3}\n", {"training.seed": 3}, setup=_files(base=GOOD + "  seed: three\n")
    ),
}


def valid_recipes() -> dict[str, Valid]:
    """All of them, by name."""
    found = {
        f"{of}: {name}": valid
        for of, cases in {
            "written": WRITTEN,
            "anchors": ANCHORS,
            "numbers": NUMBERS,
            "words": WORDS,
            "environment": ENVIRONMENT,
            "overrides": OVERRIDES,
            "extends": EXTENDS,
        }.items()
        for name, valid in cases.items()
    }
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent.name == "launch":  # parts of recipes, to be extended
            continue
        found[f"configs/{path.relative_to(CONFIGS)}"] = _of_configs(path)
    return found


def _of_configs(path: Path) -> Valid:
    """A recipe of configs/, with the data that it names."""
    name = path.relative_to(CONFIGS.parent)
    return Valid(f"extends: {name}\n", setup=_checkout)


def _checkout(folder: Path) -> None:
    (folder / "configs").symlink_to(CONFIGS)
    for recipe in (CONFIGS / "tasks").glob("*.yaml"):  # what configs/tasks/fetch.py fetches
        for name in re.findall(r"^  (?:train|eval): (data/\S+)$", recipe.read_text(encoding="utf-8"), re.M):
            path = folder / name
            (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.touch()
