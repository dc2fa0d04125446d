"""Ollama's Modelfile: the chat template in Go's language, the stop words and the limits of answers.

Ollama runs no Jinja. What a template writes between the contents of turns is read off a rendered conversation, and the
Go template writes the same; it is refused where it would not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.errors import ModelError
from peftcli.tasks.text.formats import Message
from peftcli.tasks.text.prompts import SLOT, PromptForm, prompt_text
from peftcli.tasks.text.stop_tokens import stop_tokens

_SYSTEM, _FIRST, _SAID, _SECOND = "Xq7System", "Xq7First", "Xq7Said", "Xq7Second"
_TODAY = ("strftime_now", "now(")
"""What templates call that write the date."""


@dataclass(frozen=True)
class _Turns:
    """What a chat template writes before the content of a turn, and after the last."""

    system: str
    first: str
    """Before the first question without a system prompt."""
    after_system: str
    answer: str
    """After a question, before its answer."""
    next: str
    """After an answer, before the next question."""
    asks: str
    """After the last question, before the answer that is to be written."""

    def render(self, messages: Sequence[Message]) -> str:
        """Write a conversation as the Go template does."""
        last, text = "", ""
        for turn in messages:
            before = {"": self.first, "system": self.after_system, "assistant": self.next}
            opened = {"system": self.system, "assistant": self.answer}.get(turn["role"], before.get(last, ""))
            text += opened + str(turn["content"])
            last = turn["role"]
        return text + self.asks

    def go(self) -> str:
        """Return the Go template."""
        opened = f'{{{{ if eq $last "" }}}}{self.first}{{{{ else if eq $last "system" }}}}{self.after_system}'
        opened += f"{{{{ else }}}}{self.next}{{{{ end }}}}"
        return (
            '{{ $last := "" }}{{ range .Messages }}'
            f'{{{{ if eq .Role "system" }}}}{self.system}{{{{ else if eq .Role "assistant" }}}}{self.answer}'
            f"{{{{ else }}}}{opened}{{{{ end }}}}{{{{ .Content }}}}{{{{ $last = .Role }}}}{{{{ end }}}}{self.asks}"
        )


def modelfile(tokenizer: Any, form: PromptForm, model: str, limits: Mapping[str, int]) -> str:
    """Return a Modelfile for the .gguf file ``model`` beside it.

    ``form`` says what a text that is asked becomes; ``limits`` has the ``max_new_tokens`` of training's evaluations.

    Raises:
        ModelError: Go's template cannot say what the chat template says.
    """
    if form.chat and form.template != SLOT:
        raise ModelError("the prompts of training put words around a question, which Ollama adds to no chat turn")
    template = _turns(tokenizer).go() if form.chat else form.template.replace(SLOT, "{{ .Prompt }}")
    stops = stop_tokens(tokenizer, chat=form.chat)
    texts = [*tokenizer.convert_ids_to_tokens(sorted(stops.ids)), *stops.texts]
    lines = [f"FROM ./{model}", f"TEMPLATE {_quoted(template)}"]
    lines += [f"SYSTEM {_quoted(form.system)}"] if form.system else []
    lines += [f"PARAMETER stop {_word(text)}" for text in texts]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER num_predict {limits['max_new_tokens']}"] if "max_new_tokens" in limits else []
    return "\n".join(lines) + "\n"


def _turns(tokenizer: Any) -> _Turns:
    """Read off what the chat template writes around contents, and check it on conversations.

    Raises:
        ModelError: it writes something else somewhere.
    """
    if any(word in str(tokenizer.chat_template) for word in _TODAY):
        raise ModelError("the chat template writes the date, which Ollama's templates cannot")
    question, answered = {"role": "user", "content": _FIRST}, {"role": "assistant", "content": _SAID}
    system, following = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _SECOND}

    def write(*messages: Message) -> str:
        return prompt_text(list(messages), tokenizer, decoder_only=True)[0]

    first, _, asks = write(question).partition(_FIRST)
    opened, _, rest = write(system, question).partition(_SYSTEM)
    _, _, after = write(question, answered, following).partition(_FIRST)
    answer, _, later = after.partition(_SAID)
    turns = _Turns(opened, first, rest.partition(_FIRST)[0], answer, later.partition(_SECOND)[0], asks)
    tried = [
        [question],
        [system, question],
        [question, answered, following],
        [system, question, answered, following, answered, question],
        [{"role": "user", "content": "<b>one</b>\n\n two {{ three }} 4"}],
    ]
    for messages in tried:
        if "{{" in "".join(vars(turns).values()) or turns.render(messages) != write(*messages):
            raise ModelError("the chat template is none of turns after one another, and Ollama's cannot say it")
    return turns


def _quoted(text: str) -> str:
    if '"""' in text:
        raise ModelError("the chat template contains what a Modelfile cannot quote")
    return f'"""{text}"""'


def _word(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
