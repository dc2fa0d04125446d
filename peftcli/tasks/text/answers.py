"""Rows of answers to compare: a chosen and a rejected one, or one that is good or not, with their prompt.

A prompt and its answers are texts, or messages. Where no column holds the prompt, it is what both answers begin with.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from peftcli.data.rows import Row, Table, is_true_or_false
from peftcli.data.text_rows import json_kind
from peftcli.tasks.text.formats import (
    SYSTEM_ROLES,
    ChatExample,
    ExampleReader,
    ParsedRow,
    example_reader,
    joined_parts,
    turns_in,
    without_odd,
)
from peftcli.tasks.text.spans import common_length

PAIR = ("chosen", "rejected")
"""The columns of a row of two answers."""
_BLANKS = " \n\t"
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""A letter of a script without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


@dataclass(frozen=True)
class AnswerReader(ExampleReader):
    """Reads one answer of a row, with the prompt: a text and its completion, or a conversation."""

    answers: Sequence[str] = PAIR
    """The columns that hold answers."""
    answer: str = PAIR[0]
    """The one of them that is read."""
    whole: bool = False
    """Whether the prompt counts like the answer."""

    def __call__(self, row: Row) -> ParsedRow:
        """Read the answer with its prompt. Of a conversation, only the turns after the prompt are trained.

        Raises:
            DataError: the row does not hold what it needs, or both answers are the same.
        """
        values = {name: self.value(row, name) for name in self.answers}
        prompt = row.values.get(self.names.get("prompt", ""))
        if self.name == "messages":
            values, prompt = {name: _parsed(each) for name, each in values.items()}, _parsed(prompt)
        beside: dict[str, str] = {name: self.names[name] for name in ("system", "tools") if name in self.names}
        texts = list(values.values())
        if len(texts) > 1 and texts[0] == texts[1]:
            raise row.place.error("chosen and rejected are the same", key=self.names[self.answer])
        if self.name == "messages":
            return self._conversation(prompt, values, beside, row)
        shared = 0
        if prompt is None and len(texts) > 1:
            shared = _shared(*texts) if all(isinstance(each, str) for each in texts) else 0
            prompt = texts[0][:shared] if shared else ""
        key, own = self.names[self.answer], values[self.answer]
        names = {**beside, "prompt": self.names.get("prompt", "prompt"), "completion": key}
        found = {**row.values, names["prompt"]: prompt, key: own[shared:] if shared else own}
        return ExampleReader("prompt_completion", names)(replace(row, values=found))

    def _conversation(self, prompt: Any, answers: dict[str, Any], beside: dict[str, str], row: Row) -> ChatExample:
        is_messages = isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt)
        if not (prompt is None or isinstance(prompt, str) or is_messages):
            raise row.place.error("expected messages, or a text", key=self.names["prompt"])
        parts = {name: self._parts(prompt, answer, name, row) for name, answer in answers.items()}
        openings = {name: opening for name, (opening, _) in parts.items()}
        opening = max(openings.values(), key=len)  # one answer may lack its system turn
        for name, other in openings.items():
            if opening[len(opening) - len(other) : -1] != other[:-1]:  # the last one asks, in either's words
                message = "begins with other turns than the other answer, before its own"
                raise row.place.error(message, key=self.names[name])
        wholes = {name: [*opening, *rest] for name, (_, rest) in parts.items()}
        before = len(opening)
        if len(wholes) > 1 and not (is_messages and prompt):
            before = max(before, common_length(*wholes.values()))
        key = self.names[self.answer]
        values = row.values | {key: wholes[self.answer]}
        found = ExampleReader("messages", {**beside, "messages": key})(replace(row, values=values))
        assert isinstance(found, ChatExample)
        before += len(found.messages) - len(values[key])  # the turn of a column of system
        own = next((at for at, turn in enumerate(found.messages) if at >= before and turn["role"] == "assistant"), None)
        if own is None:
            raise row.place.error("has no assistant turn of its own after the prompt", key=key)
        no_prompt = all(turn["role"] in SYSTEM_ROLES for turn in found.messages[:own])
        untrained = frozenset() if self.whole else found.untrained | frozenset(range(before))
        return replace(found, untrained=untrained, no_prompt=no_prompt)

    def _parts(self, prompt: Any, answer: Any, name: str, row: Row) -> tuple[list[Any], list[Any]]:
        """The turns of the prompt, which the answer may repeat, and those after it."""
        if not isinstance(answer, list):
            raise row.place.error(f"expected a list of turns, found {json_kind(answer)}", key=self.names[name])
        if not prompt:
            return [], answer
        if isinstance(prompt, list):
            for turns in (prompt, prompt[_system_turns(prompt) :]):
                if turns and answer[: len(turns)] == turns:
                    return prompt, answer[len(turns) :]
            role = _role(answer[0]) if answer else None
            if role == "system" or role == "user" == _role(prompt[-1]):
                message = f"begins with a {role} turn that is not the prompt's"
                raise row.place.error(message, key=self.names[name])
            return prompt, answer
        first = _system_turns(answer)
        if first == len(answer) or not isinstance(answer[first], dict) or answer[first].get("role") == "assistant":
            return [*answer[:first], {"role": "user", "content": prompt}], answer[first:]
        asked = next((at for at, turn in enumerate(answer, start=1) if _asks(turn, prompt)), None)
        if asked is None:
            message = (
                f"is in no user turn of {self.names[name]}, which begins with a turn of its own: leave the prompt "
            )
            raise row.place.error(f"{message}out, or write it as messages", key=self.names["prompt"])
        return answer[:asked], answer[asked:]


def answer_reader(
    table: Table, answers: Sequence[str] = PAIR, optional: Sequence[str] = (), **more: Sequence[str]
) -> AnswerReader:
    """Find the columns of a prompt and its answers.

    The first row of the table says whether answers are texts or messages. ``more`` are other columns, and the names
    that sources give them, of which the ``optional`` ones may be missing.

    Raises:
        DataError: a column is missing.
    """
    optional = [*optional, "system", "tools", *(["prompt"] if len(answers) > 1 else [])]
    columns = {name: (name,) for name in ("prompt", *answers, "system", "tools")} | more
    found = table.reader("answers", optional=optional, **columns)
    messages = isinstance(_parsed(table.first.get(found.names[answers[0]])), list)
    names = without_odd(table, found.names)
    return AnswerReader(
        "messages" if messages else "prompt_completion", names, answers=tuple(answers), answer=answers[0]
    )


def text_reader(table: Table, *, whole: bool) -> ExampleReader:
    """Return the reader of rows of one text each, of which a prompt and its completion may be messages.

    Raises:
        DataError: the columns fit no format, or not the given one.
    """
    found = example_reader(table)
    if found.name != "prompt_completion":
        return found
    if isinstance(table.first.get(found.names["completion"]), list):
        found = replace(answer_reader(table, ("completion",)), whole=whole)
    verdict = is_true_or_false(table.first.get("label")) and "label" not in found.names.values()
    return replace(found, verdict="label" if verdict else None)


def _parsed(value: Any) -> Any:
    """The turns that a text holds as JSON, as CSV files have them; any other value, and other JSON, as it is."""
    with suppress(ValueError):
        turns = turns_in(value)
        return turns if isinstance(turns, list) and all(map(_role, turns)) else value
    return value


def _role(turn: Any) -> Any:
    return turn.get("role") if isinstance(turn, dict) else None


def _asks(turn: Any, prompt: str) -> bool:
    """Whether a user's turn says the prompt."""
    content = joined_parts(turn.get("content")) if _role(turn) == "user" else None
    return isinstance(content, str) and content.strip() == prompt.strip()


def _system_turns(turns: list[Any]) -> int:
    """How many system turns a conversation begins with."""
    others = (at for at, turn in enumerate(turns) if _role(turn) != "system")
    return next(others, len(turns))


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with, up to white space: a word stays whole.

    A script without blanks between words has no such place: there they are all of them, but for an answer's last.
    """
    common = one[: common_length(one, other)]
    if UNSPACED.search(common) and not any(blank in common for blank in _BLANKS):
        return min(len(common), len(one) - 1, len(other) - 1)
    return max(0, *(common.rfind(blank) for blank in _BLANKS))
