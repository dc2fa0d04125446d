"""Chat templates without end: each is refused in bounded time and memory, and a good one writes what it did."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import mask_matrix
import pytest
from chat_templates import make_tokenizer
from transformers import PreTrainedTokenizerFast

from peftcli.data.rows import Place, Row, Table
from peftcli.errors import DataError, ModelError
from peftcli.schema import Dataset, Source
from peftcli.system import limited_process
from peftcli.system.limited_process import LimitedProcess
from peftcli.tasks.text import spans
from peftcli.tasks.text.chat import chat_template
from peftcli.tasks.text.encode import CausalEncoder, Seq2SeqEncoder
from peftcli.tasks.text.formats import example_reader
from peftcli.tasks.text.spans import render, tokenize

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
GOOD = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@cache
def _tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def speaking(template: str) -> PreTrainedTokenizerFast:
    """The same tokenizer each time, with another template."""
    _tokenizer().chat_template = template
    return _tokenizer()


def times(count: int, body: str) -> str:
    return f"{{% set ns = namespace(x='ab', l=[1], n=2) %}}{{% for i in range({count}) %}}{body}{{% endfor %}}"


ENDLESS = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a loop within itself": "{% for a in range(99) recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "filters that test lists": "{% set l = range(99999) | list %}{{ l | reject('in', l) | list }}",
    "places in large texts": "{% set x = 'ab' * 999999 %}" + "{% set y = x.find('c') %}" * 9999,
    "a long list that is written again and again": times(99999, "{{ range(99999) | list }}"),
}
GROWING = {
    "text doubled": times(60, "{% set ns.x = ns.x + ns.x %}"),
    "lists in lists, written": times(60, "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
    "arguments of arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}"
    "{% endif %}{% endmacro %}{{ f(60, 1) }}",
    "a long text": "{{ 'a' * 10000000000 }}",
    "a long list": "{{ ([1] * 10000000000) | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a wide number": "{{ '%999999999d' % 1 }}",
    "JSON that is indented": "{{ messages | tojson(indent=999999999) }}",
    "batch": "{{ [1] | batch(999999999, 'a') | list }}",
    "join of what comes one by one": "{% set a = 'a' * 999999 %}{{ range(99999) | map('string') | join(a) }}",
    "a very long template": GOOD + " " * 1_000_001,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "_SECONDS", 0.2)


@pytest.mark.parametrize("case", [*ENDLESS, *GROWING])
@pytest.mark.usefixtures("impatient")
def test_a_template_without_end(case: str) -> None:
    tokenizer = speaking({**ENDLESS, **GROWING}[case] + GOOD)
    start = time.thread_time()
    with pytest.raises(ModelError) as caught:
        chat_template(tokenizer)
    assert time.thread_time() - start < 1
    error = caught.value
    assert error.key == "base_model.chat_template"
    assert "the chat template of the tokenizer does not come to an end with a conversation of 2 messages: it " in str(
        error
    )
    if case in ENDLESS:
        assert "it computes for more than 0 seconds" in error.message


@pytest.mark.slow
def test_the_true_limits() -> None:
    with pytest.raises(ModelError, match="it computes for more than 4 seconds"):
        render(speaking(ENDLESS["loops in loops"] + GOOD), CHAT)
    with pytest.raises(ModelError, match="it takes more than 1,024 MiB"):
        render(speaking(GROWING["text doubled"]), [])


def test_in_any_thread() -> None:
    errors: list[BaseException] = []
    tokenizer = speaking(GROWING["text doubled"])

    def run() -> None:
        try:
            chat_template(tokenizer)
        except ModelError as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    assert len(errors) == 4
    assert render(speaking(GOOD), CHAT).endswith("Yes.<|im_end|>\n")  # the thread of the process has ended


def _sleep(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def _count_open(_: object) -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_process_that_was_kept_waiting_is_not_blamed() -> None:
    assert LimitedProcess(_sleep, 1 << 28).call(0.5, 0.1) != os.getpid()


def test_it_ends_when_it_has_no_work_and_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_process, "_IDLE_SECONDS", 0.2)
    process = LimitedProcess(_sleep, 1 << 28)
    first = process.call(0.0, 1)
    assert process.call(0.0, 1) == first
    time.sleep(0.6)
    assert process.call(0.0, 1) != first


def test_an_answer_that_a_signal_interrupts_is_not_the_next_ones() -> None:
    process = LimitedProcess(_sleep, 1 << 28)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            process.call(30.0, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert process.call(0.0, 1) != os.getpid()


def test_it_holds_no_lock_of_this_process(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w"):
        assert LimitedProcess(_count_open, 1 << 28).call(None, 1) <= 5  # with that of the listing


def test_a_long_conversation_may_take_as_long_as_it_needs() -> None:
    quadratic = (
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}{{ ns.x }}"
    )
    messages = [{"role": "user", "content": "x" * 1000} for _ in range(300)]
    assert render(speaking(quadratic), messages) == "x" * 300_000  # 45 million characters on the way


@pytest.mark.usefixtures("impatient")
def test_the_ids_are_compared_within_bounds() -> None:
    tokenizer = speaking(ENDLESS["loops in loops"] + GOOD)
    with pytest.raises(ModelError, match="does not come to an end"):
        tokenize(tokenizer, CHAT, None)


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True]}}}]
LIKE_BEFORE = [
    "{{ messages }}",
    "{{ tools | tojson(indent=4) }}",
    "{{ ''.__class__ }}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') | length }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    "{% include 'x' %}",
    "{{ missing + 'a' }}",
    "{{ 1 / 0 }}",
    "{{ '<a>' }}é{{ '\ud800' }}",
    "{# a #}\n  {% if true %}\n  x\n  {% endif %}\n",
]


@pytest.mark.parametrize("text", LIKE_BEFORE)
def test_what_a_template_writes_stays_the_same(text: str) -> None:
    tokenizer = speaking(text)
    for tools in (None, TOOLS):
        options: dict[str, Any] = {"tools": tools, "tokenize": False, "add_generation_prompt": True}
        try:
            expected = tokenizer.apply_chat_template(CHAT, **options)
        except Exception as error:
            with pytest.raises(DataError) as caught:
                render(tokenizer, CHAT, tools, prompt=True)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            assert caught.value.message == f"the chat template refuses the conversation: {reason}"
        else:
            assert render(tokenizer, CHAT, tools, prompt=True) == expected


def _with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [
        {"type": "function", "function": {**each, "arguments": json.dumps(each["arguments"], ensure_ascii=False)}}
        for each in functions
    ]
    return {**message, "tool_calls": calls} if calls else message


@pytest.mark.parametrize("name", mask_matrix.PUBLISHED)
def test_what_well_known_templates_write_stays_the_same(name: str) -> None:
    tokenizer = mask_matrix.tokenizer(name)
    for shape in mask_matrix.SHAPES:
        messages, tools = mask_matrix.conversation(name, shape)
        expected = None
        filled = [{**each, "content": each.get("content") or ""} for each in messages]
        for given in (messages, filled, [_with_arguments_as_text(each) for each in filled]):
            with suppress(Exception):
                expected = expected or tokenizer.apply_chat_template(given, tools=tools, tokenize=False)
        if expected is None:
            with pytest.raises(DataError):
                render(tokenizer, messages, tools)
        else:
            assert render(tokenizer, messages, tools) == expected


@pytest.mark.parametrize("encoder", [CausalEncoder, Seq2SeqEncoder])
@pytest.mark.usefixtures("impatient")
def test_a_row_that_the_template_does_not_end_with_is_named(encoder: Any) -> None:
    tokenizer = speaking("{% if messages | length > 3 %}" + ENDLESS["loops in loops"] + "{% endif %}" + GOOD)
    source = Source(train="a.jsonl")
    encode = encoder(example_reader(Table(source, "a.jsonl", ("messages",))), tokenizer, Dataset())
    rows = [
        Row({"messages": CHAT * times}, Place("a.jsonl", number, number + 10)) for number, times in ((1, 1), (2, 3))
    ]
    assert len(encode(rows[:1])) == 1
    with pytest.raises(ModelError, match="does not come to an end with a conversation of") as caught:
        encode(rows)
    assert (caught.value.file, caught.value.line) == ("a.jsonl", 12)
