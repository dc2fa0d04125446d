"""Distillation: what the teacher reads, how far the student is from it, and what the student writes itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from classifierkit import table_of
from safetensors.torch import load_file
from taskkit import CASES
from trainkit import MESSAGES, base_folder, resumed_and_whole, run_recipe, write_rows

from peftcli.adapters.other_model import open_other
from peftcli.core.inject import disabled, inject
from peftcli.errors import DataError, PeftcliError, UsageError
from peftcli.methods.lora import LoraConfig
from peftcli.models.open import open_base
from peftcli.schema import BaseModel
from peftcli.tasks import TASKS
from peftcli.tasks.text.divergence import Kind, divergences
from peftcli.tasks.text.fast import losses
from peftcli.tasks.text.fast.unpadded import unpad

CONTEXT = "Answer in capital letters."
OWN_SYSTEM = {"messages": [{"role": "system", "content": "You like tea."}, *MESSAGES[0]["messages"]]}
TURNS = {"messages": [*MESSAGES[0]["messages"], *MESSAGES[1]["messages"]]}


def open_task(base: Path | None = None, **settings: Any) -> Any:
    row = TASKS["distillation"]
    task = row.open(row.settings(**settings), open_base(BaseModel(name=str(base or base_folder()))))
    task.ask_others(open_other)
    return task


def student_of(task: Any, targets: str = "all-linear", **more: Any) -> Any:
    """The base model with an adapter that changes what it says."""
    torch.manual_seed(0)
    model = task.base.model("AutoModelForCausalLM", torch.float32).model.eval()
    inject(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_alpha=8, **more))
    return model


def outcomes_of(task: Any, *rows: dict[str, Any]) -> Sequence[Any]:
    table, read = table_of(list(rows))
    return list(task.encode(read, task.read(table)))


def examples_of(task: Any, *rows: dict[str, Any]) -> list[Any]:
    return [example for outcome in outcomes_of(task, *rows) for example in outcome.examples]


def said(task: Any, example: Any, prefix: str = "") -> tuple[str, str]:
    """What is read, and what counts of it."""
    ids, labels = (np.asarray(example.arrays[f"{prefix}{name}"]) for name in ("input_ids", "labels"))
    return task.processor.decode(ids), task.processor.decode(labels[labels != -100])


def compared(own: torch.Tensor, other: torch.Tensor, kind: str, temperature: float = 1.0) -> torch.Tensor:
    """The divergence of rows of logits, by its definition."""
    p, q = ((each.double() / temperature).log_softmax(-1) for each in (own, other))
    if kind == "forward_kl":
        return (q.exp() * (q - p)).sum(-1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    mean = ((p.exp() + q.exp()) / 2).log()
    return ((p.exp() * (p - mean)).sum(-1) + (q.exp() * (q - mean)).sum(-1)) / 2


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_a_divergence_and_its_gradient_are_those_of_the_definition(kind: Kind) -> None:
    torch.manual_seed(0)
    own, other = torch.randn(40, 30, requires_grad=True), torch.randn(40, 30)
    found, wanted = divergences(own, other, kind, 2.0), compared(own, other, kind, 2.0)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    one, two = (torch.autograd.grad(each.sum(), own)[0] for each in (found, wanted))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    same = divergences(own, own.detach().clone(), kind, 2.0)
    assert not torch.autograd.grad(same.sum(), own)[0].any()


@pytest.mark.parametrize(
    ("settings", "targets"),
    [
        ({"loss": "forward_kl"}, "all-linear"),
        ({"loss": "reverse_kl", "temperature": 2.0}, "all-linear"),
        ({"loss": "jsd"}, r".*(v_proj|lm_head)"),
    ],
)
@pytest.mark.parametrize("way", ["chunks", "logits"])
def test_the_loss_compares_the_places_of_the_answer(
    way: str, settings: dict[str, Any], targets: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = open_task(context=CONTEXT, **settings)
    examples, model = examples_of(task, *MESSAGES[:3], TURNS), student_of(task, targets)
    if way == "logits":
        monkeypatch.setattr("peftcli.tasks.text.language_model.output_head", lambda *_: None)
    monkeypatch.setitem(losses._ROWS, "cpu", 5)
    wanted, kl, same = 0.0, 0.0, 0
    for example in examples:
        ids, labels = (torch.tensor(np.asarray(example.arrays[name])) for name in ("input_ids", "labels"))
        read, marks = (torch.tensor(np.asarray(example.arrays[f"teacher_{name}"])) for name in ("input_ids", "labels"))
        with torch.no_grad():
            own = model(input_ids=ids[None]).logits[0, :-1][labels[1:] != -100]
            with disabled(model):
                other = model(input_ids=read[None]).logits[0, :-1][marks[1:] != -100]
        assert len(own) == len(other) == example.num_targets
        kind, temperature = str(task.settings.loss), float(task.settings.temperature)
        wanted += float(compared(own, other, kind, temperature).sum())
        kl += float(compared(own, other, "forward_kl").sum())
        same += int((own.argmax(-1) == other.argmax(-1)).sum())
    batch = task.collate(examples, training=False)
    with torch.no_grad():
        found = task.loss(model, batch)
    assert float(found.total) == pytest.approx(wanted, rel=1e-3)
    assert float(found.sums["kl"]) == pytest.approx(kl, rel=1e-3)
    assert float(found.sums["top1_agreement"]) == same
    gradients = []
    for unpadded in (False, True):
        if unpadded:
            unpad(model)
        model.train().zero_grad()
        loss = task.loss(model, batch).total
        loss.backward()
        assert float(loss.detach()) == pytest.approx(wanted, rel=1e-3)
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_the_teacher_reads_the_context_before_a_rows_own_system_prompt() -> None:
    task = open_task(context=CONTEXT)
    examples = examples_of(task, MESSAGES[0], OWN_SYSTEM, TURNS)
    for example, row in zip(examples, (MESSAGES[0], OWN_SYSTEM, TURNS), strict=True):
        (own, answer), (read, same) = said(task, example), said(task, example, "teacher_")
        assert CONTEXT in read
        assert CONTEXT not in own
        assert answer == same
        assert all(turn["content"] in answer for turn in row["messages"] if turn["role"] == "assistant")
    assert f"{CONTEXT}\n\nYou like tea." in said(task, examples[1], "teacher_")[0]
    shown = [part.title for part in task.show(examples[0]).parts]
    assert shown[-1] == "what the teacher reads"
    pair = examples_of(task, {"prompt": "two and two", "completion": " four"})[0]
    assert said(task, pair, "teacher_")[0].startswith(f"{CONTEXT}\n\ntwo and two")


def test_a_cut_row_is_cut_for_the_teacher_too() -> None:
    whole = examples_of(open_task(context=CONTEXT), MESSAGES[0])[0]
    task = open_task(context=CONTEXT, max_length=whole.size - 2)
    (example,) = examples_of(task, MESSAGES[0])
    assert example.num_targets == whole.num_targets - 1
    assert said(task, example)[1] == said(task, example, "teacher_")[1] != ""


def test_nothing_is_learnt_where_both_agree(tmp_path: Path) -> None:
    events: list[Any] = []
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        task = {"type": "distillation", "context": None, "loss": kind}
        run = run_recipe(
            CASES["distillation"].write(tmp_path), f"task={json.dumps(task)}", on_event=events.append, overwrite=True
        )
        weights = load_file(run.folder / "adapter_model.safetensors")
        assert not any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    assert "nothing to learn" in str(events)


def test_another_adapter_teaches(tmp_path: Path) -> None:
    recipe = CASES["distillation"].write(tmp_path)
    measured = ("training.eval_strategy=steps", "training.eval_steps=6", "training.eval_on_start=true")
    teacher = run_recipe(recipe, "task=causal_lm", "training.learning_rate=0.05").folder
    task = json.dumps({"type": "distillation", "context": None, "teacher": str(teacher)})
    again = (f"task={task}", f"training.output_dir={tmp_path}/student", *measured)
    first = run_recipe(recipe, *again).run["eval"]
    assert first["last"]["eval_kl"] < 0.8 * first["first"]["eval_kl"]
    same = run_recipe(recipe, *again, f"training.init_adapter_from={teacher}", overwrite=True).run["eval"]
    assert same["first"]["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert same["first"]["eval_top1_agreement"] == 1


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_folder(), other)
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|im_start|>"', '"<|turn|>"'))
    task = json.dumps({"type": "distillation", "teacher": str(other)})
    with pytest.raises(UsageError, match="has another vocabulary than") as caught:
        run_recipe(CASES["distillation"].write(tmp_path), f"task={task}")
    assert caught.value.key == "task.teacher"
    with pytest.raises(PeftcliError, match="no model folder") as missing:
        open_task(teacher=str(tmp_path / "missing/model"))
    assert missing.value.key == "task.teacher"


@pytest.mark.parametrize(
    ("settings", "row", "message"),
    [
        ({"context": CONTEXT}, {"text": "Any text."}, "task.context: needs rows with a prompt"),
        ({"on_policy": 0.5}, {"text": "Any text."}, "task.on_policy: needs rows with a prompt"),
        ({"context": CONTEXT, "train_on": "all"}, MESSAGES[0], "task.context: needs answers"),
        ({"on_policy": 0.5, "packing": True}, MESSAGES[0], "cannot be packed"),
    ],
)
def test_settings_that_contradict_the_rows_are_refused(
    settings: dict[str, Any], row: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        outcomes_of(open_task(**settings), row)


def test_rows_that_the_teacher_cannot_read_are_named() -> None:
    task = open_task(base_folder("gpt2"), context=" ".join(["tea"] * 600), max_length=64)
    limit = task._positions
    (found,) = outcomes_of(task, MESSAGES[0])
    assert isinstance(found, DataError)
    assert f"more than the base model's {limit:,} positions" in found.message


def test_rows_that_hold_the_context_are_found(tmp_path: Path) -> None:
    recipe = CASES["distillation"].write(tmp_path)
    held = {"role": "system", "content": CONTEXT}
    write_rows(tmp_path / "train.jsonl", [{"messages": [held, *row["messages"]]} for row in MESSAGES])
    with pytest.raises(DataError, match="contain the context that the teacher alone should see"):
        run_recipe(recipe)


def test_packed_rows_give_the_same_loss() -> None:
    task = open_task(context=CONTEXT)
    examples, model = examples_of(task, *MESSAGES[:4]), student_of(task)
    with torch.no_grad():
        alone = task.loss(model, task.collate(examples, training=True)).total
        packed = task.loss(model, task.collate([task.join(examples[:2]), task.join(examples[2:])], training=True)).total
    assert float(packed) == pytest.approx(float(alone), rel=1e-4)


def test_what_the_student_writes_depends_on_its_row_alone() -> None:
    task = open_task(context=CONTEXT, on_policy=1.0, max_new_tokens=6)
    task.trained_on("messages", {})
    model = student_of(task)
    examples = [replace(each, draw=at) for at, each in enumerate(examples_of(task, *MESSAGES[:4], TURNS), start=1)]

    def written(some: Sequence[Any]) -> tuple[list[list[int]], torch.Tensor]:
        batch = task.collate(some, training=True)
        found, factors = task._with_own_answers(model, batch, batch["_drawn"])
        for own, read in zip(found["labels"], found["_teacher_labels"], strict=True):
            assert own[own != -100].tolist() == read[read != -100].tolist()
        return [row[row != -100].tolist() for row in found["labels"]], factors

    together, factors = written(examples)
    assert together == [row for each in examples for row in written([each])[0]]
    assert together != written([replace(each, draw=each.draw + 9) for each in examples])[0]
    assert [len(row) * float(factor) for row, factor in zip(together, factors, strict=True)] == pytest.approx(
        [each.num_targets for each in examples]
    )
    batch = task.collate(examples, training=True)
    assert torch.isfinite(task.loss(model.train(), batch).total)


def test_resume_and_any_split_of_a_batch_give_the_same_answers(tmp_path: Path) -> None:
    recipe = CASES["distillation"].write(tmp_path)
    task = json.dumps(CASES["distillation"].task | {"on_policy": 1.0, "max_new_tokens": 5})
    settings = (f"task={task}", "training.save_strategy=steps", "training.save_steps=1")
    resumed, whole = resumed_and_whole(recipe, *settings)
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    halves = ("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2")
    split = run_recipe(recipe, *settings, *halves, f"training.output_dir={tmp_path}/split")
    assert split.losses == pytest.approx(whole.losses, rel=1e-3)
