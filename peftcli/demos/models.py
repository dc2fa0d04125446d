"""The base models of the demos: from a Python package, or small ones that are trained here first. Kept in the cache."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from peftcli.data.cache import root
from peftcli.demos import minilm, smollm2, whisper
from peftcli.demos.packages import Wheel, download
from peftcli.system.outputs import storage_errors


@dataclass(frozen=True)
class DemoModel:
    """How a base model is made."""

    about: str
    """What it is, in a few words."""
    module: str
    """Module below peftcli.demos with the function that makes it."""
    function: str
    """Takes the wheel if there is one, a scratch folder and the target folder."""
    wheel: Wheel | None = None
    """What is downloaded for it."""
    seconds: int = 10
    """About how long it takes to make, on two cores."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Optional packages that make it -> the extra that brings each."""


MODELS = {
    "SmolLM2-135M-Instruct": DemoModel(
        "a chat model of 135 million parameters (Apache-2.0)",
        "smollm2",
        "make",
        smollm2.WHEEL,
        packages={"gguf": "gguf"},
    ),
    "all-MiniLM-L6-v2": DemoModel(
        "an encoder of 22 million parameters (Apache-2.0)", "minilm", "make", minilm.WHEEL, 1
    ),
    "all-MiniLM-L6-with-masks": DemoModel(
        "the same encoder with a head that is trained now to fill masks in Python's language reference",
        "pretrain_masks",
        "make",
        minilm.WHEEL,
        seconds=90,
    ),
    "whisper-tiny.en": DemoModel("a speech model of 38 million parameters (MIT)", "whisper", "make", whisper.WHEEL),
    "tiny-t5": DemoModel(
        "a T5 that is trained now to write English dates as 2024-03-09", "pretrain_dates", "make", seconds=60
    ),
    "tiny-resnet": DemoModel(
        "a ResNet that is trained now to tell 21 other characters apart",
        "pretrain_pictures",
        "resnet",
        seconds=20,
    ),
    "tiny-segformer": DemoModel(
        "a SegFormer that is trained now to find other signs",
        "pretrain_pictures",
        "segformer",
        seconds=20,
    ),
    "tiny-rt-detr": DemoModel(
        "an RT-DETR that is trained now to find other signs",
        "pretrain_pictures",
        "rt_detr",
        seconds=60,
        packages={"scipy": "vision"},
    ),
    "SmolLM2-135M-with-eyes": DemoModel(
        "SmolLM2 behind a small vision tower that is trained now to tell 21 other characters apart",
        "pretrain_vision",
        "llava",
        smollm2.WHEEL,
        seconds=60,
        packages={"gguf": "gguf", "PIL": "vision"},
    ),
    "tiny-diffusion": DemoModel(
        "a Stable Diffusion in miniature that is trained now on pictures of signs",
        "pretrain_diffusion",
        "make",
        seconds=60,
    ),
}
"""Name -> how it is made."""


def folder_of(name: str) -> Path:
    """Return where a model is kept, or will be."""
    return root() / "demos" / name


def fetch_model(name: str, tell: Callable[[str], None]) -> Path:
    """Return the folder of a model; make it if it is not in the cache.

    Raises:
        NetworkError: its package cannot be downloaded.
        StorageError: the package is not the one that was tested, or the cache cannot be written.
    """
    folder, model = folder_of(name), MODELS[name]
    if folder.is_dir():
        return folder
    with storage_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # beside the folder, so that the last step is a rename: a killed command leaves nothing that looks whole
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
            made = Path(scratch) / "model"
            made.mkdir()
            wheel = (download(model.wheel, Path(scratch), tell),) if model.wheel else ()
            tell(f"making {name}, {model.about}: about {model.seconds} s, once")
            make = getattr(importlib.import_module(f"peftcli.demos.{model.module}"), model.function)
            make(*wheel, Path(scratch), made)
            if not folder.is_dir():  # another command may have made it meanwhile
                made.rename(folder)
    return folder
