"""Poly: its formula, whose skills a row gets, and what one task has that several have not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from models_tiny import PAD, batch, checkpoint_activations, ids, labelled, logits, tiny
from oracle import ours, theirs
from torch import nn

from peftcli.core.inject import disabled, inject, unload
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.errors import AdapterError
from peftcli.methods._task_ids import generate
from peftcli.methods.lora import LoraConfig
from peftcli.methods.poly import PolyConfig
from peftcli.methods.poly.layers import PolyLinear, attach
from peftcli.peft_api import PeftModel, get_peft_model

SETTINGS: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2}
TASKS = torch.tensor([2, 0])


def test_a_row_gets_its_tasks_mixture_of_skills() -> None:
    base, config = nn.Linear(8, 6), PolyConfig(**SETTINGS)
    layer = PolyLinear(base, "x", config).eval()
    attach(base, config, {"x": layer})
    x = torch.randn(2, 4, 8)
    layer.task_ids.of_call = TASKS
    with torch.no_grad():
        assert torch.equal(layer(x), base(x)), "B starts at zero"
        layer.poly_lora_B.normal_()
        layer.poly_router.module_logits.normal_()
        found = layer(x)
        for row, task in enumerate(TASKS.tolist()):
            shares = layer.poly_router.module_logits[task].sigmoid().view(2, 2)
            shares = shares / shares.sum(1, keepdim=True)
            a = torch.cat([sum(shares[q, s] * layer.poly_lora_A[q, s] for s in range(2)) for q in range(2)])
            b = torch.cat([sum(shares[q, s] * layer.poly_lora_B[q, s] for s in range(2)) for q in range(2)], dim=1)
            torch.testing.assert_close(found[row], base(x[row]) + x[row] @ a @ b / 3)
        torch.testing.assert_close(layer(x[:, 0]), found[:, 0], msg="rows without positions")


def test_the_shares_drawn_while_training_are_pefts() -> None:
    settings = SETTINGS | {"task_type": "CAUSAL_LM"}
    model, oracle = ours("llama", "poly", **settings)[0].train(), theirs("llama", "poly", **settings).train()
    own = {name: value for name, value in oracle.named_parameters() if value.requires_grad}
    for name, value in model.named_parameters():
        if value.requires_grad:
            end = ".module_logits" if name.endswith(".module_logits") else ""
            own[f"base_model.model.{name.removesuffix(end)}.default{end}"].data.copy_(value)
    losses = []
    for one in (model, oracle):
        torch.manual_seed(0)
        losses.append(one(**labelled("llama"), task_ids=TASKS).loss)
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.allclose(losses[0], model.eval()(**labelled("llama"), task_ids=TASKS).loss, atol=1e-3)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generated_rows_are_those_that_each_task_gives_alone(kind: str, options: dict[str, Any]) -> None:
    model, _ = ours(kind, "poly", **SETTINGS)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.poly_lora_B.mul_(20)
            layer.poly_router.module_logits.mul_(20)
    inputs, tasks = {"input_ids": ids(3, 6), "attention_mask": torch.ones(3, 6).long()}, torch.tensor([1, 0, 2])
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    together = generate(model, **inputs, task_ids=tasks, **settings, **options)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = generate(model, **one, task_ids=tasks[row : row + 1], **settings, **options)
        assert torch.equal(together[row], alone[0])
    other = generate(model, **inputs, task_ids=torch.tensor([0]), **settings, **options)
    assert not torch.equal(together, other)
    with pytest.raises(AdapterError, match="say the task of each row"):
        generate(model, **inputs, **settings, **options)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "has 3 tasks; say the task of each row"),
        ([0, 1], r"must be a tensor, not \[0, 1\]"),
        (torch.tensor([0, 3]), "tasks are 0 to 2"),
        (torch.tensor([-1]), "tasks are 0 to 2"),
        (torch.tensor([0, 1, 2]), "must be 2 whole numbers"),
        (torch.tensor([0.0, 1.0]), "must be 2 whole numbers"),
    ],
)
def test_tasks_that_cannot_be_right_are_refused(tasks: Any, message: str) -> None:
    model, _ = ours("llama", "poly", **SETTINGS)
    with pytest.raises(AdapterError, match=message):
        model(**batch("llama"), task_ids=tasks)
    if tasks is not None:
        with pytest.raises(AdapterError, match=message):
            generate(model, **batch("llama"), task_ids=tasks, max_new_tokens=2)
    model(**batch("llama"), task_ids=TASKS)
    with pytest.raises(IndexError):
        model(torch.tensor([[9999], [9999]]), task_ids=TASKS)
    with pytest.raises(AdapterError, match="say the task of each row"):
        model(**batch("llama"))
    with pytest.raises(AdapterError, match="say the task"):  # those of the last call are forgotten
        model(**batch("llama"))


def test_a_model_without_tasks_generates_for_none() -> None:
    model = tiny("llama")
    inject(model, LoraConfig())
    with pytest.raises(AdapterError, match="no adapter of this model has tasks"):
        generate(model, **batch("llama"), task_ids=TASKS)


def test_disabled_the_tasks_do_not_matter_and_a_copy_has_its_own() -> None:
    model, _ = ours("llama", "poly", **SETTINGS)
    expected = logits(model, {**batch("llama"), "task_ids": TASKS})
    with disabled(model):
        found = logits(model, {**batch("llama"), "task_ids": torch.tensor([7, 7])})
        assert torch.equal(found, logits(tiny("llama"), batch("llama")))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, {**batch("llama"), "task_ids": TASKS}), expected)
    unload(model)
    with pytest.raises(AdapterError, match="say the task"):
        twin(**batch("llama"))


def test_one_task_needs_no_ids_and_is_merged_several_are_not() -> None:
    model, config = ours("llama", "poly", r=3, n_splits=4)
    expected = logits(model, batch("llama"))
    assert torch.equal(logits(model, {**batch("llama"), "task_ids": torch.tensor([0, 0])}), expected)
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-4, rtol=1e-4)
    model, config = ours("llama", "poly", **SETTINGS)
    with pytest.raises(AdapterError, match="depends on the row's task, so it cannot be merged"):
        merge(model, config)


def test_several_tasks_and_activations_that_are_computed_again_are_refused() -> None:
    model: Any = ours("llama", "poly", **SETTINGS)[0].train()
    checkpoint_activations(model)
    loss = model(**labelled("llama"), task_ids=TASKS).loss
    with pytest.raises(AdapterError, match="Gradient checkpointing"):
        loss.backward()


def test_two_adapters_from_python_take_the_same_tasks() -> None:
    model: Any = get_peft_model(tiny("t5"), PolyConfig(**SETTINGS, task_type="SEQ_2_SEQ_LM", init_weights=False))
    assert isinstance(model, PeftModel)
    model.add_adapter("other", PolyConfig(**SETTINGS, task_type="SEQ_2_SEQ_LM", init_weights=False))
    found = []
    for name in ("default", "other"):
        model.set_adapter(name)
        found.append(logits(model.eval(), {**batch("t5"), "task_ids": TASKS}))
        tokens = model.generate(input_ids=batch("t5")["input_ids"], task_ids=TASKS, max_new_tokens=3)
        assert len(tokens) == 2
    assert not torch.allclose(*found, atol=1e-3)


def test_splits_divide_the_layers() -> None:
    with pytest.raises(AdapterError, match="32 inputs and 32 outputs, which do not divide by 5"):
        inject(tiny("llama"), PolyConfig(n_splits=5))
