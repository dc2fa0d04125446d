"""``peftcli generate``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peftcli.cli import console
from peftcli.cli.quiet import Quiet, teller
from peftcli.errors import UsageError
from peftcli.system.outputs import expanded, is_stream
from peftcli.system.secrets import settled

if TYPE_CHECKING:
    from peftcli.tasks.text.generation import GenerationSettings, Message, TextGenerator

_COLDEST = 1e-30
"""A lower temperature makes the scores of tokens too large for numbers of 32 bits."""


def generate(
    adapter: Annotated[str, typer.Argument(help="Adapter folder or hub id.")],
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    source: Annotated[Path | None, typer.Option("--input", help='A .jsonl file of {"prompt"} or {"messages"}.')] = None,
    target: Annotated[
        Path | None, typer.Option("--output", help="Where its answers go. After a stop, the same command goes on.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Base model instead of the adapter's.")] = None,
    quantization: Annotated[
        Literal["none", "nf4", "fp4", "int8", "int8_weight_only", "int4_weight_only"] | None,
        typer.Option(help="Of the base model's weights; by default as the adapter was trained."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="With a temperature: nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of --input at once.")] = 8,
    no_adapter: Annotated[bool, typer.Option("--no-adapter", help="The base model alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
) -> None:
    """Text from an adapted model: one prompt, a file of prompts, or a chat on a terminal."""
    if (source is None) != (target is None) or (prompt is not None and source is not None):
        raise UsageError("give --prompt, or --input with --output, or neither for a chat")
    chats = prompt is None and source is None
    if chats and as_json:
        raise UsageError("a chat is no JSON object", hint="give --prompt, or --input with --output", key="--json")
    if chats and not sys.stdin.isatty():
        raise UsageError("without a terminal, give --prompt or --input")
    if 0 < temperature < _COLDEST or temperature == math.inf:
        raise UsageError(f"must be 0, or a number from {_COLDEST:g}", key="--temperature")
    if prompt is not None and not _is_text(prompt):
        raise UsageError("is no UTF-8 text", key="--prompt")

    tell = teller(quiet)
    if target is not None:
        is_stream(expanded(target))  # raises before any work for what cannot be written
    from peftcli.adapters.generate import answer_file, load_generator
    from peftcli.tasks.text.generation import GenerationSettings

    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    generator = load_generator(adapter, base, with_adapter=not no_adapter, quantization=quantization)
    if source is not None and target is not None:
        count = answer_file(
            generator, source, target, settings, batch_size, lambda done, total: tell(f"{done}/{total}")
        )
        if as_json:
            return console.print_json({"output": str(target), "rows": count})
        return (tell if is_stream(target) else console.out)(f"{target}: {count} answers")
    if chats:
        return _chat(generator, settings)
    assert prompt is not None
    if as_json:
        return console.print_json(asdict(generator.generate([prompt], settings)[0]))
    with _streamed() as write:
        generator.generate([prompt], settings, stream=write)
    return None


def _chat(generator: TextGenerator, settings: GenerationSettings) -> None:
    """Turns at a terminal, until an empty line or the end of input."""
    console.log("an empty line ends the chat")
    messages: list[Message] = []
    while True:
        try:
            asked = input("> ")
        except EOFError:
            return
        except UnicodeDecodeError:
            asked = None
        if asked is None or not _is_text(asked):
            console.log("that is no UTF-8 text")
            continue
        if not asked.strip():
            return
        messages.append({"role": "user", "content": asked})
        with _streamed() as write:
            said = generator.generate([messages if generator.form == "chat" else asked], settings, stream=write)[0]
        messages.append({"role": "assistant", "content": said.text})


def _is_text(text: str) -> bool:
    """Whether it was UTF-8 before Python read it."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


@contextmanager
def _streamed() -> Iterator[Callable[[str], None]]:
    """Gives what writes text as it grows, but for what may become a secret, which is not recognised by its parts."""
    held = ""

    def write(text: str) -> None:
        nonlocal held
        held += text
        end = settled(held)
        sys.stdout.write(console.clean(held[:end]))
        sys.stdout.flush()
        held = held[end:]

    yield write
    console.out(held)
