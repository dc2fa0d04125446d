"""Speech recognition: write down what is said, or what it means in English, with Whisper or another encoder-decoder.

A row: ``{"audio": "clips/1.wav", "text": "Please enter your password."}``. Sounds are read with soundfile, and brought
to the rate that the model hears with soxr, when a batch needs them (arXiv:2212.04356).
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.prompts.config import max_positions
from peftcli.data.findings import Finding, Records
from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError, ModelError
from peftcli.models import tokens
from peftcli.models.open import OpenBase
from peftcli.tasks import TRANSCRIPTS, settings, whisper
from peftcli.tasks.base import (
    Batch,
    Loss,
    PredictOptions,
    Task,
    in_batches,
    model_inputs,
    on_device,
    refuse_unread,
    table_of,
)
from peftcli.tasks.files import FILE_COLUMNS
from peftcli.tasks.findings import SOUND as FINDINGS
from peftcli.tasks.parts import Parts, RowScore, join, loss_parts
from peftcli.tasks.scores import as_computed
from peftcli.tasks.shown import Description, Facts, Shown, Text
from peftcli.tasks.sounds import (
    AUDIO,
    FRAMES,
    PACKAGES,
    describe_lengths,
    facts_of,
    features_of,
    noise,
    read_clip,
    samples_of,
)
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.generated import text_metrics, text_parts, with_texts
from peftcli.tasks.text.language_model import tokenizer_fingerprint
from peftcli.tasks.text.token_ids import losses_of, padded, token_loss
from peftcli.tasks.text.token_text import TokenRenderer

TOO_LONG = "longer than the model hears at once"
_SILENT = 1
_TIME = re.compile(r"<\|\d+\.\d+\|>")
_MODELS = ("moonshine", "moonshine_streaming", "speech-encoder-decoder", "speech_to_text", "speecht5", "whisper")
"""Types of models that hear in an encoder, and whose answers begin with no prompt, or Whisper's."""


class SpeechRecognition(Task[settings.SpeechRecognitionSettings]):
    """The task ``speech_recognition``."""

    name = "speech_recognition"
    arguments = ("audio",)
    columns: ClassVar = {
        **FILE_COLUMNS,
        "labels": Column(),
        "text": Column("str"),
    }
    unit = "frames"
    sums_targets = True
    identity = ("digest",)
    label_columns = ("labels",)
    findings_of_flags: ClassVar = {"silent_clips": _SILENT}
    reads_files = True
    lower_is_better = ("loss", "wer", "cer")
    reports = ("loss", "wer", "cer")
    main_metric = "wer"
    advice: ClassVar = {TOO_LONG: FINDINGS["clips_too_long"].advice}
    versions = ("transformers", "tokenizers", "soundfile")
    packages: ClassVar = {**PACKAGES, "jiwer": "audio"}
    input_packages: ClassVar = PACKAGES

    def __init__(self, settings: settings.SpeechRecognitionSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        self.check_base()

    def check_base(self) -> None:
        """Check that the base model is of a kind that the task trains, and the settings that they are of that kind.

        Raises:
            ModelError: the model is of another kind.
            DataError: a setting is for another kind of model.
        """
        if (kind := self.base.config.model_type) not in _MODELS:
            name = self.base.name
            message = f"{name} is of type {kind}, which this task does not train: it knows Whisper's prompts alone"
            hint = "choose Whisper, Moonshine, Speech2Text, SpeechT5, a speech-encoder-decoder, or a CTC model"
            raise ModelError(message, key="base_model", hint=hint)
        refuse_unread(self.settings, ("vocabulary",), "is a setting of CTC models, as wav2vec2")

    @cached_property
    def extractor(self) -> Any:
        """What makes the model's inputs from samples."""
        if not hasattr(self.processor, "feature_extractor"):
            raise DataError(f"{self.base.name} has no processor of sound and text", key="base_model")
        return self.processor.feature_extractor

    @property
    def tokenizer(self) -> Any:
        """What makes tokens of a text."""
        return self.processor.tokenizer

    @property
    def rate(self) -> int:
        """Samples of a second that the model hears."""
        return int(self.extractor.sampling_rate)

    @property
    def longest(self) -> float:
        """Seconds that it hears at once: Whisper 30, other models what there is memory for."""
        return getattr(self.extractor, "n_samples", math.inf) / self.rate

    @property
    def at_once(self) -> float:
        """Seconds that it hears at once in ``predict``."""
        return self.longest

    @property
    def positions(self) -> int | None:
        """Tokens of an answer at most."""
        return getattr(self.base.config, "max_target_positions", None)

    @property
    def is_whisper(self) -> bool:
        """Whether answers begin with tokens for language and mode."""
        return hasattr(self.tokenizer, "set_prefix_tokens")

    @cached_property
    def generation(self) -> Any:
        """How answers are generated: as the base model says, and in the language and the mode of the settings.

        Raises:
            DataError: the settings do not fit the model.
        """
        from transformers import GenerationConfig

        if self.base.file("generation_config.json"):
            found: Any = GenerationConfig.from_pretrained(self.base.folder)
        else:
            found = GenerationConfig.from_model_config(self.base.config)
        if found.max_length is None and found.max_new_tokens is None:
            found.max_length = self.positions or max_positions(self.base.config.get_text_config(decoder=True))
        found.num_beams = self.settings.num_beams
        if self.is_whisper:
            whisper.complete(found, self.base, self.tokenizer.get_vocab(), self.settings)
        else:
            refuse_unread(self.settings, whisper.SETTINGS, "is a setting of Whisper models")
        return found

    @cached_property
    def prefix(self) -> list[int]:
        """The tokens of each answer before its text, without the one that starts the decoder."""
        spoken = self.generation  # which refuses settings that do not fit
        return whisper.prefix(spoken) if self.is_whisper else []

    @cached_property
    def prompt(self) -> list[int]:
        """The tokens that the decoder reads before the one that starts it."""
        return whisper.prompt(self.processor, self.base, self.settings.prompt) if self.settings.prompt else []

    def fingerprint(self) -> dict[str, Any]:
        return {
            "limits": [self.rate, str(self.longest), self.positions],
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "prefix": self.prefix,
            "prompt": self.prompt,
        }

    def record_findings(self, records: Records) -> list[Finding]:
        too_long = records.findings(FINDINGS["clips_too_long"], records.with_outcome(TOO_LONG))
        return too_long + super().record_findings(records)

    def read(self, table: Table, *, labelled: bool = True) -> Reader:
        return table.reader(
            "speech",
            optional=() if labelled else ("text",),
            audio=AUDIO,
            text=TRANSCRIPTS,
        )

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        text = reader.text(row, "text", blank=False)
        if bool(_TIME.search(text)) != self.settings.timestamps and self.is_whisper:
            message = "has no times such as <|0.00|>" if self.settings.timestamps else "has times such as <|0.00|>"
            hint = f"task.timestamps is {str(self.settings.timestamps).lower()}."
            raise row.place.error(message, key=reader.names["text"], hint=hint)
        return self._encode_sound(row, reader, text, self._labels(text, row, reader))

    def _labels(self, text: str, row: Row, reader: Reader) -> list[int]:
        """The tokens that the decoder is trained to say. It starts by itself: the model shifts them."""
        end = self.tokenizer.eos_token_id
        if self.is_whisper:
            found = [*self.prefix, *self.tokenizer(text, add_special_tokens=False)["input_ids"], end]
        else:
            found = list(self.tokenizer(text)["input_ids"])
            found = found[found[:1] == [self.generation.decoder_start_token_id] :]
            found += [] if found[-1:] == [end] else [end]
        if self.positions is not None and len(found) + len(self.prompt) > self.positions:
            more = f", beside the {len(self.prompt)} of task.prompt" if self.prompt else ""
            message = f"has {len(found)} tokens; the model can say {self.positions - len(self.prompt)}{more}"
            raise row.place.error(message, key=reader.names["text"], hint="Cut clip and text into pieces.")
        return found

    def _encode_sound(self, row: Row, reader: Reader, text: str = "", labels: Sequence[int] = ()) -> Outcome:
        """The example of a row, whose sound is read to the end if the model can hear it."""
        clip = read_clip(row, reader, self.longest if labels else math.inf)
        if labels and clip.samples > self.longest * clip.rate:
            return Outcome(reason=TOO_LONG, size=clip.size)
        arrays = {**clip.file.arrays(), "labels": labels, "text": text}
        flags = _SILENT if clip.is_silent else 0
        return Outcome([Example(arrays, clip.size, len(labels))], size=clip.size, flags=flags)

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        batch = self._features([samples_of(each, self.rate) for each in examples])
        labels = [each.arrays["labels"] for each in examples]
        batch["labels"] = padded(labels, IGNORED)  # the end, which pads, counts
        if self.prompt:
            batch |= self._after_prompt(labels)
        return batch if training else batch | {"_texts": [each.arrays["text"] for each in examples]}

    def _after_prompt(self, labels: Sequence[Sequence[int]]) -> Batch:
        """What the decoder reads and says where a prompt, which does not count, precedes its start."""
        read = [*self.prompt, self.base.config.decoder_start_token_id]
        return {
            "decoder_input_ids": padded([[*read, *row[:-1]] for row in labels], self.tokenizer.pad_token_id),
            "labels": padded([[IGNORED] * len(self.prompt) + list(row) for row in labels], IGNORED),
        }

    def _features(self, sounds: Sequence[np.ndarray], *, whole: bool = False) -> Batch:
        """What the model hears; with ``whole`` also what is beyond its limit."""
        limited = math.isfinite(self.longest) and not whole
        options: dict[str, Any] = {"padding": "max_length" if limited else "longest", "truncation": limited}
        return features_of(self.extractor, sounds, return_attention_mask=True, **options)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        inputs = as_computed(model, model_inputs(batch))
        logits, counts = model(**inputs, use_cache=False).logits, batch["labels"] != IGNORED
        found = token_loss(losses_of(logits[counts], batch["labels"][counts]))
        heard = {name: value for name, value in inputs.items() if name not in ("labels", "decoder_input_ids")}
        return with_texts(found, batch.get("_texts"), lambda: map(self._text_of, self._generate(model, heard).tolist()))

    def _generate(self, model: Any, inputs: Batch, **options: Any) -> Any:
        if self.prompt:
            options["prompt_ids"] = torch.tensor(self.prompt, device=inputs["input_features"].device)
        return model.generate(**inputs, **options)

    def _text_of(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def constant_metrics(self, view: View) -> dict[str, float]:
        return {"wer": 1.0}  # without a word

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        rates = text_metrics(("wer", "cer"), self._pairs(outputs))
        if self.settings.normalize_text and self._letters_are_words:
            rates["cer"] = rates["wer"]
        return {"loss": float(sums["loss"]) / num_targets, **rates}

    def _pairs(self, outputs: Sequence[Any]) -> list[tuple[str, str]]:
        """What was said and what the model heard, as error rates compare them."""
        return [(self._compared(wanted), self._compared(found)) for wanted, found in outputs]

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        pairs = self._pairs([row.outputs[0] for row in rows])
        names = ("wer",) if self.settings.normalize_text and self._letters_are_words else ("cer", "wer")
        found = join(loss_parts(rows), text_parts(names, pairs))
        if "cer" in names:
            return found

        def metrics_of(sums: np.ndarray) -> dict[str, np.ndarray]:
            rates = found.metrics_of(sums)
            return rates | {"cer": rates["wer"]}

        return replace(found, metrics_of=metrics_of)

    def _compared(self, text: str) -> str:
        """A text as error rates compare it, without times."""
        text = _TIME.sub(" ", text)
        return " ".join((self._normaliser(text) if self.settings.normalize_text else text).split())

    @property
    def _letters_are_words(self) -> bool:
        """Whether a normalised text has a blank after each letter."""
        return self.is_whisper and whisper.letters_are_words(self.generation)

    @cached_property
    def _normaliser(self) -> Callable[[str], str]:
        return whisper.normaliser(self.tokenizer, self.generation if self.is_whisper else None)

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """Answer rows in their order; those of similar size share a batch, and one that is too long stands alone."""
        reader = self.read(table_of(rows, options.columns), labelled=False)
        examples = [self._encode_sound(row, reader).examples[0] for row in rows]
        limit, answers = self.at_once * FRAMES, partial(self._answers, model)
        short = iter(in_batches([each for each in examples if each.size <= limit], options.batch_size, answers))
        long = iter(in_batches([each for each in examples if each.size > limit], 1, answers))
        yield from (next(short if each.size <= limit else long) for each in examples)

    @torch.inference_mode()
    def _answers(self, model: Any, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """What ``predict`` says of examples; of one that is too long, what is said in all of it."""
        long = examples[0].size > self.longest * FRAMES
        batch = self._features([samples_of(each, self.rate) for each in examples], whole=long)
        inputs = as_computed(model, on_device(batch, next(model.parameters()).device))
        if not self.settings.timestamps:
            found = self._generate(model, inputs, **({"return_timestamps": True} if long else {}))
            return [{"text": self._text_of(ids)} for ids in found.tolist()]
        # a text of several parts does not say where each begins: its times are those within its part
        found = self._generate(model, inputs, return_timestamps=True, return_segments=True)
        both = zip(found["sequences"].tolist(), found["segments"], strict=True)
        return [{"text": self._text_of(ids), "chunks": [*map(self._chunk, parts)]} for ids, parts in both]

    def _chunk(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """What is said from one second to another.

        Where what was heard at once is one part, transformers has it begin there, whatever its own first time is.
        """
        step, ids = self.extractor.chunk_length / self.base.config.max_source_positions, part["tokens"].tolist()
        zero = self.generation.no_timestamps_token_id + 1
        start, end = (float(part[name]) for name in ("start", "end"))
        if len(own := [(each - zero) * step for each in ids if each >= zero]) > 1:
            start = end - own[1] + own[0]
        return {
            "timestamp": [round(start, 2), round(end, 2)],
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
        }

    def show(self, example: Example) -> Shown:
        ids, seconds = np.asarray(example.arrays["labels"]).tolist(), example.size / FRAMES
        facts = facts_of(example)
        facts |= {"prompt": self.settings.prompt} if self.settings.prompt else {}
        transcript = Text(TokenRenderer(self.tokenizer).render(ids), "transcript")
        return Shown([Facts(facts), transcript], {"labels": ids, "text": example.arrays["text"], "seconds": seconds})

    def describe(self, view: View) -> Description:
        return describe_lengths(view.sizes)

    def probe(self) -> Batch:
        """Two clips of noise, and random tokens."""
        random = torch.Generator().manual_seed(0)
        sounds = self._features(noise(self.rate, random))
        return {**sounds, "decoder_input_ids": torch.randint(len(self.tokenizer), (2, 8), generator=random)}

    def fit_model(self, model: Any, config: AdapterConfig | None) -> list[str]:
        """Let the model generate in the language and mode of the settings."""
        logging.getLogger("transformers.generation.utils").setLevel(logging.ERROR)  # of what Whisper itself passes on
        model.generation_config = copy.deepcopy(self.generation)
        if getattr(model.config, "forced_decoder_ids", None) is not None:
            model.config.forced_decoder_ids = None
        return []

    def save(self, folder: Path) -> list[str]:
        self.generation.save_pretrained(folder)
        own = [self.write_task(folder, settings=self.settings, config={}), "generation_config.json"]
        return own + tokens.save_processor(folder, self.processor)


TASK = SpeechRecognition
