"""Rows of answers to compare: a chosen and a rejected one, or one that is good or not, with their prompt.

A prompt and its answers are texts, or messages. Where no column holds the prompt, it is what both answers begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftcli.data.rows import Row, Table
from peftcli.tasks.text.formats import ChatExample, ExampleReader, ParsedRow
from peftcli.tasks.text.spans import common_length

PAIR = ("chosen", "rejected")
"""The columns of a row of two answers."""


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
        prompt, tools = (row.values.get(self.names.get(name, "")) for name in ("prompt", "tools"))
        texts = list(values.values())
        if len(texts) > 1 and texts[0] == texts[1]:
            raise row.place.error("chosen and rejected are the same", key=self.names[self.answer])
        shared = 0
        is_messages = isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt)
        if self.name == "messages" and not (prompt is None or isinstance(prompt, str) or is_messages):
            raise row.place.error("expected messages, or a text", key=self.names["prompt"])
        if self.name == "messages" and all(isinstance(each, list) for each in texts):
            prompt, shared = _messages_before(prompt, texts)
        elif prompt is None and len(texts) > 1:
            shared = _shared(*texts) if all(isinstance(each, str) for each in texts) else 0
            prompt = texts[0][:shared] if shared else ""
        own = values[self.answer][shared:] if shared else values[self.answer]
        return self._parsed(prompt, own, tools, row)

    def _parsed(self, prompt: Any, answer: Any, tools: Any, row: Row) -> ParsedRow:
        key = self.names[self.answer]
        if self.name != "messages":
            names = {"prompt": self.names.get("prompt", "prompt"), "completion": key}
            values = {names["prompt"]: prompt, key: answer}
            return ExampleReader("prompt_completion", names)(replace(row, values=values))
        whole = [*(prompt or ()), *answer] if isinstance(answer, list) else answer
        names = {"messages": key, "tools": "tools"}
        found = ExampleReader("messages", names)(replace(row, values={key: whole, "tools": tools}))
        assert isinstance(found, ChatExample)
        before = frozenset(range(len(prompt or ())))
        if not any(turn["role"] == "assistant" for turn in found.messages[len(before) :]):
            raise row.place.error("has no assistant turn of its own after the prompt", key=key)
        return replace(found, untrained=frozenset() if self.whole else found.untrained | before)


def answer_reader(
    table: Table, answers: Sequence[str] = PAIR, optional: Sequence[str] = (), **more: Sequence[str]
) -> AnswerReader:
    """Find the columns of a prompt and its answers.

    The first row of the table says whether answers are texts or messages. ``more`` are other columns, and the names
    that sources give them, of which the ``optional`` ones may be missing.

    Raises:
        DataError: a column is missing.
    """
    optional = [*optional, "tools", *(["prompt"] if len(answers) > 1 else [])]
    columns = {"prompt": ("prompt",), **{name: (name,) for name in answers}, "tools": ("tools",), **more}
    found = table.reader("answers", optional=optional, **columns)
    messages = isinstance(table.first.get(found.names[answers[0]]), list)
    return AnswerReader("messages" if messages else "prompt_completion", found.names, tuple(answers), answers[0])


def _messages_before(prompt: Any, answers: Sequence[list[Any]]) -> tuple[list[Any], int]:
    """The turns before the answers, and how many turns of each answer repeat them."""
    if isinstance(prompt, list):
        again = all(each[: len(prompt)] == prompt for each in answers)
        return prompt, len(prompt) if again else 0
    shared = common_length(*answers) if len(answers) > 1 else 0
    if not shared and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}], 0
    return answers[0][:shared], shared


def _shared(one: str, other: str) -> int:
    """How many characters two texts begin with, up to white space: a word stays whole."""
    common = one[: common_length(one, other)]
    return max(0, *(common.rfind(blank) for blank in " \n\t"))
