"""A base model and an adapter are loaded with each of their files opened once and each JSON parsed once by us."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit

import peftcli
from peftcli.adapters.generate import load_generator
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.methods.lora import LoraConfig
from peftcli.models import validate
from peftcli.models.hub_files import base_hash, hash_ahead
from peftcli.models.open import open_base
from peftcli.schema import BaseModel

_watched: list[tuple[Path, Counter[str]]] = []
"""Folders whose files are watched, and how often each was opened. An audit hook cannot be taken away."""


def is_ours() -> bool:
    """Whether code of the package, and no library that it calls, opens a file now."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith(("transformers.", "safetensors", "huggingface_hub")):
            return False
        if name.startswith("peftcli."):
            return True
        frame = frame.f_back
    return False


def hook(event: str, arguments: Any) -> None:
    if event == "open" and _watched and isinstance(arguments[0], (str, os.PathLike)):
        path = Path(arguments[0])
        for folder, opened in _watched:
            if folder in path.parents and path.is_file() and is_ours():
                opened[str(path.relative_to(folder))] += 1


sys.addaudithook(hook)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with an adapter, beside its base model of several shards."""
    (tmp_path / "base").symlink_to(trainkit.base_folder(shard="20KB"))
    model = open_base(BaseModel(name=str(tmp_path / "base"))).model("AutoModelForCausalLM", torch.float32).model
    config = LoraConfig(
        target_modules="all-linear", task_type="CAUSAL_LM", base_model_name_or_path=str(tmp_path / "base")
    )
    inject(model, config)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, config, tmp_path / "adapter")
    (tmp_path / "adapter" / "run.json").write_text(json.dumps({"recipe": {"task": "causal_lm"}}))
    return tmp_path


BASE = {"config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "run.json"}


@pytest.mark.parametrize(
    ("load", "checked", "of_base"),
    [
        (lambda adapter: load_generator(adapter), 1, BASE),
        (lambda adapter: peftcli.AutoPeftModel.from_pretrained(adapter), 0, set()),
        (lambda adapter: peftcli.AutoPeftModelForCausalLM.from_pretrained(adapter), 0, set()),
    ],
    ids=["generate", "AutoPeftModel", "AutoPeftModelForCausalLM"],
)
def test_each_file_is_opened_once(
    load: Callable[[str], Any], checked: int, of_base: set[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(str(folder / "adapter"))  # imports what it needs
    folders, parsed, opened = list[Path](), Counter[str](), Counter[str]()
    check, loads = validate.check_folder, json.loads

    def checking(path: Path, **options: Any) -> Any:
        folders.append(path)
        return check(path, **options)

    def parsing(text: Any, **options: Any) -> Any:
        if is_ours():
            parsed[str(text)] += 1
        return loads(text, **options)

    monkeypatch.setattr(validate, "check_folder", checking)
    monkeypatch.setattr(json, "loads", parsing)
    _watched.append((folder, opened))
    try:
        load(str(folder / "adapter"))
    finally:
        _watched.clear()
    assert {name: count for name, count in opened.items() if count > 1} == {}
    assert [count for count in parsed.values() if count > 1] == []
    assert len(folders) == checked
    files = {str(Path(name).name) for name in opened}
    assert {name for name in files if "model-0" not in name} - {"model.safetensors.index.json", "run.json"} == {
        *of_base,
        *ADAPTER,
    } - {"run.json"}


def test_the_hash_of_a_base_model_can_be_begun_ahead(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 500_000)
    expected = base_hash(tmp_path)
    assert expected
    hash_ahead(tmp_path)
    assert base_hash(tmp_path) == expected
    (tmp_path / "config.json").write_text('{"other": 1}')
    assert base_hash(tmp_path) != expected
    hash_ahead(tmp_path / "none")
    assert base_hash(tmp_path / "none") is None
