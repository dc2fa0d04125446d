"""Chat templates without end: each is refused in bounded time and memory, and a good one writes what it did."""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from functools import cache
from typing import Any

import mask_matrix
import pytest
from chat_templates import make_tokenizer
from transformers import PreTrainedTokenizerFast

from peftcli.data.rows import Place, Row, Table
from peftcli.errors import DataError, ModelError
from peftcli.guard import templates
from peftcli.schema import Dataset, Source
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
    "loops over one name": "{% set r = range(99999) %}" + "{% for a in r %}" * 4 + "{% endfor %}" * 4,
    "a loop that skips all": times(99999, "{% for j in range(99999) if j < 0 %}{% endfor %}"),
    "a loop that goes on": times(99999, "{% for j in range(99999) %}{% continue %}{% endfor %}"),
    "a loop within itself": "{% for a in range(99) recursive %}{{ loop(range(99)) if loop.depth < 9 }}{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a macro that is only asked": "{% macro f(n) %}{% if n and f(n - 1) == f(n - 1) %}x{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a call block in a macro": "{% macro f(n) %}{{ caller() if n < 0 }}{% if n %}{% call f(n - 1) %}{% endcall %}"
    "{% call f(n - 1) %}{% endcall %}{% endif %}{% endmacro %}{% call f(60) %}{% endcall %}",
    "a block within itself": "{% set ns = namespace(n=60) %}{% block a %}{% set ns.n = ns.n - 1 %}"
    "{% if ns.n > 0 %}{{ self.a() }}{{ self.a() }}{% endif %}{% set ns.n = ns.n + 1 %}{% endblock %}",
    "filters that test": times(99999, "{{ range(99999) | select('equalto', -1) | list }}"),
    "filters that test lists": "{% set l = range(99999) | list %}{{ l | reject('in', l) | list }}",
    "small results of large texts": "{% set x = 'ab' * 999999 %}" + "{% set y = x | wordcount %}" * 999,
    "places in large texts": "{% set x = 'ab' * 999999 %}" + "{% set y = x.find('c') %}" * 9999,
    "very many divisions": "{% set a = 7 ** 30000 %}{% set b = 5 ** 15000 %}" + "{% if a // b %}{% endif %}" * 5000,
    "a long list that is written again and again": times(99999, "{{ range(99999) | list }}"),
}
GROWING = {
    "very many comparisons": times(22, "{% set ns.l = ns.l + ns.l %}{% set ns.x = ns.x * 2 %}")
    + "{% set a = ns.x | list %}{% set b = ns.x | list %}{% if a == b %}{% endif %}" * 999,
    "very many small steps": "{% set x = 'ab' * 999999 %}" + "{% set x = x | upper %}" * 999,
    "very many small calls": "{% set x = 'ab' * 999999 %}" + "{% set x = x.upper() %}" * 999,
    "text doubled": times(60, "{% set ns.x = ns.x + ns.x %}"),
    "text joined": times(60, "{% set ns.x = ns.x ~ ns.x %}"),
    "text doubled in a block": times(60, "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"),
    "lists doubled": times(60, "{% set ns.l = ns.l + ns.l %}"),
    "lists in lists, written": times(60, "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l }}",
    "lists in lists, as JSON": times(60, "{% set ns.l = [ns.l, ns.l] %}") + "{{ ns.l | tojson }}",
    "lists in lists, as text": times(60, "{% set ns.l = [ns.l, ns.l] %}") + "{{ (ns.l | string | length) ~ '' }}",
    "lists in lists, joined": times(60, "{% set ns.l = [ns.l, ns.l] %}") + "{{ '' ~ ns.l }}",
    "lists in lists, compared": times(60, "{% set ns.l = [ns.l, ns.l] %}{% set ns.x = [ns.x, ns.x] %}")
    + "{{ ns.l == ns.x }}",
    "lists in lists, tested": times(60, "{% set ns.l = [ns.l, ns.l] %}{% set ns.x = [ns.x, ns.x] %}")
    + "{{ ns.l is eq(ns.x) }}",
    "mappings in mappings": times(60, "{% set ns.l = {'a': ns.l, 'b': ns.l} %}") + "{{ ns.l }}",
    "tuples in tuples": times(60, "{% set ns.l = (ns.l, ns.l) %}") + "{{ ns.l }}",
    "views of mappings of views": times(60, "{% set ns.l = {'a': ns.l, 'b': ns.l}.items() %}") + "{{ ns.l }}",
    "mappings by a call": times(60, "{% set ns.l = dict(a=ns.l, b=ns.l) %}") + "{{ ns.l }}",
    "lists that are twice as long": times(60, "{% set ns.l = [ns.l] * 2 %}") + "{{ ns.l }}",
    "arguments of arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}"
    "{% endif %}{% endmacro %}{{ f(60, 1) }}",
    "named arguments of arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, a=kwargs, b=kwargs) }}{% else %}{{ kwargs }}"
    "{% endif %}{% endmacro %}{{ f(60) }}",
    "long lists in a block": "{% set l = range(99999) | list %}{% set x %}" + times(99999, "{{ l }}") + "{% endset %}",
    "slices of a text": "{% set x = 'a' * 99999 %}" + times(9999, "{% set ns.l = ns.l + [x[1:]] %}"),
    "a long text": "{{ 'a' * 10000000000 }}",
    "a long text, the other way": "{{ 10000000000 * 'a' }}",
    "a long list": "{{ ([1] * 10000000000) | length }}",
    "a text times a text": "{% set a = 'a' * 90000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a power that is not reached": "{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}"
    + GOOD.replace("m.role", "9 ** (9 ** 9)"),
    "products": times(99, "{% set ns.n = ns.n * ns.n %}"),
    "a wide number": "{{ '%999999999d' % 1 }}",
    "a wide number that is given": "{{ '%*d' % (999999999, 1) }}",
    "many digits": "{{ '%.999999999f' % 1 }}",
    "a wide field": "{{ '{:>999999999}'.format(1) }}",
    "a wide field that is given": "{{ '{:>{}}'.format(1, 999999999) }}",
    "a format in a filter": "{{ '%999999999d' | format(1) }}",
    "a field again and again": "{% set a = 'a' * 999999 %}{{ ('%(x)s' * 99999) % {'x': a} }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "center, by name": "{{ 'a' | center(width=9999999999) }}",
    "center, from a list": "{{ 'a' | center(*[9999999999]) }}",
    "center, as a method": "{{ 'a'.center(9999999999) }}",
    "center, as an item": "{{ 'a'['center'](9999999999) }}",
    "center, under another name": "{% set f = 'a'.center %}{{ f(9999999999) }}",
    "center, as an attribute": "{{ ('a' | attr('center'))(9999999999) }}",
    "center, in a block": "{% filter center(9999999999) %}a{% endfilter %}",
    "center, in a set block": "{% set x | center(9999999999) %}a{% endset %}{{ x }}",
    "ljust": "{{ 'a'.ljust(9999999999) }}",
    "zfill": "{{ 'a'.zfill(9999999999) }}",
    "expandtabs": "{{ '\\t\\t'.expandtabs(999999999) }}",
    "indent": "{{ 'a\\nb' | indent(9999999999) }}",
    "JSON that is indented": "{{ messages | tojson(indent=999999999) }}",
    "round": "{{ 1.5 | round(999999999) }}",
    "batch": "{{ [1] | batch(999999999, 'a') | list }}",
    "batches of one": "{{ (('a ' * 999999) | list) | batch(1) | list | length }}",
    "lists of a long text": "{% set x = 'a' * 999999 %}{{ " + " ~ ".join(["(x | list | length)"] * 99) + " }}",
    "copies that a filter makes": "{% set x = 'a' * 9999 %}{{ ([x] * 9999) | map('upper') | list | length }}",
    "words that are too long": "{{ ('a' * 999999) | wordwrap(1) }}",
    "words that are too long, by name": "{{ ('a' * 999999) | wordwrap(width=2) }}",
    "tags in tags": "{{ ('<!---->' * 99999) | striptags }}",
    "slice": "{{ [1] | slice(999999999) | list }}",
    "replace": "{% set a = 'a' * 999999 %}{{ a | replace('a', a) }}",
    "replace, as a method": "{% set a = 'a' * 999999 %}{{ a.replace('', a) }}",
    "join": "{% set a = 'a' * 999999 %}{{ range(99999) | join(a) }}",
    "join, as a method": "{% set a = 'a' * 999999 %}{{ a.join(['x'] * 99999) }}",
    "join of what comes one by one": "{% set a = 'a' * 999999 %}{{ range(99999) | map('string') | join(a) }}",
    "translate": "{% set a = 'a' * 999999 %}{{ a.translate({97: a}) }}",
    "JSON of JSON": times(60, "{% set ns.x = ns.x ~ '\"' %}{% set ns.x = ns.x | tojson %}"),
    "made-up text": "{{ lipsum(n=999999999) }}",
    "made-up text in many words": "{{ lipsum(n=90000, max=90000) }}",
    "sum": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "bytes": "{{ (1).to_bytes(9999999999) | length }}",
    "copies in a list": times(99999, "{% set ns.x = 'a' * 9999 %}{% set ns.l = ns.l + [ns.x.upper()] %}"),
    "a very long template": GOOD + " " * 1_000_001,
}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_SECONDS", 0.2)
    monkeypatch.setattr(templates, "_SIZE", 10_000_000)


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("case", [*ENDLESS, *GROWING])
@pytest.mark.usefixtures("impatient")
def test_a_template_without_end(case: str) -> None:
    tokenizer = speaking({**ENDLESS, **GROWING}[case] + GOOD)
    start = time.thread_time()
    with pytest.raises(ModelError) as caught:
        chat_template(tokenizer)
    assert time.thread_time() - start < 10
    error = caught.value
    assert error.key == "base_model.chat_template"
    assert "the chat template of the tokenizer does not come to an end with a conversation of 2 messages: it " in str(
        error
    )
    if case in ENDLESS and "written" not in case:
        assert "it computes for more than 0 seconds" in error.message


@pytest.mark.slow
def test_the_true_limits() -> None:
    tokenizer = speaking(ENDLESS["loops over one name"] + GOOD)
    start = time.thread_time()
    with pytest.raises(ModelError, match="it computes for more than 4 seconds"):
        render(tokenizer, CHAT)
    assert time.thread_time() - start < 15
    with pytest.raises(ModelError, match=r"it makes more than 100,0\d\d,000 characters"):
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


@pytest.mark.usefixtures("impatient")
def test_a_thread_that_was_kept_waiting_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0] + [1000.0] * 99)
    monkeypatch.setattr("peftcli.guard.templates.time.monotonic", lambda: next(clock))
    assert render(speaking(GOOD), CHAT).endswith("Yes.<|im_end|>\n")


@pytest.mark.usefixtures("impatient")
def test_a_long_conversation_may_take_as_long_as_it_needs() -> None:
    quadratic = (
        "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}{{ ns.x }}"
    )
    messages = [{"role": "user", "content": "x" * 1000} for _ in range(300)]
    assert render(speaking(quadratic), messages) == "x" * 300_000  # 45 million characters on the way


def test_namespaces_that_hold_one_another_are_not_written_out() -> None:
    template = times(60, "{% set ns.x = namespace(a=ns.x, b=ns.x) %}") + "{{ ns.x }}"
    assert render(speaking(template), CHAT).startswith("<")


@pytest.mark.usefixtures("impatient")
def test_the_ids_are_compared_within_bounds() -> None:
    tokenizer = speaking(ENDLESS["loops in loops"] + GOOD)
    with pytest.raises(ModelError, match="does not come to an end"):
        tokenize(tokenizer, CHAT, None)


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, None, True]}}}]
LIKE_BEFORE = [
    "{{ 'a' + messages[0].content + 'b' + 'c' }}",
    "{{ 1 + 2 + 3 }}",
    "{{ 'a' + 1 }}",
    "{{ 1 + 'a' }}",
    "{{ [1] + [2, 3] }}",
    "{{ 'a' ~ 1 ~ none ~ [1] ~ missing }}",
    "{{ 'ab' * 3 }}",
    "{{ 3 * 'ab' }}",
    "{{ 2 * 3.5 }}",
    "{{ 'a' * -1 }}",
    "{{ 2 ** 10 }}",
    "{{ 2 ** -1 }}",
    "{{ 7 % 4 }}",
    "{{ '%s and %05.1f' % ('x', 2) }}",
    "{{ '%(a)s' % {'a': 1} }}",
    "{{ '{} {:>4} {x}'.format(1, 'a', x=[2]) }}",
    "{{ '{a}'.format_map({'a': 3}) }}",
    "{{ messages }}",
    "{{ tools | tojson }}",
    "{{ tools | tojson(indent=4) }}",
    "{{ tools | tojson(separators=(',', ':')) }}",
    "{{ messages[1:] | length }}",
    "{{ messages[::-1] | map(attribute='role') | join(', ') }}",
    "{{ ['b', 'a'] | sort | join }}",
    "{{ 'a b' | title | trim }}",
    "{{ 'x' | center(5) | replace('x', 'yy') | indent(2) }}",
    "{{ 'a\nb' | indent(width=3, first=true) }}",
    "{{ none | trim }}",
    "{{ missing | center(3) }}|",
    "{{ missing | join(',') }}|",
    "{{ missing | replace('a', 'b') }}|",
    "{{ 5 | center(3) }}|",
    "{{ [1, 2, 3] | sum }}",
    "{{ messages | sum(attribute='x') }}",
    "{{ [[1], [2]] | sum(start=[]) }}",
    "{{ 2.567 | round(2) }}",
    "{{ [1, 2, 3] | batch(2, 0) | list }}",
    "{{ range(5) | slice(2) | list }}",
    "{{ 'a long text here' | truncate(6) }}",
    "{{ 'a long text' | wordwrap(4) }}",
    "{{ '<a>' | e }}",
    "{{ ('<a>' | e) + '<b>' }}",
    "{{ '<i>' + ('<a>' | safe) }}",
    "{{ {'a': 1, 'b': none} | xmlattr }}",
    "{{ 'see www.x.org' | urlize }}",
    "{{ 'a/ b' | urlencode }}",
    "{{ [3, 1] | min }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ none | select | list }}",
    "{{ messages | rejectattr('x') | map('upper') | list }}",
    "{{ [0, 1] | select | list }}",
    "{{ 'aXb'.split('X') }}",
    "{{ ', '.join(messages | map(attribute='role')) }}",
    "{{ ', '.join(['a', 'b']) }}",
    "{{ 'ab'.ljust(4) ~ '|' }}",
    "{{ 'a'.replace('a', 'bb', 1) }}",
    "{{ 'a'.nothing() }}",
    "{{ messages[0].get('content', 'x') }}",
    "{{ messages.append(1) }}",
    "{{ ''.__class__ }}",
    "{{ 'a'['upper']() }}",
    "{{ ('a' | attr('upper'))() }}",
    "{{ raise_exception('no') }}",
    "{{ lipsum }}",
    "{{ lipsum(n=1, html=false, min=2, max=3) | length > 3 }}",
    "{{ dict(a=1) }}",
    "{{ 10 // 3 }}",
    "{{ 10 / 4 }}",
    "{{ -3 }}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }}{% else %}none{% endfor %}",
    "{% for m in [] %}x{% else %}none{% endfor %}",
    "{% for a, b in messages[0].items() %}{{ a }}{{ loop.last }}{% endfor %}",
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% for c in 'abc' %}{{ loop.cycle('x', 'y') }}{{ c }}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% set x = 1 %}{% for m in messages %}{% set x = 2 %}{% endfor %}{{ x }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "{% set ns = namespace(x=1) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }}",
    "{% set x | upper | replace('A', 'b') %}a{{ 1 }}{% endset %}{{ x }}",
    "{% set ns = namespace() %}{% set ns.x | center(5) %}a{% endset %}{{ ns.x }}|",
    "{% filter upper | trim %} a{% endfilter %}",
    "{% filter indent(2) %}a\nb{% endfilter %}",
    "{% filter upper %}{% filter trim %} a {% endfilter %}!{% endfilter %}",
    "{% macro f(a, b='x') %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(1, 2, 3, c=4) }}",
    "{% macro f() %}[{{ caller('z') }}]{% endmacro %}{% call(u) f() %}{{ u }}y{% endcall %}",
    "{{ f() }}",
    "{% block a %}x{{ 1 }}{% endblock %}{{ self.a() }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}!",
    "{% if 'a' in messages[0] and not tools %}x{% endif %}",
    "{{ 'x' if messages[0].role == messages[1].role else 'y' }}",
    "{{ 1 < 2 < 3 }}",
    "{{ [1, 2] == [1, 2] }}",
    "{{ messages[0] is mapping }}{{ 1 is eq 1 }}{{ 'a' is in ['a'] }}{{ x is defined }}",
    "{{ messages is sameas messages }}",
    "{{ {'a': [1]} }}",
    "{{ (1, 'a') }}",
    "{{ cycler('a', 'b').next() }}",
    "{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b",
    "{{ strftime_now('%Y') | length }}",
    "{{ 'a' | nofilter }}",
    "{% include 'x' %}",
    "{{ 'é' | length }}",
    "{%- raw %}{{ x }}{% endraw %}",
    "{% set _peftcli = 1 %}{{ missing.x }}",
    "{{ missing }}|",
    "{{ missing + 'a' }}",
    "{{ messages[9] }}|",
    "{{ 1 / 0 }}",
    "{% extends 'x' %}",
    "{% autoescape true %}{{ '<' + 'a' }}{% endautoescape %}",
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
