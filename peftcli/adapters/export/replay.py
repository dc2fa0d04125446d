"""Ask a program that is installed what it makes of an export, and compare with what peftcli says."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftcli.adapters.export.gguf import Numbers, write_model_file
from peftcli.adapters.export.programs import PROGRAMS, Form
from peftcli.adapters.generate import load_generator
from peftcli.adapters.load import AdapterSource
from peftcli.errors import AdapterError
from peftcli.guard.files import one_line
from peftcli.models.open import OpenBase
from peftcli.tasks.text.replay import Said, what_is_said

ASKED: dict[Form, str] = {
    "lora": "mistralrs",
    "gguf": "llama.cpp",
    "merged-gguf": "llama.cpp",
    "modelfile": "llama.cpp",
    "mlx": "mlx",
}
"""Form -> the program that peftcli runs, to see that it says the same."""
_FIRST = {"f32": 0.01, "f16": 0.02, "q8_0": 0.3, "q4_0": 2.5}
"""Number format -> how far an answer's likeliest first tokens may be off: see ``Replayed.first``."""
_TIE = 5e-3
"""Tokens whose logarithms of probabilities are nearer are as likely as one another."""
_SECONDS = 1800
"""After which a program is given up."""


@dataclass(frozen=True)
class Replayed:
    """What a program made of an export."""

    program: str
    version: str
    prompts: int
    same_prompts: int
    """Of how many the program's own template and vocabulary give the tokens of training."""
    answers: int
    same_answers: int
    """How many greedy answers are peftcli's, to the last token or to one that another is as likely as; of mistral.rs,
    to the last letter."""
    first: float | None
    """How far the logarithms of the probabilities of an answer's five likeliest first tokens are off, in the mean by
    these probabilities, of the answer of which it is most; None: not asked."""
    normalised: int = 0
    """How many of the other prompts have letters of several signs that the program does not bring into one form."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    def words(self) -> str:
        """Return it as a sentence."""
        prompts = f"the tokens of {self.same_prompts} of {self.prompts} prompts"
        return (
            f"{self.program} {self.version}: {prompts} and {self.same_answers} of {self.answers} answers are the same"
        )


def missing(program: str) -> str | None:
    """Return why peftcli cannot run a program here; None: it can."""
    row = PROGRAMS[program]
    if row.module is None:
        return f"peftcli does not run {program}"
    return None if importlib.util.find_spec(row.module) else f"pip install {row.package}"


def say(source: AdapterSource, prompts: Sequence[str] | None = None) -> Said:
    """Return what an adapter says over its base model in full precision, in float32."""
    generator = load_generator(source, dtype="float32", quantization="none")
    return what_is_said(generator, prompts) if prompts else what_is_said(generator)


def replay(form: Form, said: Said, folder: Path, file: str, opened: OpenBase) -> Replayed:
    """Ask the program for ``form`` what it makes of an export, and compare with what was ``said``.

    ``folder`` has the export, in it ``file`` where it is a .gguf file; ``opened`` is the base model.

    Raises:
        AdapterError: the program cannot use it.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model, adapter = opened.folder, folder
        if form == "gguf":
            model, adapter = Path(scratch) / "base.gguf", folder / file
            write_model_file(opened, model, _numbers_of(opened), chat=said.asked[0].messages is not None)
        given = (folder / file, None) if form in ("merged-gguf", "modelfile") else (model, adapter)
        return compare(ASKED[form], said, *given)


def compare(program: str, said: Said, model: Path, adapter: Path | None) -> Replayed:
    """Ask a program for a model, and an adapter beside it, what was ``said``, and compare."""
    got = _ask(program, said, model, adapter)
    rows = [
        row == each.ids and (at >= len(got.get("counts", ())) or got["counts"][at] == len(each.ids))
        for at, (row, each) in enumerate(zip(got["rows"], said.asked, strict=True))
    ]
    if "answers" in got:
        same = list(map(_same, got["answers"], said.answers, said.margins))
    else:
        same = [one.strip() == other for one, other in zip(got["texts"], said.texts, strict=True)]
    first = [
        sum(math.exp(one) * abs(theirs.get(str(token), min(theirs.values())) - one) for token, one in ours.items())
        for theirs, ours in zip(got.get("first", ()), said.first, strict=False)
        if theirs
    ]
    return Replayed(
        program,
        got["version"],
        len(rows),
        sum(rows),
        len(same),
        sum(same),
        max(first, default=None),
        sum(each.normalised and not row for row, each in zip(rows, said.asked, strict=True)),
    )


def _same(found: list[int], expected: list[int], margins: list[float]) -> bool:
    """Return whether two answers are the same, up to a token that another is as likely as."""
    pairs = enumerate(zip(found, expected, strict=False))
    differs = next((at for at, (one, other) in pairs if one != other), None)
    return found == expected if differs is None else margins[differs] < _TIE


def require_same(replayed: Replayed, folder: Path, numbers: Numbers = "f32", *, exact: bool = True) -> None:
    """Raise AdapterError where a program reads prompts otherwise or, where the export is exact, answers otherwise.

    ``exact`` is false for a LoRA that is only near. A quantised model need not write the same answers, but begin them
    with the same tokens in mind.
    """
    quantised = numbers.startswith("q")
    tokens = replayed.same_prompts + replayed.normalised == replayed.prompts
    answers = replayed.same_answers == replayed.answers or quantised
    first = (replayed.first or 0.0) <= _FIRST[numbers]
    if not tokens or (exact and not (answers and first)):
        far = f"; first tokens are off by {replayed.first:.2g}" if replayed.first is not None else ""
        raise AdapterError(f"{replayed.words()}{far}", file=str(folder), key=f"--with {replayed.program}")


def _numbers_of(opened: OpenBase) -> Numbers:
    """Return the number format that holds the base model's weights."""
    return "f32" if any(each.dtype != "F16" for header in opened.shards.values() for each in header.values()) else "f16"


def _ask(program: str, said: Said, model: Path, adapter: Path | None) -> dict[str, Any]:
    """Ask a program in a process of its own."""
    request = {
        "program": program,
        "model": str(model.absolute()),
        "adapter": str(adapter.absolute()) if adapter else None,
        "prompts": [asdict(each) for each in said.asked],
        "answers": len(said.answers),
        "max_new_tokens": max(map(len, said.answers)),
        "stops": said.stops,
        "threads": max(1, (os.cpu_count() or 2) // 2),
    }
    command = [sys.executable, "-m", "peftcli.adapters.export.ask"]
    threads = {name: str(request["threads"]) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1", "MISTRALRS_CPU_KV_F32": "1"}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request).encode(),
            capture_output=True,
            timeout=_SECONDS,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise AdapterError(f"{program} did not answer within {_SECONDS} seconds", key=f"--with {program}") from None
    if done.returncode != 0 or not done.stdout:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        last = next((line for line in reversed(text) if "rror" in line), text[-1] if text else "no word")
        raise AdapterError(f"{program} cannot use it: {one_line(last)[:300]}", key=f"--with {program}")
    got: dict[str, Any] = json.loads(done.stdout)
    return got
