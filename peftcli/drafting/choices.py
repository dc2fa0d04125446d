"""Method, length, batch, passes and split of a drafted recipe, each with its reason."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

from peftcli.data.rows import count_of
from peftcli.drafting.bases import AUDIO, DIFFUSION, PICTURE_TOKENS, VISION, Base, Proposal, memory_of
from peftcli.drafting.facts import ColumnFacts, count_words
from peftcli.drafting.language import language_of
from peftcli.drafting.look import Look
from peftcli.drafting.readings import Found
from peftcli.drafting.write import Line
from peftcli.system.memory import free_memory

_LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
_WINDOW = 384
"""The usual length of a question with a part of its context."""
_PASSES = ((100, 10), (1000, 5), (20_000, 3), (100_000, 2))
"""Pairs of a number of rows and the passes over data of at most that many rows."""
_WRITERS = ("causal_lm", "seq2seq_lm", "preference", "reward", "image_text_to_text")
_MEDIA = (VISION, AUDIO, DIFFUSION)
_KEY_NAMES = (
    *("user", "speaker", "author", "patient", "session", "conversation", "dialog", "doc", "document", "thread"),
    *("group", "subject", "customer", "client", "person", "movie", "product", "asin", "article", "paper", "case"),
    *("family", "chat"),
)
_MAX_GROUP = 0.2


def language_in(found: Found, look: Look) -> str | None:
    """Return the language of the texts that are read, if it is known."""
    texts = [text for name in found.names() for text in look.columns[name].texts if not look.columns[name].media]
    if not texts:
        turns = (turn for name in found.names() for turn in look.columns[name].items if isinstance(turn, dict))
        texts = list(filter(None, map(_text_of, turns)))
    return language_of(texts)


def tokens_of(found: Found, look: Look, language: str | None, positions: int | None) -> tuple[int, str, int] | None:
    """Return the length to which rows are cut, the reason, and a long row's length; None for pictures and sounds."""
    if found.reading.families[0] in _MEDIA:
        return None
    facts = [look.columns[name] for name in found.names()]
    words = [_long(each) for each in facts]
    if found.reading.task == "feature_extraction":
        longest = max(words)
    elif found.reading.task in ("preference", "reward"):
        answers = [_long(look.columns[str(name)]) for role, name in found.columns.items() if role != "prompt"]
        longest = max(answers) + sum(words) - sum(answers)
    else:
        longest = sum(words)
    needed, pictures = needed_tokens(found, longest, language), sum(each.most_pictures for each in facts)
    needed += PICTURE_TOKENS * pictures
    length = next((each for each in _LENGTHS if each >= needed), _LENGTHS[-1])
    if "context" in found.columns:
        length = max(length, _WINDOW)  # room for windows of the context, which overlap
    length = min(length, _LENGTHS[-1] if pictures else 2048 if found.reading.task in _WRITERS else 1024)
    seen = f" and {count_of(pictures, 'picture')}, of {PICTURE_TOKENS:,} tokens at most" if pictures else ""
    why = f"99 of 100 rows have at most {longest:,} words{seen}; longer ones are cut, and counted"
    if positions and length > positions:
        return positions, f"{why}; the base model reads {positions:,} tokens", min(needed, positions)
    return length, why, min(needed, length)


def needed_tokens(found: Found, words: int, language: str | None) -> int:
    """Estimate the tokens of a text of this many words, with those that a template adds."""
    return int(words * (1.4 if language == "en" else 2)) + 16 + 16 * (found.reading.task in _WRITERS)


def _long(facts: ColumnFacts) -> int:
    """Words of a column's value that 99 of 100 do not exceed; of turns, of all their texts."""
    if facts.is_text and facts.parsed_list is None:
        return facts.long_words
    sizes = []
    for each in facts.parsed_list or []:
        texts = [_text_of(turn) if isinstance(turn, dict) else str(turn) for turn in each]
        sizes.append(sum(map(count_words, texts)) + 4 * sum(isinstance(turn, dict) for turn in each))
    sizes.sort()
    return sizes[min(len(sizes) - 1, int(len(sizes) * 0.99))] if sizes else 0


def _text_of(turn: dict[str, Any]) -> str:
    """The text of a turn: its content, or those parts of it that are texts."""
    content = turn.get("content", turn.get("value"))
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(str(part["text"]) for part in parts if isinstance(part, dict) and part.get("text"))


def batch_of(found: Found, tokens: int) -> tuple[int, str]:
    """Return the rows of a micro-batch, and why."""
    if found.reading.task == "feature_extraction":
        return 32, "each row's negatives are the other rows of its batch"
    if found.reading.families[0] == DIFFUSION:
        return 1, "a picture at a time, which takes the least memory"
    if found.reading.families[0] in _MEDIA:
        return 8, "the usual choice; raise it while memory is left"
    size = 16 if tokens <= 256 else 8 if tokens <= 512 else 4
    if found.reading.task in _WRITERS:
        size //= 2
    return size, f"rows of up to {tokens:,} tokens"


def accumulation_of(found: Found, batch: int) -> int:
    """Return how many micro-batches make a step of 8 rows of a language model."""
    return max(1, 8 // batch) if found.reading.task in _WRITERS else 1


def training_lines(found: Found, look: Look, tokens: int, rows: int, output_dir: str, has_eval: bool) -> list[Line]:
    """Return the settings of the section ``training``."""
    batch, why = batch_of(found, tokens)
    if found.reading.task == "feature_extraction" and rows < batch:
        batch = max(2, rows)
    steps = accumulation_of(found, batch)
    passes = next((number for most, number in _PASSES if rows <= most), 1)
    per_pass = math.ceil(rows / (batch * steps))
    lines = [
        Line("training.output_dir", output_dir, "the run folder: adapter, logs, checkpoints"),
        Line("training.num_train_epochs", passes, f"{count_of(rows, 'row')}: {count_of(per_pass * passes, 'step')}"),
        Line("training.learning_rate", "auto", "the measured rate of the method and the task"),
        Line("training.per_device_train_batch_size", batch, why),
    ]
    if steps > 1:
        lines.append(Line("training.gradient_accumulation_steps", steps, f"{batch * steps} rows a step"))
    if has_eval:
        lines.append(Line("training.load_best_model_at_end", True, "keep the adapter of the best evaluation"))
    return lines


def method_lines(found: Found, base: Base | None) -> list[Line]:
    """Return the settings of the section ``method``."""
    if found.reading.families[0] == DIFFUSION:
        return [
            Line("method.type", "lora", "the usual choice"),
            Line("method.r", 8, "size of the adapter; without target_modules the attention is adapted"),
            Line("method.lora_alpha", 8, "its strength: equal to r"),
        ]
    convolutions = base.convolutions if base else None
    reason = "its convolutions: the model has no linear layers" if convolutions else "every linear layer but the head"
    return [
        Line("method.type", "lora", "the usual choice; `peftcli info methods` lists the others"),
        Line("method.r", 16, "size of the adapter"),
        Line("method.lora_alpha", 32, "its strength: twice r"),
        Line("method.target_modules", convolutions or "all-linear", reason),
    ]


def fraction_of(rows: int) -> tuple[float, str]:
    """Return the share of rows to hold out for evaluation, and why."""
    fraction = 0.2 if rows < 200 else 0.1 if rows <= 20_000 else max(0.01, round(2000 / rows, 2))
    held = max(1, round(rows * fraction))
    return fraction, f"{held:,} of {rows:,} rows; equal and nearly equal rows stay together, classes keep their share"


def group_of(found: Found, look: Look) -> tuple[str, str] | None:
    """Return the column that groups rows, such as a user's name, with the reason; None if no column does.

    Rows of one group must all be trained on or all be held out.
    """
    for name, keys in look.keys.items():
        plain = name.strip().lower().replace(" ", "_").replace("-", "_")
        named = any(plain in (each, f"{each}_id", f"{each}id", f"{each}_name") for each in _KEY_NAMES)
        kinds = len(keys.counts)
        if not named or name in found.names() or not keys.is_whole or kinds < 10 or keys.rows < 0.9 * look.rows:
            continue
        most = max(keys.counts.values())
        if kinds <= 0.9 * keys.rows and most <= _MAX_GROUP * keys.rows:
            return name, f"{look.rows:,} rows share {kinds:,} values, which stay on one side"
    return None


def task_settings(found: Found, look: Look, base: Base | None, language: str | None) -> dict[str, tuple[Any, str]]:
    """Return the task's settings that the data decide, each with its reason."""
    settings = {
        name: (value, _REASONS.get(name) or "the label is " + _KINDS.get(value, str(value)))
        for name, value in found.settings.items()
    }
    masks = found.columns.get("annotation")
    if isinstance(masks, str) and (count := binary_masks(look.columns[masks])):
        settings["binary_masks"] = (True, f"all pixels of {count_of(count, 'mask')} are 0 or 255")
    label = found.columns.get("label")
    if isinstance(label, str) and found.reading.task.endswith("_classification"):
        facts = look.columns[label]
        if facts.separator and facts.is_text and facts.parsed_list is None:
            settings["problem_type"] = ("multi_label", f"{len(facts.parts):,} names, of which a row may have several")
            settings["label_separator"] = (facts.separator, "stands between the names")
        elif facts.is_fractional:
            settings["problem_type"] = ("regression", facts.described_numbers())
    hears = found.reading.families[0] == AUDIO and "text" in found.columns
    if hears and (base is None or base.knows_languages):
        settings["language"] = (language or "en", "of the transcripts" if language else "not found in the transcripts")
    return settings


def binary_masks(masks: ColumnFacts) -> int:
    """Return how many masks have pixels of 0 and 255 alone; 0 where one has another, or none has 255."""
    from PIL import Image

    seen, count = set[int](), 0
    for value, folder in zip(masks.values[:_MASKS], masks.folders, strict=False):
        with suppress(OSError, ValueError, SyntaxError), Image.open(folder / str(value)) as mask:
            seen |= {at for at, pixels in enumerate(mask.convert("L").histogram()) if pixels}
            count += 1
    return count if 255 in seen <= {0, 255} else 0


_MASKS = 20
"""Masks that are opened."""
_REASONS = {
    "labels": "by their values in the masks",
    "negatives": "the rows have none: an embedding model finds them",
    "miner": "the embedding model",
}
_KINDS = {"kto": "true for good answers, false for bad ones", "regression": "a number"}


def stride_of(found: Found, tokens: int) -> dict[str, tuple[Any, str]]:
    """Return the overlap of windows, where a base model reads less than the usual length."""
    if "context" not in found.columns or tokens >= _WINDOW:
        return {}
    return {"stride": (tokens // 4, f"a quarter of the {tokens:,} tokens that the base model reads")}


def rows_of(look: Look, fraction: float | None) -> int:
    """Return how many rows are trained on."""
    return look.rows - (max(1, round(look.rows * fraction)) if fraction else 0)


def memory_text(model: Proposal, found: Found, tokens: int, rows: int) -> str:
    """Return the memory that a run with a model takes, and what this machine has."""
    need = memory_of(model, rows, tokens, on_gpu=False)
    free = None
    with suppress(ImportError):
        free = free_memory()
    has = f" of {free / 2**30:.1f} free" if free else ""
    return f"about {need / 2**30:.1f} GiB{has}"
