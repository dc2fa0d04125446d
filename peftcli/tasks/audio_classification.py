"""Audio classification: put a sound into a class, or into several.

A row: ``{"audio": "clips/1.wav", "label": "bark"}``, or a file in a folder that is named as its class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Example, Outcome, View
from peftcli.models.tokens import save_processor
from peftcli.tasks import settings
from peftcli.tasks.base import Batch, Loss
from peftcli.tasks.classification import LABEL, Classification
from peftcli.tasks.files import FILE_COLUMNS
from peftcli.tasks.scores import as_computed
from peftcli.tasks.shown import Description, Facts, Label, Shown
from peftcli.tasks.sounds import (
    AUDIO,
    FRAMES,
    PACKAGES,
    describe_lengths,
    facts_of,
    noise,
    padded_features,
    read_clip,
    samples_of,
)

_TRUNCATED, _SILENT = 1, 2


class AudioClassification(Classification[settings.AudioClassificationSettings]):
    """The task ``audio_classification``."""

    name = "audio_classification"
    arguments = ("audio",)
    columns: ClassVar = {**FILE_COLUMNS, "label": LABEL}
    unit = "frames"
    identity = ("digest",)
    flags: ClassVar = {"truncated": _TRUNCATED}
    findings_of_flags: ClassVar = {"clips_without_sound": _SILENT}
    packages: ClassVar = {"sklearn": "metrics", **PACKAGES}
    input_packages: ClassVar = PACKAGES
    reads_files = True
    versions = ("soundfile",)

    @property
    def rate(self) -> int:
        """Samples of a second that the model hears."""
        return int(self.processor.sampling_rate)

    @property
    def longest(self) -> float:
        """Seconds of a clip that the model gets, as far as that is limited before its inputs are made."""
        heard = getattr(self.processor, "n_samples", math.inf) / self.rate
        return min(heard, self.settings.max_seconds or math.inf)

    def fingerprint(self) -> dict[str, Any]:
        return {"limit": str(self.longest)}  # the rest of the extractor is for ``collate``

    def input_columns(self, table: Table) -> Mapping[str, Sequence[str]]:
        return {"audio": AUDIO}

    def encode_inputs(self, row: Row, reader: Reader) -> Outcome:
        clip = read_clip(row, reader)
        size = min(clip.size, math.ceil(min(self.longest, clip.seconds) * FRAMES))
        flags = _TRUNCATED * (clip.seconds > self.longest) | _SILENT * clip.is_silent
        return Outcome([Example(clip.file.arrays(), size, 1)], size=clip.size, flags=flags)

    def collate_inputs(self, examples: Sequence[Example]) -> Batch:
        return self._features([samples_of(each, self.rate, end=self.longest) for each in examples])

    def _features(self, sounds: Sequence[np.ndarray]) -> Batch:
        limited = hasattr(self.processor, "n_samples")
        options: dict[str, Any] = {"padding": "max_length" if limited else "longest", "truncation": limited}
        return padded_features(self.processor, sounds, **options)

    def inputs_for(self, model: nn.Module, examples: Sequence[Example]) -> Batch:
        return as_computed(model, self.collate_inputs(examples))

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return super().loss(model, as_computed(model, batch))

    def show(self, example: Example) -> Shown:
        return Shown([Facts(facts_of(example)), Label(self.label_text(example))])

    def describe(self, view: View) -> Description:
        classes, lengths = super().describe(view), describe_lengths(view.sizes)
        return Description({**lengths.facts, **classes.facts}, {**lengths.lines, **classes.lines})

    def probe(self) -> Batch:
        return self._features(noise(self.rate, torch.Generator().manual_seed(0)))

    def save(self, folder: Path) -> list[str]:
        own = self.write_task(folder, settings=self.settings, config={})
        return [own, *save_processor(folder, self.processor)]


TASK = AudioClassification
