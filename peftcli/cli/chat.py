"""A chat with a model on a terminal, for ``peftcli generate`` without a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftcli.adapters.generate import check_images
from peftcli.cli import console
from peftcli.data.rows import Place, Row
from peftcli.errors import DataError
from peftcli.tasks.text.formats import Message
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.pictured import MARK
from peftcli.tasks.text.prompts import Prompt, with_system

_SHOW = "/image"
"""Begins a line that names a picture."""


def chat(
    generator: TextGenerator, settings: GenerationSettings, system: str | None, images: Sequence[Path] = ()
) -> None:
    """Chat until an empty line or the end of the input; the first question is about ``images``."""
    sees = generator.read_rows is not None
    console.log(f"an empty line ends the chat{f'; {_SHOW} FILE adds a picture to the next question' if sees else ''}")
    talk = _Talk(generator, system, images)
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except UnicodeDecodeError:
            line = None
        if line is None or not console.is_text(line):
            console.log("the input is not UTF-8 text")
            continue
        if not line.strip():
            return
        command, _, rest = line.strip().partition(" ")
        try:
            if command == _SHOW:
                talk.show(rest.strip())
                continue
            said = talk.ask(line)
            with console.streamed_output() as write:
                answer = generator.generate([said], settings, stream=write)[0]
        except DataError as error:
            if not sees:
                raise
            console.log(": ".join(filter(None, (error.file and Path(error.file).name, error.message))))
            continue
        talk.answered(answer.text)


class _Talk:
    """The turns of a chat, and its pictures."""

    def __init__(self, generator: TextGenerator, system: str | None, images: Sequence[Path]):
        self._generator, self._system = generator, system
        self._turns: list[Message] = generator.form.opening(system)
        self._images, self._next = list[str](), list(map(str, images))
        self._asked: list[Message] = []

    def show(self, name: str) -> None:
        """Add a picture to the next question.

        Raises:
            DataError: it cannot be read.
        """
        if self._generator.read_rows is None:
            return console.log("the model reads no pictures")
        check_images([Path(name)])
        self._next.append(name)
        return console.log(f"{name}: added to the next question")

    def ask(self, line: str) -> Prompt:
        """Return what the model is asked: the chat so far, and a line."""
        if self._generator.read_rows is not None:
            content = line if MARK in line else MARK * len(self._next) + line
            self._asked = [{"role": "user", "content": content}]
            row = {"messages": [*self._turns, *self._asked], "images": [*self._images, *self._next]}
            return Row(row, Place("chat", 1, line=1))
        asked = self._generator.form.ask(line, system="")
        self._asked = [] if isinstance(asked, str) else asked
        return with_system(line, self._system) if isinstance(asked, str) else [*self._turns, *self._asked]

    def answered(self, text: str) -> None:
        """Keep the last question with its answer."""
        self._turns += [*self._asked, {"role": "assistant", "content": text}]
        self._images, self._next = [*self._images, *self._next], []
