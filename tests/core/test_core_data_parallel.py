"""The replicas of ``nn.DataParallel``, in which transformers' Trainer trains where it sees several GPUs."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models_tiny import labelled, randomise, tiny
from torch import nn
from torch.nn.parallel import replicate

import peftcli


@pytest.fixture
def _copies_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch make replicas without GPUs: each gets copies of the tensors."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: Sequence[torch.Tensor], devices: Sequence[int], detach: bool = False) -> list[list[Any]]:
        return [[each.detach() if detach else each.clone() for each in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)


def _train(modules: Sequence[nn.Module], parts: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    outputs = [module(**part) for module, part in zip(modules, parts, strict=True)]
    torch.stack([output.loss for output in outputs]).sum().backward()
    return torch.cat([output.logits.detach() for output in outputs])


@pytest.mark.usefixtures("_copies_on_a_cpu")
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("bert", peftcli.LoraConfig(task_type="SEQ_CLS", bias="all", use_dora=True)),
        ("llama", peftcli.LNTuningConfig()),
        ("llama", peftcli.VeraConfig()),
        ("llama", peftcli.LoHaConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    ],
    ids=["head", "norms", "shared", "delta"],
)
def test_replicas_compute_and_train_what_the_model_does(kind: str, config: Any) -> None:
    model = peftcli.get_peft_model(tiny(kind), config).eval()
    randomise(model)
    inputs = labelled(kind)
    parts = [{name: value[row : row + 1] for name, value in inputs.items()} for row in range(2)]
    trained = [value for value in model.parameters() if value.requires_grad]
    expected = _train([model, model], parts), [value.grad for value in trained]
    model.zero_grad()
    found = _train(replicate(model, [0, 1]), parts), [value.grad for value in trained]
    torch.testing.assert_close(found, expected)
    assert any(value.abs().max() > 0 for value in expected[1] if value is not None)
