"""What every method promises on every task: it trains, and the folder that it saves is the trained model.

``tests/contract/test_methods_of_tasks.py`` runs this as tests, and ``docs/conformance.py`` writes the table of it.
"""

from __future__ import annotations

import fnmatch
import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
from promises import base_settings
from taskkit import CASES
from trainkit import run_recipe, scratch

from peftcli.adapters.proof.verify import verify_adapter
from peftcli.core.files import save_adapter
from peftcli.core.inject import inject
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS

SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    # its layers share a matrix, and SegFormer's stages differ in size
    ("frod", "semantic_segmentation"): {"target_modules": ["stages.1.blocks.0.attention.q_proj"]},
    **{  # the last layer of its boxes has 4 outputs
        (method, "object_detection"): {"target_modules": ["query", "value"]} for method in ("vblora", "c3a", "road")
    },
    ("trainable_tokens", "grpo"): {"token_indices": [266, 268]},  # which each prompt has
    ("trainable_tokens", "image_text_to_text"): {"token_indices": [1, 2]},  # which each row has
}
"""What besides ``promises.METHOD_SETTINGS``: (method, task) patterns -> settings, of which all that match count."""

_PICTURES = ("image_classification", "semantic_segmentation", "object_detection", "text_to_image")
_SOUNDS = ("audio_classification", "speech_recognition")
_OF_NO_TEXT = (*_PICTURES, "audio_classification")
_SOFT_PROMPTS = ("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cartridge")
_NO_TEXT = "virtual tokens stand before those of a text; the model adapted here reads {}"
NOT_FOR: dict[tuple[str, str], str] = {
    **{(method, task): _NO_TEXT.format("pictures") for method in _SOFT_PROMPTS for task in _PICTURES},
    **{(method, task): _NO_TEXT.format("sound") for method in _SOFT_PROMPTS for task in _SOUNDS},
    **{("trainable_tokens", task): "the model adapted here has no rows of tokens" for task in _OF_NO_TEXT},
    **{
        ("adaption_prompt", task): "no layer keeps keys and values, as those of language models" for task in _OF_NO_TEXT
    },
    **{
        (method, "image_text_to_text"): "virtual tokens have no place among those of pictures"
        for method in _SOFT_PROMPTS
    },
    **{
        (method, "multiple_choice"): "virtual tokens have no place where texts are compared" for method in _SOFT_PROMPTS
    },
    **{
        ("xlora", task): "its classifier reads one state for each token of a text"
        for task in (*_PICTURES, *_SOUNDS, "seq2seq_lm")
    },
    **{
        ("cpt", task): "its loss is that of a causal language model"
        for task in TASKS
        if TASKS[task].task_type != "CAUSAL_LM"
    },
}
"""Methods that do not go with a task: (method, task) patterns -> reason. Training must refuse them."""


def settings_of(method: str, task: str) -> dict[str, Any]:
    """The recipe's ``method``."""
    found = {"type": method, **base_settings(method, "llama")}
    if method == "xlora":
        found["adapters"] = experts(task)
    for (methods, tasks), values in SETTINGS.items():
        if fnmatch.fnmatch(method, methods) and fnmatch.fnmatch(task, tasks):
            found |= values
    return found


@functools.cache
def experts(task: str) -> dict[str, str]:
    """Two LoRA adapters of the task's base model for X-LoRA to mix."""
    found = {}
    for number in range(2):
        opened = open_base(BaseModel(name=str(CASES[task].base())))
        base = opened.model(TASKS[task].auto_class, torch.float32).model
        beside = {"target_modules": r".*language_model.*_proj"} if task == "image_text_to_text" else {}  # no pictures
        config = LoraConfig(r=2 + number, init_lora_weights=False, **beside)
        inject(base, config)
        found[str(number)] = str(scratch() / f"expert {number} of {task}")
        save_adapter(base, config, Path(found[str(number)]))
    return found


def why_not(method: str, task: str) -> str | None:
    """Why the method does not go with the task; None when it does."""
    matches = (reason for place, reason in NOT_FOR.items() if all(map(fnmatch.fnmatch, (method, task), place)))
    return next(matches, None)


def trains(method: str, task: str, folder: Path) -> None:
    """Three steps change what the model says of rows that it has not seen, and the folder says the same."""
    run = _run(method, task, folder)
    before, after = (run.run["eval"][which]["eval_loss"] for which in ("first", "last"))
    assert math.isfinite(after)
    assert {f"eval_{name}" for name in CASES[task].metrics} <= run.run["eval"]["last"].keys()
    assert after != before
    found = verify_adapter(str(run.folder))
    assert found["tensors"]
    assert found["difference"] is None or found["difference"] <= found["allowed"] / 10


def is_refused(method: str, task: str, folder: Path) -> None:
    """For methods that do not go with a task: training says so before its first step."""
    try:
        _run(method, task, folder)
    except AdapterError:
        assert not (folder / "out/metrics.jsonl").exists()
        return
    raise AssertionError(f"{method} is said not to go with {task}, and does")


def _run(method: str, task: str, folder: Path) -> Any:
    measured = ("training.eval_strategy=steps", "training.eval_steps=3", "training.eval_on_start=true")
    settings = f"method={json.dumps(settings_of(method, task))}"
    return run_recipe(CASES[task].write(folder), settings, *measured, "training.verify=true", "training.max_steps=3")
