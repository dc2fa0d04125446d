"""Sounds of rows, for every task whose rows have some: read with soundfile, brought to the model's rate with soxr."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftcli.data.rows import Reader, Row
from peftcli.data.store import Example
from peftcli.errors import DataError
from peftcli.tasks.base import Batch
from peftcli.tasks.files import File, digest_of, errors_of_row, file_of
from peftcli.tasks.shown import Description

if TYPE_CHECKING:
    from soundfile import SoundFile

AUDIO = ("audio", "file_name", "path", "file", "audio_file_name")
"""Columns in which sources have sounds."""
FRAMES = 100
"""Frames of a second: the unit of a clip's size."""
PACKAGES = {"soundfile": "audio", "soxr": "audio"}
_QUIET = 2.0**-10
"""The largest sample of a clip without sound, where 1 is the loudest that a file can hold."""
_LOUDEST = 32
"""A larger sample is one of 16 or 24 bits as a whole number, and not a share of the loudest."""
_UNKNOWN_SIZE = 2**31 - 2**16
"""A WAV file that says to have more bytes was written into a pipe, when nobody knew how many there would be."""
_BLOCK = 1 << 16
_SHORTEST = 0.25
"""Seconds. Silence follows a shorter clip: models hear windows, and SpecAugment masks some of them."""


@dataclass(frozen=True)
class Clip:
    """A sound that was read to its end."""

    file: File
    samples: int
    """Of each channel."""
    rate: int
    is_silent: bool = False

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.samples / self.rate

    @property
    def size(self) -> int:
        """How long it is, in frames."""
        return math.ceil(self.seconds * FRAMES)


def read_clip(row: Row, reader: Reader, longest: float = math.inf) -> Clip:
    """Read the sound of a row: to its end, unless it has more than ``longest`` seconds.

    Raises:
        DataError: the row has none, or its samples are not those of a sound.
    """
    with errors_of_row(row, reader.names["audio"]):
        value = reader.value(row, "audio")
        if isinstance(value, dict) and value.get("array") is not None:
            content = _as_file(value)
            file = File("", content, digest_of(content))
        else:
            file, content = file_of(row, reader, "audio", "a sound")
        with opened_sound(content, file.path) as sound:
            clip = Clip(file, sound.frames, sound.samplerate)
            if clip.samples > longest * clip.rate:
                return clip
            loudest = [float(np.abs(block).max()) for block in sound.blocks(_BLOCK, dtype="float32")]
        if not loudest or not math.isfinite(sum(loudest)):
            raise DataError("has samples that are not numbers" if loudest else "has no samples", file=file.path)
        if max(loudest) > _LOUDEST:
            message = f"has samples up to {max(loudest):g}; those of a sound are from -1 to 1"
            raise DataError(message, file=file.path, hint="Divide samples of 16 bits by 32768.")
    return Clip(file, clip.samples, clip.rate, max(loudest) <= _QUIET)


def samples_of(example: Example, rate: int, start: float = 0, end: float = math.inf) -> np.ndarray:
    """Return the samples of an example from one second to another, of all channels together, at this rate."""
    return next(windows_of(example, rate, [(start, end)]))


def windows_of(example: Example, rate: int, spans: Iterable[tuple[float, float]]) -> Iterator[np.ndarray]:
    """Yield the samples of an example in spans of seconds, one after another, as ``samples_of`` returns those of one.

    No more than one span is held as samples.
    """
    import soxr

    file = File.of(example)
    with opened_sound(file.read(), file.path) as sound:
        given = sound.samplerate
        for start, end in spans:
            sound.seek(round(start * given))
            count = -1 if math.isinf(end) else round(end * given) - round(start * given)
            samples = sound.read(count, dtype="float32", always_2d=True).mean(axis=1)
            yield samples if given == rate else soxr.resample(samples, given, rate)


def padded_features(extractor: Any, sounds: Sequence[np.ndarray], **options: Any) -> Batch:
    """Return ``features_of`` with a mask, if the extractor makes one. Silence follows very short sounds."""
    shortest = int(_SHORTEST * extractor.sampling_rate)
    sounds = [np.pad(each, (0, max(0, shortest - len(each)))) for each in sounds]
    masked = "attention_mask" in extractor.model_input_names
    return features_of(extractor, sounds, return_attention_mask=masked, **options)


def features_of(extractor: Any, sounds: Sequence[np.ndarray], **options: Any) -> Batch:
    """Return what a feature extractor makes of samples at its rate, padded to the longest."""
    with torch.autocast("cpu", enabled=False):  # it makes numpy arrays, which have no bfloat16
        found = extractor(
            list(sounds),
            **{"sampling_rate": extractor.sampling_rate, "padding": "longest", "return_tensors": "pt"} | options,
        )
    return dict(found)


def noise(rate: int, random: torch.Generator) -> list[np.ndarray]:
    """Make up two clips of noise, a second long."""
    return list(torch.randn(2, rate, generator=random).numpy() / 10)


def describe_lengths(sizes: np.ndarray) -> Description:
    """Describe how long clips of these sizes are."""
    seconds = sizes / FRAMES
    words = f"{seconds.sum() / 60:.1f} minutes; a clip {seconds.min():.1f} to {seconds.max():.1f} s"
    return Description({"seconds": float(seconds.sum())}, {"sound": words})


def facts_of(example: Example) -> dict[str, str]:
    """Return what ``inspect`` says of an example's sound."""
    return {"sound": example.arrays["path"] or "in the row", "length": f"{example.size / FRAMES:.2f} s"}


@contextmanager
def opened_sound(content: bytes, path: str) -> Iterator[SoundFile]:
    """Open a sound. Inside, what soundfile raises is about the sound.

    Raises:
        DataError: it cannot be read; ``path`` names it.
    """
    import soundfile

    if len(content) < (end := _end_of_samples(content)):
        raise DataError(f"is cut off: it has {len(content):,} bytes, and samples up to {end:,}", file=path or None)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            yield file
    except (RuntimeError, TypeError, ValueError) as error:
        message = str(error).partition(": ")[2] or str(error)
        raise DataError(f"cannot be read as WAV, FLAC, OGG or MP3: {message}", file=path or None) from None


def _end_of_samples(content: bytes) -> int:
    """Where the samples of a WAV file end, as its header says; 0 for other files, and where that was not known."""
    at = 12
    while content[:4] == b"RIFF" and at + 8 <= len(content):
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if content[at : at + 4] == b"data":
            return at + 8 + size if size < _UNKNOWN_SIZE else 0
        at += 8 + size + size % 2
    return 0


def _as_file(value: Mapping[str, Any]) -> bytes:
    """Samples as datasets decode them, ``{"array": ..., "sampling_rate": ...}``, as a file."""
    import soundfile

    file, rate = io.BytesIO(), value.get("sampling_rate")
    try:
        samples = np.asarray(value["array"], np.float32)
        if samples.ndim not in (1, 2) or not isinstance(rate, int):
            raise ValueError
        soundfile.write(file, samples.T, rate, format="WAV", subtype="FLOAT")  # of several channels, (C, N)
    except (ValueError, TypeError, RuntimeError):
        raise DataError("expected samples in array, and sampling_rate") from None
    return file.getvalue()
