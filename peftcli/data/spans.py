"""Where the assistant's answers stand in a rendered conversation, for any chat template.

A template is a program, so the places are found by running it. The conversation is rendered a second time with marks
around the contents. If taking the marks out gives the first rendering again, they show where each content went.
How the template opens and closes an assistant turn is learnt once, from a short conversation. A turn that no mark
shows is found by rendering the conversation up to it, if that is a prefix of the whole. Otherwise it is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peftcli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.data.formats import Message

_MARK = "Xq7Marker"
_MARKS = re.compile(_MARK + r"(\d+)([arzc])")
_THINKING = ("reasoning_content", "reasoning", "thinking")

Places = dict[tuple[int, str], int]
"""(message, kind of mark) -> position in the rendered conversation. Kinds: a and z, where the content begins and ends;
r, where its thinking begins; c, the end of the last tool call's function name."""


class _Unclear(Exception):
    """Why a turn cannot be found."""


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False
) -> str:
    """The conversation as text, with ``prompt`` followed by what asks for an answer.

    Raises:
        DataError: the template refuses the conversation.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is foreign code
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"the chat template refuses the conversation: {reason}") from error
    return str(text)


@dataclass(frozen=True)
class Answer:
    """One assistant turn in a rendered conversation: characters ``start`` to ``end`` are trained."""

    message: int
    start: int
    end: int
    closed: bool
    """Whether an end-of-turn token is part of it."""


class Template:
    """A tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._opening, self._bare_opening, self._closings = self._learn()

    def render(self, messages: list[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
        """As the function ``render``."""
        return render(self.tokenizer, messages, tools, prompt)

    def answers(self, messages: list[Message], tools: list[Any] | None = None) -> tuple[str, list[Answer]]:
        """The rendered conversation, and where its assistant turns stand in it.

        Raises:
            DataError: the template refuses the conversation, or a turn cannot be found for certain.
        """
        full = self.render(messages, tools)
        places = self._places(messages, tools, full)
        found: list[Answer] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            after = found[-1].end if found else 0
            try:
                answer = self._by_marks(messages, index, full, places, after)
            except _Unclear as unclear:
                answer = self._by_prefix(messages, tools, index, full, after, unclear)
            found.append(answer)
        return full, found

    def _learn(self) -> tuple[str, str, tuple[str, ...]]:
        """How an assistant turn opens when asked for, how it opens at least, and what may close it.

        Raises:
            DataError: the template does not render a question and its answer.
        """
        ask, answer, again = (_MARK + name for name in ("Ask", "Answer", "Again"))
        turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
        try:
            last = self.render(turns)
        except DataError:
            # Some templates insist on a system prompt.
            turns = [{"role": "system", "content": "Help."}, *turns]
            last = self.render(turns)
        if last.count(answer) != 1:
            raise DataError("the chat template does not show a plain question and its answer")
        try:
            middle = self.render([*turns, {"role": "user", "content": again}])
        except DataError:
            middle = last
        asked, opened = self.render(turns[:-1]), self.render(turns[:-1], prompt=True)
        opening = opened[_shared(asked, opened) :]
        if not opening.strip() and last.startswith(asked):
            # The template has no generation prompt: an answer opens as it does in the conversation.
            opening = last[len(asked) :].partition(answer)[0]
        between = middle.partition(answer)[0].rpartition(ask)[2]
        ends = (opening[:size] for size in range(len(opening), 0, -1) if between.endswith(opening[:size]))
        bare = opening if opening in between else next(ends, "")
        tails = last.partition(answer)[2], middle.partition(answer)[2].partition(again)[0]
        return opening if opening.strip() else "", bare if bare.strip() else "", self._closings_of(*tails)

    def _closings_of(self, last: str, middle: str) -> tuple[str, ...]:
        """What closes a turn, from the texts that follow an answer at the end and in the middle."""
        last_run, middle_run = list(self._run(last)), list(self._run(middle))
        if size := _shared(last_run, middle_run):
            return ("".join(last_run[:size]),)
        if last_run:
            return tuple(run[0] for run in (last_run, middle_run) if run)
        words = last[: _shared(last, middle)].split()
        return (words[0],) if words and not middle_run else ()

    def _run(self, text: str) -> Iterator[str]:
        """The special tokens that ``text`` begins with, one directly after another."""
        position = len(text) - len(text.lstrip())
        while found := self._special.match(text, position):
            yield found.group()
            position = found.end()

    def _places(self, messages: list[Message], tools: list[Any] | None, full: str) -> Places:
        """Where marks come out, from as many marked renderings as are needed."""
        assistants = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        edged = any(_edged(messages[index].get("content")) for index in assistants)
        # Whether marks go outside or inside the white space around a content: a template may keep it or strip it.
        choices = [(True, True), (False, False), (False, True), (True, False)][: 4 if edged else 1]
        for outer in choices:
            if (places := self._marked(messages, tools, full, outer, set(range(len(messages))))) is not None:
                return places
        found: Places = {}
        for index in assistants:
            for outer in choices:
                if (places := self._marked(messages, tools, full, outer, {index})) is not None:
                    found |= places
                    break
        return found

    def _marked(
        self, messages: list[Message], tools: list[Any] | None, full: str, outer: tuple[bool, bool], which: set[int]
    ) -> Places | None:
        """The places of the marks around messages ``which``; None where marking changes the rendering."""
        if _MARK in full:
            return None
        marked = [_mark(message, index, outer) if index in which else message for index, message in enumerate(messages)]
        try:
            text = self.render(marked, tools)
        except DataError:
            return None
        if _MARKS.sub("", text) != full:
            return None
        places: Places = {}
        shift = 0
        for found in _MARKS.finditer(text):
            place = (int(found[1]), found[2])
            if place in places:
                return None
            places[place] = found.start() - shift
            shift += len(found[0])
        return places

    def _by_marks(self, messages: list[Message], index: int, full: str, places: Places, after: int) -> Answer:
        first = min((places[index, kind] for kind in "ra" if (index, kind) in places), default=None)
        last = max((places[index, kind] for kind in "zc" if (index, kind) in places), default=None)
        calls = bool(messages[index].get("tool_calls"))
        if last is None:
            raise _Unclear("the template does not show its content")
        if calls and (index, "c") not in places:
            raise _Unclear("the template does not show its tool calls")
        before = places.get((index - 1, "z"))
        start = self._start(full, after if before is None else before, first, last, sure=before is not None)
        if start < after:
            raise _Unclear("the template changes the order of the turns")
        limit = min((place for (message, _), place in places.items() if message > index), default=len(full))
        if limit < last:
            raise _Unclear("the template changes the order of the turns")
        ends = [(full.find(text, last, limit), len(text)) for text in self._closings]
        ends = [(position, size) for position, size in ends if position >= 0]
        if calls and (not ends or sum(full.count(text, last, limit) for text in self._closings) != 1):
            raise _Unclear("where its tool calls end is not clear")
        if not ends:
            return Answer(index, start, last, closed=False)
        position, size = min(ends)
        return Answer(index, start, position + size, closed=True)

    def _start(self, full: str, before: int, first: int | None, last: int, sure: bool) -> int:
        """Where the turn's header ends: after ``before``, the end of the turn before, and not after ``first``."""
        head_end = last if first is None else first
        for opening in (self._opening, self._bare_opening):
            position = full.find(opening, before, head_end) if opening else -1
            if position >= 0:
                if not sure and full.count(opening, before, head_end) > 1:
                    raise _Unclear("where it begins is not clear")
                return position + len(opening)
        if first is None:
            raise _Unclear("where it begins is not clear")
        return first

    def _by_prefix(
        self, messages: list[Message], tools: list[Any] | None, index: int, full: str, after: int, unclear: _Unclear
    ) -> Answer:
        refusal = DataError(
            f"which tokens of message {index + 1} (assistant) to train is not clear with this model's chat template: "
            f"{unclear}",
            hint="Leave the row out, give it another form, or train on every token: dataset.train_on: all",
        )
        try:
            before = self.render(messages[:index], tools, prompt=True) if index else ""
            upto = self.render(messages[: index + 1], tools)
        except DataError:
            raise refusal from unclear
        if not self._shows_calls(messages[: index + 1], tools, upto):
            raise refusal from unclear
        start, end = len(before), len(upto)
        if self._opening and full.startswith(self._opening, start):
            start += len(self._opening)
        closings = [text for text in self._closings if text in full[start:end]]
        if not (full.startswith(before) and full.startswith(upto) and after <= start < end and len(closings) == 1):
            raise refusal from unclear
        content, closing, rest = full[start:end].partition(closings[0])
        if not content.strip() or closing in rest:
            raise refusal from unclear
        return Answer(index, start, start + len(content + closing), closed=True)

    def _shows_calls(self, messages: list[Message], tools: list[Any] | None, text: str) -> bool:
        """Whether the tool calls of the last message, if it has any, make a difference to ``text``."""
        *others, message = messages
        if not message.get("tool_calls"):
            return True
        silent = {key: value for key, value in message.items() if key != "tool_calls"}
        try:
            return self.render([*others, silent], tools) != text
        except DataError:
            return True


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many items the two begin with alike."""
    return next(
        (at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )


def _edged(content: Any) -> bool:
    return isinstance(content, str) and content != content.strip()


def _mark(message: Message, index: int, outer: tuple[bool, bool]) -> Message:
    """``message`` with marks around its content, before its thinking and after its last function's name."""
    marked = dict(message)
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        left, right = outer if message["role"] == "assistant" else (False, False)
        begin = 0 if left else len(content) - len(content.lstrip())
        end = len(content) if right else len(content.rstrip())
        inner = f"{_MARK}{index}a{content[begin:end]}{_MARK}{index}z"
        marked["content"] = content[:begin] + inner + content[end:]
    for key in _THINKING:
        thinking = message.get(key)
        if isinstance(thinking, str) and thinking.strip():
            begin = len(thinking) - len(thinking.lstrip())
            marked[key] = f"{thinking[:begin]}{_MARK}{index}r{thinking[begin:]}"
            break
    if message.get("tool_calls"):
        *others, call = message["tool_calls"]
        name = {"name": f"{call.get('function', call)['name']}{_MARK}{index}c"}
        called = call | {"function": call["function"] | name} if "function" in call else call | name
        marked["tool_calls"] = [*others, called]
    return marked
