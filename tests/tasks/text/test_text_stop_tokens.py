"""Where generation stops: at what training ended the answers with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import HARMONY, TEMPLATES, make_tokenizer

from peftcli.adapters.load import AdapterSource
from peftcli.tasks.text.formats import AlpacaExample
from peftcli.tasks.text.prompts import SLOT, PromptForm
from peftcli.tasks.text.stop_tokens import StopTokens, all_stops, missing_stops, stop_tokens

OURS = {
    "smollm": {"<|im_end|>"},
    "qwen3": {"<|im_end|>"},
    "llama2": {"</s>"},
    "llama3": {"<|eot_id|>"},
    "gemma": {"<end_of_turn>"},
    "mistral": {"</s>"},
    "mistral_tools": {"</s>"},
    "zephyr": {"</s>"},
    "deepseek": {"</s>"},
    "phi3": {"<|end|>"},
    "two_ends": {"<|end|>"},  # the first of the two: nothing else has it
    "open_ended": set(),
    "plain": set(),
}


def texts(tokenizer: Any, ends: StopTokens) -> set[str]:
    return set(tokenizer.convert_ids_to_tokens(sorted(ends.ids)))


@pytest.mark.parametrize("name", OURS)
def test_an_answer_ends_with_the_templates_end_of_turn_and_with_eos(name: str) -> None:
    tokenizer = make_tokenizer(name)
    assert texts(tokenizer, stop_tokens(tokenizer, chat=True)) == OURS[name] | {"</s>"}
    assert texts(tokenizer, stop_tokens(tokenizer, chat=False)) == {"</s>"}, "no template was at work"


def test_every_template_is_tried() -> None:
    assert set(OURS) == set(TEMPLATES)


def test_marks_that_are_no_tokens_end_an_answer_as_text() -> None:
    tokenizer = make_tokenizer("plain")
    assert stop_tokens(tokenizer, chat=True).texts == ("[end]",)
    assert stop_tokens(tokenizer, chat=False).texts == ()
    assert stop_tokens(make_tokenizer("llama3"), chat=True).texts == ()


def test_what_ends_thinking_too_is_no_sure_end() -> None:
    tokenizer = make_tokenizer(HARMONY)
    assert texts(tokenizer, stop_tokens(tokenizer, chat=True)) == {"<|stop|>", "</s>"}
    silent = make_tokenizer(HARMONY.replace("m.thinking %}", "false %}"))
    assert texts(silent, stop_tokens(silent, chat=True)) == {"<|stop|>", "<|end|>", "</s>"}


def test_an_end_that_is_not_sure_is_better_than_none() -> None:
    tokenizer = make_tokenizer(HARMONY.replace("<|stop|>", "<|end|>"))
    assert texts(tokenizer, stop_tokens(tokenizer, chat=True)) == {"<|end|>", "</s>"}


BRACKETS = (
    "{% for m in messages %}{{ '<|U|>' if m.role == 'user' else '<|A|>' }}{% if m.role == 'assistant' %}"
    "{{ '[thought: ' + m.reasoning + ']' if m.reasoning else '[none]' }}{% endif %}{{ m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|A|>' }}{% endif %}"
)
# An answer without thinking begins at once.
THINKS = BRACKETS.replace("'[thought: '", "'<think>'").replace("']' if", "'</think>' if").replace("'[none]'", "''")
ASKS_TO_THINK = THINKS.replace("{{ '<|A|>' }}", "{{ '<|A|><think>' }}")


@pytest.mark.parametrize(
    ("template", "lead"),
    [
        (HARMONY, "final<|A|>"),
        (HARMONY.replace("m.thinking %}", "false %}"), "final<|A|>"),
        ("qwen3", "</think>"),
        (TEMPLATES["qwen3"].replace("think>", "thought>"), "</thought>"),
        (BRACKETS, "[none]"),  # what both end with is not a token
        (THINKS, "</think>"),
        (ASKS_TO_THINK, "</think>"),
        (THINKS.replace("{{ '<|A|>' }}", "{{ '<|A|><think></think>' }}"), ""),
        ("smollm", ""),
        ("llama2", ""),
    ],
)
def test_what_the_template_writes_before_an_answers_text(template: str, lead: str) -> None:
    tokenizer = make_tokenizer(template)
    assert stop_tokens(tokenizer, chat=True).lead == lead
    assert stop_tokens(tokenizer, chat=False).lead == ""


def test_thinking_is_no_part_of_an_answer_of_a_template_that_writes_none_where_there_is_none() -> None:
    stops = stop_tokens(make_tokenizer(THINKS), chat=True)
    answers = ("<think>A sum.</think>Three.", "Three.")
    assert [answer[stops.before(answer) :] for answer in answers] == ["Three."] * 2
    stops = stop_tokens(make_tokenizer(ASKS_TO_THINK), chat=True)
    assert stops.before("A sum.</think>Three.") == len("A sum.</think>")


def test_a_template_that_shows_no_conversation_and_a_tokenizer_without_eos() -> None:
    assert stop_tokens(make_tokenizer("{{ raise_exception('no') }}", eos=None), chat=True) == StopTokens()
    assert stop_tokens(make_tokenizer(None, eos=None), chat=False) == StopTokens()


def test_the_base_models_own_ends_stay() -> None:
    ends = StopTokens(frozenset({7, 3}))
    assert all_stops(ends, None) == [3, 7]
    assert all_stops(ends, 5) == [3, 5, 7]
    assert all_stops(ends, [7, 9]) == [3, 7, 9]
    assert all_stops(StopTokens(), None) == []


@pytest.mark.parametrize(
    ("trained_on", "template", "chat", "text"),
    [
        ("messages", "llama3", True, SLOT),
        ("sharegpt", "llama3", True, SLOT),
        ("alpaca", "llama3", True, SLOT),
        ("alpaca", None, False, f"### Instruction:\n{SLOT}\n\n### Response:\n"),
        ("prompt_completion", "llama3", False, SLOT),
        ("text", "llama3", False, SLOT),
        (None, "llama3", True, SLOT),
        (None, None, False, SLOT),
    ],
)
def test_the_form_of_an_older_folder_is_that_of_the_trained_rows(
    tmp_path: Path, trained_on: str | None, template: str | None, chat: bool, text: str
) -> None:
    if trained_on:
        (tmp_path / "run.json").write_text(json.dumps({"data": {"format": trained_on}}))
    form = AdapterSource(tmp_path, {}).prompt_form(has_template=template is not None)
    assert form == PromptForm(chat, trained_on or "messages", text)


def test_what_all_rows_share_is_asked_again() -> None:
    shared = {"system": "Be kind.", "instruction": "Translate."}
    form = PromptForm.of_rows("alpaca", shared, has_template=True)
    assert form.ask("Hi") == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Translate.\n\nHi"},
    ]
    assert form.ask("Hi", system="") == [{"role": "user", "content": "Translate.\n\nHi"}]
    plain = PromptForm.of_rows("alpaca", shared, has_template=False)
    assert plain.ask("Hi") == AlpacaExample("Translate.", "", "Hi", "Be kind.").pair().prompt


def test_stops_are_named_where_the_base_model_lacks_one() -> None:
    tokenizer = make_tokenizer("llama3")
    eos, turn = tokenizer.convert_tokens_to_ids(["</s>", "<|eot_id|>"])
    assert missing_stops(tokenizer, eos, chat=True) == sorted([eos, turn])
    assert missing_stops(tokenizer, None, chat=True) == sorted([eos, turn])
    assert missing_stops(tokenizer, [turn, eos], chat=True) == []
    assert missing_stops(tokenizer, [turn, eos, 0], chat=True) == []
