"""The form of a prompt: what a text becomes before the model reads it, as in the rows that the model was trained on.

It belongs to the adapter: task.json holds it under ``prompt``. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftcli.errors import AdapterError
from peftcli.guard.typed_fields import fits, hints_of
from peftcli.tasks.text.formats import AlpacaExample, Message

SLOT = "{prompt}"
"""Stands in a template for the text that is asked."""
_CHATS = ("messages", "sharegpt")
"""Formats of conversations."""


@dataclass(frozen=True)
class PromptForm:
    """What a text that is asked becomes."""

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


def _literal(value: Any) -> str:
    """Return a value as Python reads it, in a block of Markdown."""
    return json.dumps(value, ensure_ascii=False).replace("`", "\\u0060")
