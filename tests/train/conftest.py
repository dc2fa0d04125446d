from __future__ import annotations

from pathlib import Path

import pytest
import trainkit


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe for the tiny Llama, beside its data."""
    return trainkit.write_recipe(tmp_path)


@pytest.fixture
def t5_recipe(tmp_path: Path) -> Path:
    """The same for the tiny T5."""
    path = trainkit.write_recipe(tmp_path, trainkit.base_folder("t5", chat=False), trainkit.PROMPTS)
    path.write_text(path.read_text().replace("causal_lm", "seq2seq_lm"))
    return path


@pytest.fixture
def short(recipe: Path) -> None:
    """The recipe takes two steps."""
    recipe.write_text(recipe.read_text().replace("max_steps: 8", "max_steps: 2"))
