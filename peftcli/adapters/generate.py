"""Generate text from a base model and an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from peftcli.adapters.load import AdapterSource, apply_adapter, find_adapter, other_base
from peftcli.adapters.merged import load_merged
from peftcli.adapters.number_format import NumberFormat, device_format, number_format
from peftcli.data.rows import Place, Row
from peftcli.errors import UsageError
from peftcli.models import tokens
from peftcli.models.open import LoadedModel, OpenBase, open_base
from peftcli.models.parts import widen_heads
from peftcli.schema import BaseModel, Quantization
from peftcli.tasks import TASKS
from peftcli.tasks.base import AsksRows, Task, require_extra
from peftcli.tasks.files import read_file
from peftcli.tasks.pictures import check_image
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator, generator_of
from peftcli.tasks.text.prompts import Prompt, prompt_of, with_system

_WORTH_MERGING = 64
"""Tokens after which a merged model has made up for the time that merging takes: SmolLM2-135M on a CPU needs 50."""


def find_asked(adapter: str, base: str | None = None, *, pictures: bool = False) -> AdapterSource:
    """Find an adapter that prompts are for, or with ``pictures`` one that is asked about these.

    Raises:
        UsageError: its task answers no prompts, or reads no pictures.
        AdapterError: it cannot be read.
    """
    source = find_adapter(adapter, base)
    row = TASKS[source.task] if source.task is not None else None
    if row and not (row.writes_text or row.sees):
        hint = f"peftcli predict {adapter} answers rows of any task"
        raise UsageError(f"is an adapter of {source.task}, which answers no prompts", file=adapter, hint=hint)
    if pictures and not (row and row.sees):
        seeing = " or ".join(name for name, each in TASKS.items() if each.sees)
        hint = f"Leave --image out, or give an adapter of {seeing}."
        message = f"is an adapter of {source.task or 'a language model'}, which reads no pictures"
        raise UsageError(message, file=adapter, key="--image", hint=hint)
    return source


def as_prompt(source: AdapterSource, asked: Row | str, images: Sequence[Path], system: str | None) -> Prompt:
    """Return what an adapter is asked: a row of a file, or a text with pictures, after a system prompt.

    Raises:
        DataError: the row asks nothing.
    """
    if source.task is None or not TASKS[source.task].sees:
        return with_system(prompt_of(asked, columns={}) if isinstance(asked, Row) else asked, system)
    if isinstance(asked, str):
        asked = Row({"prompt": asked, "images": list(map(str, images))}, Place("the command line", 1))
    return with_system(asked, system)


def check_images(images: Sequence[Path]) -> None:
    """Check that pictures can be read, before a model is loaded.

    Raises:
        DataError: one cannot.
    """
    if images:
        require_extra("PIL", "vision", "--image")
    for each in images:
        check_image(read_file(str(each), [Path.cwd()]), str(each))


def load_generator(
    adapter: str | AdapterSource,
    base: str | None = None,
    *,
    with_adapter: bool = True,
    quantization: str | None = None,
    dtype: str | None = None,
    as_evaluated: bool = False,
    merge_for: Sequence[Prompt] = (),
    check: Callable[[TextGenerator], None] = lambda generator: None,
    tell: Callable[[str], None] = lambda text: None,
) -> TextGenerator:
    """Load the base model that an adapter names, with the adapter in it.

    ``quantization`` is a type, or ``none``; None: as run.json says the adapter was trained. ``dtype`` is a number
    format to compute in; None: what suits the device or, with ``as_evaluated``, that of the evaluations of training.
    For the prompts of ``merge_for`` the adapter is merged in memory, if that changes nothing of what the model says;
    ``tell`` is told whether it is. ``check`` is called with what is loaded, before that answers anything.

    Raises:
        AdapterError: the adapter cannot be read or does not fit.
        ModelError: the base model cannot be loaded.
        UsageError: the adapter's task answers no prompts.
    """
    source = find_asked(adapter, base) if isinstance(adapter, str) else adapter
    spec = source.base
    if quantization is not None:
        wanted = None if quantization == "none" else Quantization(type=quantization)  # type: ignore[arg-type]
        spec = replace(spec, quantization=wanted)
    if with_adapter and (odd := other_base(source, spec)):
        tell(f"warning: {odd}")

    def load() -> TextGenerator:
        numbers = number_format(source, dtype) if as_evaluated else device_format(dtype)
        generator = _load(source, spec, numbers, with_adapter)
        check(generator)
        return generator

    if not merge_for or not with_adapter:
        return load()
    one = GenerationSettings(max_new_tokens=1)
    return load_merged(load, source.config, lambda loaded: loaded.generate(merge_for, one), tell)


def first_batch(prompts: Sequence[Prompt], settings: GenerationSettings, batch_size: int) -> Sequence[Prompt]:
    """Return the prompts to merge an adapter for: the first batch, or none if the answers are too few or too short."""
    batches = math.ceil(len(prompts) / batch_size)
    return prompts[:batch_size] if batches * settings.max_new_tokens >= _WORTH_MERGING else ()


def _load(source: AdapterSource, spec: BaseModel, numbers: NumberFormat, with_adapter: bool) -> TextGenerator:
    """Load a base model with the adapter beside its weights."""
    folder = source.folder
    with open_base(spec, processors=folder) as opened:
        task = source.open_task(opened) if source.task is not None and TASKS[source.task].sees else None
        if isinstance(task, AsksRows):
            model = ready(load_for_task(source, opened, task, numbers.weights, with_adapter=with_adapter))
            generator = task.generator(model, source.trained_columns)
            loaded_from = describe(source, spec, model, numbers, with_adapter)
            return replace(generator, loaded_from=loaded_from, bf16=numbers.bf16)
        loaded = opened.model(source.auto_class(lambda: opened.config), numbers.weights)
        tokenizer = opened.processor("tokenizer")
    if with_adapter:
        apply_adapter(loaded, source)
    elif source.has_tokenizer:
        tokens.fit_tokenizer(loaded.model, tokenizer, folder)
    model = ready(loaded)
    loaded_from = describe(source, spec, model, numbers, with_adapter)
    return generator_of(model, tokenizer, source.prompt_form, loaded_from, bf16=numbers.bf16)


def ready(loaded: LoadedModel) -> Any:
    """Return a model on the GPU, if there is one, as it answers."""
    model: Any = loaded.model
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_for_task(
    source: AdapterSource, base: OpenBase, task: Task[Any], dtype: torch.dtype, *, with_adapter: bool = True
) -> LoadedModel:
    """Load the base model as a task needs it, with the adapter in it.

    Raises:
        AdapterError: the adapter does not fit the base model.
        ModelError: the base model cannot be loaded.
    """
    loaded = base.model(source.auto_class(lambda: base.config), dtype, **source.model_options(base))
    task.fit_model(loaded.model, None)
    if with_adapter:
        apply_adapter(loaded, source)
    widen_heads(loaded.model)
    return loaded


def describe(
    source: AdapterSource, spec: BaseModel, model: Any, numbers: NumberFormat, with_adapter: bool
) -> dict[str, Any]:
    """Return what a model was loaded from, as JSON: to tell whether earlier answers are its own."""
    return {
        "base": asdict(spec),
        "adapter": str(source.folder) if with_adapter else None,
        "device": str(model.device),
        "numbers": [str(numbers.weights), numbers.bf16],
        "versions": [version(name) for name in ("peftcli", "torch", "transformers")],
    }


def longest_first(rows: Sequence[object]) -> list[int]:
    """Return the order of rows by their characters: what is too long for the memory fails at once."""
    return sorted(range(len(rows)), key=lambda at: len(str(rows[at])), reverse=True)
