"""Multitask prompt tuning: a prompt that tasks share, a factor for each, and where a new task starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from safetensors.torch import save_file
from torch import nn

from peftcli.core.files import save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftcli.methods.prompt_tuning import PromptTuningConfig

N = 4


def _adapted(**settings: Any) -> tuple[Any, MultitaskPromptTuningConfig]:
    model, config = tiny("llama"), MultitaskPromptTuningConfig(num_virtual_tokens=N, **settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model, config


def test_each_tasks_prompt_is_the_shared_one_times_its_factor() -> None:
    model, _ = _adapted(num_tasks=3, num_ranks=2)
    state = adapter_state(model)
    for task in range(3):
        plain = tiny("llama")
        inject(plain, PromptTuningConfig(num_virtual_tokens=N))
        factor = torch.einsum("nr,rd->nd", state["prefix_task_cols"][task], state["prefix_task_rows"][task])
        with torch.no_grad():
            nn.Module.get_parameter(plain, "model.embed_tokens.prompt_embeddings").copy_(
                state["prompt_embeddings"] * factor
            )
        got = logits(model, {**batch("llama"), "task_ids": torch.tensor([task, task])})
        torch.testing.assert_close(got, logits(plain, batch("llama")), atol=1e-5, rtol=1e-4)


def test_only_the_factors_of_a_batchs_tasks_get_gradients() -> None:
    model, _ = _adapted(num_tasks=3)
    inputs = batch("llama")
    model(**inputs, labels=inputs["input_ids"], task_ids=torch.tensor([2, 2])).loss.backward()
    found = {name.rpartition(".")[2]: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert found["prefix_task_cols"].abs().sum((1, 2)).bool().tolist() == [False, False, True]
    assert found["prompt_embeddings"].abs().sum() > 0


def test_one_task_needs_no_ids() -> None:
    model, _ = _adapted()
    given = logits(model, {**batch("llama"), "task_ids": torch.tensor([0, 0])})
    assert torch.equal(logits(model, batch("llama")), given)


def test_counts() -> None:
    model, _ = _adapted(num_tasks=3, num_ranks=2)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained == N * 32 + 3 * 2 * (N + 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An adapter of three tasks."""
    model, config = _adapted(num_tasks=3, num_ranks=2)
    save_adapter(model, config, tmp_path)
    return tmp_path / "adapter_model.safetensors"


def _start(source: Path, init: str, **settings: Any) -> dict[str, torch.Tensor]:
    model = tiny("llama")
    given = {"num_virtual_tokens": N, "num_ranks": 2, "prompt_tuning_init": init, **settings}
    inject(model, MultitaskPromptTuningConfig(**given, prompt_tuning_init_state_dict_path=str(source)))
    return adapter_state(model)


@pytest.mark.parametrize(
    ("init", "settings", "message"),
    [
        (
            "EXACT_SOURCE_TASK",
            {"prompt_tuning_init_task": 3},
            "prompt_tuning_init_task: 3: the source's tasks are 0 to 2",
        ),
        ("EXACT_SOURCE_TASK", {"num_tasks": 2}, "num_tasks: EXACT_SOURCE_TASK starts one task, not 2"),
        (
            "AVERAGE_SOURCE_TASKS",
            {"num_ranks": 1},
            r"prefix_task_cols is \(1, 4, 2\), the settings ask for \(1, 4, 1\)",
        ),
        (
            "ONLY_SOURCE_SHARED",
            {"num_virtual_tokens": 5},
            r"prompt_embeddings is \(4, 32\), the settings ask for \(5, 32\)",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused(source: Path, init: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        _start(source, init, **settings)


def test_a_source_that_cannot_be_read_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: cannot be read"):
        _start(tmp_path / "none.safetensors", "EXACT_SOURCE_TASK")
    with pytest.raises(AdapterError, match=r"must be a \.safetensors file; others can run code"):
        _start(tmp_path / "adapter_model.bin", "EXACT_SOURCE_TASK")
    whole = source.read_bytes()
    save_file({"prompt_embeddings": torch.full((N, 32), torch.nan)}, source)
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: contains NaN or Inf"):
        _start(source, "ONLY_SOURCE_SHARED")
    source.write_bytes(whole[:100])
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: damaged"):
        _start(source, "ONLY_SOURCE_SHARED")
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: EXACT_SOURCE_TASK needs it"):
        inject(tiny("llama"), MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK"))


def test_several_tasks_may_go_on_from_the_shared_prompt(source: Path) -> None:
    state = _start(source, "ONLY_SOURCE_SHARED", num_tasks=5)
    assert state["prefix_task_rows"].shape == (5, 2, 32)


def test_a_text_starts_the_shared_prompt() -> None:
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=N,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a text",
        base_model_name_or_path="base",
    )
    config.prepare(lambda name: lambda text: {"input_ids": [5, 6, 7]})
    model = tiny("llama")
    inject(model, config)
    expected = model.get_input_embeddings().base_layer.weight[[5, 6, 7, 5]]
    assert torch.equal(adapter_state(model)["prompt_embeddings"], expected)
    assert config.file_dict()["tokenizer_name_or_path"] == "base"  # PEFT reads no TEXT without one
