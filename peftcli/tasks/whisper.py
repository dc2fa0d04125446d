"""What is Whisper's own in speech recognition (arXiv:2212.04356): language and mode, prompts, and compared texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from peftcli.errors import DataError

if TYPE_CHECKING:
    from peftcli.models.open import OpenBase
    from peftcli.tasks import settings

SETTINGS = ("language", "mode", "timestamps", "prompt")
"""Settings of Whisper models alone."""
_NO_BLANKS = ("zh", "yue", "ja", "th", "lo", "my")
"""Languages written without blanks between words, in which Whisper's authors compare letters (appendix C)."""
_ALL_LANGUAGES = 51865
"""Tokens of the smallest model that knows several languages."""


def complete(
    generation: Any, base: OpenBase, tokens: Mapping[str, int], given: settings.SpeechRecognitionSettings
) -> None:
    """Complete a generation config for the settings. Those of old models name no tokens and force some.

    Raises:
        DataError: the settings do not fit the model.
    """
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS, TO_LANGUAGE_CODE

    spoken, key = (given.language or "").lower(), "task.language"
    code = TO_LANGUAGE_CODE.get(spoken, spoken)
    several = getattr(generation, "is_multilingual", None)
    if several is None:
        several = bool(spoken) or base.config.vocab_size >= _ALL_LANGUAGES
    generation.is_multilingual, generation.return_timestamps = several, given.timestamps
    generation.forced_decoder_ids = None  # they would stand against language and mode
    generation.language = generation.task = None
    generation.no_timestamps_token_id = tokens["<|notimestamps|>"]
    if not several:
        if code not in ("", "en") or given.mode == "translate":
            key = key if code not in ("", "en") else "task.mode"
            raise DataError(f"{base.name} knows English alone", key=key, hint="leave it out")
        return
    generation.lang_to_id = {name: tokens[name] for each in LANGUAGES if (name := f"<|{each}|>") in tokens}
    generation.task_to_id = {name: tokens[f"<|{name}|>"] for name in TASK_IDS if f"<|{name}|>" in tokens}
    if not spoken:
        message = f"is missing: {base.name} knows {len(generation.lang_to_id)} languages"
        raise DataError(message, key=key, hint="name the one that is spoken, as in task.language: en")
    if f"<|{code}|>" not in generation.lang_to_id:
        raise DataError(f"{base.name} knows no language {spoken!r}", key=key)
    generation.language, generation.task = code, given.mode


def prefix(generation: Any) -> list[int]:
    """Return the tokens of each answer before its text, without the one that starts the decoder."""
    language, found = generation.language, list[int]()
    if language:
        found = [generation.lang_to_id[f"<|{language}|>"], generation.task_to_id[generation.task]]
    return found + ([] if generation.return_timestamps else [generation.no_timestamps_token_id])


def prompt(processor: Any, base: OpenBase, text: str) -> list[int]:
    """Return the tokens that the decoder reads before the one that starts it.

    Raises:
        DataError: the text is not plain, or has more tokens than Whisper has learnt to read.
    """
    try:
        found = [int(each) for each in processor.get_prompt_ids(text)]
    except ValueError:
        raise DataError("is not plain text: it names a special token", key="task.prompt") from None
    longest = base.config.max_target_positions // 2 - 1  # of which Whisper has seen earlier text in training
    if len(found) > longest:
        message = f"has {len(found)} tokens; {base.name} reads {longest} at most before an answer"
        raise DataError(message, key="task.prompt")
    return found


def letters_are_words(generation: Any) -> bool:
    """Return whether a normalised text has a blank after each letter."""
    return generation.task != "translate" and generation.language in _NO_BLANKS


def normaliser(tokenizer: Any, generation: Any) -> Callable[[str], str]:
    """Return what brings texts into the form that Whisper's authors compare; ``generation`` is None of other models."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    if generation and (generation.language in (None, "en") or generation.task == "translate"):
        return EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    return BasicTextNormalizer(split_letters=bool(generation) and letters_are_words(generation))
