"""Libraries that import peft, with peftcli in its place, or read its files: a script each, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "libraries"


@pytest.mark.slow
@pytest.mark.parametrize("library", ["transformers", "trl", "sentence_transformers", "diffusers"])
def test_a_library_works_with_peftcli_in_the_place_of_peft(library: str) -> None:
    run(library, f"with_{library}.py")


@pytest.mark.slow
def test_mistral_rs_answers_as_peftcli_does() -> None:
    run("mistralrs", "with_mistralrs.py")


@pytest.mark.slow
def test_llama_cpp_answers_as_peftcli_does() -> None:
    run("xllamacpp", "with_llama_cpp.py")


@pytest.mark.slow
def test_losses_of_answers_are_those_of_trl() -> None:
    run("trl", "losses_of_trl.py")


@pytest.mark.slow
def test_embeddings_and_their_losses_are_those_of_sentence_transformers() -> None:
    run("sentence_transformers", "embeddings_of_sentence_transformers.py")


@pytest.mark.slow
def test_scores_of_rerankers_and_their_losses_are_those_of_sentence_transformers() -> None:
    run("sentence_transformers", "scores_of_sentence_transformers.py")


@pytest.mark.slow
def test_pefts_guide_to_dreambooth() -> None:
    run("diffusers", "dreambooth.py")


@pytest.mark.slow
def test_pictures_are_those_of_diffusers() -> None:
    run("diffusers", "pictures_of_diffusers.py")


def run(library: str, name: str) -> None:
    """Run a script that needs a library, in a process of its own."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])}
    script = [sys.executable, str(SCRIPTS / name)]
    done = subprocess.run(script, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
