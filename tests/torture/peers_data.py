"""What ``datasets.load_dataset`` makes of the same bad data files.

The counts stand beside peftcli's in docs/reliability.md. One process imports datasets and is forked for every file:
``python peers_data.py``.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

LIMIT, PATIENCE = 10, 60.0
"""Seconds of computing for one file, and of waiting."""
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_GROUPS = ("line", "line in .gz", "line in .zst", "in a list", "record", "file", "no file", "damaged")
"""Of the bad data: those that are no good file in themselves, whatever their rows are for."""
_OUTCOMES = ("trials", "accepted", "refused", "named_the_line", "hung", "crashed")


def datasets_accepts() -> dict[str, int]:
    """Loads each bad file with the builder of its kind.

    Returns:
        ``trials``; ``accepted``, ``refused``, ``hung`` and ``crashed``, which add up to it; ``named_the_line``: of the
        refused, those whose error names the line that is bad.
    """
    here = Path(__file__)
    found = os.pathsep.join([str(here.parents[1]), str(here.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(here)],
        env={**os.environ, "PYTHONPATH": found},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _main() -> None:
    import datasets  # before the forks
    from bad_data_cases import bad_data

    datasets.disable_progress_bars()
    counts: Counter[str] = Counter()
    for name, case in bad_data().items():
        if name.partition(":")[0] not in _GROUPS:
            continue
        with tempfile.TemporaryDirectory() as folder:
            at = Path(folder)
            for file, content in case.files.items():
                (at / file).write_bytes(content)
            case.setup(at)
            path = at / (next(iter(case.files), None) or "data.jsonl")
            counts["trials"] += 1
            counts[outcome := _loaded(path, at)] += 1
            error = (at / "error").read_text() if outcome == "refused" else ""
            counts["named_the_line"] += case.line is not None and _names(error, case.line)
    print(json.dumps({key: counts[key] for key in _OUTCOMES}))


def _loaded(path: Path, folder: Path) -> str:
    """What becomes of a process that loads a file. What it raises, it writes to ``error``."""
    kind = next((builder for ending, builder in _BUILDERS.items() if ending in path.name), "json")
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
        os._exit(_load(kind, path, folder))
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {0: "accepted", 3: "refused", -signal.SIGXCPU: "hung"}.get(code, "crashed")
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"


def _load(kind: str, path: Path, folder: Path) -> int:
    from datasets import load_dataset

    try:
        rows = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(folder / "cache"))
        for _ in rows:
            pass
    except Exception as error:
        told, texts = error, []
        while told is not None:
            texts.append(str(told))
            told = told.__cause__ or told.__context__
        (folder / "error").write_text("\n".join(texts), errors="replace")
        return 3
    return 0


def _names(error: str, line: int) -> bool:
    """Whether an error names a line; the row's number, with a header or without, is as good."""
    return any(re.search(rf"\b(?:line|row)\D{{0,12}}{number}\b", error, re.IGNORECASE) for number in (line, line - 1))


if __name__ == "__main__":
    _main()
