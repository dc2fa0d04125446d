"""What an adapter says to prompts, for a comparison with another program: tokens of the prompts, and of the answers."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftcli.tasks.text.formats import Message
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.prompts import prompt_ids, prompt_text

PROMPTS = (
    "Hello!",
    "What is the capital of Norway?",
    "Write one sentence about rain on a tin roof.",
    "I'd say it's 3:45 p.m.; they've got 12,000 items, haven't they?",
    "def add(a, b):\n    return a + b",
    'for (int i = 0; i < 10; ++i) {\n\tprintf("%d\\n", i);\n}',
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    '{"name": "Ada", "born": 1815, "tags": ["mathematics", null, true]}',
    "A line\n\nand after an empty one, another.\n\n\nThree of them.",
    "Two  blanks,   three    and\ta tab.",
    "1234567890 3.14159 1e-5 0x1F 2026-01-31 50%",
    "Où est la bibliothèque, s'il vous plaît ?",
    "Straße, Übergröße, naïve façade, Dvořák, Łódź",
    "¿Cuántos años tienes? ¡Qué sorpresa!",
    "Привет, как дела?",
    "你好\uff0c世界\uff01今天天气怎么样\uff1f",
    "こんにちは。お元気ですか\uff1f",
    "안녕하세요, 만나서 반갑습니다.",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "The emoji 🙂, 👩‍🚀 and 🇳🇴 are one sign each.",
    "e\u0301 and \u00e9 are two spellings of one letter.",
    "https://example.org/a/b?c=d&e=f#g and name@example.org",
    "ALL CAPITALS, CamelCase, snake_case, kebab-case, antidisestablishmentarianism",
    "“Quoted”, \u2018single\u2019, «guillemets» \u2013 dashes — and an ellipsis…",
)
"""Texts that show how tokenizers and templates differ: numbers, blanks, code, scripts, signs of several bytes."""


_LIKELIEST = 5
"""First tokens that are compared."""


@dataclass(frozen=True)
class Asked:
    """A prompt as the adapter was trained to read it."""

    messages: list[Message] | None
    """The conversation, which the chat template writes; None: a text alone."""
    text: str
    ids: list[int]
    normalised: bool
    """Whether the tokenizer brings letters of several signs into one form first, which some programs do not."""


@dataclass(frozen=True)
class Said:
    """What an adapter says to prompts."""

    asked: list[Asked]
    answers: list[list[int]]
    """Tokens of the greedy answers to the first prompts, their stop tokens included."""
    texts: list[str]
    """The same as texts."""
    stops: list[int]
    """The tokens that end an answer."""
    first: list[dict[int, float]]
    """Of each answer: the likeliest first tokens, and the logarithm of the probability of each."""
    margins: list[list[float]]
    """Of each token of the answers: how much likelier it is than the next likeliest, as logarithms."""


def what_is_said(
    generator: TextGenerator, prompts: Sequence[str] = PROMPTS, answers: int = 6, max_new_tokens: int = 32
) -> Said:
    """Ask an adapter prompts, and let it answer the first ``answers`` of them, one by one."""
    asked = [_asked(generator, prompt) for prompt in prompts]
    settings = GenerationSettings(max_new_tokens=max_new_tokens)
    rows = [each.ids for each in asked[:answers]]
    said = [generator.write([row], settings)[0][0] for row in rows]
    found = [_chances(generator, row, answer.ids) for row, answer in zip(rows, said, strict=True)]
    return Said(
        asked,
        [answer.ids for answer in said],
        [answer.text for answer in said],
        generator.stops,
        [first for first, _ in found],
        [margins for _, margins in found],
    )


def _asked(generator: TextGenerator, prompt: str) -> Asked:
    form = generator.form.ask(prompt)
    text, templated = prompt_text(form, generator.tokenizer, decoder_only=True)
    ids = prompt_ids(text, generator.tokenizer, templated=templated, decoder_only=True)
    inner = getattr(generator.tokenizer, "backend_tokenizer", None)
    changed = bool(inner and inner.normalizer) and unicodedata.normalize("NFC", text) != text
    return Asked(None if isinstance(form, str) else form, text, ids, changed)


@torch.inference_mode()
def _chances(generator: TextGenerator, row: list[int], answer: list[int]) -> tuple[dict[int, float], list[float]]:
    """Return the likeliest first tokens of an answer to a row, and by how much each token is the likeliest."""
    ids = torch.tensor([row + answer], device=generator.model.device)
    logits: Any = generator.model(input_ids=ids).logits
    likeliest = logits[0, len(row) - 1 : -1].float().log_softmax(-1).topk(_LIKELIEST)
    first = dict(zip(likeliest.indices[0].tolist(), likeliest.values[0].tolist(), strict=True))
    margins: list[float] = (likeliest.values[:, 0] - likeliest.values[:, 1]).tolist()
    return first, margins
