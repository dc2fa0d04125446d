"""The mask matrix: what is trained, for every template and shape of conversation, against what was checked by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import mask_matrix
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2 import UndefinedError
from mask_matrix import PUBLISHED, SHAPES, answer, conversation, expected, user

from peftcli.data.rows import Place, Row
from peftcli.errors import DataError
from peftcli.system import date
from peftcli.tasks.text.chat import IGNORED, MarkedText, check_ids, encode_marked, mark_chat
from peftcli.tasks.text.findings import Flag
from peftcli.tasks.text.formats import ChatExample, ExampleReader
from peftcli.tasks.text.spans import Template

PAIRS = [(template, shape) for template in PUBLISHED for shape in SHAPES]
Span = tuple[int, int]
FOUND = {pair: want for pair in PAIRS if not isinstance(want := expected(*pair), str)}
"""What is expected of the pairs that are not refused."""
REFUSED = {pair: want for pair in PAIRS if isinstance(want := expected(*pair), str)}


@pytest.fixture(autouse=True)
def _today(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", mask_matrix.Today)
    with date.fixed_date(mask_matrix.DAY):
        yield


def plan(
    template: str, shape: str, train_on: str = "answers", *untrained: int, using: Template | None = None
) -> MarkedText:
    messages, tools = conversation(template, shape)
    using = using or Template(mask_matrix.tokenizer(template))
    return mark_chat(ChatExample(messages, tools, frozenset(untrained)), using, train_on)


def label_spans(tokenizer: Any, ids: list[int], labels: list[int], text: str) -> list[Span]:
    """Which characters the trained tokens stand for, where every character has tokens of its own."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert offsets["input_ids"] == ids
    spans: list[Span] = []
    for (left, right), label in zip(offsets["offset_mapping"], labels, strict=True):
        if label == IGNORED:
            continue
        if spans and left <= spans[-1][1]:
            spans[-1] = (spans[-1][0], right)
        else:
            spans.append((left, right))
    return spans


def joined(spans: list[Span]) -> list[Span]:
    """Spans that touch as one."""
    found: list[Span] = []
    for start, end in spans:
        if found and found[-1][1] == start:
            start = found.pop()[0]
        found.append((start, end))
    return found


def test_the_frozen_file_has_every_pair_and_no_other() -> None:
    assert [(template, shape) for template, row in mask_matrix.frozen().items() for shape in row] == PAIRS


@pytest.mark.grid(keep=12)
@pytest.mark.parametrize(("template", "shape"), FOUND)
def test_answers(template: str, shape: str) -> None:
    text, spans = FOUND[template, shape]
    tokenizer = mask_matrix.tokenizer(template)
    planned = plan(template, shape)
    assert planned.text == text
    assert list(planned.spans or ()) == spans
    [encoded] = encode_marked([planned], tokenizer)
    check_ids(ChatExample(*conversation(template, shape)), encoded, tokenizer)
    if not PUBLISHED[template].swallow:
        assert label_spans(tokenizer, encoded.input_ids, encoded.labels, text) == joined(spans)


@pytest.mark.grid(each="template")
@pytest.mark.parametrize(("template", "shape"), REFUSED)
def test_refused(template: str, shape: str) -> None:
    with pytest.raises(DataError) as caught:
        plan(template, shape)
    assert REFUSED[template, shape] in caught.value.message
    assert len(str(caught.value).splitlines()) <= 6


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("template", PUBLISHED)
def test_what_was_learnt_from_one_conversation_holds_for_the_next(template: str) -> None:
    using = Template(mask_matrix.tokenizer(template))
    for shape in [*SHAPES, *reversed(SHAPES)]:
        if (template, shape) in FOUND:
            planned = plan(template, shape, using=using)
            assert (planned.text, list(planned.spans or ())) == FOUND[template, shape], shape
        else:
            with pytest.raises(DataError):
                plan(template, shape, using=using)


def test_arguments_that_were_read_are_text_again_for_a_template_that_wants_text() -> None:
    messages, tools = conversation("deepseek_v3", "tool_text_arguments")
    names = {"messages": "messages", "tools": "tools"}
    example = ExampleReader("messages", names)(Row({"messages": messages, "tools": tools}, Place("a", 1)))
    assert isinstance(example, ChatExample)
    planned = mark_chat(example, Template(mask_matrix.tokenizer("deepseek_v3")), "answers")
    assert (planned.text, list(planned.spans or ())) == FOUND["deepseek_v3", "tool_text_arguments"]


SEVERAL = ("multi", "tool_text_steps", "answer_twice", "typed", "thinking", "edges")


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize(("template", "shape"), [pair for pair in FOUND if pair[1] in SEVERAL])
def test_which_turns_are_trained(template: str, shape: str) -> None:
    text, spans = FOUND[template, shape]
    messages, _ = conversation(template, shape)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert list(plan(template, shape, "last_answer").spans or ()) == spans[-1:]
    assert plan(template, shape, "last_answer", answers[-1]).spans == ()
    everything = plan(template, shape, "all")
    assert (everything.text, everything.spans) == (text, None)
    for turn, span in zip(answers, spans, strict=True):
        others = [each for each in spans if each != span]
        assert list(plan(template, shape, "answers", turn).spans or ()) == others
        assert list(plan(template, shape, "all", turn).spans or ()) == [(0, span[0]), (span[1], len(text))]
    assert plan(template, shape, "answers", *answers).spans == ()


@pytest.mark.grid(keep=10)
@pytest.mark.parametrize(("template", "shape"), FOUND)
def test_a_template_with_generation_tags(template: str, shape: str) -> None:
    """It is masked as without them, and as transformers does by the tags."""
    tokenizer = mask_matrix.tokenizer(template, tags=True)
    planned = plan(template, shape, using=Template(tokenizer))
    assert (planned.text, list(planned.spans or ())) == FOUND[template, shape]
    if PUBLISHED[template].swallow:
        return  # transformers trains a header that swallows the white space of the answer
    [encoded] = encode_marked([planned], tokenizer)
    messages, tools = conversation(template, shape)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    try:
        theirs = tokenizer.apply_chat_template(messages, tools=tools, **options)
    except (TypeError, UndefinedError):  # deepseek_v3 refuses calls without text, and arguments that are none
        return
    assert [label != IGNORED for label in encoded.labels] == list(map(bool, theirs["assistant_masks"]))


@pytest.mark.parametrize(
    ("template", "shape", "flags"),
    [
        ("chatml", "multi", Flag(0)),
        ("chatml", "typed", Flag.MARKERS),
        ("chatml", "question_last", Flag.ODD_TURNS),
        ("chatml", "question_twice", Flag.ODD_TURNS),
        ("chatml", "answer_twice", Flag.ODD_TURNS),
        ("chatml", "answer_first", Flag.ODD_TURNS),
        ("qwen3", "tool_calls_two", Flag(0)),
        ("qwen3", "tool_steps", Flag(0)),
        ("qwen3", "thinking_inline", Flag(0)),
        ("mistral_v3", "system", Flag.UNSEEN),
        ("mistral_v1", "system", Flag(0)),
        ("gemma3", "system", Flag(0)),
        ("llama3_1", "tool_beside_text", Flag.UNSEEN),
        ("gpt_oss", "system_late", Flag.UNSEEN),
    ],
)
def test_flags(template: str, shape: str, flags: Flag) -> None:
    assert plan(template, shape).flags == flags


@pytest.mark.parametrize("shape", ["system", "tool_beside_text"])
def test_what_a_template_leaves_out_is_told_when_every_token_is_trained_too(shape: str) -> None:
    assert plan("mistral_v3", shape, "all").flags == Flag.UNSEEN
    assert plan("qwen3", shape, "all").flags == Flag(0)


def test_dropped_tool_calls_are_told_where_they_are_not_refused() -> None:
    assert plan("chatml", "tool", "all").flags == Flag.UNSEEN
    last = plan("chatml", "tool", "last_answer")
    assert [last.text[start:end] for start, end in last.spans or ()] == ["Three.<|im_end|>"]
    assert last.flags == Flag.UNSEEN


@pytest.mark.parametrize(("template", "flags"), [("chatml", Flag.UNSEEN), ("qwen3", 0), ("mistral_v3", 0)])
def test_tools_that_a_template_leaves_out_are_told(template: str, flags: int) -> None:
    example = ChatExample([user("q"), answer("A")], [{"type": "function", "function": {"name": "add"}}])
    assert mark_chat(example, Template(mask_matrix.tokenizer(template)), "answers").flags == flags


def test_tools_that_a_template_writes_in_other_conversations_are_told_too() -> None:
    tokenizer = mask_matrix.tokenizer("chatml")
    tokenizer.chat_template = "{% if messages[0].role != 'system' %}{{ tools }}{% endif %}" + tokenizer.chat_template
    tools, using = [{"type": "function", "function": {"name": "add"}}], Template(tokenizer)
    for first, flags in (([], 0), ([{"role": "system", "content": "s"}], Flag.UNSEEN)):
        example = ChatExample([*first, user("q"), answer("A")], tools)
        assert mark_chat(example, using, "answers").flags == flags


def test_a_turn_that_is_not_trained_may_be_unclear() -> None:
    messages = [user("q"), answer("<think>\nhm\n</think>"), user("r"), answer("A")]
    using = Template(mask_matrix.tokenizer("qwen3"))
    with pytest.raises(DataError, match=r"message 2 .* shows nothing of its content"):
        mark_chat(ChatExample(messages), using, "answers")
    for planned in (
        mark_chat(ChatExample(messages), using, "last_answer"),
        mark_chat(ChatExample(messages, None, frozenset({1})), using, "answers"),
    ):
        spans = planned.spans or ()
        assert [planned.text[start:end] for start, end in spans] == ["<think>\n\n</think>\n\nA<|im_end|>"]


@cache
def learnt(template: str) -> Template:
    return Template(mask_matrix.tokenizer(template))


PIECES = st.sampled_from(
    [
        *(
            "",
            " ",
            "\n",
            "\n\n",
            "\t",
            "\u00a0",
            "\u200d",
            "\ufeff",
            "a",
            "Z9",
            "é",
            "e\u0301",
            "🙂",
            "东京",
            '"',
            "\\n",
        ),
        *("{{ x }}", "{% y %}", "<think>", "</think>", "<think>\nhm\n</think>\n\n", "<tool_call>", "Xq7Marker"),
        *("assistant", "system", "User:", "Assistant:", "[INST]", "[/INST]", "<s>", "</s>", "<|end|>", "<|eot_id|>"),
        *("<|im_end|>", "<|im_start|>assistant\n", "<end_of_turn>\n<start_of_turn>model\n", "<|call|>", "<|return|>"),
        *("<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", *PUBLISHED["deepseek_v3"].typed),
    ]
)
NASTY = st.lists(PIECES, max_size=4).map("".join)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(template=st.sampled_from(list(PUBLISHED)), around=st.lists(st.tuples(NASTY, NASTY), min_size=2, max_size=6))
def test_no_content_of_a_user_is_trained_and_every_answer_is(template: str, around: list[tuple[str, str]]) -> None:
    """Whatever the contents: each has a text of its own, which tells where it went."""
    contents = [f"{left}·{index}·{right}" for index, (left, right) in enumerate(around[: len(around) // 2 * 2])]
    messages = [user(text) if index % 2 == 0 else answer(text) for index, text in enumerate(contents)]
    try:
        planned = mark_chat(ChatExample(messages), learnt(template), "answers")
    except DataError:
        planned = None
    if planned is None:
        # It may be where the text holds what marks are made of, or where the template drops thinking.
        assert "Xq7Marker" in "".join(contents) or "</think>" in "".join(contents)
        return
    spans = list(planned.spans or ())
    assert len(spans) == len(messages) // 2
    trained = [planned.text[start:end] for start, end in spans]
    for index, (text, content) in enumerate(zip(trained, contents[1::2], strict=True)):
        assert all(f"·{other}·" not in text for other in range(len(messages)) if other != 2 * index + 1)
        # Some templates drop thinking.
        assert content.strip() in text or "</think>" in content
    untrained = planned.text
    for start, end in reversed(spans):
        untrained = untrained[:start] + untrained[end:]
    assert all(f"·{2 * index + 1}·" not in untrained for index in range(len(trained)))


@pytest.mark.grid(keep=8)
@pytest.mark.parametrize("template", PUBLISHED)
def test_answers_begin_as_they_are_asked_for_or_it_is_said(template: str) -> None:
    messages, tools = conversation(template, "single")
    using = Template(mask_matrix.tokenizer(template))
    text, prompt = using.render(messages, tools), using.render(messages[:-1], tools, prompt=True)
    differs = bool(plan(template, "single").flags & Flag.PROMPT_DIFFERS)
    assert text.startswith(prompt.rstrip()) is not differs
    assert differs is (template in ("deepseek_v3", "deepseek_r1"))
