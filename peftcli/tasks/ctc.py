"""Speech recognition with models that label each frame of a sound: CTC (https://doi.org/10.1145/1143844.1143891).

Each output is a letter or the blank, which stands for no letter; what is said are the letters without repetitions and
blanks. Models are wav2vec2, HuBERT and others that ``AutoModelForCTC`` loads. A target is a letter.
"""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Example, Outcome
from peftcli.errors import DataError, ModelError
from peftcli.models import tokens
from peftcli.tasks import settings, whisper
from peftcli.tasks.base import Batch, Loss, Task, model_inputs, on_device, refuse_unread
from peftcli.tasks.scores import as_computed
from peftcli.tasks.settings import CTC_BLANK as BLANK
from peftcli.tasks.shown import Facts, Shown, Text, TokenText
from peftcli.tasks.sounds import FRAMES, facts_of, noise, padded_features, samples_of, windows_of
from peftcli.tasks.speech_recognition import SpeechRecognition
from peftcli.tasks.text.generated import with_texts
from peftcli.tasks.text.token_ids import padded

WORDS = "|"
"""What is between words in a vocabulary."""
_WINDOW, _MARGIN = 28, 4
"""Seconds of a longer clip that ``predict`` hears at once, and of these at either end, which are heard for what is
between them. 20 s and 4 s are whole numbers of every model's frames."""
_MAX_SHOWN = 60
"""Letters that a message names."""


class CTC(SpeechRecognition):
    """The task ``speech_recognition`` for CTC models."""

    instead_of_texts = "hears sounds"

    def check_base(self) -> None:
        written = "is a setting of models that write tokens, as Whisper"
        refuse_unread(self.settings, (*whisper.SETTINGS, "num_beams"), written)
        if "attention_mask" not in self.extractor.model_input_names or self._counter is None:
            kind = self.base.config.model_type
            message = f"{self.base.name} is of type {kind}, of which it is not known how many frames it labels"
            raise ModelError(message, key="base_model", hint="choose wav2vec2, HuBERT, WavLM or W2V-BERT")

    @property
    def extractor(self) -> Any:
        return self.processor

    @cached_property
    def tokenizer(self) -> Any:
        """The vocabulary as transformers' tokenizer."""
        from transformers import Wav2Vec2CTCTokenizer

        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "vocab.json"
            file.write_text(json.dumps({name: number for number, name in enumerate(self.vocabulary)}))
            others = dict.fromkeys(("unk_token", "bos_token", "eos_token"))
            return Wav2Vec2CTCTokenizer(str(file), pad_token=BLANK, word_delimiter_token=WORDS, **others)

    @property
    def at_once(self) -> float:
        return _WINDOW

    # --- the vocabulary -----------------------------------------------------------------------------------------------

    @property
    def needs_scan(self) -> bool:
        return BLANK not in (self.settings.vocabulary or ())

    def scan(self, tables: Iterable[tuple[Table, Iterator[Row]]]) -> settings.SpeechRecognitionSettings:
        """Return the settings with a complete vocabulary: that of the settings, the base model's, or the rows'."""
        if self.settings.vocabulary is None and self.base_vocabulary:
            return replace(self.settings, vocabulary=self.base_vocabulary)
        letters = self.settings.vocabulary or sorted(self._letters_in(tables))
        own = [each for each in dict.fromkeys(letters) if each not in (" ", WORDS)]
        if wrong := [each for each in own if len(each) != 1]:
            raise DataError(f"expected single letters, found {wrong[0]!r}", key="task.vocabulary")
        if not own:
            raise DataError("no training row has a transcript with a letter", key="dataset.train")
        return replace(self.settings, vocabulary=[BLANK, WORDS, *own])

    def _letters_in(self, tables: Iterable[tuple[Table, Iterator[Row]]]) -> set[str]:
        found = set[str]()
        for table, rows in tables:
            reader = self.read(table)
            for row in rows:
                with suppress(DataError):  # which encoding reports
                    if not reader.left_out(row):
                        found.update("".join(reader.text(row, "text", blank=False).split()))
        return found

    @cached_property
    def base_vocabulary(self) -> list[str]:
        """The outputs of a base model that writes letters already, in our names; empty of any other."""
        config = self.base.config
        heard = any(name.endswith("ForCTC") for name in config.architectures or ())
        if not heard or not self.base.file("vocab.json"):
            return []
        tokenizer = self.base.processor("tokenizer")
        names = {number: name for name, number in tokenizer.get_vocab().items()}
        ours = {getattr(tokenizer, "word_delimiter_token", WORDS): WORDS, names.get(config.pad_token_id): BLANK}
        found = [names.get(number, f"<{number}>") for number in range(config.vocab_size)]
        special = {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}
        if any(len(name) != 1 and name not in special and name[:1] != "<" for name in found):
            return []  # pieces of words, or sounds
        return [ours.get(name, name) for name in found]

    @property
    def outputs_are_new(self) -> bool:
        return self.vocabulary != self.base_vocabulary

    @property
    def vocabulary(self) -> list[str]:
        """The model's outputs, in order: those of the settings, which adapters of other tools lack, or the base's."""
        return self.settings.vocabulary or self.base_vocabulary

    @cached_property
    def letters(self) -> Mapping[str, int]:
        """Letters of a transcript -> outputs."""
        return {(" " if name == WORDS else name): number for number, name in enumerate(self.vocabulary)}

    @cached_property
    def blank(self) -> int:
        """The output that stands for no letter. It is what pads, too.

        Raises:
            DataError: neither settings nor base model say what the outputs are.
        """
        if BLANK not in self.vocabulary:
            raise DataError(f"is missing: {self.base.name} does not say what its outputs are", key="task.vocabulary")
        return self.vocabulary.index(BLANK)

    @property
    def found(self) -> str:
        names = [name for name in self.vocabulary if len(name) == 1 and name != WORDS]
        listed = " ".join(names[:_MAX_SHOWN]) + (" ..." if len(names) > _MAX_SHOWN else "")
        return f"vocabulary: {len(names)} letters{'' if self.outputs_are_new else ' of the base model'}: {listed}"

    def spelled(self, text: str) -> str:
        """Return a transcript with single blanks, in upper or lower case if the vocabulary has no other."""
        text, known = " ".join(text.split()), "".join(name for name in self.letters if len(name) == 1)
        for change in (str.upper, str.lower):
            if known != known.swapcase() and known == change(known):
                return change(text)
        return text

    # --- rows ---------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        return {"limits": [self.rate, self._frames_in([1.0, 2.0])]}

    @cached_property
    def _counter(self) -> Any:
        model = self.base.empty_model("AutoModelForCTC", vocab_size=len(self.vocabulary) or 1)
        return getattr(model, "_get_feat_extract_output_lengths", None)

    def frames(self, features: Batch) -> torch.Tensor:
        """Return how many frames the model labels in each sound of a batch, (B,)."""
        found: torch.Tensor = self._counter(features["attention_mask"].sum(-1)).to(torch.long)
        return found

    def _frames_in(self, lengths: Sequence[float]) -> list[int]:
        """Return how many frames the model labels in sounds of these seconds."""
        silence = [np.zeros(round(each * self.rate), np.float32) for each in lengths]
        return [int(self.frames(self._features([each]))[0]) for each in silence]

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        text = self.spelled(reader.text(row, "text", blank=False))
        labels = self._labels(text, row, reader)
        found = self._encode_sound(row, reader, text, labels)
        (example,) = found.examples
        heard = int(self.frames(self._features([samples_of(example, self.rate)]))[0])
        needed = len(labels) + sum(one == other for one, other in itertools.pairwise(labels))
        if needed > heard:
            message = f"needs {needed} frames, and {example.size / FRAMES:.2f} s of sound give the model {heard}"
            raise row.place.error(
                message, key=reader.names["text"], hint="Check whether clip and text belong together."
            )
        return found

    def _labels(self, text: str, row: Row, reader: Reader) -> list[int]:
        """The outputs for the letters of a transcript."""
        if unknown := [each for each in dict.fromkeys(text) if each not in self.letters]:
            message = f"has letters that the vocabulary lacks: {' '.join(unknown[:_MAX_SHOWN])}"
            hint = "Write the text with others, or name all letters in task.vocabulary."
            raise row.place.error(message, key=reader.names["text"], hint=hint)
        return [self.letters[each] for each in text]

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        batch = self._features([samples_of(each, self.rate) for each in examples])
        labels = [each.arrays["labels"] for each in examples]
        batch |= {"_labels": padded(labels, self.blank), "_letters": torch.tensor([len(each) for each in labels])}
        batch["_frames"] = self.frames(batch)
        return batch if training else batch | {"_texts": [each.arrays["text"] for each in examples]}

    def _features(self, sounds: Sequence[np.ndarray], *, whole: bool = False) -> Batch:
        return padded_features(self.extractor, sounds)

    def probe(self) -> Batch:
        return self._features(noise(self.rate, torch.Generator().manual_seed(0)))

    # --- loss and answers ---------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        logits = model(**as_computed(model, model_inputs(batch))).logits.float()
        frames, letters = batch["_frames"], batch["_letters"]
        with torch.backends.cudnn.flags(enabled=False):  # which takes other labels, and is not deterministic
            losses = nn.functional.ctc_loss(
                logits.log_softmax(-1).transpose(0, 1), batch["_labels"], frames, letters, self.blank, reduction="none"
            )
        # that of a row has no parts: each letter gets as much of it
        each = (losses.detach() / letters).repeat_interleave(letters)
        found = Loss(losses.sum(), {"loss": losses.detach().sum()}, of_targets={"loss": each})
        return with_texts(found, batch.get("_texts"), lambda: map(self.text_of, self._heard(logits, frames)))

    def _heard(self, logits: torch.Tensor, frames: torch.Tensor) -> list[list[int]]:
        """The likeliest output at each frame of each sound."""
        return [row[:count].tolist() for row, count in zip(logits.argmax(-1), frames.tolist(), strict=True)]

    def text_of(self, outputs: Sequence[int]) -> str:
        """Return the text of outputs, frame by frame."""
        kept = [each for each, _ in itertools.groupby(outputs) if each != self.blank]
        names = [self.vocabulary[each] for each in kept]
        text = "".join(" " if name == WORDS else name for name in names if len(name) == 1)
        return " ".join(text.split())

    @torch.inference_mode()
    def _answers(self, model: Any, examples: Sequence[Example]) -> list[dict[str, Any]]:
        if examples[0].size > self.at_once * FRAMES:
            return [{"text": self.text_of([*self._windows(model, examples[0])])}]
        return [{"text": self.text_of(each)} for each in self._outputs(model, map(self._samples, examples))]

    def _samples(self, example: Example) -> np.ndarray:
        return samples_of(example, self.rate)

    def _outputs(self, model: Any, sounds: Iterable[np.ndarray]) -> list[list[int]]:
        batch = self._features(list(sounds))
        logits = model(**as_computed(model, on_device(batch, next(model.parameters()).device))).logits
        return self._heard(logits, self.frames(batch))

    def _windows(self, model: Any, example: Example) -> Iterator[int]:
        """Yield the outputs of a long clip, window by window: of each what is heard between its margins."""
        step = _WINDOW - 2 * _MARGIN
        count = 1 + max(0, -(-(example.size - _WINDOW * FRAMES) // (step * FRAMES)))
        spans = [(at * step, at * step + _WINDOW if at + 1 < count else math.inf) for at in range(count)]
        short, long = self._frames_in([1.0, 1.0 + step])
        margin, kept = round((long - short) * _MARGIN / step), long - short
        for at, samples in enumerate(windows_of(example, self.rate, spans)):
            (outputs,) = self._outputs(model, [samples])
            start = margin if at else 0
            yield from outputs[start : margin + kept if at + 1 < count else None]

    # --- what people and files get ------------------------------------------------------------------------------------

    def show(self, example: Example) -> Shown:
        labels = np.asarray(example.arrays["labels"]).tolist()
        text, seconds = example.arrays["text"], example.size / FRAMES
        pieces = [TokenText(letter, (number,), trained=True) for letter, number in zip(text, labels, strict=True)]
        values = {"labels": labels, "text": text, "seconds": seconds}
        return Shown([Facts(facts_of(example)), Text(pieces, "transcript")], values)

    def fit_model(self, model: Any, config: AdapterConfig | None) -> list[str]:
        return Task.fit_model(self, model, config)

    def save(self, folder: Path) -> list[str]:
        own = [self.write_task(folder, settings=self.settings, config={})]
        own += tokens.save_processor(folder, self.processor)
        return own + tokens.save_processor(folder, self.tokenizer)

    def export(self, folder: Path) -> None:
        """Write the vocabulary beside a merged model."""
        tokens.save_processor(folder, self.tokenizer)


TASK = CTC
