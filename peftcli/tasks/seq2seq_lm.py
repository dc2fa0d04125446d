"""Sequence to sequence: turn one text into another with an encoder-decoder (T5, BART).

A row: ``{"prompt": "translate English to German: Thank you.", "completion": "Danke."}``
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from peftcli.data.rows import Table
from peftcli.errors import DataError, ModelError
from peftcli.models.tokens import save_processor
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss, model_inputs
from peftcli.tasks.shown import Text
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.encode import Seq2SeqEncoder
from peftcli.tasks.text.formats import ExampleReader
from peftcli.tasks.text.generation import has_languages
from peftcli.tasks.text.language_model import LanguageModel, target_losses
from peftcli.tasks.text.token_ids import inner_model, losses_of, token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.models.open import OpenBase


class Seq2SeqLM(LanguageModel[settings.Seq2SeqLMSettings]):
    """The task ``seq2seq_lm``."""

    name = "seq2seq_lm"
    encoder = Seq2SeqEncoder
    targets_in_size = False
    identity: ClassVar = ("input_ids", "labels")

    def __init__(self, settings: settings.Seq2SeqLMSettings, processor: Any, base: OpenBase):
        if not base.config.is_encoder_decoder:
            hint = "name an encoder-decoder, as T5 or BART; decoders of texts are for the task causal_lm"
            raise ModelError(f"{base.name} is not an encoder-decoder", key="base_model", hint=hint)
        super().__init__(settings, processor, base)
        _set_languages(processor, settings)

    def read(self, table: Table) -> ExampleReader:
        _require_languages(self.processor, self.settings)
        return super().read(table)

    def save_processor(self, folder: Path) -> list[str]:
        if self.settings.target_language is None:
            return super().save_processor(folder)
        return save_processor(folder, self.processor)  # which keeps the languages

    def texts(self, ids: list[int], labels: list[int]) -> list[Text]:
        source = self.renderer.render(ids, [IGNORED] * len(ids))
        return [Text(source, "input"), Text(self.renderer.render(labels), "answer")]

    def loss_of_targets(self, model: nn.Module, batch: Batch) -> Loss:
        inputs = model_inputs(batch)
        labels = inputs["labels"]
        given = {name: value for name, value in inputs.items() if name != "labels"}
        shift = getattr(inner_model(model), "prepare_decoder_input_ids_from_labels", None)
        if shift is not None:
            read = shift(labels.clone())  # FSMT changes what it is given
            return token_loss(target_losses(model, given | {"decoder_input_ids": read}, labels))
        logits, counts = model(**inputs, use_cache=False).logits, labels != IGNORED
        return token_loss(losses_of(logits[counts], labels[counts]))


def _set_languages(tokenizer: PreTrainedTokenizerBase, settings: settings.Seq2SeqLMSettings) -> None:
    """Let a tokenizer write sources and targets in the languages of the settings, where they name them."""
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


def _require_languages(tokenizer: PreTrainedTokenizerBase, settings: settings.Seq2SeqLMSettings) -> None:
    """Check that the settings name the languages of a tokenizer that has several."""
    for name in ("source_language", "target_language"):
        if has_languages(tokenizer) and getattr(settings, name) is None:
            message = "the base model's tokenizer has several languages, and the recipe names none of them here"
            raise DataError(message, key=f"task.{name}", hint="codes are written as de_DE, deu_Latn or de")


TASK = Seq2SeqLM
