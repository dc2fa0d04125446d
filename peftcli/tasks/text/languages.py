"""Languages of encoder-decoders that translate between many, as mBART, NLLB and M2M100: their tokenizers' codes."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from peftcli.errors import DataError
from peftcli.tasks.settings import Seq2SeqLMSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_MARKS = 2
"""Tokens of a target without text: its language and EOS."""


def set_languages(tokenizer: PreTrainedTokenizerBase, settings: Seq2SeqLMSettings) -> None:
    """Let a tokenizer write sources and targets in the languages of the settings, where they name them.

    Raises:
        DataError: the tokenizer knows no such language.
    """
    for name, attribute in (("source_language", "src_lang"), ("target_language", "tgt_lang")):
        code = getattr(settings, name)
        if code is None:
            continue
        if not has_languages(tokenizer):
            raise DataError("the base model's tokenizer has no languages", key=f"task.{name}", hint="leave it out")
        others = tokenizer.special_tokens_map.values()
        known = [token for token in tokenizer.all_special_tokens if token not in others]
        written = getattr(tokenizer, "lang_code_to_token", {}).get(code, code)  # M2M100 writes __de__ for de
        if written not in known:
            near = difflib.get_close_matches(code, [token.strip("_") for token in known], n=3)
            hint = f"closest: {', '.join(near)}" if near else "codes are written as de_DE, deu_Latn or de"
            raise DataError(f"{code!r} is not a language of the base model's tokenizer", key=f"task.{name}", hint=hint)
        setattr(tokenizer, attribute, code)


def require_languages(tokenizer: PreTrainedTokenizerBase, settings: Seq2SeqLMSettings) -> None:
    """Check that the settings name the languages of a tokenizer that has several.

    Raises:
        DataError: one is missing.
    """
    for name in ("source_language", "target_language"):
        if has_languages(tokenizer) and getattr(settings, name) is None:
            message = "the base model's tokenizer has several languages, and the recipe names none of them here"
            raise DataError(message, key=f"task.{name}", hint="codes are written as de_DE, deu_Latn or de")


def has_languages(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer marks texts with their language, each by one token."""
    return hasattr(type(tokenizer), "src_lang") and len(tokenizer(text_target="")["input_ids"]) == _MARKS


def answer_start(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The options of ``generate`` by which an answer is in the tokenizer's target language, if it has one."""
    code = getattr(tokenizer, "tgt_lang", None)
    if code is None or not has_languages(tokenizer):
        return {}
    first, last = tokenizer(text_target="")["input_ids"]  # the language and EOS, in any order
    # mBART's targets end with their language, with which its decoder starts
    return {"forced_bos_token_id": first} if last == tokenizer.eos_token_id else {"decoder_start_token_id": last}
