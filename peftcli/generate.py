"""Text from a base model and an adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftcli.errors import AdapterError, DataError, UsageError

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
    form: Literal["chat", "plain", "alpaca"]
    """What a prompt that is a string becomes: a user's turn in the chat template, itself, or an Alpaca instruction."""

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

        from peftcli.core.prompt import generate

        set_seed(settings.seed)
        inputs = self._encode(prompts)
        options = self._options(settings)
        if stream is not None:
            options["streamer"] = _streamer(self.tokenizer, stream, strip=self.form == "chat")
        with torch.inference_mode():
            output = generate(self.model, **inputs, **options)
        if not self.model.config.is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]
        return [self._answer(prompt, ids.tolist()) for prompt, ids in zip(prompts, output, strict=True)]

    def _encode(self, prompts: Sequence[str | list[Message]]) -> dict[str, torch.Tensor]:
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        texts, templated = [], []
        for prompt in prompts:
            asked = self._formed(prompt)
            templated.append(not isinstance(asked, str))
            if not isinstance(asked, str):
                asked = self._rendered(asked)
            texts.append(asked)
        # a template writes its own special tokens; a bare text gets the tokenizer's, but no EOS before the answer
        ids = [
            tokenizer(text, add_special_tokens=not by_template)["input_ids"]
            for text, by_template in zip(texts, templated, strict=True)
        ]
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
        from peftcli.data.formats import AlpacaExample

        return AlpacaExample(prompt, output="").pair().prompt

    def _rendered(self, messages: list[Message]) -> str:
        from peftcli.data.spans import render

        if not self.tokenizer.chat_template:
            raise UsageError(
                "the base model's tokenizer has no chat template for messages", hint="give prompts instead"
            )
        return render(self.tokenizer, messages, prompt=True)

    def _options(self, settings: Settings) -> dict[str, Any]:
        stops = self._stops()
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            chosen = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        return {
            **chosen,
            "max_new_tokens": settings.max_new_tokens,
            "eos_token_id": sorted(stops) or None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _stops(self) -> set[int]:
        """Ids that end an answer: those of the base model's generation config and the tokenizer's EOS."""
        configured = self.model.generation_config.eos_token_id
        stops = set(configured) if isinstance(configured, list) else {configured}
        return {stop for stop in stops | {self.tokenizer.eos_token_id} if stop is not None}

    def _answer(self, prompt: str | list[Message], ids: list[int]) -> Answer:
        stops = self._stops()
        if self.model.config.is_encoder_decoder:
            ids = ids[1:]  # the decoder's start token
        ends = next((place for place, token in enumerate(ids) if token in stops), None)
        kept = ids if ends is None else ids[: ends + 1]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        return Answer(
            asked, text.strip() if self.form == "chat" else text, len(kept), "length" if ends is None else "stop"
        )


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

    from peftcli.core.files import load_adapter, read_config
    from peftcli.hub import local_folder
    from peftcli.methods import config_from_dict
    from peftcli.models.load import base_of, load_model, load_tokenizer
    from peftcli.models.quantization import trained_quantization
    from peftcli.schema import Quantization
    from peftcli.tasks import TASKS

    folder = local_folder(adapter)
    config = config_from_dict(read_config(folder), file=str(folder / "adapter_config.json"))
    name = base or config.base_model_name_or_path
    if not name:
        raise AdapterError("names no base model", file=str(folder), hint="give one with --base")
    classes = {row.task_type: row.auto_class for row in TASKS.values()}
    auto_class = classes.get(config.task_type or "", "AutoModelForCausalLM")
    how = trained_quantization(folder) if quantization is None and not base else None
    if quantization not in (None, "none"):
        how = Quantization(type=quantization)  # type: ignore[arg-type]
    spec = base_of(name, None if base else config.revision, how)
    cuda = torch.cuda.is_available()
    model = load_model(spec, auto_class, torch.bfloat16 if cuda and torch.cuda.is_bf16_supported() else torch.float32)
    if with_adapter:
        config.inference_mode = True
        load_adapter(model, config, folder)
    model = model.to("cuda" if cuda else "cpu").eval()  # type: ignore[arg-type]
    tokenizer = load_tokenizer(base_of(str(folder)) if (folder / "tokenizer_config.json").exists() else spec)
    return Speaker(model, tokenizer, _prompt_form(folder, tokenizer))


def answer_file(
    speaker: Speaker,
    source: Path,
    target: Path,
    settings: Settings,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> int:
    """Answer every row of a .jsonl file, ``{"prompt": ...}`` or ``{"messages": [...]}``, into another.

    Returns:
        The number of rows.

    Raises:
        DataError: a row without a prompt; nothing is written then.
        StorageError: the target cannot be written.
    """
    from dataclasses import asdict

    from peftcli.core.files import write_file

    prompts = list(_prompts(source))
    lines: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        lines += [json.dumps(asdict(answer), ensure_ascii=False) for answer in speaker.answers(batch, settings)]
        progress(len(lines), len(prompts))
    write_file(target, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def _prompts(source: Path) -> Iterator[str | list[Message]]:
    from peftcli.data.load import load_rows

    rows = load_rows(str(source))
    for number, row in enumerate(rows.rows):
        line = rows.lines[number] if rows.lines else number + 1
        prompt, messages = row.get("prompt"), row.get("messages")
        if isinstance(messages, list) and all(isinstance(turn, dict) and "content" in turn for turn in messages):
            while messages and messages[-1].get("role") == "assistant":
                messages = messages[:-1]  # the answer that a dataset's row holds
            if not messages:
                raise DataError("the conversation has no turn to answer", file=str(source), line=line)
            yield messages
        elif isinstance(prompt, str) and prompt:
            yield prompt
        else:
            has = ", ".join(row) or "no columns"
            raise DataError(f'needs "prompt" or "messages"; it has {has}', file=str(source), line=line)


def _prompt_form(folder: Path, tokenizer: Any) -> Literal["chat", "plain", "alpaca"]:
    """The form of the data that the adapter's run was fed, so that it is asked what it was taught to answer."""
    path = folder / "run.json"
    data = json.loads(path.read_bytes()).get("data", {}) if path.is_file() else {}
    trained_on = data.get("format", "messages")
    if trained_on in ("text", "prompt_completion"):
        return "plain"
    if tokenizer.chat_template:
        return "chat"
    return "alpaca" if trained_on == "alpaca" else "plain"


def _streamer(tokenizer: Any, write: Callable[[str], None], *, strip: bool) -> Any:
    """Writes the text as it grows; with ``strip``, without the white space around it."""
    from transformers import TextStreamer

    class _Streamer(TextStreamer):
        begun, held = False, ""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            text = self.held + text
            if strip:
                text = text if self.begun else text.lstrip()
                kept = text.rstrip()  # what follows is written once more text has come
                text, self.held = kept, text[len(kept) :]
            self.begun |= bool(text)
            write(text)

    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
