"""Generate text from a base model and an adapter: into one answer, or from file to file with resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path

from peftcli.adapters.load import apply_adapter, find_adapter
from peftcli.errors import DataError
from peftcli.guard.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from peftcli.system.disk import sha256
from peftcli.system.outputs import expand_user, is_stream, partial_file, write_output
from peftcli.system.secrets import redact_values
from peftcli.system.signals import current
from peftcli.tasks.text.generation import GenerationSettings, Prompt, TextGenerator
from peftcli.tasks.text.stop_tokens import prompt_form, stop_tokens


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
    tokens.settle_pad(tokenizer, loaded.model)
    model = loaded.model.to("cuda" if cuda else "cpu").eval()  # type: ignore[arg-type]
    form = prompt_form(source.record, tokenizer)
    loaded_from = {
        "base": asdict(spec),
        "adapter": str(folder) if with_adapter else None,
        "device": str(model.device),
        "versions": [version(name) for name in ("peftcli", "torch", "transformers")],
    }
    return TextGenerator(model, tokenizer, form, stop_tokens(tokenizer, form), loaded_from)


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
    target = expand_user(target)
    prompts = list(_prompts(source))
    if is_stream(target):
        lines: list[bytes] = []
        for batch in _answered(generator, prompts, settings, batch_size):
            lines += batch
            progress(len(lines), len(prompts))
        write_output(target, b"".join(lines))
        return len(lines)
    with partial_file(target, _key(generator, prompts, settings, batch_size)) as file:
        kept = _whole(file.lines())
        done = min(len(kept), len(prompts)) // batch_size * batch_size
        file.truncate(kept[:done])
        if done:
            progress(done, len(prompts))
        for batch in _answered(generator, prompts, settings, batch_size, done):
            file.append(b"".join(batch))
            done += len(batch)
            stop = current()
            stop.saved, stop.message = True, f"stopped after {done} of {len(prompts)} answers"
            progress(done, len(prompts))
    return done


def _answered(
    generator: TextGenerator, prompts: Sequence[Prompt], settings: GenerationSettings, batch_size: int, start: int = 0
) -> Iterator[list[bytes]]:
    """The lines of each batch of answers."""
    for at in range(start, len(prompts), batch_size):
        answers = generator.generate(prompts[at : at + batch_size], settings)
        yield [f"{json.dumps(redact_values(asdict(answer)), ensure_ascii=False)}\n".encode() for answer in answers]


def _key(generator: TextGenerator, prompts: Sequence[Prompt], settings: GenerationSettings, batch_size: int) -> str:
    """All that the answers follow from, but for the content of a base model that is a folder."""
    adapter = generator.loaded_from.get("adapter")
    hashes = [sha256(Path(adapter) / name) for name in (CONFIG_FILE, WEIGHTS_FILE)] if adapter else []
    return json.dumps([generator.loaded_from, hashes, list(prompts), asdict(settings), batch_size], sort_keys=True)


def _whole(lines: Sequence[bytes]) -> list[bytes]:
    """The lines before the first that a crash of the machine has damaged."""
    return list(takewhile(_is_json, lines))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _prompts(source: Path) -> Iterator[Prompt]:
    from peftcli.data.sources import open_source
    from peftcli.data.text_rows import quote
    from peftcli.schema import Source

    for row in open_source(Source(train=str(source))).rows():
        if isinstance(row, DataError):
            raise row
        prompt, messages = row.values.get("prompt"), row.values.get("messages")
        if isinstance(messages, list) and all(isinstance(turn, dict) and "content" in turn for turn in messages):
            while messages and messages[-1].get("role") == "assistant":
                messages = messages[:-1]  # the answer that a dataset's row holds
            if not messages:
                raise row.place.error("the conversation has no turn to answer")
            yield messages
        elif isinstance(prompt, str) and prompt:
            yield prompt
        else:
            names = ", ".join(quote(name, 40) for name in list(row.values)[:12])
            raise row.place.error(f'needs "prompt" or "messages"; it has {names or "no columns"}')
