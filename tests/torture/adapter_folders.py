"""Adapter folders and base models to spoil, and what a command must do with one that it refuses."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import trainkit
from in_process import Ran, peftcli
from safetensors.torch import load, save

from peftcli.core.files import save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.layer import adapter_layers
from peftcli.methods import METHODS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS, LONGEST_WAIT = 10, 60
"""Of the process, and on the clock of a busy machine."""
MEMORY = 2 << 30
LONGEST_ERROR = 3000
MOST_LINES = 20
PROGRESS = ("merging into ", "shard ", "verifying: ", "[transformers] Model config: ")
"""What may stand before a message."""
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "adalora": {"total_step": 4},
    "randlora": {"r": 8, "randlora_alpha": 8},
    "vblora": {"num_vectors": 20, "vector_length": 8},
    "fourierft": {"n_frequency": 50},
    "waveft": {"n_frequency": 50},
    "c3a": {"block_size": 8},
    "miss": {"r": 8},
    "shira": {"r": 2},
    "gralora": {"r": 4, "alpha": 8},
    "oft": {"oft_block_size": 4},
    "trainable_tokens": {"token_indices": [58, 79]},
    "road": {"group_size": 8},
    "psoft": {"r": 4},
    "lily": {"r": 8},
    "tinylora": {"u": 8},
    "pvera": {"r": 16},
    "peanut": {"r": 4},
    "deft": {"r": 4},
    "adamss": {"r": 8},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "poly": {"r": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "multitask_prompt_tuning": {"num_virtual_tokens": 4},
}
"""Of adapters for the tiny Llama; nothing: the method's own."""


@functools.cache
def adapter(method: str = "lora", **settings: Any) -> dict[str, bytes]:
    """The two files of a good adapter of the tiny base model, with random weights."""
    folder = trainkit.scratch() / "adapters" / f"{method}-{len(settings)}"
    model = trainkit.build("llama")
    if method == "xlora":
        adapter()  # what it mixes
        settings["adapters"] = {"0": str(folder.with_name("lora-0"))}
    config = METHODS[method].config_class()(
        **{**SETTINGS.get(method, {}), **settings},
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(trainkit.base_folder()),
    )
    inject(model, config)
    set_trainable(model, True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for value in layer.own_tensors().values():
                value.add_(0.02 * torch.randn(value.shape, generator=generator))
    save_adapter(model, config, folder)
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@dataclass(frozen=True)
class Folder:
    """An adapter folder that is about to be spoilt, beside a base model that may be, too."""

    place: Path
    """The trial's folder."""
    names: list[str] = field(default_factory=lambda: ["adapter"])
    """The last one is what the adapter's folder is called in it."""

    @property
    def path(self) -> Path:
        """The adapter."""
        return self.place / self.names[-1]

    @property
    def base(self) -> Path:
        """A copy of the base model."""
        folder = self.place / "base"
        if not folder.exists():
            shutil.copytree(trainkit.base_folder(), folder)
        return folder

    def several_files(self) -> dict[str, str]:
        """Let the base model's weights stand in several files. Gives the index's map."""
        shutil.rmtree(self.place / "base", ignore_errors=True)
        shutil.copytree(trainkit.base_folder(shard="20KB"), self.place / "base")
        return dict(json.loads((self.place / "base" / "model.safetensors.index.json").read_bytes())["weight_map"])

    def write(self, files: dict[str, bytes]) -> None:
        """The adapter's files."""
        self.path.mkdir(exist_ok=True)
        for name, content in files.items():
            (self.path / name).write_bytes(content)

    def config(self, **changes: Any) -> None:
        """Change keys of adapter_config.json; ``...`` takes one away."""
        values = {**json.loads((self.path / CONFIG).read_bytes()), **changes}
        self.raw(json.dumps({key: value for key, value in values.items() if value is not ...}))

    def raw(self, text: str | bytes) -> None:
        """Other content of adapter_config.json."""
        content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (self.path / CONFIG).write_bytes(content)

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Change the adapter's tensors."""
        tensors = load((self.path / WEIGHTS).read_bytes())
        change(tensors)
        (self.path / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))

    def header(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change what the header says, and leave the bytes."""
        content = (self.path / WEIGHTS).read_bytes()
        size = struct.unpack("<Q", content[:8])[0]
        said = json.loads(content[8 : 8 + size])
        change(said)
        self.weights(json.dumps(said), content[8 + size :])

    def weights(self, header: str | bytes, data: bytes = b"", size: int | None = None) -> None:
        """A file of weights made by hand."""
        raw = header.encode() if isinstance(header, str) else header
        (self.path / WEIGHTS).write_bytes(struct.pack("<Q", len(raw) if size is None else size) + raw + data)

    def base_config(self, **changes: Any) -> None:
        """Change keys of the base model's config.json."""
        change_json(self.base / "config.json", **changes)

    def replace(self, path: Path, make: Callable[[Path], object]) -> None:
        """Put something else in the place of a file."""
        path.unlink(missing_ok=True)
        make(path)


def change_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ``...`` takes one away."""
    values = {**json.loads(path.read_bytes()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def info(folder: Folder) -> list[object]:
    return ["info", folder.path]


def generate(folder: Folder) -> list[object]:
    return ["generate", folder.path, "--prompt", "tea", "--max-new-tokens", "1"]


def merge(folder: Folder) -> list[object]:
    return ["merge", folder.path, "--output", folder.place / "merged"]


def from_base(folder: Folder) -> list[object]:
    """``generate`` with the base model that stands beside the adapter."""
    return [*generate(folder), "--base", folder.base]


def merge_base(folder: Folder) -> list[object]:
    return [*merge(folder), "--base", folder.base]


def timed(*args: object, cwd: Path | None = None) -> Ran:
    """Runs a command, which must not take long."""
    with bounded(" ".join(map(str, args))[:200]):
        return peftcli(*args, cwd=cwd)


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """AssertionError, unless what is done inside ends after some seconds of this process's time, without waiting."""

    def ring(number: int, frame: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_WAIT)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, limits[1]))
    start = time.process_time()
    try:
        yield
    except _Late:
        raise AssertionError(f"{what} still ran after {LONGEST_WAIT} s") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    spent = time.process_time() - start
    assert spent < SECONDS, f"{what} took {spent:.1f} s"


class _Late(BaseException):
    """No handler of a library is to catch it."""


def refused(ran: Ran, code: int, *said: str) -> None:
    """One message, which holds these words, and nothing but a message."""
    text = ran.err.decode()
    assert ran.code == code, f"ended with {ran.code}, not {code}: {text[-700:]}"
    assert len(ran.messages) == 1, f"{len(ran.messages)} messages: {text[-700:]}"
    before = text.partition("error: ")[0].splitlines()
    assert all(line.startswith(PROGRESS) for line in before), f"before the message: {text[:700]}"
    harmless(ran)
    for words in said:
        assert words in text, f"does not say {words!r}: {text[:700]}"


def harmless(ran: Ran) -> None:
    """No traceback, nothing that steers a terminal, and not too much of it."""
    text = ran.err.decode()
    assert "Traceback" not in text, text[-700:]
    assert text.count("\n") <= MOST_LINES, f"{text.count(chr(10))} lines: {text[:700]}"
    assert len(text) <= LONGEST_ERROR, f"{len(text)} characters: {text[:700]}"
    strange = {char for char in text + ran.out.decode() if not char.isprintable()} - {"\n"}
    assert not strange, f"{strange} in {text[:700]!r}"


def listing(folder: Path) -> list[str]:
    """Everything below a folder, links and pipes too."""
    return sorted(f"{above}/{name}" for above, folders, files in os.walk(folder) for name in folders + files)
