"""Generate text: prompts become batches, and answers end where training has taught the model to end them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from transformers import DynamicCache, LogitsProcessor, StoppingCriteria, TextStreamer

from peftcli.core.layer import model_ends
from peftcli.core.prompts.config import max_positions
from peftcli.core.prompts.generate import generate
from peftcli.core.prompts.inputs import position_tables, soft_prompt, takes
from peftcli.data.rows import Place, Row
from peftcli.errors import DataError, UsageError
from peftcli.models import tokens
from peftcli.tasks.text.prompts import Prompt, PromptForm, TextWithSystem, last_words, prompt_ids, prompt_text
from peftcli.tasks.text.stop_tokens import StopTokens, all_stops, stop_tokens

_OWN_DISTRIBUTION = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}
"""Options of ``generate`` that let a model's distribution as it is."""
_MARKS = 2
"""Tokens of a target without text, of a tokenizer that marks languages: the language and EOS."""
_SHORTER = "Shorten the prompt, or ask for fewer new tokens (generate --max-new-tokens)."


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How tokens are chosen."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the most probable token (greedy), as far as the model's generation config (repetition_penalty,
    min_length) lets it."""
    top_p: float = 1.0
    """With a temperature: sample from the most probable tokens that together have this probability."""
    seed: int = 0
    num_beams: int = 1
    """Answers that are followed at once."""


@dataclass(frozen=True)
class GeneratedText:
    """The answer to one prompt."""

    prompt: str
    text: str
    tokens: int
    """Number of generated tokens, the stop token included."""
    finish_reason: str
    """``stop``: the model ended its answer; ``length``: max_new_tokens was reached."""


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer as tokens and as text."""

    ids: list[int]
    """Its tokens, the one that ends it included."""
    text: str
    ended: bool
    """Whether the model ended it; else max_new_tokens did."""


@dataclass(frozen=True)
class TextGenerator:
    """A language model with its tokenizer."""

    model: Any
    tokenizer: Any
    form: PromptForm
    """What a prompt that is a string becomes."""
    stop_tokens: StopTokens
    loaded_from: dict[str, Any] = field(default_factory=dict)
    """What it was loaded from, as JSON: an interrupted file is resumed only by an equal generator."""
    bf16: bool = False
    """Whether ``generate`` computes in bfloat16, whatever the weights are."""
    read_rows: Callable[[Sequence[Row]], tuple[dict[str, Any], list[str]]] | None = None
    """Makes the model's inputs of prompts that are rows, and says of each what is asked in words; None: prompts are
    texts alone."""

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings, stream: Callable[[str], None] | None = None
    ) -> list[GeneratedText]:
        """Answer prompts, in one batch.

        ``stream`` receives the answer's text as it grows; for a single prompt.

        Raises:
            DataError: the model has too few positions for one.
        """
        if not prompts:
            return []
        set_seed(settings.seed)
        if self.read_rows is not None:
            inputs, asked = self.read_rows([prompt for prompt in prompts if isinstance(prompt, Row)])
        else:
            inputs, asked = self._inputs(prompts, settings), list(map(last_words, prompts))
        with torch.inference_mode(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            answers = self.answered(inputs, settings, stream)
        return [GeneratedText(words, *answer) for words, answer in zip(asked, answers, strict=True)]

    def _inputs(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> dict[str, Any]:
        """The model's inputs of prompts that are texts.

        Raises:
            DataError: the model has too few positions for one.
        """
        rows = list(map(self._ids, prompts))
        for prompt, ids in zip(prompts, rows, strict=True):
            if problem := self._too_long(ids, settings):
                raise DataError(f"{last_words(prompt)!r:.40}: {problem}", hint=_SHORTER)
        return self._padded(rows)

    def refuse_long(self, prompts: Sequence[Prompt], places: Sequence[Place], settings: GenerationSettings) -> None:
        """Check that the model has positions for prompts and their answers.

        Raises:
            DataError: it has too few for one, which the error names.
        """
        if self._positions is None or self.read_rows is not None:
            return
        for prompt, place in zip(prompts, places, strict=True):
            if problem := self._too_long(self._ids(prompt), settings):
                raise place.error(problem, hint=_SHORTER)

    @cached_property
    def _positions(self) -> int | None:
        """How many tokens the model's tables of positions are for, virtual ones aside; None: it has no tables."""
        limit = max_positions(self.model.config)
        if limit is None or not position_tables(self.model):
            return None
        prompt = soft_prompt(self.model)
        return limit - (prompt.count if prompt else 0)

    def _too_long(self, ids: Sequence[int], settings: GenerationSettings) -> str | None:
        """Why a prompt cannot be answered, if the model has too few positions for it."""
        new = settings.max_new_tokens
        longest = len(ids) + new if self._decoder_only else max(len(ids), new)
        if self._positions is None or longest <= self._positions:
            return None
        both = "and" if self._decoder_only else "or"
        what = f"the prompt's {len(ids):,} tokens {both} {new:,} new ones are more than"
        return f"{what} the base model's {self._positions:,} positions"

    def continued(
        self, rows: Sequence[list[int]], settings: GenerationSettings, stream: Callable[[str], None] | None = None
    ) -> list[tuple[str, int, str]]:
        """The answers to rows of tokens, in one batch: text, tokens and finish_reason of each."""
        return self.answered(self._padded(rows), settings, stream)

    def _padded(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        # an answer follows its prompt; but an encoder is trained on rows that begin at position 0
        side = "left" if self._decoder_only else "right"
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        return {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def answered(
        self, inputs: dict[str, Any], settings: GenerationSettings, stream: Callable[[str], None] | None = None
    ) -> list[tuple[str, int, str]]:
        """The answers to a batch of the model's inputs: text, tokens and finish_reason of each."""
        options = self._options(settings)
        if stream is not None:
            options["streamer"] = _streamer(self.tokenizer, stream, self.stop_tokens, strip=self.form.chat)
        return list(map(self._answer, self._new_ids(inputs, options)))

    def write(
        self, rows: Sequence[list[int]], settings: GenerationSettings, draws: Sequence[int] = (), count: int = 1
    ) -> list[list[WrittenAnswer]]:
        """Answer rows of tokens in one batch, each ``count`` times.

        Args:
            rows: The prompts.
            settings: With a temperature, answers are sampled from the model's own distribution at that temperature,
                whatever the base model's generation config says.
            draws: With a temperature, a number for each row, which decides its answers together with the model.
            count: The number of answers to each row.
        """
        inputs, options = self._padded(rows), self._options(replace(settings, temperature=0.0))
        if settings.temperature > 0:
            drawn = [np.random.default_rng(draw).random((count, settings.max_new_tokens)) for draw in draws]
            uniform = torch.from_numpy(np.concatenate(drawn)).to(self.model.device)
            options |= _OWN_DISTRIBUTION | {"logits_processor": [_DrawnTokens(uniform, settings.temperature)]}
        found = self._new_ids(_read_once(self.model, inputs, count), options)
        answers = []
        for ids in found:
            text, size, reason = self._answer(ids)
            answers.append(WrittenAnswer(ids[:size], text, reason == "stop"))
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _new_ids(self, inputs: dict[str, Any], options: dict[str, Any]) -> list[list[int]]:
        """The tokens after each row of a batch, some of which may stand behind the end of the answer."""
        with _contiguous_states(self.model):
            output = generate(self.model, **inputs, **options)
        start = inputs["input_ids"].shape[1] if self._decoder_only else 1  # the decoder's start token
        return list(output[:, start:].tolist())

    @property
    def _decoder_only(self) -> bool:
        return not self.model.config.is_encoder_decoder

    def _ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, in the form of the training data."""
        if isinstance(prompt, TextWithSystem):
            prompt = self.form.ask(prompt.text, prompt.system)
        elif isinstance(prompt, str):
            prompt = self.form.ask(prompt)
        if isinstance(prompt, Row):
            raise UsageError("the model answers texts alone")
        text, templated = prompt_text(prompt, self.tokenizer, decoder_only=self._decoder_only)
        return prompt_ids(text, self.tokenizer, templated=templated, decoder_only=self._decoder_only)

    def _options(self, settings: GenerationSettings) -> dict[str, Any]:
        chosen: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            chosen = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
        ends = self.stop_tokens.texts
        return {
            **chosen,
            "max_new_tokens": settings.max_new_tokens,
            "num_beams": settings.num_beams,
            "eos_token_id": self.stops or None,
            "pad_token_id": self.tokenizer.pad_token_id,
            **_answer_start(self.tokenizer),
            **({"stopping_criteria": [_text_stop(self.tokenizer, ends)]} if ends else {}),
        }

    @cached_property
    def stops(self) -> list[int]:
        """Return the ids that end an answer."""
        return all_stops(self.stop_tokens, self.model.generation_config.eos_token_id)

    def _answer(self, ids: list[int]) -> tuple[str, int, str]:
        ends = next(
            (place for place, token in enumerate(ids, 1) if token in self.stops or self._says_end(ids[:place])), None
        )
        kept = ids[:ends]
        text, _ = _before(self._text(kept), self.stop_tokens.texts)
        text = text.strip() if self.form.chat else text
        return text, len(kept), "length" if ends is None else "stop"

    def _text(self, ids: list[int]) -> str:
        """The text of an answer's ids, without what stands before it."""

        def before(end: int) -> int:
            return self.stop_tokens.before(self.tokenizer.decode(ids[:end])) or 0

        lead = bisect_left(range(len(ids)), True, key=lambda end: before(end) > 0) if before(len(ids)) else 0
        begun = self.tokenizer.decode(ids[:lead])[before(lead) :]  # of the token that the lead ends in
        return begun + self.tokenizer.decode(ids[lead:], skip_special_tokens=True)

    def _says_end(self, ids: list[int]) -> bool:
        """Whether the text of the ids contains an end of the template that is not a token."""
        return bool(self.stop_tokens.texts) and _before(self.tokenizer.decode(ids), self.stop_tokens.texts)[1]


class _DrawnTokens(LogitsProcessor):
    """Leaves each row one token, drawn from its distribution by a number of its own.

    So what is sampled for a row does not depend on the rows beside it, nor on the global random state.
    """

    def __init__(self, uniform: torch.Tensor, temperature: float):
        """Take numbers from 0 to 1, (B, T): one for each token."""
        self.uniform, self.temperature, self.done = uniform, temperature, 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        summed = (scores.float() / self.temperature).softmax(-1).double().cumsum(-1)
        wanted = self.uniform[:, self.done, None] * summed[:, -1:]
        chosen = torch.searchsorted(summed, wanted, right=True).clamp(max=scores.shape[1] - 1)
        self.done += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _read_once(model: Any, inputs: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the arguments of ``generate`` for each row of a batch ``count`` times.

    The model reads a row once where its cache can be repeated.
    """
    repeated = {name: value.repeat_interleave(count, dim=0) for name, value in inputs.items()}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    caches = takes(model, "past_key_values") and model.generation_config.use_cache is not False
    if count == 1 or ids.shape[1] == 1 or soft_prompt(model) is not None or not caches:
        return repeated
    given = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "use_cache": True}
    if takes(model, "position_ids"):
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, :-1]
    if takes(model, "logits_to_keep"):
        given["logits_to_keep"] = 1
    with torch.no_grad():
        cache = model(**given).past_key_values
    if not isinstance(cache, DynamicCache):
        return repeated
    cache.batch_repeat_interleave(count)
    return repeated | {"past_key_values": cache}


def generator_of(
    model: Any,
    tokenizer: Any,
    form_of: Callable[..., PromptForm],
    loaded_from: dict[str, Any] | None = None,
    *,
    bf16: bool = False,
) -> TextGenerator:
    """Make a generator of an adapter's model: prompts have the form of its training, and answers end as there.

    ``form_of`` is ``AdapterSource.prompt_form``; ``loaded_from`` says what both were loaded from, as JSON.
    """
    tokens.settle_pad(tokenizer, model)
    form = form_of(has_template=bool(tokenizer.chat_template), decoder_only=not model.config.is_encoder_decoder)
    return TextGenerator(model, tokenizer, form, stop_tokens(tokenizer, chat=form.chat), loaded_from or {}, bf16)


def has_languages(tokenizer: Any) -> bool:
    """Whether a tokenizer marks texts with their language, each by one token."""
    return hasattr(type(tokenizer), "src_lang") and len(tokenizer(text_target="")["input_ids"]) == _MARKS


def _answer_start(tokenizer: Any) -> dict[str, int]:
    """The options of ``generate`` by which an answer is in the tokenizer's target language, if it has one."""
    code = getattr(tokenizer, "tgt_lang", None)
    if code is None or not has_languages(tokenizer):
        return {}
    first, last = tokenizer(text_target="")["input_ids"]  # the language and EOS, in any order
    # mBART's targets end with their language, with which its decoder starts
    return {"forced_bos_token_id": first} if last == tokenizer.eos_token_id else {"decoder_start_token_id": last}


@contextmanager
def _contiguous_states(model: Any) -> Iterator[None]:
    """Inside, the output head gets contiguous states (B, 1, D).

    Of the prompt's states models take a view of the last ones, and ``linear`` would read a frozen head's weight once
    for each row, or copy it B times.
    """
    head = model_ends(model)[1]
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def _before(text: str, ends: Sequence[str]) -> tuple[str, bool]:
    """Return the text up to the first of ``ends``, and whether there is one."""
    places = [text.find(end) for end in ends if end in text]
    return (text[: min(places)], True) if places else (text, False)


def _begun(text: str, ends: Sequence[str]) -> int:
    """Return how many of the last characters of the text may begin one of ``ends``."""
    sizes = (size for end in ends for size in range(1, len(end)) if text.endswith(end[:size]))
    return max(sizes, default=0)


def _text_stop(tokenizer: Any, ends: Sequence[str]) -> Any:
    """Return a criterion that stops a row whose last tokens spell one of ``ends``."""
    longest = max(len(tokenizer.encode(end, add_special_tokens=False)) for end in ends) + 2

    class _TextStop(StoppingCriteria):
        generated = 0

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.generated += 1
            tails = input_ids[:, -min(self.generated, longest) :].tolist()
            done = [_before(tokenizer.decode(tail), ends)[1] for tail in tails]
            return torch.tensor(done, device=input_ids.device)

    return _TextStop()


def _streamer(tokenizer: Any, write: Callable[[str], None], stops: StopTokens, *, strip: bool) -> Any:
    """Return a streamer of an answer's text; with ``strip``, without the white space around it."""
    ends = stops.texts
    longest = max(len(text.encode()) for text in (stops.lead, *stops.thinking))  # in tokens, at most

    class _Streamer(TextStreamer):
        begun, ended, held = False, False, ""
        # the ids of an answer are held until it is clear where its text starts
        starts, held_ids = not stops.lead, list[int]()

        def put(self, value: torch.Tensor) -> None:
            if self.next_tokens_are_prompt or self.starts:
                super().put(value)  # type: ignore[no-untyped-call]
                return
            self.held_ids += value.tolist()
            if len(self.held_ids) > longest and stops.lead not in tokenizer.decode(self.held_ids[-longest:]):
                return  # still thinking
            text = tokenizer.decode(self.held_ids).rstrip("\ufffd")
            if (before := stops.before(text)) is None:
                return
            self.starts = True
            if before:
                self.on_finalized_text(text[before:])
            else:
                super().put(torch.tensor(self.held_ids))  # type: ignore[no-untyped-call]

        def end(self) -> None:
            if not self.starts:  # an answer that ends before that
                super().put(torch.tensor(self.held_ids))  # type: ignore[no-untyped-call]
            super().end()  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if self.ended:
                return
            text, self.ended = _before(self.held + text, ends)
            if strip and not self.begun:
                text = text.lstrip()
            # what may become an end, and trailing white space, waits for more text
            kept = text[: len(text) - (0 if stream_end or self.ended else _begun(text, ends))]
            kept = kept.rstrip() if strip else kept
            text, self.held = kept, text[len(kept) :]
            self.begun |= bool(text)
            write(text)

    return _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
