"""``peftcli ARGS`` within this process, with all that it prints, and what such a command is given to work on."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from unittest import mock

import trainkit
from hub_server import TOKEN, Hub

from peftcli.cli.app import main


@dataclass(frozen=True)
class Ran:
    """What came of a command."""

    code: int
    out: bytes
    err: bytes

    @property
    def messages(self) -> list[str]:
        """The errors that it told."""
        return [line for line in self.err.decode(errors="replace").splitlines() if line.startswith("error: ")]


def peftcli(*args: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Ran:
    """Runs a command line in this process."""
    trainkit.reset_accelerate()
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        _environment(env or {}),
        _inside(cwd or Path.cwd()),
        _descriptors(out, err),
    ):
        code = main([str(arg) for arg in args])
        sys.stdout.flush()
        sys.stderr.flush()
        return Ran(code, _content(out), _content(err))


@dataclass(frozen=True)
class Inputs:
    """What the commands read."""

    recipe: Path
    adapter: Path
    """Trained by that recipe."""
    other: Path
    """Another one."""
    prompts: Path
    """Six of them."""


@functools.cache
def inputs() -> Inputs:
    """Made once in this process, and kept."""
    folder = trainkit.scratch() / "inputs"
    recipe = trainkit.write_recipe(folder)
    for name, seed in (("adapter", 1), ("other", 2)):
        trained = peftcli("train", recipe, f"training.output_dir={folder}/{name}", f"training.seed={seed}")
        assert trained.code == 0, trained.err.decode()
    rows = [{"prompt": question} for question, _ in trainkit.PAIRS[:6]]
    return Inputs(recipe, folder / "adapter", folder / "other", trainkit.write_rows(folder / "prompts.jsonl", rows))


def places() -> dict[str, str]:
    """The inputs' paths by their names."""
    return {name: str(path) for name, path in vars(inputs()).items()}


@contextlib.contextmanager
def used(hub: Hub) -> Iterator[dict[str, str]]:
    """Inside, huggingface_hub asks this hub. Gives the environment of somebody who is logged in."""
    from huggingface_hub import constants

    with mock.patch.multiple(constants, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(trainkit.scratch() / "hub")):
        yield {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _descriptors(out: IO[bytes], err: IO[bytes]) -> Iterator[None]:
    """Inside, 1 and 2 are these files, for Python and for everybody else in this process."""
    streams, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    for stream in streams:
        stream.flush()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False, encoding="utf-8") for number in (1, 2))  # noqa: SIM115
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for number, handle in enumerate(kept, 1):
            os.dup2(handle, number)
            os.close(handle)


def _content(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
