"""What the settings of the data mean together: each rule, with the place that it names."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from peftcli.errors import Problem
from peftcli.methods import METHODS
from peftcli.recipe import read
from peftcli.recipe.names import VALUES
from peftcli.recipe.settings import choices, sections, settings
from peftcli.schema import Recipe
from peftcli.tasks.findings import FINDINGS

RECIPE = """\
base_model: {name: org/model%(base)s}
task: %(task)s
method: {type: %(method)s}
dataset: {%(dataset)s}
training: {output_dir: outputs/run%(training)s}
"""
PARTS = {"base": "", "task": "causal_lm", "method": "lora", "dataset": "train: org/data", "training": ""}


@pytest.fixture(autouse=True)
def _some_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("data/train.jsonl", "data/more.csv.gz", "chat.jinja"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()


def recipe(**parts: str) -> str:
    return RECIPE % {**PARTS, **parts}


@pytest.mark.parametrize(
    ("dataset", "column", "key", "message"),
    [
        # one of train and mix
        ("eval: org/eval", 1, "train", "is required, unless dataset.mix names several datasets"),
        ("train: org/a, mix: [org/b]", 30, "mix", "cannot be given together with dataset.train; if one of them is"),
        ("mix: [org/a], split: x", 32, "split", "applies to a single dataset"),
        ("mix: [org/a], streaming: true", 36, "streaming", "applies to a single dataset"),
        # paths
        ("train: ''", 18, "train", "is empty"),
        ("mix: [' ']", 17, "mix[0].train", "is empty"),
        ("mix: [org/a, 'https://host/a']", 24, "mix[1].train", "must be a path or a hub id, not a URL"),
        ("mix: [org/a, {train: data/trian.jsonl}]", 32, "mix[1].train", "no such file: data/trian.jsonl"),
        ("train: data/more.csv.zst", 18, "train", "no such file: data/more.csv.zst"),
        ("train: more/data/train", 18, "train", "no such file: more/data/train"),
        ("train: dat/", 18, "train", "no such file: dat/"),
        ("train: ~/data", 18, "train", "no such file: ~/data"),
        ("train: data/*.jsonl", 18, "train", "patterns are not expanded; name a folder"),
        ("train: org/a, eval: data/eval.JSON", 31, "eval", "no such file: data/eval.JSON"),
        # settings of hub datasets
        (
            "train: data, eval_split: x",
            36,
            "eval_split",
            "applies to hub datasets, but dataset.train is local; dataset.eval_fraction holds rows of it out",
        ),
        ("train: data/train.jsonl, name: x", 42, "name", "applies to hub datasets, but dataset.train is local"),
        ("train: data, streaming: true", 35, "streaming", "is local; local files are always streamed"),
        (
            "mix: [{train: data, streaming: true}]",
            42,
            "mix[0].streaming",
            "applies to hub datasets, but dataset.mix[0].train is local; local files are always streamed",
        ),
        ("train: org/a, split: 'x[:9]', streaming: true", 32, "split", "a part of a split cannot be streamed"),
        ("mix: [{train: org/a, split: 'x[:9]', streaming: true}]", 39, "mix[0].split", "cannot be streamed"),
        ("train: org/a, streaming: true, eval_split: 'x[9:]'", 54, "eval_split", "cannot be streamed"),
        # amounts
        ("mix: [{train: org/a, limit: -1}]", 39, "mix[0].limit", "must be at least 1, not -1"),
        ("mix: [{train: org/a, weight: -.5}]", 40, "mix[0].weight", "must be above 0, not -0.5"),
        # the same again
        ("mix: [data, ./data/]", 23, "mix[1].train", "repeats dataset.mix[0]"),
        (
            "mix: [{train: org/a, weight: 1}, {train: org/a, weight: 2}]",
            52,
            "mix[1].train",
            "repeats dataset.mix[0]; give it once, with a larger weight",
        ),
        (
            "columns: {a: b, c: d}, mix: [org/a, {train: org/a, columns: {c: d, a: b}}]",
            55,
            "mix[1].train",
            "repeats dataset.mix[0]",
        ),
        # rows to evaluate on
        ("train: org/a, eval_split: x, eval_fraction: 0.5", 55, "eval_fraction", "together with dataset.eval_split"),
        # findings
        ("train: org/a, allow: [double_boss]", 33, "allow[0]", "unknown finding: 'double_boss'; those that stop"),
        ("train: org/a, allow: [double_bos, bad_rows]", 45, "allow[1]", "dataset.on_bad_row decides about bad rows"),
        ("train: org/a, allow: [rows_truncated]", 33, "allow[0]", "never stops a run; leave it out"),
    ],
)
def test_what_data_settings_mean_together(
    problem: Callable[..., Problem], dataset: str, column: int, key: str, message: str
) -> None:
    found = problem(text=recipe(dataset=dataset))
    assert message in found.message
    assert (found.key, found.line, found.column) == (f"dataset.{key}", 4, column)
    assert found.file.endswith("recipe.yaml")


@pytest.mark.parametrize(
    "dataset",
    [
        "train: data",
        "train: data/train.jsonl, eval_fraction: 0.1",
        "train: data/more.csv.gz",
        "train: org/data.v1",
        "train: squad, name: plain, revision: main, split: validation, streaming: true, limit: 1, eval_split: test",
        "train: org/a, split: x+y, streaming: true, eval: org/b, eval_split: y",
        "mix: [org/a], eval: org/b, eval_fraction: null",
        "mix: [data], eval: org/b, eval_split: test",
        "train: data, eval: org/b, eval_split: test",
        "mix: [data/train.jsonl, data/more.csv.gz, data]",
        "mix: [{train: org/a, limit: 5}, {train: org/a, split: test}, org/a, {train: org/a, name: x}]",
        "mix: [{train: org/a, streaming: true, weight: 1e-3}, {train: data, weight: 2}]",
        "train: null, mix: [org/a]",
        "train: org/a, mix: null, allow: null",
        "train: org/a, overlong: split, packing: yes",
        "train: org/a, allow: [double_bos, answers_cut]",
    ],
)
def test_valid_data_settings_are_not_refused(load: Callable[..., Recipe], dataset: str) -> None:
    load(text=recipe(dataset=dataset))


def test_near_files_are_named_of_mixes_too(problems: Callable[..., list[Problem]]) -> None:
    found = problems(text=recipe(dataset="mix: [data/trian.jsonl, data/mor.csv.gz]"))
    assert [p.suggestion for p in found] == ["data/train.jsonl", "data/more.csv.gz"]


def test_what_could_not_be_read_is_no_second_problem(problem: Callable[..., Problem]) -> None:
    for dataset, key in [
        ("mix: [{train: org/a, weight: x}, {train: org/b, weight: 1}]", "mix[0].weight"),
        ("mix: [{train: org/a, limit: x}, org/a]", "mix[0].limit"),
        ("mix: org/a", "mix"),
        ("train: [a]", "train"),
        ("train: org/a, packing: maybe", "packing"),
        ("train: org/a, allow: [3]", "allow[0]"),
    ]:
        assert problem(text=recipe(dataset=dataset, method="prompt_tuning")).key == f"dataset.{key}"


def test_every_finding_that_stops_a_run_can_be_allowed(load: Callable[..., Recipe]) -> None:
    stops = [name for name, kind in FINDINGS.items() if kind.can_stop and name != "bad_rows"]
    assert stops
    assert load("", f"dataset.allow=[{','.join(stops)}]").dataset.allow == stops


def test_a_finding_has_a_near_name(problem: Callable[..., Problem]) -> None:
    assert problem("", "dataset.allow=[double_boss]").suggestion == "double_bos"
    assert problem("", "dataset.allow=double_bos").suggestion == "[double_bos]"


def test_the_checks_import_nothing_slow(write: Callable[..., Path]) -> None:
    path = write(text=recipe(dataset="mix: [data, org/a], packing: true, allow: [double_bos]", method="prompt_tuning"))
    code = (
        "import sys; from pathlib import Path; from peftcli.recipe import read; read(Path(sys.argv[1]));"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'pyarrow'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


# --- packing ---------------------------------------------------------------------------------------------------------


def test_rows_of_alora_are_not_packed(write: Callable[..., Path]) -> None:
    text = recipe(dataset="train: org/data, packing: true", method="lora, alora_invocation_tokens: [5]")
    [problem] = read(write(text=text)).problems
    assert problem.key == "dataset.packing"
    assert "LoRA finds alora_invocation_tokens only once per row" in problem.message


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_look_at_a_whole_batch_are_not_packed(write: Callable[..., Path], method: str) -> None:
    path = write(text=recipe(dataset="train: org/data, packing: true", method=method))
    needed = ("method.token_indices", "method.adapters", "method.adapter_len", "method.adapter_layers")
    found = [problem for problem in read(path).problems if problem.key not in needed]
    if method != "lily":
        assert not found
        return
    [problem] = found
    assert (problem.key, problem.line, problem.column) == ("dataset.packing", 4, 37)
    assert problem.message == (
        "packed rows contain several examples, but Lily mixes its parts by the mean over all tokens of a batch; "
        "set dataset.packing: false"
    )


@pytest.mark.parametrize(
    ("parts", "key", "place", "message"),
    [
        (
            {"dataset": "train: org/data, packing: true", "training": ", train_sampling_strategy: group_by_length"},
            "training.train_sampling_strategy",
            (5, 62),
            "group_by_length has no effect with dataset.packing, whose rows have about equal lengths; choose random",
        ),
    ],
)
def test_what_does_not_go_with_task_or_order(
    problem: Callable[..., Problem], parts: dict[str, str], key: str, place: tuple[int, int], message: str
) -> None:
    found = problem(text=recipe(**parts))
    assert (found.key, (found.line, found.column), found.message) == (key, place, message)


# --- the tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "column", "key", "message", "suggestion"),
    [
        ("chat_template: chatlm", 46, "chat_template", "expected chatml or a .jinja file, found 'chatlm'", "chatml"),
        ("chat_template: ''", 46, "chat_template", "expected chatml or a .jinja file, found ''", None),
        ("chat_template: data/train.jsonl", 46, "chat_template", "expected chatml or a .jinja file", None),
        ("chat_template: caht.jinja", 46, "chat_template", "no such file: caht.jinja", "chat.jinja"),
        (
            "chat_template: '{{ messages }}'",
            46,
            "chat_template",
            "contains a template; write it to a .jinja file",
            None,
        ),
        ("new_tokens: <a>", 43, "new_tokens", "expected a list of strings, found '<a>'", "[<a>]"),
        ("new_tokens: [<a>, ' ']", 49, "new_tokens[1]", "is empty", None),
        ("new_tokens: [<a>, ' <b>']", 49, "new_tokens[1]", "begins or ends with white space: ' <b>'", None),
        ("new_tokens: [<a>, <b>, <a>]", 54, "new_tokens[2]", "occurs twice in the list: '<a>'", None),
    ],
)
def test_what_the_tokenizer_is_given(
    problem: Callable[..., Problem], base: str, column: int, key: str, message: str, suggestion: str | None
) -> None:
    found = problem(text=recipe(base=f", {base}"))
    assert found.message.startswith(message)
    assert (found.key, found.line, found.column) == (f"base_model.{key}", 1, column)
    assert found.suggestion == suggestion


def test_templates_and_tokens_that_are_right(load: Callable[..., Recipe]) -> None:
    for template in ("chatml", "chat.jinja", "./chat.jinja", "null"):
        load(text=recipe(base=f", chat_template: {template}, new_tokens: [<a>, <b>]"))


# --- other tools' words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("sample_packing", "dataset.packing"),
        ("pack", "dataset.packing"),
        ("packed_sequences", "dataset.packing"),
        ("datasets", "dataset.mix"),
        ("dataset_mixer", "dataset.mix"),
        ("mix_strategy", "dataset.mix"),
        ("interleave_probs", "dataset.mix"),
        ("probs", "dataset.mix"),
        ("data_files", "dataset.train"),
        ("train_on_inputs", "dataset.train_on"),
        ("train_on_prompt", "dataset.train_on"),
        ("mask_history", "dataset.train_on: last_answer"),
        ("cutoff_len", "dataset.max_length"),
        ("sequence_len", "dataset.max_length"),
        ("excess_length_strategy", "dataset.overlong"),
        ("optimizer", "training.optim"),
        ("add_tokens", "base_model.new_tokens"),
        ("template", "base_model.chat_template"),
        # ours, in another place
        ("overlong", "dataset.overlong"),
        ("streaming", "dataset.streaming"),
        ("packing", "dataset.packing"),
        ("chat_template", "base_model.chat_template"),
    ],
)
def test_other_tools_keys(problem: Callable[..., Problem], key: str, suggestion: str) -> None:
    assert problem(f"{key}: 1\n").suggestion == suggestion


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("dataset.path=x", "train"),
        ("dataset.type=x", "format"),
        ("dataset.mask_history=true", "train_on: last_answer"),
        ("base_model.path=x", "name"),
        ("dataset.overlong=discard", "drop"),
        ("dataset.overlong=truncation", "truncate"),
        ("dataset.train_on=assistant", "answers"),
        ("dataset.format=chat_template", "messages"),
        ("dataset.on_bad_row=ignore", "skip"),
        ("base_model.dtype=bf16", "bfloat16"),
        ("dataset=org/data", "{train: org/data}"),
    ],
)
def test_other_tools_words_in_a_section(problem: Callable[..., Problem], override: str, suggestion: str) -> None:
    assert problem("", override).suggestion == suggestion


def test_words_for_values_are_true() -> None:
    ours = {word for cls in sections().values() for entry in settings(cls).values() for word in choices(entry.hint)}
    ours |= {"nf4", "int8"}
    assert set(VALUES.values()) <= ours
    assert all(re.fullmatch("[a-z0-9_]+", word) for word in VALUES)
