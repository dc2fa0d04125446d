"""Packed rows: what they compute is what their examples compute alone, also where the model cannot unpad."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trainkit
from accelerate import Accelerator
from models_tiny import EOS, VOCABULARY, checkpoint_activations, tiny
from test_train_processes import group, losses
from trainkit import reset_accelerate, run_recipe
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.data.rows import Place
from peftcli.data.store import Column, Example, Outcome, Selection, Store, View, Writer
from peftcli.errors import ModelError
from peftcli.methods.lora import LoraConfig
from peftcli.schema import Training
from peftcli.tasks import settings
from peftcli.tasks.causal_lm import CausalLM
from peftcli.tasks.text.fast.segments import ATTENTION
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.train.data import Data, RunData
from peftcli.train.events import StepResult
from peftcli.train.forward import refuse_contamination
from peftcli.train.loop import Gradients, PreparedModel, fit
from peftcli.train.plan import MicroBatch, Plan

WINDOW = 16
"""Of the models with sliding windows; some examples below are longer."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
TASK = CausalLM(settings.CausalLMSettings(), SimpleNamespace(pad_token_id=0, eos_token_id=EOS), None)


def task_of(model: PreTrainedModel) -> CausalLM:
    return CausalLM(TASK.settings, TASK.processor, SimpleNamespace(config=model.config))


def _scaled(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


_LOCAL: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=WINDOW)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW)),
    "mpt": lambda: MptForCausalLM(MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=VOCABULARY)),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0)
    ),
}


def base(kind: str) -> PreTrainedModel:
    return _scaled(_LOCAL[kind]) if kind in _LOCAL else tiny(kind)


def adapted(kind: str, attention: str) -> PreTrainedModel:
    """A model with a LoRA adapter whose delta is not zero."""
    model = base(kind)
    if attention == ATTENTION:
        assert unpad(model)
    else:
        model.set_attn_implementation(attention)
    inject(model, LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(1)
    for _, _, parameter in named_tensors(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def examples(*lengths: int, seed: int = 0) -> list[Example]:
    """Random ids; the first label counts for nothing, and a third of the others is no target."""
    generator = np.random.default_rng(seed)
    ids = [generator.integers(2, EOS, length).tolist() for length in lengths]
    labels = [[id if id % 3 else -100 for id in row] for row in ids]
    return [
        Example({"input_ids": row, "labels": of_row}, len(row), sum(label != -100 for label in of_row[1:]))
        for row, of_row in zip(ids, labels, strict=True)
    ]


def loss_and_gradients(model: PreTrainedModel, batches: list[list[Example]]) -> tuple[float, dict[str, Any]]:
    total = 0.0
    for batch in batches:
        loss = TASK.loss(model, TASK.collate(batch, training=True)).total
        loss.backward()
        total += float(loss.detach())
    tensors = named_tensors(model)
    gradients = {
        name: parameter.grad.clone() for name, (_, _, parameter) in tensors.items() if parameter.grad is not None
    }
    assert gradients.keys() == tensors.keys()
    model.zero_grad()
    return total, gradients


COMPARED = [
    (kind, attention)
    for kind in ("llama", "qwen2", "qwen3", "gpt2", "gemma2", "gemma3", "mistral")
    for attention in ("eager", "sdpa")
    if (kind, attention) != ("gemma2", "sdpa")  # SDPA has no softcap, which Gemma 2 needs
]


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(("kind", "attention"), COMPARED)
def test_packed_rows_have_the_loss_and_gradients_of_their_examples(kind: str, attention: str) -> None:
    model = adapted(kind, attention)
    packed = examples(7, 40, 1, 23, 12, 30, 2)
    rows = [TASK.join(packed[:3]), TASK.join(packed[3:])]  # of different lengths: the first is padded
    alone, gradients = loss_and_gradients(model, [[example] for example in packed])
    for batches in ([rows], [[TASK.join(packed)]]):
        total, found = loss_and_gradients(model, batches)
        assert total == pytest.approx(alone, rel=1e-5)
        for name, gradient in gradients.items():
            off = (found[name] - gradient).abs().max() / gradient.abs().max()
            assert float(off) < 1e-5, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch and transformers, which compile it
def test_flex_attention_keeps_examples_apart() -> None:
    """The forward pass only: on a CPU, flex attention has no backward pass."""
    model, packed = adapted("llama", "flex_attention"), examples(7, 40, 1, 23)
    with torch.no_grad():
        loss = TASK.loss(model, TASK.collate([TASK.join(packed)], training=True)).total
        model.set_attn_implementation("sdpa")
        alone = sum(TASK.loss(model, TASK.collate([example], training=True)).total for example in packed)
    assert float(loss) == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(("kind", "attention"), COMPARED)
def test_another_example_changes_nothing_of_its_neighbours(kind: str, attention: str) -> None:
    model = adapted(kind, attention)
    packed = examples(9, 20, 11)
    changed = [packed[0], *examples(20, seed=1), packed[2]]
    inputs = [TASK.collate([TASK.join(row)], training=True) for row in (packed, changed)]
    with torch.no_grad():
        before, after = (
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
            for batch in inputs
        )
    moved = (before - after).abs().amax(dim=1)
    assert float(moved[[*range(9), *range(29, 40)]].max()) == 0
    assert float(moved[9:29].max()) > 0.1


# --- models that mix examples -----------------------------------------------------------------------------------------


@pytest.fixture
def accelerator() -> Accelerator:
    reset_accelerate()
    return Accelerator(cpu=True)


@pytest.mark.parametrize("kind", ["bloom", "mpt", "mamba", "opt", "t5"])
def test_a_model_that_mixes_examples_is_refused(kind: str, accelerator: Accelerator) -> None:
    model = base(kind)
    with pytest.raises(ModelError, match=type(model).__name__) as caught:
        refuse_contamination(model, task_of(model), accelerator)
    assert caught.value.key == "dataset.packing"
    assert caught.value.hint == "set dataset.packing: false"
    assert model.config._attn_implementation in caught.value.message


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize(("kind", "attention"), [*COMPARED, ("mixtral", "sdpa"), ("llama_tied", "sdpa")])
def test_a_model_that_keeps_examples_apart_is_accepted(kind: str, attention: str, accelerator: Accelerator) -> None:
    model = base(kind)
    model.set_attn_implementation(attention)
    for dtype in (torch.float32, torch.bfloat16):
        refuse_contamination(model.to(dtype), task_of(model), accelerator)


def test_a_cache_hides_the_examples(accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check is for: nothing fails, and every example sees those before it."""
    model = base("llama")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda position_ids=None, **inputs: forward(**inputs))
    with pytest.raises(ModelError):
        refuse_contamination(model, task_of(model), accelerator)


def test_the_check_leaves_no_trace(accelerator: Accelerator) -> None:
    model = base("gpt2").train()
    model.transformer.h[0].eval()
    model.transformer.h[1].mlp.dropout.p = 0.5
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    refuse_contamination(model, task_of(model), accelerator)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


# --- whole runs -------------------------------------------------------------------------------------------------------


class Unpacked(Plan):
    """The same examples in each step and each micro-batch, every one in a row of its own."""

    def __init__(self, packed: Plan):
        self.packed = packed
        self.sizes, self.training = packed.sizes, packed.training

    @property
    def packs(self) -> bool:
        return False

    @property
    def total_steps(self) -> int:
        return self.packed.total_steps

    def global_batch(self, step: int) -> list[int]:
        return self.packed.global_batch(step)

    def micro_batches(self, step: int, process: int) -> list[MicroBatch]:
        return [[[index] for row in part for index in row] for part in self.packed.micro_batches(step, process)]


def view_of(some: list[Example], folder: Path) -> View:
    folder.mkdir()
    with Writer(folder, {"input_ids": Column(), "labels": Column()}) as writer:
        writer.add([Place("a.jsonl", number) for number in range(1, len(some) + 1)], [Outcome([each]) for each in some])
        writer.finish()
    return View([Selection(Store(folder))])


@pytest.mark.grid(keep=2)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "attention"), [("llama", ATTENTION), ("gemma3", ATTENTION), ("gpt2", "sdpa"), ("qwen2", "eager")]
)
def test_packed_training_has_the_losses_of_unpacked_training(
    kind: str, attention: str, checkpointing: bool, accelerator: Accelerator, tmp_path: Path
) -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 24)
    view = view_of(examples(*lengths.tolist()), tmp_path / "store")
    training = Training(
        output_dir="out", per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=4
    )
    plan = Plan(view.sizes, training, 1, max_length=64)
    start = adapted(kind, attention)

    def run(plan: Plan) -> list[StepResult]:
        model = copy.deepcopy(start)
        if checkpointing and plan.packs:
            checkpoint_activations(model)
        parameters = [parameter for _, _, parameter in named_tensors(model).values()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        prepared = PreparedModel(model, parameters, optimizer, schedule, LoraConfig(r=4))
        return list(fit(Gradients(RunData(Data(TASK, view, None, {}, []), plan), prepared, accelerator)))

    packed, unpacked = run(plan), run(Unpacked(plan))
    assert [step.loss for step in packed] == pytest.approx([step.loss for step in unpacked], rel=1e-5)
    assert [step.grad_norm for step in packed] == pytest.approx([step.grad_norm for step in unpacked], rel=1e-4)
    assert [step.num_targets for step in packed] == [step.num_targets for step in unpacked]
    assert sum(step.num_tokens for step in packed) == 4 * lengths.sum()
    assert packed[-1].loss < packed[0].loss * 0.95


PACKING = ("dataset.packing=true", "training.per_device_train_batch_size=1", "training.max_steps=6")


@pytest.fixture
def long_recipe(tmp_path: Path) -> Path:
    """Rows of 128 tokens, and enough data for some of them."""
    path = trainkit.write_recipe(tmp_path)
    trainkit.write_rows(tmp_path / "train.jsonl", trainkit.MESSAGES * 3)
    return path


def test_a_packed_run_from_its_recipe(long_recipe: Path, tmp_path: Path) -> None:
    done = run_recipe(long_recipe, *PACKING)
    longest = max(done.run["data"]["tokens"] / len(trainkit.MESSAGES) / 3, 1)
    assert done.metrics[0]["num_tokens"] > 2 * longest, "a row holds several examples"
    assert done.losses[-1] < done.losses[0]
    again = run_recipe(long_recipe, *PACKING, f"training.output_dir={tmp_path}/again")
    assert again.weights == done.weights
    half = run_recipe(long_recipe, *PACKING, f"training.output_dir={tmp_path}/half", "training.bf16=true")
    assert half.losses == pytest.approx(done.losses, rel=0.01)


def test_packed_rows_and_generated_answers_where_padding_is_computed(long_recipe: Path) -> None:
    answers = ("task.generate_metrics=[exact_match]", "task.max_new_tokens=4", "training.eval_strategy=epoch")
    done = run_recipe(
        long_recipe,
        *PACKING,
        *answers,
        f"dataset.eval={long_recipe.parent}/train.jsonl",
        "base_model.attn_implementation=eager",
    )
    assert "eval_exact_match" in done.run["eval"]["last"]


def test_a_stopped_packed_run_goes_on_with_the_same_rows(long_recipe: Path) -> None:
    settings = (*PACKING, "method.lora_dropout=0.2")
    resumed, whole = trainkit.resumed_and_whole(long_recipe, *settings)
    assert resumed.run["attempts"][-1]["from_step"] == 4
    assert resumed.weights == whole.weights
    assert resumed.losses == whole.losses


@pytest.mark.slow
def test_two_processes_pack_as_one_does(long_recipe: Path, tmp_path: Path) -> None:
    one = run_recipe(long_recipe, *PACKING, "training.per_device_train_batch_size=2")
    two = tmp_path / "two"
    children = group(tmp_path, "train", long_recipe, *PACKING, f"training.output_dir={two}")
    assert [child.wait() for child in children] == [0, 0]
    assert losses(two) == pytest.approx(one.losses, rel=1e-5)
    assert losses(two, "grad_norm") == pytest.approx(losses(one.folder, "grad_norm"), rel=1e-4)


def test_a_run_of_a_model_that_mixes_examples_is_refused(long_recipe: Path) -> None:
    folder = long_recipe.parent / "bloom"
    model = base("bloom")
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(folder)
    trainkit.tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match="BloomForCausalLM with eager attention"):
        run_recipe(long_recipe, *PACKING, f"base_model={folder}")
    assert not (long_recipe.parent / "out/adapter_model.safetensors").exists()
