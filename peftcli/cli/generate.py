"""``peftcli generate``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from peftcli.cli import console
from peftcli.cli.options import Adapter, Base, Dtype, Json, NoAdapter, Quiet, output_path, path, progress_log
from peftcli.cli.predict import check_target, print_count
from peftcli.errors import UsageError

if TYPE_CHECKING:
    from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
    from peftcli.tasks.text.prompts import Prompt

_MIN_TEMPERATURE = 1e-30
"""A lower temperature makes the scores of tokens too large for float32."""
_FIRST_OF_A_CHAT = "Hello"
"""Stands for the first prompt of a chat, which is not known when the model is loaded."""

_Source = Annotated[
    Path | None,
    typer.Option("--input", parser=path, help='A .jsonl file of {"prompt"} or {"messages"}; -: its lines on stdin.'),
]
_Target = Annotated[
    Path | None,
    typer.Option(
        "--output",
        parser=output_path,
        help="File for the answers, .jsonl or .csv; -: stdout. After a stop, run it again to resume.",
    ),
]
_System = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="System prompt, instead of the training rows'; a row of --input keeps its own."),
]
_Images = Annotated[
    list[Path] | None,
    typer.Option("--image", parser=path, metavar="FILE", help="Picture to ask about, also in a chat; may be repeated."),
]
_Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0: greedy decoding.")]
_Quantization = Annotated[
    Literal["none", "nf4", "fp4", "int8", "int8_weight_only", "int4_weight_only"] | None,
    typer.Option(help="Quantization of the base model; by default as in training."),
]


def generate(
    adapter: Adapter,
    prompt: Annotated[str | None, typer.Option(help="One prompt.")] = None,
    system: _System = None,
    image: _Images = None,
    source: _Source = None,
    target: _Target = None,
    base: Base = None,
    quantization: _Quantization = None,
    dtype: Dtype = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 256,
    temperature: _Temperature = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling, with a temperature above 0.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of sampling.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of --input per batch.")] = 8,
    no_adapter: NoAdapter = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate text: for one prompt, a file of prompts, or in a chat."""
    images, tell = image or [], progress_log(quiet)
    _check(prompt, system, images, source, target, temperature, top_p, as_json)
    from peftcli.adapters.generate import as_prompt, check_images, find_asked, first_batch, load_generator
    from peftcli.adapters.predict import predict_file, read_input, text_predictor
    from peftcli.cli.chat import chat
    from peftcli.tasks.text.generation import GenerationSettings

    settings = GenerationSettings(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    rows, found = read_input(source), find_asked(adapter, base, pictures=bool(images))
    check_images(images)

    ask = partial(as_prompt, found, images=images, system=system)
    prompts = [ask(_FIRST_OF_A_CHAT if prompt is None else prompt)] if source is None else list(map(ask, rows))
    generator = load_generator(
        found,
        base,
        with_adapter=not no_adapter,
        quantization=quantization,
        dtype=dtype,
        merge_for=first_batch(prompts, settings, batch_size),
        check=lambda loaded: loaded.refuse_long(prompts, [row.place for row in rows], settings) if rows else None,
        tell=tell,
    )
    if source is not None and target is not None:
        predictor = text_predictor(generator, ask, settings, batch_size)
        count = predict_file(predictor, rows, target, lambda done, total: tell(f"{done}/{total}"))
        return print_count(target, count, tell, as_json=as_json)
    if prompt is None:
        return chat(generator, settings, system, images)
    return _answer(generator, prompts, settings, as_json)


def _answer(generator: TextGenerator, prompts: Sequence[Prompt], settings: GenerationSettings, as_json: bool) -> None:
    if as_json:
        return console.print_json(asdict(generator.generate(prompts, settings)[0]))
    with console.streamed_output() as write:
        generator.generate(prompts, settings, stream=write)
    return None


def _check(
    prompt: str | None,
    system: str | None,
    images: Sequence[Path],
    source: Path | None,
    target: Path | None,
    temperature: float,
    top_p: float,
    as_json: bool,
) -> None:
    """Raise an error for options that do not go together, or for an output that cannot be written."""
    if (source is None) != (target is None) or (prompt is not None and source is not None):
        raise UsageError("give --prompt, or --input with --output, or neither for a chat")
    if images and source is not None:
        raise UsageError("is for --prompt or a chat; rows of --input name their pictures", key="--image")
    chats = prompt is None and source is None
    if chats and as_json:
        raise UsageError("cannot print a chat as JSON", hint="give --prompt, or --input with --output", key="--json")
    if chats and not sys.stdin.isatty():
        raise UsageError(
            "a chat needs a terminal; give --prompt, or --input with --output, which may be - for stdin and stdout"
        )
    if 0 < temperature < _MIN_TEMPERATURE or not math.isfinite(temperature):
        raise UsageError(f"must be 0, or at least {_MIN_TEMPERATURE:g} and finite", key="--temperature")
    if math.isnan(top_p):  # older versions of typer let it pass their bounds
        raise UsageError("must be a number from 0 to 1", key="--top-p")
    for key, text in (("--prompt", prompt), ("--system", system)):
        if text is not None and not console.is_text(text):
            raise UsageError("is not UTF-8 text", key=key)
    if target is not None:
        check_target(target, source, as_json=as_json)
