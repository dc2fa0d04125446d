"""Text to image: teach a diffusion model a thing (DreamBooth), or a style, from pictures and what is on them.

A row: ``{"image": "dog/1.jpg", "text": "a dog on a sofa"}``; with ``task.instance_prompt`` the picture is enough. For a
base model that edits pictures: ``{"image": "day.jpg", "instruction": "make it night", "target": "night.jpg"}``.

DreamBooth: https://arxiv.org/abs/2208.12242.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from peftcli.core.inject import disabled
from peftcli.data.cache import root
from peftcli.data.media import is_media
from peftcli.data.rows import Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import DataError
from peftcli.models.diffusion import Flow, Picture, noise_of
from peftcli.models.open import OpenBase
from peftcli.models.pipeline import OpenPipeline
from peftcli.system.disk import write_file
from peftcli.tasks import CAPTIONS, EDITED_PICTURES, INSTRUCTIONS, PICTURES, SOURCE_PICTURES, settings
from peftcli.tasks.base import (
    Batch,
    Loss,
    PredictOptions,
    Task,
    model_inputs,
    refuse_unread,
    table_of,
)
from peftcli.tasks.diffusers_files import write_parts
from peftcli.tasks.files import FILE_COLUMNS, File, digest_of, read_file
from peftcli.tasks.pictures import open_image, picture_of, png, shown_picture
from peftcli.tasks.shown import Shown, Text, TokenText
from peftcli.tasks.text.language_model import tokenizer_fingerprint

if TYPE_CHECKING:
    from PIL.Image import Image


_SMALL, _NO_CAPTION, _CUT = 1, 2, 4
"""Flags of rows: the picture is smaller than the resolution; nothing says what is on it; no encoder reads all of it."""
_SOURCE = "source_"
"""Prefix of the columns of the picture that is edited."""
_EDITS = {"image": (*SOURCE_PICTURES, *PICTURES), "text": (*INSTRUCTIONS, *CAPTIONS)}
"""What an editing model is asked: column of the task -> usual names."""
_TIMES = (0.125, 0.375, 0.625, 0.875)
"""Where in time evaluation measures each picture: how hard the noise is to see depends on it more than on the model."""


class TextToImage(Task[settings.TextToImageSettings]):
    """The task ``text_to_image``. The base model is a pipeline of diffusers."""

    name = "text_to_image"
    arguments = ("text",)
    reads_files = True
    versions = ("transformers", "pillow")
    unit = "pictures"
    reports = ("loss",)
    identity = ("digest", "prompt")
    findings_of_flags: ClassVar = {"small_pictures": _SMALL, "no_caption": _NO_CAPTION, "captions_cut": _CUT}
    packages: ClassVar = {"diffusers": "diffusion", "PIL": "diffusion"}
    input_packages = packages
    instead_of_texts = "makes pictures"
    origins = (*Task.origins, f"{_SOURCE}path")

    @property
    def columns(self) -> dict[str, Column]:
        own = {**FILE_COLUMNS, "width": Column("int64", ()), "height": Column("int64", ())}
        sources = {f"{_SOURCE}{name}": column for name, column in own.items()}
        return {**own, "prompt": Column("str"), **(sources if self.edits else {})}

    @property
    def judges_rows(self) -> bool:
        return False

    def __init__(self, settings: settings.TextToImageSettings, processor: Any, base: OpenBase):
        super().__init__(settings, processor, base)
        if settings.class_prompt is None:
            of_class = ("class_data_dir", "num_class_images", "prior_loss_weight")
            refuse_unread(settings, of_class, "is a setting of the pictures of task.class_prompt, which is missing")
        if not settings.center_crop:
            refuse_unread(settings, ("cache_latents",), "has no use where task.center_crop: false draws a new crop")
        if settings.snr_gamma is not None and isinstance(noise_of(self.pipeline.part("scheduler")), Flow):
            message = f"weighs the steps of noise; {self.pipeline.family.name} predicts a flow. Leave it out"
            raise DataError(message, key="task.snr_gamma")
        for name in ("class_prompt", "sample_prompts"):
            if getattr(settings, name) and self.edits:
                message = f"makes pictures without a source, and {self.pipeline.family.name} edits them. Leave it out"
                raise DataError(message, key=f"task.{name}")
        self.priors: list[_Stored] = []
        """Pictures of the class prompt."""

    @cached_property
    def pipeline(self) -> OpenPipeline:
        """The base model.

        Raises:
            DataError: it is another kind of model.
        """
        if not isinstance(self.base, OpenPipeline):
            raise DataError(f"{self.base.name} is not a pipeline of diffusers: it has no model_index.json", key="task")
        return self.base

    @property
    def edits(self) -> bool:
        """Whether the base model makes pictures from others."""
        return isinstance(self.base, OpenPipeline) and self.base.family.edits

    @cached_property
    def tokenizers(self) -> list[Any]:
        """Those of the pipeline's encoders of texts."""
        encoders = [name for name in self.pipeline.parts if name.startswith("text_encoder")]
        names = [name.replace("text_encoder", "tokenizer") for name in encoders]
        found = [self.pipeline.part(name) for name in names if name in self.pipeline.parts]
        return [getattr(each, "tokenizer", each) for each in found]  # the tokenizer of a processor

    @cached_property
    def resolution(self) -> int:
        """Side of the pictures, in pixels.

        Raises:
            DataError: the base model cannot make such pictures.
        """
        found: int = self.settings.resolution or self.pipeline.resolution
        if found % (step := self.pipeline.resolution_step) or found < 1:
            raise DataError(f"must be a multiple of {step}, not {found}", key="task.resolution")
        return found

    def fingerprint(self) -> dict[str, Any]:
        tokenizers = list(map(tokenizer_fingerprint, self.tokenizers))
        return super().fingerprint() | {"resolution": self.resolution, "tokenizers": tokenizers}

    # --- rows ---------------------------------------------------------------------------------------------------------

    def read(self, table: Table) -> Reader:
        optional = () if self.settings.instance_prompt is None else ("text",)
        if not self.edits:
            return table.reader("pictures", optional=optional, image=PICTURES, text=CAPTIONS)
        return table.reader("pairs of pictures", optional=optional, **_EDITS, target=EDITED_PICTURES)

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        prompt = _prompt(row, reader) or self.settings.instance_prompt or ""
        file, image = picture_of(row, reader, "target" if self.edits else "image")
        width, height = image.size
        arrays = {**_Stored(file, width, height).arrays(), "prompt": prompt}
        if self.edits:
            source, original = picture_of(row, reader)
            arrays |= _Stored(source, *original.size).arrays(_SOURCE)
        size = self._size(width, height)
        flags = _SMALL * (width < size[0] or height < size[1]) | _NO_CAPTION * (not prompt)
        flags |= _CUT * all(
            len(each(prompt, verbose=False)["input_ids"]) > min(each.model_max_length, self.pipeline.family.longest)
            for each in self.tokenizers
        )
        return Outcome([Example(arrays, 1, 1)], size=1, flags=flags)

    def show(self, example: Example) -> Shown:
        sources = [shown_picture(example, _SOURCE)] if self.edits else []
        return Shown([*sources, shown_picture(example), Text([TokenText(example.arrays["prompt"])], "prompt")])

    # --- training -----------------------------------------------------------------------------------------------------

    def _size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which a picture of these is cut."""
        if not self.settings.buckets:
            return self.resolution, self.resolution
        sizes, shape = bucket_sizes(self.resolution, self.pipeline.resolution_step), math.log(width / height)
        return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - shape))

    def groups(self, view: View) -> np.ndarray | None:
        if not self.settings.buckets:
            return None
        sides = zip(view.scalars("width").tolist(), view.scalars("height").tolist(), strict=True)
        sizes = {size: at for at, size in enumerate(bucket_sizes(self.resolution, self.pipeline.resolution_step))}
        return np.array([sizes[self._size(*each)] for each in sides], np.int64)

    def begin(self, model: Any, from_adapter: bool) -> None:
        """Find the pictures of the class prompt, or let the base model make those that the cache lacks."""
        given = self.settings
        if given.cache_latents:
            model.keep_latents(root() / "latents")
        if given.class_prompt is None:
            return
        if given.class_data_dir is not None:
            refuse = partial(DataError, file=given.class_data_dir, key="task.class_data_dir")
            try:
                found = sorted(path for path in Path(given.class_data_dir).iterdir() if is_media(path.name))
            except OSError as error:
                raise refuse(f"cannot be read: {error.strerror}") from None
            if not found:
                raise refuse("contains no pictures")
        else:
            found = self._class_pictures(model, given.class_prompt)
        self.priors = [_read_stored(path) for path in found]

    def _class_pictures(self, model: nn.Module, prompt: str) -> list[Path]:
        """The base model's pictures of a prompt, kept in the cache. The processes of a machine share the work."""
        decisive = (self.base.name, self.base.commit, _weights(self.base.folder), self.resolution, self._making)
        key = hashlib.sha256(repr((*decisive, prompt)).encode()).hexdigest()
        paths = [root() / "pictures" / key / f"{seed}.png" for seed in range(self.settings.num_class_images)]
        rank, size = (int(os.environ.get(name, least)) for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        mine = [seed for seed in range(rank, len(paths), size) if not paths[seed].exists()]
        with disabled(model):
            for seed in mine:
                write_file(paths[seed], png(self._make(model, [prompt], [seed])[0]))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        return paths

    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        seeds = [_seed(each.draw, each.arrays["digest"]) for each in examples]
        stored = [_Stored.of(each) for each in examples]
        sizes = [self._size(each.width, each.height) for each in stored]
        prompts, weights = [each.arrays["prompt"] for each in examples], [1.0] * len(examples)
        if training and (share := self.settings.caption_dropout):
            left_out = [np.random.default_rng(seed + 2).random() < share for seed in seeds]
            prompts = ["" if out else prompt for prompt, out in zip(prompts, left_out, strict=True)]
        if training and self.priors:
            stored += [self.priors[seed % len(self.priors)] for seed in seeds]
            seeds += [_seed(seed, b"prior") for seed in seeds]
            prompts += [str(self.settings.class_prompt)] * len(examples)
            weights += [self.settings.prior_loss_weight] * len(examples)
            sizes *= 2  # of the picture that each one stands beside
        cuts = [self._cut(*each, training) for each in zip(stored, sizes, seeds, strict=True)]
        others = [_Stored.of(each, _SOURCE) for each in examples] if self.edits else []
        sources = [self._cut(*each, training) for each in zip(others, sizes, seeds, strict=False)]
        kept = not training or self.settings.center_crop
        more: Batch = {"sources": [Picture(cut, cut.key if kept else None) for cut in sources]} if sources else {}
        if training and self.settings.snr_gamma is not None:
            more["snr_gamma"] = self.settings.snr_gamma
        return more | {
            "pictures": [Picture(cut, cut.key if kept else None) for cut in cuts],
            "prompts": prompts,
            "seeds": seeds,
            "times": torch.tensor([float(np.random.default_rng(seed).random()) for seed in seeds]),
            "sizes": torch.tensor([cut.sizes for cut in cuts]),
            "_weights": torch.tensor(weights),
        }

    def _cut(self, stored: _Stored, size: tuple[int, int], seed: int, training: bool) -> _Cut:
        """Where a picture is cut, and whether it is mirrored."""
        draw, given = np.random.default_rng(seed + 1), self.settings
        places = draw.random(2) if training and not given.center_crop else np.array([0.5, 0.5])
        flipped = bool(training and given.random_flip and draw.random() < 0.5)
        sides = stored.width, stored.height
        scale = max(cut / side for cut, side in zip(size, sides, strict=True))
        wide, high = (max(cut, round(side * scale)) for cut, side in zip(size, sides, strict=True))
        left, top = (int(place * room) for place, room in zip(places, (wide - size[0], high - size[1]), strict=True))
        return _Cut(stored, (wide, high), left, top, size, flipped)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The squared error of what is predicted, a mean over each picture's latents.

        Evaluation measures each picture at several times, with noise that is the same in each evaluation.
        """
        inputs = model_inputs(batch)
        if model.training:
            total = (model(**inputs).errors * batch["_weights"]).sum()
        else:
            at = [inputs | {"times": torch.full_like(batch["times"], time)} for time in _TIMES]
            total = torch.stack([model(**each).errors.sum() for each in at]).mean()
        return Loss(total, {"loss": total.detach()})

    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        return {"loss": float(sums["loss"]) / num_targets}

    # --- pictures -----------------------------------------------------------------------------------------------------

    @property
    def _making(self) -> dict[str, Any]:
        given = {name: getattr(self.settings, name) for name in ("num_inference_steps", "guidance_scale")}
        return {name: value for name, value in given.items() if value is not None}

    def _make(
        self, model: Any, prompts: Sequence[str], seeds: Sequence[int], sources: Sequence[_Stored] | None = None
    ) -> list[Image]:
        square = (self.resolution, self.resolution)
        cut = None if sources is None else [self._cut(each, square, 0, training=False).image() for each in sources]
        return model.pictures(prompts, seeds, self.resolution, sources=cut, **self._making)

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> None:
        for number, prompt in enumerate(self.settings.sample_prompts):
            path = folder / "samples" / f"step-{step:06}-{number}.png"
            write_file(path, png(self._make(model, [prompt], [number])[0], prompt))

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """Make a picture of each row's text, by its seed: that of the row, else its number."""
        asked: dict[str, Sequence[str]] = dict(_EDITS) if self.edits else {"text": CAPTIONS}
        columns = {name: column for name, column in options.columns.items() if name in asked}
        reader = table_of(rows, columns).reader("prompts", **asked)
        folder = options.beside.with_name(f"{options.beside.name}.images")
        for start in range(0, len(rows), options.batch_size):
            chosen = rows[start : start + options.batch_size]
            numbers = range(options.first + start, options.first + start + len(chosen))
            prompts = [_prompt(row, reader) for row in chosen]
            if "" in prompts:
                raise chosen[prompts.index("")].place.error("is empty", key=reader.names["text"])
            seeds = [_given_seed(row, number) for row, number in zip(chosen, numbers, strict=True)]
            found = [picture_of(row, reader) for row in chosen] if self.edits else None
            sources = None if found is None else [_Stored(file, *image.size) for file, image in found]
            made = self._make(model, prompts, seeds, sources)
            for number, image, prompt, seed in zip(numbers, made, prompts, seeds, strict=True):
                path = folder / f"{number:05}.png"
                write_file(path, png(image))
                yield {"image": str(path), "prompt": prompt, "seed": seed}

    def probe(self) -> Batch:
        noise = torch.rand(2, 3, self.resolution, self.resolution, generator=torch.Generator().manual_seed(0)) * 2 - 1
        pictures = [Picture(partial(noise.__getitem__, at)) for at in range(2)]
        more = {"sources": pictures[::-1]} if self.edits else {}
        return more | {
            "pictures": pictures,
            "prompts": ["a photo", "a drawing of a house"],
            "seeds": [0, 1],
            "times": torch.tensor([0.3, 0.7]),
            "sizes": torch.tensor([[self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]] * 2),
        }

    # --- what is kept -------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> list[str]:
        """Write the same adapter as PEFT's folders of each part and, of a LoRA, as diffusers' file."""
        empty = self.pipeline.empty_model("DiffusionPipeline", **self.model_options())
        return [self.write_task(folder, settings=self.settings, config={}), *write_parts(empty, folder)]


@dataclass(frozen=True)
class _Stored:
    """A picture in a file."""

    file: File
    width: int
    """In pixels, upright, as is ``height``."""
    height: int

    @classmethod
    def of(cls, example: Example, prefix: str = "") -> _Stored:
        """Return the picture that an example holds in columns with this prefix."""
        width, height = (int(example.arrays[f"{prefix}{side}"]) for side in ("width", "height"))
        return cls(File.of(example, prefix), width, height)

    def arrays(self, prefix: str = "") -> dict[str, Any]:
        """Return the values of these columns."""
        return {**self.file.arrays(prefix), f"{prefix}width": self.width, f"{prefix}height": self.height}


@dataclass(frozen=True)
class _Cut:
    """The part of a picture that the model sees."""

    stored: _Stored
    scaled: tuple[int, int]
    """Width and height to which the picture is scaled."""
    left: int
    top: int
    size: tuple[int, int]
    """Width and height of the part."""
    flipped: bool

    @property
    def key(self) -> str:
        """Equal for equal pixels."""
        place = (self.stored.file.digest, self.scaled, self.left, self.top, self.size, self.flipped)
        return hashlib.sha256(repr(place).encode()).hexdigest()

    @property
    def sizes(self) -> list[int]:
        """What Stable Diffusion XL is told: height and width of the file's picture, the cut, and what is left."""
        return [self.stored.height, self.stored.width, self.top, self.left, *self.size[::-1]]

    def __call__(self) -> torch.Tensor:
        """Return the pixels (3, H, W), from -1 to 1."""
        values = np.asarray(self.image(), np.float32)
        return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)

    def image(self) -> Image:
        """Return it as a picture."""
        from PIL import Image, ImageOps

        file = self.stored.file
        resized = open_image(file.read(), file.path).convert("RGB").resize(self.scaled, Image.Resampling.LANCZOS)
        cut = resized.crop((self.left, self.top, self.left + self.size[0], self.top + self.size[1]))
        return ImageOps.mirror(cut) if self.flipped else cut


@cache
def bucket_sizes(resolution: int, step: int) -> list[tuple[int, int]]:
    """Return widths and heights of about the area of a square of ``resolution``, from 1:4 to 4:1.

    Sides are multiples of ``step``, and of a sixteenth of ``resolution``.
    """
    step *= max(1, resolution // (16 * step))
    longer = range(-(-resolution // step) * step, 2 * resolution + 1, step)
    wide = [(side, resolution**2 // (side * step) * step) for side in longer]
    return [*wide, *((width, height) for height, width in wide if height != width)]


def _seed(draw: int, name: bytes) -> int:
    return int.from_bytes(hashlib.sha256(b"%d " % draw + name).digest()[:7], "big")


def _prompt(row: Row, reader: Reader) -> str:
    prompt = row.values.get(reader.names.get("text", ""))
    if not (prompt is None or isinstance(prompt, str)):
        raise row.place.error(f"expected a text, found {prompt!r:.60}", key=reader.names["text"])
    return (prompt or "").strip()


def _given_seed(row: Row, number: int) -> int:
    """The row's own seed, else ``number``."""
    given = row.values.get("seed")
    if given in (None, ""):
        return number
    if isinstance(given, float) and given.is_integer():  # as tables have it whose other rows have none
        given = int(given)
    with suppress(ValueError):
        if isinstance(given, str | int) and not isinstance(given, bool) and -(2**63) <= int(given) < 2**64:
            return int(given)
    message = f"expected a whole number from -2^63 to 2^64 - 1, as seeds of torch are, found {given!r:.60}"
    raise row.place.error(message, key="seed")


def _read_stored(path: Path) -> _Stored:
    content = read_file(str(path))
    return _Stored(File(str(path), b"", digest_of(content)), *open_image(content, str(path)).size)


def _weights(folder: Path) -> list[tuple[str, int, int]]:
    """What tells the weights of a pipeline from those of another one in the same folder, without reading them all."""
    files = [(path, path.stat()) for path in sorted(folder.glob("*/*.safetensors"))]
    return [(str(path.relative_to(folder)), found.st_size, found.st_mtime_ns) for path, found in files]


TASK = TextToImage
