"""Shared code knows no tokenizer, no token ids and no task by its name: ``peftcli/tasks/`` does."""

from __future__ import annotations

import re
from pathlib import Path

from peftcli.tasks import TASKS

PACKAGE = Path(__file__).parents[2] / "peftcli"
FOLDERS = ("train", "data", "models", "adapters", "inspection")
WORDS = re.compile(rf"\b(input_ids|labels|tokenizers?|{'|'.join(TASKS)})\b")
EXCEPTIONS = {
    "train/runs/resume.py": 1,
    "train/read_data.py": 1,
    "models/hub_files.py": 2,
    "data/exports.py": 8,  # keys of annotation tools
    "data/media.py": 2,  # names of folders of masks
    "models/base.py": 10,
    "models/open.py": 1,
    "models/tokens.py": 40,
    "models/validate.py": 7,
    "adapters/card.py": 3,
    "adapters/generate.py": 4,
    "adapters/load.py": 3,
    "adapters/merge.py": 4,
    "adapters/proof/benchmark_tasks.py": 1,  # lm-eval's name of a kind of question
    "adapters/proof/benchmark.py": 12,  # lm-eval asks for what a tokenizer knows
}
"""File -> how often it still has one of the words. A number may only fall, and falls here as soon as it does there."""


def test_shared_code_asks_the_task() -> None:
    found = {
        str(path.relative_to(PACKAGE)): count
        for folder in FOLDERS
        for path in sorted((PACKAGE / folder).rglob("*.py"))
        if (count := len(WORDS.findall(path.read_text(encoding="utf-8"))))
    }
    more = {name: count for name, count in found.items() if count > EXCEPTIONS.get(name, 0)}
    assert not more, "ask the task instead: a method of tasks/base.py, or a capability"
    assert found == EXCEPTIONS, "there are fewer now: lower the numbers"
