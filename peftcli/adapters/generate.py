"""Generate text from a base model and an adapter: into one answer, or from file to file with resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftcli.adapters.answer_file import content_key, write_answers
from peftcli.adapters.load import AdapterSource, apply_adapter, find_adapter
from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.schema import BaseModel, Source
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator, generator_of
from peftcli.tasks.text.prompts import Prompt, prompt_of


def load_generator(
    adapter: str, base: str | None = None, *, with_adapter: bool = True, quantization: str | None = None
) -> TextGenerator:
    """Load the base model that an adapter names, with the adapter in it.

    Args:
        adapter: folder or hub id.
        base: base model to use instead of the one that the adapter names.
        with_adapter: False gives the base model alone.
        quantization: type to quantise the base model to, or ``none``; None: as run.json says the adapter was trained.

    Raises:
        AdapterError: the adapter cannot be read or does not fit.
        ModelError: the base model cannot be loaded.
    """
    import torch

    from peftcli.models import tokens
    from peftcli.models.open import open_base
    from peftcli.schema import Quantization

    source = find_adapter(adapter, base)
    folder, spec = source.folder, source.base
    if quantization is not None:
        wanted = None if quantization == "none" else Quantization(type=quantization)  # type: ignore[arg-type]
        spec = replace(spec, quantization=wanted)
    cuda = torch.cuda.is_available()
    with open_base(spec, processors=folder) as opened:
        dtype = torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32
        loaded, tokenizer = opened.model(source.auto_class(lambda: opened.config), dtype), opened.processor("tokenizer")
    if with_adapter:
        apply_adapter(loaded, source)
    elif source.has_tokenizer:
        tokens.fit_tokenizer(loaded.model, tokenizer, folder)
    model = loaded.model.to("cuda" if cuda else "cpu").eval()  # type: ignore[arg-type]
    return generator_of(model, tokenizer, source.record, describe(source, spec, model, with_adapter))


def describe(source: AdapterSource, spec: BaseModel, model: Any, with_adapter: bool) -> dict[str, Any]:
    """Return what a model was loaded from, as JSON: to tell whether earlier answers are its own."""
    return {
        "base": asdict(spec),
        "adapter": str(source.folder) if with_adapter else None,
        "device": str(model.device),
        "versions": [version(name) for name in ("peftcli", "torch", "transformers")],
    }


def answer_file(
    generator: TextGenerator,
    source: Path,
    target: Path,
    settings: GenerationSettings,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> int:
    """Answer every row of a .jsonl file, ``{"prompt": ...}`` or ``{"messages": [...]}``, into another.

    The target appears when all rows are answered. After a stop, the same call resumes after the last whole batch.

    Returns:
        The number of rows.

    Raises:
        DataError: a row without a prompt; nothing is written then.
        FolderBusy: another process is answering into the same target.
        StorageError: the target cannot be written.
    """

    def answer(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        return [asdict(each) for each in generator.generate(prompts, settings)]

    prompts = list(_prompts(source))
    key = [*content_key(generator.loaded_from), prompts, asdict(settings)]
    return write_answers(prompts, target, answer, key=key, batch_size=batch_size, progress=progress)


def _prompts(source: Path) -> Iterator[Prompt]:
    for row in open_source(Source(train=str(source))).rows():
        if isinstance(row, DataError):
            raise row
        yield prompt_of(row, {})
