"""Locate the assistant's answers in a rendered conversation, for any chat template.

A template is a program, so answers are located by running it. The conversation is rendered a second time with marks
around the contents. If removing the marks gives the first rendering again, they show the position of each content.
How the template opens and closes an assistant turn is learnt once, from a short conversation. Where tool calls begin
and end is seen in the conversation up to them. A row with a turn that marks do not locate is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from peftcli.errors import DataError, Interrupted, ModelError
from peftcli.system.date import fixed_date, strftime_now, today
from peftcli.system.limited_process import LimitedProcess
from peftcli.tasks.text.formats import Message, with_function

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "Xq7Marker"
_MARKS = re.compile(_MARK + r"(\d+)([arz]|c\d+q)")
_MAX_ASKINGS = 1000
"""Kinds of conversations for which it is kept how the template asks for an answer."""
_MAX_TEMPLATE, _MAX_TEXT = 1_000_000, 100_000_000
"""Characters of a template, and of what it writes."""
_SECONDS, _SECONDS_EACH = 4.0, 20e-6
"""Processor time of one rendering, and as much more for each character of the conversation."""
_MEMORY = 1 << 30
"""Bytes that all renderings may take."""
_THINKING = ("reasoning_content", "reasoning", "thinking")


class _Mark(NamedTuple):
    """A mark, and its position in the rendered conversation without marks."""

    position: int
    message: int
    kind: str
    """a and z: the beginning and the end of the content; r: the beginning of its thinking; c0q, c1q, ...: the end of
    the name of the function that a tool call names."""


_MARKINGS = (True, False, None)
"""Ways to mark a content, as a template may keep or strip the white space around it, and may test how it begins: True:
outside of the white space; False: inside; None: only behind the content, outside."""


class _Unclear(Exception):
    """The reason why marks do not locate a turn."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False
) -> str:
    """Render a conversation as text, with ``prompt`` followed by the generation prompt.

    If the template refuses tool calls without a content, they get an empty one; if it refuses their arguments as an
    object, they are JSON text.

    Raises:
        DataError: the template refuses the conversation.
        ModelError: the template does not come to an end.
    """
    return str(_apply(tokenizer, messages, tools, tokenize=False, add_generation_prompt=prompt))


def tokenize(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None) -> list[int]:
    """Return the ids that ``apply_chat_template`` gives, of the conversation that ``render`` renders.

    Raises:
        DataError: the template refuses the conversation.
        ModelError: the template does not come to an end.
    """
    return list(_apply(tokenizer, messages, tools, tokenize=True, return_dict=False))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None, **options: Any) -> Any:
    """Apply the template within limits, with tool calls in the first form that it accepts."""
    refusal: DataError | None = None
    for form in _forms(messages):
        try:
            with _translated_errors(tokenizer, form):
                if _renders_plainly(tokenizer):
                    template, variables = tokenizer.get_chat_template(tools=tools), dict(tokenizer.special_tokens_map)
                    text = _render(template, form, tools, options.get("add_generation_prompt", False), variables)
                    if not options["tokenize"]:
                        return text
                    options |= {"chat_template": "{{ rendered_text }}", "rendered_text": text}
                return tokenizer.apply_chat_template(form, tools=tools, **options)
        except DataError as error:
            refusal = error
    assert refusal is not None
    raise refusal


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """A conversation; with empty contents for tool calls without one; with their arguments as JSON text; with both."""

    def form(message: Message, filled: bool, as_text: bool) -> Message:
        if not (calls := message.get("tool_calls")):
            return message
        content = {"content": message.get("content") or ""} if filled else {}
        return message | content | ({"tool_calls": list(map(_with_text, calls))} if as_text else {})

    yield messages
    if any(message.get("tool_calls") for message in messages):
        for filled, as_text in ((True, False), (False, True), (True, True)):
            yield [form(message, filled, as_text) for message in messages]


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON text."""
    given = call.get("function", call).get("arguments")
    return with_function(call, arguments=json.dumps(given, ensure_ascii=False)) if isinstance(given, dict) else call


def _renders_plainly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer renders with transformers' code. A few have their own."""
    from transformers import PreTrainedTokenizerBase as Base

    return getattr(tokenizer.apply_chat_template, "__func__", None) is Base.apply_chat_template


class _Endless(Exception):
    """A rendering takes too long or makes too much."""


def _render(
    template: str, messages: list[Message], tools: list[Any] | None, prompt: bool, variables: dict[str, Any]
) -> str:
    """Render a conversation as ``apply_chat_template`` does, in a process with limits: a template is a program."""
    if len(template) > _MAX_TEMPLATE:
        raise _Endless(f"it is {len(template):,} characters long; at most {_MAX_TEMPLATE:,} are read")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    seconds = _SECONDS + _SECONDS_EACH * len(repr((messages, tools)))
    try:
        text, problem = _renderer.call((template, messages, tools, prompt, variables, today().isoformat()), seconds)
    except TimeoutError:
        raise _Endless(f"it computes for more than {seconds:.0f} seconds") from None
    except MemoryError:
        raise _Endless(f"it takes more than {_MEMORY >> 20:,} MiB") from None
    if problem:
        raise DataError(f"the chat template refuses the conversation: {problem}")
    return str(text)


def _render_here(given: tuple[Any, ...]) -> tuple[str | None, str | None]:
    """Return the text, or why the template refuses the conversation."""
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    template, messages, tools, prompt, variables, day = given
    try:
        # which transformers has in a cache, and formats the true date with
        _compile_jinja_template(template).environment.globals["strftime_now"] = strftime_now
        with fixed_date(day):
            texts: Any = render_jinja_template(
                [messages], tools=tools, chat_template=template, add_generation_prompt=prompt, **variables
            )
    except MemoryError:
        raise
    except Exception as error:  # a template is foreign code
        return None, " ".join(str(error).split())[:200] or type(error).__name__
    if len(text := str(texts[0][0])) > _MAX_TEXT:
        raise MemoryError
    return text, None


_renderer = LimitedProcess(_render_here, _MEMORY)


@contextmanager
def _translated_errors(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> Iterator[None]:
    """Translate the template's exceptions. An endless template is a ModelError: no other row would succeed either."""
    try:
        yield
    except (Interrupted, DataError):  # a signal is not a fault of the template
        raise
    except _Endless as error:
        raise ModelError(
            f"the chat template of {tokenizer.name_or_path or 'the tokenizer'} does not come to an end with a "
            f"conversation of {len(messages)} messages: {error}",
            key="base_model.chat_template",
            hint="Give the model another template: base_model.chat_template: chatml, or a .jinja file.",
        ) from error
    except Exception as error:  # a template is foreign code
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"the chat template refuses the conversation: {problem}") from error


@dataclass(frozen=True)
class AnswerSpan:
    """One assistant turn in a rendered conversation: characters ``start`` to ``end`` are trained."""

    message: int
    start: int
    end: int
    closed: bool
    """Whether it includes an end-of-turn token."""


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation, and the spans of its assistant turns."""

    text: str
    answers: list[AnswerSpan]
    unseen: bool
    """Whether the template omits the text of a turn, the last answer's thinking, a tool call, or the tools."""


@dataclass(frozen=True)
class _Conversation:
    """A conversation and its rendering."""

    messages: list[Message]
    tools: list[Any] | None
    text: str
    format: _TurnFormat


@dataclass(frozen=True)
class _TurnFormat:
    """How a template writes assistant turns."""

    opener: str | None
    """The special token that begins a turn."""
    unasked: str
    """How a turn opens, if the template has no generation prompt."""
    openings: tuple[str, ...]
    """Texts that may precede one: the generation prompt, and the part of it that conversations contain."""
    lead: str
    """What stands between the generation prompt and the text of the last answer: empty thinking, a channel."""
    closings: tuple[str, ...]
    """Texts that may end one, the longest first."""
    closing: re.Pattern[str]
    """One of the closings, after white space."""


class Template:
    """A tokenizer's chat template, or templates: some have a separate one for conversations with tools.

    Raises:
        DataError: the template does not render a question and its answer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        given: Callable[[list[Message]], list[Message]] | None = None,
    ):
        """``given`` changes messages into the form that the template reads, as contents into lists of parts."""
        self.tokenizer = tokenizer
        self._plain = _renders_plainly(tokenizer)
        self.render: Callable[..., str] = partial(render, tokenizer)
        if given is not None:
            self.render = lambda messages, *more, **options: render(tokenizer, given(messages), *more, **options)
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        # Gemma's tokenizer has added tokens of line breaks, which end no turn.
        self._special = _any_of(token for token in tokens if token.strip())
        self._borders = re.compile(rf"{self._special.pattern}|\s+")
        self.markers = _any_of(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        """Finds special tokens in a text."""
        self._learnt: dict[str, _TurnFormat] = {}
        self._askings: dict[tuple[Any, ...], str] = {}
        self._turn_format(None)

    @property
    def closings(self) -> tuple[str, ...]:
        """Texts that may close an assistant turn."""
        return self._turn_format(None).closings

    @property
    def lead(self) -> str:
        """The text that a model trained on conversations writes before the text of an answer."""
        return self._turn_format(None).lead

    def unasked(self, tools: list[Any] | None) -> str:
        """How an answer opens, if the template has no generation prompt; blanks at its end belong to the answer."""
        return self._turn_format(tools).unasked.rstrip(" ")

    def asks_so(self, rendered: Rendered, messages: list[Message], tools: list[Any] | None) -> bool:
        """Return whether the last answer begins after the text with which the template asks for it."""
        last = rendered.answers[-1]
        asking = self._asking(messages[: last.message], tools)
        asked = asking.rstrip(), (asking + self._turn_format(tools).unasked).rstrip()
        return rendered.text[: last.start].rstrip().endswith(asked)

    def _asking(self, messages: list[Message], tools: list[Any] | None) -> str:
        """Return the text after a conversation's last content that asks for an answer; empty if unclear."""
        key = (bool(tools), *((message["role"], *message) for message in messages))
        if key not in self._askings:
            marked = [*messages[:-1], *(_mark(message, 0, False) for message in messages[-1:])]
            asking = ""
            with suppress(DataError):
                asking = self.render(marked, tools, prompt=True).partition(f"{_MARK}0z")[2]
            if len(self._askings) >= _MAX_ASKINGS:
                return asking
            self._askings[key] = asking
        return self._askings[key]

    def answers(self, messages: list[Message], tools: list[Any] | None, turns: Sequence[int]) -> Rendered:
        """Render a conversation and locate some of its assistant turns.

        Raises:
            DataError: the template refuses the conversation, or a turn cannot be located with certainty.
        """
        whole = _Conversation(messages, tools, self.render(messages, tools), self._turn_format(tools))
        marks = self._marks(whole, range(len(messages)))
        places, found = _by_message(marks or []), list[AnswerSpan]()
        for index in turns:
            try:
                found.append(self._by_marks(whole, index, marks, places, found[-1].end if found else 0))
            except _Unclear as unclear:
                thinks = "</think>" in str(messages[index].get("content"))
                raise _refusal(index, str(unclear), thinks=thinks) from unclear
        unseen = marks is not None and _unseen(messages, marks)
        return Rendered(whole.text, found, unseen or self._omits_tools(whole))

    def _omits_tools(self, whole: _Conversation) -> bool:
        """Whether a conversation with tools is rendered as it would be without them."""
        if not whole.tools:
            return False
        with suppress(DataError):
            return self.render(whole.messages) == whole.text
        return False

    def _turn_format(self, tools: list[Any] | None) -> _TurnFormat:
        """How the template for conversations with ``tools`` writes assistant turns, learnt once."""
        name = self.tokenizer.get_chat_template(tools=tools) if self._plain else ""
        if name not in self._learnt:
            self._learnt[name] = self._learn(tools if self._learnt else None)
        return self._learnt[name]

    def _learn(self, tools: list[Any] | None) -> _TurnFormat:
        ask, answer, again = (_MARK + name for name in ("Ask", "Answer", "Again"))
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        try:
            last = self.render(turns, tools)
        except DataError:
            # Some templates insist on a system prompt.
            turns = [{"role": "system", "content": "Help."}, *turns]
            last = self.render(turns, tools)
        if last.count(ask) != 1 or last.count(answer) != 1:
            raise DataError("the chat template does not show a plain question and its answer")
        try:
            middle = self.render([*turns, {"role": "user", "content": again}], tools)
        except DataError:
            middle = last
        asked, opened = self.render(turns[:-1], tools), self.render(turns[:-1], tools, prompt=True)
        opening, unasked = opened[len(self._common_start(opened, asked)) :], ""
        if not opening.strip() and last.startswith(asked):
            # The template has no generation prompt: an answer opens as it does in the conversation.
            opening = unasked = last[len(asked) :].partition(answer)[0]
        header = middle.partition(answer)[0].rpartition(ask)[2]
        openings = (opening + _gap(header, opening), _opening_part(header, opening))
        first, following = last.partition(ask)[0], middle.partition(answer)[2].partition(again)[0]
        opens = self._special.match(first.removeprefix(self.tokenizer.bos_token or "").lstrip())
        opener = opens.group() if opens else None
        inside = header.partition(opening)[2] if opening else ""
        closings = self._closings_of(first, opener, header, inside, following, last.partition(answer)[2])
        return _TurnFormat(
            opener,
            unasked,
            tuple(dict.fromkeys(text for text in openings if text.strip())),
            last.partition(answer)[0].rpartition(ask)[2].partition(opening)[2].strip() if opening.strip() else "",
            tuple(sorted(closings, key=len, reverse=True)),
            re.compile(rf"\s*(?:{_any_of(closings).pattern})"),
        )

    def _closings_of(
        self, first: str, opener: str | None, header: str, inside: str, middle: str, last: str
    ) -> tuple[str, ...]:
        """Texts that may close a turn.

        Args:
            first: The text before the first question.
            opener: The token that begins a turn.
            header: The text between a question and its answer.
            inside: The part of it after the generation prompt.
            middle: The text between an answer and the next question.
            last: The text after the last answer.
        """
        runs = [self._run(text, opener) for text in (last, middle)]
        if size := common_length(*runs):
            closing = "".join(runs[0][:size])
            if closing in inside:  # Only the tokens after it show that the answer ends.
                common = self._before_turn(self._common_start(last, middle), opener)
                closing = common[: max(found.end() for found in self._special.finditer(common))].lstrip()
            return (closing,)
        if all(runs):
            return runs[0][0], runs[1][0]
        if runs[0]:
            # It may be a generation prompt that the template writes in any case.
            return () if header.endswith(last) else ("".join(runs[0]),)
        # The text before every question opens its turn and does not close the previous one.
        size = common_length(first[::-1], middle[::-1])
        borders = [border for found in self._borders.finditer(middle) for border in found.span()]
        own = middle[: min(border for border in [0, *borders, len(middle)] if border >= len(middle) - size)]
        closing = "".join(self._run(own, opener)) or self._common_start(last, own).strip()
        return (closing,) if closing else ()

    def _run(self, text: str, stop: str | None) -> list[str]:
        """The adjacent special tokens at the beginning of ``text``, up to ``stop``."""
        run: list[str] = []
        position = len(text) - len(text.lstrip())
        while (found := self._special.match(text, position)) and found.group() != stop:
            run.append(found.group())
            position = found.end()
        return run

    def _before_turn(self, text: str, opener: str | None) -> str:
        """``text`` without the beginning of another turn at its end: some templates ask after every conversation."""
        return re.sub(rf"\s*{re.escape(opener)}(?:{self._special.pattern})*\Z", "", text) if opener else text

    def _common_start(self, one: str, other: str) -> str:
        """The common beginning of two texts, without part of a special token."""
        size = common_length(one, other)
        splits = (found.start() for found in self._special.finditer(one) if found.start() < size < found.end())
        return one[: next(splits, size)]

    def _marks(self, whole: _Conversation, which: Sequence[int]) -> list[_Mark] | None:
        """The marks of the messages ``which``, in the order of the text; None if marking changes the rendering."""
        if _MARK in whole.text:
            return None
        for outside in _MARKINGS:
            messages = list(whole.messages)
            for index in which:
                messages[index] = _mark(messages[index], index, outside)
            with suppress(DataError):
                text, marks = _unmark(self.render(messages, whole.tools))
                if marks is not None and text == whole.text:
                    return marks
        return None

    def _by_marks(
        self, whole: _Conversation, index: int, marks: list[_Mark] | None, places: dict[int, list[int]], after: int
    ) -> AnswerSpan:
        if marks is None:
            if (marks := self._marks(whole, [index])) is None:
                raise _Unclear("the template changes its text")
            places = _by_message(marks)
        own = places.get(index, [])
        kinds = {marks[at].kind: marks[at].position for at in own}
        calls = len(whole.messages[index].get("tool_calls") or ())
        missing = [at for at in range(calls) if f"c{at}q" not in kinds]
        if missing:
            raise _refusal(index, "the template does not show " + ("all " * (len(missing) < calls)) + "its tool calls")
        last = max((place for kind, place in kinds.items() if kind not in "ra"), default=None)
        if last is None:
            raise _Unclear("the template does not show its content")
        if own != list(range(own[0], own[-1] + 1)):
            raise _Unclear("the template changes the order of the turns")
        previous = marks[own[0] - 1] if own[0] else None
        limit = marks[own[-1] + 1].position if own[-1] + 1 < len(marks) else len(whole.text)
        first = min((place for kind, place in kinds.items() if kind in "ra"), default=None)
        before = max(after, previous.position if previous else 0)
        sure = before == after > 0 or (previous is not None and previous.kind == "z")
        if before > (last if first is None else first):
            raise _Unclear("the template changes the order of the turns")
        start = self._start(whole, index, kinds, before, sure)
        if start > min(kinds.values()):
            raise _Unclear("the template writes its tool calls before its text")
        if calls:
            end = self._end_of_calls(whole, index, kinds, limit)
            return AnswerSpan(index, start, end, closed=not self._ends_a_call(whole, index, whole.text[start:end]))
        if not whole.text[start:last].strip():
            raise _Unclear("the template shows nothing of its content")
        closing = whole.format.closing.match(whole.text, last, limit)
        return AnswerSpan(index, start, closing.end() if closing else last, closed=closing is not None)

    def _start(self, whole: _Conversation, index: int, kinds: dict[str, int], before: int, sure: bool) -> int:
        """The end of the turn's header: after ``before``, the end of the previous turn, and not after its text."""
        first = min((place for kind, place in kinds.items() if kind in "ra"), default=None)
        head_end = min(kinds.values())
        for opening in whole.format.openings:
            if first is not None and whole.text.endswith(opening, before, first):
                return first
            position = whole.text.find(opening, before, head_end)
            if position >= 0:
                if not sure and whole.text.count(opening, before, head_end) > 1:
                    raise _Unclear("where it begins is not clear")
                return position + len(opening)
        if first is not None:
            return first
        # Only the difference that another answer in its place makes shows where it begins.
        kind, place = min(kinds.items(), key=lambda each: each[1])
        upto = whole.messages[:index]
        try:
            text, position = self._render_mark(whole, [*upto, whole.messages[index]], index, kind)
            other = self.render([*upto, {"role": "assistant", "content": _MARK}], whole.tools)
        except DataError:
            raise _Unclear("where it begins is not clear") from None
        head = text[common_length(text, other) : position]
        if not whole.text.endswith(head, before, place):
            raise _Unclear("where it begins is not clear")
        return place - len(head)

    def _end_of_calls(self, whole: _Conversation, index: int, kinds: dict[str, int], limit: int) -> int:
        """The end of a turn with tool calls: the last special token that does not depend on what follows."""
        kind, last = max(kinds.items(), key=lambda each: each[1])
        upto = whole.messages[: index + 1]
        tails = [whole.text[last:limit]] if index + 1 < len(whole.messages) else []
        for following in ([], *([each] for each in _followers(upto[-1]))):
            if len(tails) < 2:
                with suppress(DataError):
                    text, position = self._render_mark(whole, [*upto, *following], index, kind)
                    tails.append(text[position:])
        common = self._common_start(tails[0], tails[-1]).rstrip() if tails else ""
        common = self._before_turn(common, whole.format.opener)
        begin = end = 0
        for found in self._special.finditer(common):
            begin, end = begin if found.start() == end else found.start(), found.end()
        run = common[begin:] if end == len(common) else ""
        for closing in whole.format.closings:
            if closing in run:
                return last + begin + run.index(closing) + len(closing)
        if run or common.endswith(whole.format.closings):
            return last + len(common)
        raise _Unclear("where its tool calls end is not clear")

    def _ends_a_call(self, whole: _Conversation, index: int, answer: str) -> bool:
        """Whether the end of a turn with tool calls is that of its last call, and one more call could follow."""
        if answer.endswith(whole.format.closings):
            return False
        upto, turn = whole.messages[:index], whole.messages[index]
        longer = turn | {"tool_calls": [*turn["tool_calls"], turn["tool_calls"][-1]]}
        end = self._special.findall(answer)[-1]
        with suppress(DataError):
            one, more = (self.render([*upto, each], whole.tools).count(end) for each in (turn, longer))
            return more > one
        return False

    def _render_mark(self, whole: _Conversation, messages: list[Message], index: int, kind: str) -> tuple[str, int]:
        """Render other messages; also return the position of this kind of mark of message ``index``."""
        marked = [*messages[:index], _mark(messages[index], index, False), *messages[index + 1 :]]
        text, marks = _unmark(self.render(marked, whole.tools))
        for mark in marks or ():
            if mark.kind == kind:
                return text, mark.position
        raise _Unclear("the template shows it otherwise at the end of a conversation")


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches the longest of ``texts``."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common beginning."""
    differ = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def _gap(header: str, opening: str) -> str:
    """The white space between ``opening`` and the answer in a conversation."""
    gap = header.rpartition(opening)[2] if opening and opening in header else ""
    return gap if gap.isspace() else ""


def _opening_part(header: str, opening: str) -> str:
    """The part of the generation prompt that precedes an answer in a conversation."""
    ends = (opening[:size] for size in range(len(opening), 0, -1) if header.endswith(opening[:size]))
    return next(ends, "")


def _refusal(index: int, problem: str, *, thinks: bool = False) -> DataError:
    advice = "remove the row, rewrite it, or train on every token: dataset.train_on: all"
    if thinks:
        advice = f"if the template reads reasoning_content, write its thinking there; otherwise {advice}"
    return DataError(
        f"the tokens of message {index + 1} (assistant) cannot be located in the output of this model's chat template: "
        f"{problem}",
        hint=advice[0].upper() + advice[1:],
    )


def _by_message(marks: list[_Mark]) -> dict[int, list[int]]:
    """The indices of each message's marks in the list."""
    places: dict[int, list[int]] = {}
    for at, mark in enumerate(marks):
        places.setdefault(mark.message, []).append(at)
    return places


def _unseen(messages: list[Message], marks: list[_Mark]) -> bool:
    """Return whether the template drops marked content, thinking or a tool call."""
    found = {(mark.message, mark.kind) for mark in marks}
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    for index, message in enumerate(messages):
        content, calls = message.get("content"), message.get("tool_calls") or ()
        if isinstance(content, str) and content.strip() and (index, "z") not in found:
            return True
        # Many templates leave out earlier thinking, as the model will not see it in use either.
        thinking = index == last and any(
            isinstance(text := message.get(key), str) and text.strip() for key in _THINKING
        )
        if thinking and (index, "r") not in found:
            return True
        if any((index, f"c{at}q") not in found for at in range(len(calls))):
            return True
    return False


def _followers(message: Message) -> list[Message]:
    """Turns that may follow tool calls."""
    call = message["tool_calls"][-1]
    result = {"role": "tool", "name": call.get("function", call)["name"], "content": _MARK}
    return [result | {"tool_call_id": call.get("id")}, {"role": "user", "content": _MARK}]


def _mark(message: Message, index: int, outside: bool | None) -> Message:
    """Add marks around a message's content, before its thinking and after the names of the functions that it calls."""
    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        outside = outside if message["role"] == "assistant" else False
        begin = 0 if outside else len(content) - len(content.lstrip())
        end = len(content.rstrip()) if outside is False else len(content)
        opens = "" if outside is None else f"{_MARK}{index}a"
        marked["content"] = f"{content[:begin]}{opens}{content[begin:end]}{_MARK}{index}z{content[end:]}"
    for key in _THINKING:
        thinking = message.get(key)
        if isinstance(thinking, str) and thinking.strip():
            begin = len(thinking) - len(thinking.lstrip())
            marked[key] = f"{thinking[:begin]}{_MARK}{index}r{thinking[begin:]}"
    if calls := message.get("tool_calls"):
        names = [f"{call.get('function', call)['name']}{_MARK}{index}c{at}q" for at, call in enumerate(calls)]
        marked["tool_calls"] = [with_function(call, name=name) for call, name in zip(calls, names, strict=True)]
    return marked


def _unmark(text: str) -> tuple[str, list[_Mark] | None]:
    """Remove the marks from a text; also return them in order, or None if a content occurs twice."""
    marks: list[_Mark] = []
    seen: set[str] = set()
    parts = []
    position = end = 0
    for found in _MARKS.finditer(text):
        part = text[end : found.start()]
        parts.append(part)
        position, end = position + len(part), found.end()
        if found.group() not in seen:
            marks.append(_Mark(position, int(found[1]), found[2]))
            seen.add(found.group())
        elif found[2] in "az":
            return text, None
    return "".join([*parts, text[end:]]), marks
