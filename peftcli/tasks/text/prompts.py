"""Prompts: what a model is asked, in the form of the rows that it was trained on. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from peftcli.data.rows import Row, add_keys
from peftcli.data.text_rows import quote
from peftcli.errors import AdapterError, DataError, UsageError
from peftcli.guard.typed_fields import fits, hints_of
from peftcli.tasks.text.formats import (
    FORMATS,
    SYSTEM_ROLES,
    AlpacaExample,
    ChatExample,
    ExampleReader,
    Message,
    PairExample,
    ParsedRow,
    TextExample,
    near_column,
    turns_in,
)
from peftcli.tasks.text.spans import Template, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TextWithSystem:
    """A text that is asked after a system prompt of its own."""

    text: str
    system: str


CompletePrompt = str | list[Message] | AlpacaExample | ChatExample
"""A text; a conversation that ends with a turn to answer, the second with the tools that may be called; an
instruction."""
Prompt = CompletePrompt | TextWithSystem | Row
"""The same, or a text that a ``PromptForm`` completes, as it does with a ``str``; or a row of a task whose prompts are
more than text."""

SLOT = "{prompt}"
"""Stands in a template for the text that is asked."""
_CHATS = ("messages", "sharegpt")
"""Formats of conversations."""


_ASKING = {"sharegpt": "conversations", "messages": "messages", "prompt_completion": "prompt", "alpaca": "instruction"}
"""Format -> its column of what is asked."""


@dataclass(frozen=True)
class PromptForm:
    """What a text that is asked becomes, as in the training rows. An adapter's task.json holds it under ``prompt``."""

    chat: bool
    """Whether it becomes a user's turn in the model's chat template; else it is continued as it is."""
    format: str = "messages"
    """The format of the training rows."""
    template: str = SLOT
    """The text, or the user's turn, with ``{prompt}`` in the place of what is asked. It contains an instruction that
    all training rows share."""
    system: str = ""
    """The system prompt that all training rows share."""

    @classmethod
    def of_rows(
        cls, format: str, shared: Mapping[str, str], *, has_template: bool, decoder_only: bool = True
    ) -> PromptForm:
        """Return the form of training rows of a format, which share a system prompt or an instruction.

        ``has_template``: whether the tokenizer has a chat template.
        """
        chat = has_template and (format in _CHATS or (format == "alpaca" and decoder_only))
        template, instruction = SLOT, shared.get("instruction", "")
        if format == "alpaca":
            asked = AlpacaExample(instruction, "", SLOT) if instruction and SLOT not in instruction else None
            asked = asked or AlpacaExample(SLOT, "")
            template = asked.request() if chat or not decoder_only else asked.pair().prompt
        return cls(chat, format, template, shared.get("system", ""))

    @classmethod
    def from_json(cls, values: Any, file: str) -> PromptForm:
        """Read what task.json holds.

        Raises:
            AdapterError: it is no such form.
        """
        hints = hints_of(PromptForm)
        known = (
            isinstance(values, dict)
            and "chat" in values
            and all(name in hints and fits(value, hints[name]) for name, value in values.items())
        )
        if not known or SLOT not in values.get("template", SLOT):
            raise AdapterError(f"must be an object of {', '.join(hints)}", key="prompt", file=file)
        return cls(**values)

    def ask(self, text: str, system: str | None = None) -> str | list[Message]:
        """Return the text or the conversation that asks ``text``, after ``system`` in place of the shared one."""
        system = self.system if system is None else system
        text = self.template.replace(SLOT, text)
        if not self.chat:
            return "\n\n".join(filter(None, (system, text)))
        return [*self.opening(system), {"role": "user", "content": text}]

    def python_lines(self, text: str) -> list[str]:
        """Return lines of Python that make the ``inputs`` of a model with its tokenizer."""
        asked = self.ask(text)
        if isinstance(asked, str):
            return [f'inputs = tokenizer({_literal(asked)}, return_tensors="pt")']
        return [
            "messages = [",
            *(f"    {_literal(turn)}," for turn in asked),
            "]",
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]

    def opening(self, system: str | None = None) -> list[Message]:
        """Return the turns before the first question."""
        system = self.system if system is None else system
        return [{"role": "system", "content": system}] if system else []


def prompt_and_answer(example: ParsedRow) -> tuple[CompletePrompt, str]:
    """Split a row into its prompt and its answer: of a conversation, the last one that is trained.

    Raises:
        DataError: it has none.
    """
    if isinstance(example, PairExample):
        return example.prompt, example.completion
    if isinstance(example, AlpacaExample):
        return replace(example, output=""), example.output
    if isinstance(example, TextExample):
        raise DataError("a text alone has no prompt to answer", key="task.generate_metrics")
    answers = (at for at, turn in enumerate(example.messages) if turn["role"] == "assistant")
    last = max((at for at in answers if at not in example.untrained), default=0)
    answer, before = example.messages[last].get("content"), example.messages[:last]
    if not isinstance(answer, str) or not answer.strip() or not before:
        raise DataError("the conversation has no question followed by a trained answer in text")
    return ChatExample(before, example.tools), answer


def prompt_start(example: ParsedRow) -> Any:
    """Return the start of a row, up to its first answer: rows with the same one belong together. Empty: none."""
    if isinstance(example, TextExample):
        return example.text
    if isinstance(example, PairExample):
        return example.prompt
    if isinstance(example, AlpacaExample):
        return [example.instruction, example.input]
    first = next(at for at, turn in enumerate(example.messages) if turn["role"] == "assistant")
    return [turn for turn in example.messages[:first] if turn["role"] not in SYSTEM_ROLES]


def prompt_text(
    prompt: CompletePrompt, tokenizer: PreTrainedTokenizerBase, *, decoder_only: bool, trained: bool = False
) -> tuple[str, bool]:
    """The text that the model reads, and whether a chat template has written it, special tokens included.

    Args:
        prompt: What is asked.
        tokenizer: Has the template.
        decoder_only: Whether the answer follows in the same text. An encoder-decoder reads an instruction without
            headings, and a conversation without a template as its turns.
        trained: Whether a trained answer followed this prompt, if it ends with an answer. None did: the model
            continues that one, where the template has no generation prompt.

    Raises:
        UsageError: a conversation needs a template.
        DataError: the template refuses the conversation.
    """
    if isinstance(prompt, str):
        return prompt, False
    if isinstance(prompt, AlpacaExample):
        if not decoder_only:
            return prompt.source(), False
        if not tokenizer.chat_template:
            return prompt.pair().prompt, False
        prompt = prompt.chat().messages[:-1]
    messages, tools = (prompt, None) if isinstance(prompt, list) else (prompt.messages, prompt.tools)
    if tokenizer.chat_template:
        text = render(tokenizer, messages, tools, prompt=True)
        if not decoder_only or text != render(tokenizer, messages, tools):
            return text, True
        if messages[-1]["role"] == "assistant" and not trained:
            text = text.removesuffix(str(tokenizer.eos_token or ""))
        else:
            with suppress(DataError):  # of a template for other conversations than plain ones
                text += _template(tokenizer, str(tokenizer.chat_template)).unasked(tools)
        return text, True
    if decoder_only:
        message = "the base model's tokenizer has no chat template for messages"
        raise UsageError(message, hint="give prompts instead")
    if len(messages) == 1:
        return str(messages[0].get("content", "")), False
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in messages), False


@lru_cache(maxsize=8)
def _template(tokenizer: PreTrainedTokenizerBase, written: str) -> Template:
    """The chat template of a tokenizer, which is ``written`` so now."""
    return Template(tokenizer)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerBase, *, templated: bool, decoder_only: bool) -> list[int]:
    """The tokens of a prompt. A template writes its own special tokens; other text gets the tokenizer's.

    BOS stands once, and no EOS of the tokenizer's at the end of what a decoder continues.

    Raises:
        UsageError: the prompt has no tokens.
    """
    ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if decoder_only and not templated and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    if not ids:
        raise UsageError("the prompt is empty: it has no tokens to continue from")
    return ids


def prompt_of(row: Row, columns: Mapping[str, str], trained_on: str | None = None) -> Prompt:
    """The prompt of a row to answer: a text, messages, or an instruction; of a conversation, up to the last answer.

    Args:
        row: As in training; the answer may be missing.
        columns: The formats' columns -> the row's, where they have other names.
        trained_on: The format of the training rows: of several columns that ask, its own is read.

    Raises:
        DataError: it has none.
    """
    add_keys(values := dict(row.values), columns.values())
    values |= {name: values[each] for name, each in columns.items() if each in values}
    own = _ASKING.get(trained_on or "")
    if own and values.get(own):
        values = {name: value for name, value in values.items() if name == own or name not in _ASKING.values()}
    for column in {"conversations", "messages"} & values.keys():
        with suppress(ValueError):  # the reader says what is wrong
            values[column] = turns_in(values[column])
    for column, format in (("conversations", "sharegpt"), ("prompt", "messages"), ("messages", "messages")):
        if (turns := values.get(column)) and (isinstance(turns, list) or format == "sharegpt"):
            return _conversation(format, column, row, values)
    prompt = values.get("prompt")
    if isinstance(prompt, str) and prompt:
        pair = _read("prompt_completion", row, {**values, "completion": "."})
        assert isinstance(pair, PairExample)
        return TextWithSystem(prompt, pair.system) if pair.system else prompt
    if values.get("instruction"):
        read = _read("alpaca", row, {**values, "output": "."})
        assert isinstance(read, AlpacaExample)
        return replace(read, output="")
    if empty := [name for name in _ASKING.values() if values.get(name, 0) in ("", [], None)]:
        raise row.place.error("is empty; there is nothing to answer", key=empty[0])
    names = ", ".join(quote(name, 40) for name in list(row.values)[:12])
    near = near_column("prompt", list(row.values))
    hint = f'If {quote(near, 40)} is what is asked, call it "prompt".' if near else None
    raise row.place.error(f'needs "prompt" or "messages"; it has {names or "no columns"}', hint=hint)


def _conversation(format: str, column: str, row: Row, values: dict[str, Any]) -> Prompt:
    """The turns up to the last answer, read as in training."""
    turns = values[column]
    if isinstance(turns, list):
        while turns and _is_answer(turns[-1]):
            turns = turns[:-1]  # a dataset's row contains it
        if not turns:
            raise row.place.error("the conversation has no turn to answer")
        sharegpt = isinstance(turns[0], dict) and "from" in turns[0]
        # The reader looks for an answer.
        turns = [*turns, {"from": "gpt", "value": "."} if sharegpt else {"role": "assistant", "content": "."}]
    read = _read(format, row, {**values, column: turns}, column)
    assert isinstance(read, ChatExample)
    messages = read.messages[:-1]
    return ChatExample(messages, read.tools) if read.tools else messages


def _is_answer(turn: Any) -> bool:
    return isinstance(turn, dict) and (
        turn.get("role") == "assistant" or turn.get("from") in ("assistant", "gpt", "chatgpt")
    )


def _read(format: str, row: Row, values: dict[str, Any], column: str | None = None) -> ParsedRow:
    """Read a row of this format, whose first column may have another name."""
    needs, reads = FORMATS[format].needs, FORMATS[format].reads
    names = {key: key for key in (*needs, *reads)} | ({needs[0]: column} if column else {})
    return ExampleReader(format, names)(replace(row, values=values))


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """Return a prompt after a system prompt, in place of the one that training rows share; one of its own stays."""
    if system is None:
        return prompt
    if isinstance(prompt, Row):
        return replace(prompt, values={"system": system} | prompt.values)
    if isinstance(prompt, str):
        return TextWithSystem(prompt, system)
    if isinstance(prompt, TextWithSystem):
        return prompt
    if isinstance(prompt, AlpacaExample):
        return prompt if prompt.system else replace(prompt, system=system)
    messages = prompt if isinstance(prompt, list) else prompt.messages
    if not messages or messages[0].get("role") not in SYSTEM_ROLES:
        messages = [{"role": "system", "content": system}, *messages]
    return messages if isinstance(prompt, list) else replace(prompt, messages=messages)


def last_words(prompt: Prompt) -> str:
    """What was asked, in few words: the text, the last turn, or the instruction."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, TextWithSystem):
        return prompt.text
    if isinstance(prompt, Row):
        return str(prompt.place)
    if isinstance(prompt, AlpacaExample):
        return prompt.request()
    messages = prompt if isinstance(prompt, list) else prompt.messages
    return str(messages[-1]["content"])


def _literal(value: Any) -> str:
    """Return a value as Python reads it, in a block of Markdown."""
    return json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")
