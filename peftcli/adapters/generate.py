"""Text from a base model and an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import DataError, UsageError
from peftcli.guard.adapter_header import CONFIG_FILE, WEIGHTS_FILE
from peftcli.system.disk import sha256
from peftcli.system.outputs import expanded, is_stream, unfinished_file, write_output
from peftcli.system.secrets import redact_values
from peftcli.system.signals import current
from peftcli.tasks.text.stop_tokens import Ends, Form, all_stops, ends_of, prompt_form

if TYPE_CHECKING:
    import torch

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How text is chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token (greedy)."""
    top_p: float = 1.0
    """With a temperature: choose among the likeliest tokens that together have this probability."""
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    prompt: str
    text: str
    tokens: int
    """Tokens generated, the end-of-text token included."""
    finish_reason: str
    """``stop``: the model ended its answer; ``length``: it ran into max_new_tokens."""


@dataclass(frozen=True)
class Speaker:
    """A model that answers, with its tokenizer."""

    model: Any
    tokenizer: Any
    form: Form
    """What a prompt that is a string becomes: a user's turn in the chat template, itself, or an Alpaca instruction."""
    ends: Ends
    """What ends an answer."""
    made_from: dict[str, Any] = field(default_factory=dict)
    """What it was loaded from, as JSON takes it: to tell whether answers of an earlier process are this one's too."""

    def answers(
        self, prompts: Sequence[str | list[Message]], settings: Settings, stream: Callable[[str], None] | None = None
    ) -> list[Answer]:
        """One answer a prompt, computed as one left-padded batch.

        Args:
            prompts: texts, or conversations that end with a user's turn.
            settings: how text is chosen.
            stream: is given the answer's text as it grows; for a single prompt.
        """
        import torch
        from accelerate.utils import set_seed

        from peftcli.core.prompts.virtual_tokens import generate

        set_seed(settings.seed)
        inputs = self._encode(prompts)
        options = self._options(settings)
        if stream is not None:
            options["streamer"] = _streamer(self.tokenizer, stream, self.ends.texts, strip=self.form == "chat")
        with torch.inference_mode():
            output = generate(self.model, **inputs, **options)
        if not self.model.config.is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]
        return [self._answer(prompt, ids.tolist()) for prompt, ids in zip(prompts, output, strict=True)]

    def _encode(self, prompts: Sequence[str | list[Message]]) -> dict[str, torch.Tensor]:
        tokenizer = self.tokenizer
        texts, templated = [], []
        for prompt in prompts:
            asked = self._formed(prompt)
            templated.append(not isinstance(asked, str))
            if not isinstance(asked, str):
                asked = self._rendered(asked)
            texts.append(asked)
        # a template writes its own special tokens; a bare text gets the tokenizer's, but BOS once, and no EOS
        ids = [
            tokenizer(text, add_special_tokens=not by_template)["input_ids"]
            for text, by_template in zip(texts, templated, strict=True)
        ]
        bos = tokenizer.bos_token_id
        ids = [row[1:] if bos is not None and row[:2] == [bos, bos] else row for row in ids]
        if not self.model.config.is_encoder_decoder:
            ids = [row[:-1] if row and row[-1] == tokenizer.eos_token_id and len(row) > 1 else row for row in ids]
        if not all(ids):
            raise UsageError("a prompt without text holds no tokens to go on from")
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _formed(self, prompt: str | list[Message]) -> str | list[Message]:
        """The prompt in the form that the adapter was trained on."""
        if not isinstance(prompt, str) or self.form == "plain":
            return prompt
        if self.form == "chat":
            return [{"role": "user", "content": prompt}]
        from peftcli.tasks.text.formats import AlpacaExample

        return AlpacaExample(prompt, output="").pair().prompt

    def _rendered(self, messages: list[Message]) -> str:
        from peftcli.tasks.text.spans import render

        if not self.tokenizer.chat_template:
            raise UsageError(
                "the base model's tokenizer has no chat template for messages", hint="give prompts instead"
            )
        return render(self.tokenizer, messages, prompt=True)

    def _options(self, settings: Settings) -> dict[str, Any]:
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            chosen = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        return {
            **chosen,
            "max_new_tokens": settings.max_new_tokens,
            "eos_token_id": self._stops() or None,
            "pad_token_id": self.tokenizer.pad_token_id,
            **({"stopping_criteria": [_text_stop(self.tokenizer, self.ends.texts)]} if self.ends.texts else {}),
        }

    def _stops(self) -> list[int]:
        """Ids that end an answer."""
        return all_stops(self.ends, self.model.generation_config.eos_token_id)

    def _answer(self, prompt: str | list[Message], ids: list[int]) -> Answer:
        stops = self._stops()
        if self.model.config.is_encoder_decoder:
            ids = ids[1:]  # the decoder's start token
        ends = next(
            (place for place, token in enumerate(ids, 1) if token in stops or self._says_end(ids[:place])), None
        )
        kept = ids[:ends]
        text, _ = _before(self.tokenizer.decode(kept, skip_special_tokens=True), self.ends.texts)
        asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        return Answer(
            asked, text.strip() if self.form == "chat" else text, len(kept), "length" if ends is None else "stop"
        )

    def _says_end(self, ids: list[int]) -> bool:
        """Whether the text of the ids holds an end of the template's that is no token."""
        return bool(self.ends.texts) and _before(self.tokenizer.decode(ids), self.ends.texts)[1]


def load_speaker(
    adapter: str, base: str | None = None, *, with_adapter: bool = True, quantization: str | None = None
) -> Speaker:
    """The base model that an adapter names, with the adapter in it.

    Args:
        adapter: folder or hub id.
        base: base model to use instead of the one that the adapter names.
        with_adapter: False gives the base model alone.
        quantization: type to quantise the base model to, or ``none``; None: as the adapter was trained, where its
            folder says so.

    Raises:
        AdapterError: the adapter cannot be read or does not fit.
        ModelError: the base model cannot be loaded.
    """
    import torch

    from peftcli.adapters.load import apply_adapter, find_adapter
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
    else:
        tokens.fit_tokenizer(loaded.model, tokenizer, folder)
    tokens.settle_pad(tokenizer, loaded.model)
    model = loaded.model.to("cuda" if cuda else "cpu").eval()  # type: ignore[arg-type]
    form = prompt_form(folder, tokenizer)
    made_from = {
        "base": asdict(spec),
        "adapter": str(folder) if with_adapter else None,
        "device": str(model.device),
        "versions": [version(name) for name in ("peftcli", "torch", "transformers")],
    }
    return Speaker(model, tokenizer, form, ends_of(tokenizer, form), made_from)


def answer_file(
    speaker: Speaker,
    source: Path,
    target: Path,
    settings: Settings,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> int:
    """Answer every row of a .jsonl file, ``{"prompt": ...}`` or ``{"messages": [...]}``, into another.

    After a stop, the same call goes on after the last batch that was answered. The target appears when all are.

    Returns:
        The number of rows.

    Raises:
        DataError: a row without a prompt; nothing is written then.
        FolderBusy: another process is answering into the same target.
        StorageError: the target cannot be written.
    """
    target = expanded(target)
    prompts = list(_prompts(source))
    if is_stream(target):
        lines: list[bytes] = []
        for batch in _answered(speaker, prompts, settings, batch_size):
            lines += batch
            progress(len(lines), len(prompts))
        write_output(target, b"".join(lines))
        return len(lines)
    with unfinished_file(target, _key(speaker, prompts, settings, batch_size)) as file:
        kept = _whole(file.lines())
        done = min(len(kept), len(prompts)) // batch_size * batch_size
        file.keep(kept[:done])
        if done:
            progress(done, len(prompts))
        for batch in _answered(speaker, prompts, settings, batch_size, done):
            file.append(b"".join(batch))
            done += len(batch)
            stop = current()
            stop.saved, stop.message = True, f"stopped after {done} of {len(prompts)} answers"
            progress(done, len(prompts))
    return done


def _answered(
    speaker: Speaker, prompts: Sequence[str | list[Message]], settings: Settings, batch_size: int, start: int = 0
) -> Iterator[list[bytes]]:
    """The lines of each batch of answers."""
    for at in range(start, len(prompts), batch_size):
        answers = speaker.answers(prompts[at : at + batch_size], settings)
        yield [f"{json.dumps(redact_values(asdict(answer)), ensure_ascii=False)}\n".encode() for answer in answers]


def _key(speaker: Speaker, prompts: Sequence[str | list[Message]], settings: Settings, batch_size: int) -> str:
    """All that the answers follow from, but for the content of a base model that is a folder."""
    adapter = speaker.made_from.get("adapter")
    hashes = [sha256(Path(adapter) / name) for name in (CONFIG_FILE, WEIGHTS_FILE)] if adapter else []
    return json.dumps([speaker.made_from, hashes, list(prompts), asdict(settings), batch_size], sort_keys=True)


def _whole(lines: Sequence[bytes]) -> list[bytes]:
    """The lines before the first that a crash of the machine has damaged."""
    return list(takewhile(_is_json, lines))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _prompts(source: Path) -> Iterator[str | list[Message]]:
    from peftcli.data.sources import open_source
    from peftcli.data.text_rows import cut
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
            names = ", ".join(cut(name, 40) for name in list(row.values)[:12])
            raise row.place.error(f'needs "prompt" or "messages"; it has {names or "no columns"}')


def _before(text: str, ends: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first of ``ends``, and whether there is one."""
    places = [text.find(end) for end in ends if end in text]
    return (text[: min(places)], True) if places else (text, False)


def _begun(text: str, ends: Sequence[str]) -> int:
    """How many of the last characters of the text one of ``ends`` begins with."""
    sizes = (size for end in ends for size in range(1, len(end)) if text.endswith(end[:size]))
    return max(sizes, default=0)


def _text_stop(tokenizer: Any, ends: Sequence[str]) -> Any:
    """Stops a row whose last tokens say one of ``ends``."""
    import torch
    from transformers import StoppingCriteria

    longest = max(len(tokenizer.encode(end, add_special_tokens=False)) for end in ends) + 2

    class _TextStop(StoppingCriteria):
        generated = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.generated += 1
            tails = input_ids[:, -min(self.generated, longest) :].tolist()
            done = [_before(tokenizer.decode(tail), ends)[1] for tail in tails]
            return torch.tensor(done, device=input_ids.device)

    return _TextStop()


def _streamer(tokenizer: Any, write: Callable[[str], None], ends: Sequence[str], *, strip: bool) -> Any:
    """Writes the text as it grows, up to one of ``ends``; with ``strip``, without the white space around it."""
    from transformers import TextStreamer

    class _Streamer(TextStreamer):
        begun, ended, held = False, False, ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if self.ended:
                return
            text, self.ended = _before(self.held + text, ends)
            if strip and not self.begun:
                text = text.lstrip()
            # what may turn out to be an end, or the white space at the end, is written once more text has come
            kept = text[: len(text) - (0 if stream_end or self.ended else _begun(text, ends))]
            kept = kept.rstrip() if strip else kept
            text, self.held = kept, text[len(kept) :]
            self.begun |= bool(text)
            write(text)

    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
