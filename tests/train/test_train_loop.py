"""The loss series, and the adapter that comes out."""

from __future__ import annotations

import importlib
import math
import re
import shutil
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trainkit
from classifierkit import classifier_base
from safetensors.torch import load, load_file, save_file
from taskkit import CASES
from trainkit import PROMPT_TUNING, Trained, read_run, run_recipe, run_until, write_recipe
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BrosConfig, BrosModel

from peftcli.adapters.proof.verify import verify_adapter
from peftcli.cli.progress import summary
from peftcli.core.inject import inject
from peftcli.errors import Diverged, Interrupted, ModelError, OutOfMemory, PeftWarning, StorageError, UsageError
from peftcli.methods.lora import LoraConfig
from peftcli.models.open import open_base
from peftcli.recipe import load_recipe
from peftcli.schema import Training
from peftcli.tasks import open_task
from peftcli.tasks.base import Batch
from peftcli.tasks.text.language_model import LanguageModel
from peftcli.train import batches, loop
from peftcli.train.memory.fit import too_large_a_step
from peftcli.train.run import train
from peftcli.train.runs.checkpoint import Progress
from peftcli.train.training_loop import TrainingLoop


def same_weights(one: Trained, other: Trained, atol: float = 2e-5) -> None:
    mine, theirs = load(one.weights), load(other.weights)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(
            value, theirs[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name} {text}"
        )


def chat_ids(question: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of one exchange and its labels, without peftcli."""
    tokenizer = AutoTokenizer.from_pretrained(trainkit.base_folder())
    head = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    said = tokenizer(f"{answer}<|im_end|>")["input_ids"]
    after = tokenizer("\n")["input_ids"]
    return head + said + after, [-100] * len(head) + said + [-100] * len(after)


def summed_loss(model: Any, rows: list[tuple[str, str]]) -> tuple[torch.Tensor, int]:
    """Summed loss and number of targets, each row alone and unpadded."""
    total, count = torch.zeros(()), 0
    for ids, labels in (chat_ids(*row) for row in rows):
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum", ignore_index=-100)
        count += sum(label != -100 for label in labels)
    return total, count


@pytest.mark.grid
@pytest.mark.parametrize("method", [None, PROMPT_TUNING], ids=["lora", "prompt_tuning"])
def test_first_loss_is_the_sum_over_targets_divided_by_the_targets(recipe: Path, method: str | None) -> None:
    settings = [method] if method else []
    done = run_recipe(
        recipe,
        *settings,
        "training.train_sampling_strategy=sequential",
        "training.max_steps=1",
        "training.learning_rate=0",
    )
    model = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    if method:
        vectors = load(done.weights)["prompt_embeddings"]
        plain = model

        def model(input_ids: torch.Tensor) -> Any:
            embedded = torch.cat([vectors, plain.get_input_embeddings()(input_ids[0])])[None]
            output = plain(inputs_embeds=embedded)
            output.logits = output.logits[:, len(vectors) :]
            return output

    with torch.no_grad():
        total, count = summed_loss(model, trainkit.PAIRS[:4])
    assert done.metrics[0]["num_targets"] == count
    assert done.losses[0] == pytest.approx(float(total) / count, rel=1e-6)


@pytest.mark.grid
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_of_several_towers_learns_from_text_alone(tmp_path: Path, attention: str) -> None:
    base = trainkit.base_folder("gemma3_towers")
    done = run_recipe(
        write_recipe(tmp_path, base),
        f"base_model.attn_implementation={attention}",
        "training.train_sampling_strategy=sequential",
        "training.max_steps=1",
        "training.verify=true",
    )
    with torch.no_grad():
        total, count = summed_loss(AutoModelForCausalLM.from_pretrained(base), trainkit.PAIRS[:4])
    assert done.losses[0] == pytest.approx(float(total) / count, rel=1e-5)
    assert (done.run["data"]["efficiency"] == 1) is (attention == "sdpa")
    assert all("language_model" in name for name in load(done.weights))
    assert not done.warnings
    assert verify_adapter(str(done.folder))["tensors"] == len(load(done.weights)) == 2 * 7 * 2


def test_targets_that_texts_never_reach_are_told(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, trainkit.base_folder("gemma3_towers"))
    with pytest.warns(PeftWarning, match=r"never reaches, as model\.vision_tower\."):
        run_recipe(recipe, "training.max_steps=1", "method.target_modules=[q_proj]")


def test_first_loss_of_an_encoder_decoder(t5_recipe: Path) -> None:
    done = run_recipe(t5_recipe, "training.train_sampling_strategy=sequential", "training.max_steps=1")
    model = AutoModelForSeq2SeqLM.from_pretrained(trainkit.base_folder("t5", chat=False))
    tokenizer = AutoTokenizer.from_pretrained(trainkit.base_folder("t5", chat=False))
    total, count, read = 0.0, 0, 0
    for row in trainkit.PROMPTS[:4]:
        labels = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=torch.tensor([labels])).loss) * len(labels)
        count, read = count + len(labels), read + ids.numel()
    assert done.metrics[0]["num_targets"] == count
    assert done.metrics[0]["num_tokens"] == read + count
    assert done.losses[0] == pytest.approx(total / count, rel=1e-6)


def test_series_equals_a_plain_loop(recipe: Path) -> None:
    """Clipping, weight decay, warm-up and schedule, against a loop written out."""
    settings = {"max_grad_norm": 0.05, "weight_decay": 0.3, "warmup_steps": 2, "adam_beta2": 0.95}
    done = run_recipe(
        recipe,
        *(f"training.{name}={value}" for name, value in settings.items()),
        "training.train_sampling_strategy=sequential",
    )
    model = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    torch.manual_seed(42)
    inject(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.3, betas=(0.9, 0.95))
    losses, norms = [], []
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 5e-3 * (step / 2 if step < 2 else (8 - step) / 6)
        start = 4 * (step % 3)
        total, count = summed_loss(model, trainkit.PAIRS[start : min(start + 4, 10)])
        (total / count).backward()
        losses.append(float(total.detach()) / count)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 0.05)))
        optimizer.step()
        optimizer.zero_grad()
    assert done.losses == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in done.metrics] == pytest.approx(norms, rel=1e-4)
    assert losses[-1] < losses[0]


@pytest.mark.grid
@pytest.mark.parametrize(
    "method",
    [None, PROMPT_TUNING, "method.init_lora_weights=lora_ga", "method.init_lora_weights=eva"],
    ids=["lora", "prompt_tuning", "lora_ga", "eva"],
)
def test_any_split_gives_the_series_of_the_big_batch(tmp_path: Path, method: str | None) -> None:
    runs = [
        run_recipe(
            write_recipe(tmp_path / f"{size}x{parts}"),
            *([method] if method else []),
            "training.max_steps=4",
            f"training.per_device_train_batch_size={size}",
            f"training.gradient_accumulation_steps={parts}",
        )
        for size, parts in [(4, 1), (1, 4)]
    ]
    whole, parts = runs
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert [entry["num_targets"] for entry in parts.metrics] == [entry["num_targets"] for entry in whole.metrics]
    same_weights(whole, parts)
    assert len({entry["num_targets"] for entry in whole.metrics}) > 1, "the rows must be ragged"


def test_a_cpu_computes_a_large_micro_batch_in_parts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, loss = list[int](), loop.Gradients.loss

    def noted(gradients: loop.Gradients, batch: Batch) -> torch.Tensor:
        sizes.append(int(batch["attention_mask"].sum()))
        return loss(gradients, batch)

    monkeypatch.setattr(loop.Gradients, "loss", noted)
    whole = run_recipe(recipe, "training.max_steps=4")
    together = list(sizes)
    monkeypatch.setattr("peftcli.tasks.text.fast.parts._COST", 10)  # rows this short share most of their tokens
    monkeypatch.setattr(batches, "PART", max(together) // 2)
    sizes.clear()
    parts = run_recipe(recipe, "training.max_steps=4", f"training.output_dir={tmp_path}/parts")
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    same_weights(whole, parts)
    assert sum(sizes) == sum(together)
    assert len(sizes) > len(together)


def test_the_longest_rows_of_a_step_are_computed_first() -> None:
    form, examples = batches.BatchForm(joins=False, pads=True, divides=True), Mock(sizes=np.array([2, 2, 90, 90]))
    assert form.divided([[[0], [1], [2], [3]]], examples) == [[[2], [3]], [[0], [1]]]


def test_group_by_length_trains(recipe: Path) -> None:
    done = run_recipe(recipe, "training.train_sampling_strategy=group_by_length", "training.max_steps=3")
    assert sum(entry["num_targets"] for entry in done.metrics) == done.run["data"]["targets"]


def test_logged_loss_is_the_mean_over_the_targets_since_the_last_line(recipe: Path, tmp_path: Path) -> None:
    every = run_recipe(recipe)
    rare = run_recipe(recipe, f"training.output_dir={tmp_path}/rare", "training.logging_steps=3")
    assert [entry["step"] for entry in rare.metrics] == [1, 3, 6, 8]

    def mean(first: int, last: int) -> float:
        part = every.metrics[first - 1 : last]
        return sum(e["loss"] * e["num_targets"] for e in part) / sum(e["num_targets"] for e in part)

    assert rare.losses == pytest.approx([mean(1, 1), mean(2, 3), mean(4, 6), mean(7, 8)], rel=1e-9)
    assert rare.run["train_loss"] == pytest.approx(mean(1, 8), rel=1e-9)


# --- the same again, and not the same ---------------------------------------------------------------------------------

DROPOUT = "method.lora_dropout=0.3"


def test_a_seed_gives_the_same_bytes_and_another_seed_others(recipe: Path, tmp_path: Path) -> None:
    def weights(name: str, *settings: str) -> bytes:
        output = f"training.output_dir={tmp_path}/{name}"
        return run_recipe(recipe, output, "training.max_steps=2", DROPOUT, *settings).weights

    first = weights("first")
    torch.manual_seed(99)  # what happened in the process before does not matter
    assert weights("again") == first
    assert weights("other", "training.seed=43") != first
    assert weights("none", "method.lora_dropout=0") != first


@pytest.mark.grid
@pytest.mark.parametrize("settings", [[], [PROMPT_TUNING], [DROPOUT]], ids=["lora", "prompt_tuning", "dropout"])
def test_gradient_checkpointing_changes_nothing(recipe: Path, tmp_path: Path, settings: list[str]) -> None:
    plain = run_recipe(recipe, *settings)
    saving = run_recipe(
        recipe, *settings, f"training.output_dir={tmp_path}/saving", "training.gradient_checkpointing=true"
    )
    assert saving.losses == pytest.approx(plain.losses, rel=1e-6)
    same_weights(plain, saving)


@pytest.mark.grid
@pytest.mark.parametrize("method", [None, PROMPT_TUNING], ids=["lora", "prompt_tuning"])
def test_bf16_trains_on_the_cpu(recipe: Path, tmp_path: Path, method: str | None) -> None:
    settings = [method] if method else []
    exact = run_recipe(recipe, *settings)
    fast = run_recipe(recipe, *settings, f"training.output_dir={tmp_path}/bf16", "training.bf16=true")
    assert fast.losses == pytest.approx(exact.losses, rel=0.01)
    assert fast.losses != exact.losses
    assert all(value.dtype == torch.float32 for value in load(fast.weights).values())


def test_bf16_loss_is_computed_at_targets_only(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the wrapper that accelerate puts around forward."""
    from peftcli.tasks.text.fast import losses

    rows = []
    chunk = losses._chunk

    def spy(head: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(hidden))
        return chunk(head, hidden, *rest)

    monkeypatch.setattr(losses, "_chunk", spy)
    done = run_recipe(recipe, "training.bf16=true", "training.max_steps=1", "training.eval_strategy=no")
    assert sum(rows) == done.metrics[0]["num_targets"]


def test_only_the_adapter_is_trained(recipe: Path) -> None:
    before = {path.name: path.read_bytes() for path in trainkit.base_folder().iterdir()}
    done = run_recipe(recipe, "method.target_modules=[q_proj]")
    assert {path.name: path.read_bytes() for path in trainkit.base_folder().iterdir()} == before
    tensors = load(done.weights)
    assert len(tensors) == 4
    assert all("q_proj" in name for name in tensors)
    assert sum(value.numel() for value in tensors.values()) == done.run["parameters"]["trainable"]


# --- divergence -------------------------------------------------------------------------------------------------------


HUGE = ("training.learning_rate=1e6", "method.lora_alpha=1000000000000000000")
"""After the first step that moves anything, the update times its input overflows float32."""


def diverged(recipe: Path, *settings: str) -> dict[str, Any]:
    """Trains until Diverged; gives run.json. Nothing final may stand."""
    with pytest.raises(Diverged):
        run_recipe(recipe, "training.max_grad_norm=0", *settings)
    folder = recipe.parent / "out"
    run = trainkit.read_run(folder)
    assert (run["status"], run["exit_code"], run["error"]["kind"]) == ("failed", 9, "Diverged")
    assert not (folder / "adapter_model.safetensors").exists()
    return run


def test_a_huge_learning_rate_diverges(recipe: Path) -> None:
    run = diverged(recipe, *HUGE)
    assert "step 2" in run["error"]["message"]
    assert "learning_rate" in run["error"]["hint"]


def test_a_model_that_takes_more_than_the_task_gives_is_named(tmp_path: Path) -> None:
    base = shutil.copytree(classifier_base("bert"), tmp_path / "base")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BrosModel(BrosConfig(vocab_size=300, **small)).save_pretrained(base)
    recipe = CASES["token_classification"].write(tmp_path)
    with pytest.raises(ModelError, match="BrosForTokenClassification does not take what this task gives it: You"):
        run_recipe(recipe, f"base_model={base}")


def test_an_evaluation_that_is_not_finite(recipe: Path) -> None:
    settings = (*HUGE, "training.max_steps=1", "training.eval_strategy=steps")
    assert "evaluation after step 1" in diverged(recipe, *settings)["error"]["message"]


def test_a_metric_that_is_nan_is_named_and_never_the_best(recipe: Path) -> None:
    code = recipe.parent / "mine.py"
    code.write_text("scores = iter([float('nan'), 2.0, 1.0, float('inf')])\ndef mine(*texts): return next(scores)\n")
    task = f"{{type: causal_lm, metric_code: {code}:mine, trust_metric_code: true, max_new_tokens: 1}}"
    best = ("training.load_best_model_at_end=true", "training.metric_for_best_model=mine")
    settings = ("training.eval_strategy=steps", "training.eval_steps=2", "training.greater_is_better=true")
    done = run_recipe(recipe, f"task={task}", *settings, *best)
    assert [entry.get("eval_mine") for entry in done.metrics if "eval_loss" in entry] == [None, 2.0, 1.0, None]
    assert done.run["eval"]["best_step"] == 4
    assert [text for text in done.warnings if "eval_mine is" in text] == [
        "eval_mine is nan after step 2: it is left out, and is not the best",
        "eval_mine is inf after step 8: it is left out, and is not the best",
    ]
    code.write_text("def mine(*texts): return float('nan')\n")
    never = run_recipe(
        recipe, f"task={task}", *settings, *best, "training.max_steps=2", f"training.output_dir={recipe.parent}/never"
    )
    assert "no evaluation gave a finite mine: the last adapter is written" in never.warnings


def test_a_nan_in_the_base_model(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(trainkit.base_folder(), base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run = diverged(write_recipe(tmp_path, base))
    assert "step 1" in run["error"]["message"]
    assert run["resumable"] is False


def test_the_last_checkpoint_stands_after_a_divergence(recipe: Path) -> None:
    settings = (*HUGE, "training.lr_scheduler_type=constant_with_warmup")
    run = diverged(
        recipe, *settings, "training.warmup_steps=100", "training.save_strategy=steps", "training.save_steps=1"
    )
    assert run["steps"]["done"] >= 1
    assert (recipe.parent / f"out/checkpoints/step-{run['steps']['done']:06d}").is_dir()


# --- evaluation -------------------------------------------------------------------------------------------------------

EVAL = ("training.eval_strategy=steps", "training.eval_steps=2")


@pytest.mark.grid
@pytest.mark.parametrize("method", [None, PROMPT_TUNING], ids=["lora", "prompt_tuning"])
def test_metrics_do_not_depend_on_the_batch_size(recipe: Path, tmp_path: Path, method: str | None) -> None:
    found = [
        run_recipe(
            recipe,
            *([method] if method else []),
            *EVAL,
            "training.max_steps=4",
            f"training.output_dir={tmp_path}/{size}",
            f"training.per_device_eval_batch_size={size}",
        )
        for size in (1, 8)
    ]
    one, other = found
    assert other.run["eval"]["last"] == pytest.approx(one.run["eval"]["last"], rel=1e-6)
    assert other.weights == one.weights, "evaluation must not touch training"


def test_evaluation_of_the_base_model_by_hand(recipe: Path) -> None:
    done = run_recipe(recipe, "training.eval_on_start=true", *EVAL)
    model = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    right = 0
    with torch.no_grad():
        total, count = summed_loss(model, trainkit.PAIRS[10:])
        for ids, labels in (chat_ids(*row) for row in trainkit.PAIRS[10:]):
            top = model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1)
            right += int((top == torch.tensor(labels[1:])).sum())
    loss = float(total) / count
    expected = {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_token_accuracy": right / count}
    assert done.run["eval"]["first"] == pytest.approx(expected, rel=1e-6)
    assert done.run["data"]["eval"]["targets"] == count


@pytest.mark.usefixtures("short")
def test_runs_of_one_process_may_have_other_precisions_and_count_their_time_from_their_start(recipe: Path) -> None:
    run_recipe(recipe)
    settings = [f"training.output_dir={recipe.parent}/bf16", "training.bf16=true", "training.max_time=1h"]
    with pytest.raises(Interrupted, match=r"training\.max_time"):
        train(load_recipe(recipe, settings), started=time.monotonic() - 3601)
    assert train(load_recipe(recipe, settings))["bf16"] is True


def test_when_it_evaluates(recipe: Path, tmp_path: Path) -> None:
    def steps(name: str, *settings: str) -> list[int]:
        done = run_recipe(recipe, f"training.output_dir={tmp_path}/{name}", *settings)
        return [entry["step"] for entry in done.metrics if "eval_loss" in entry]

    assert steps("steps", "training.eval_strategy=steps", "training.eval_steps=3") == [3, 6, 8]
    assert steps("epoch", "training.eval_strategy=epoch", "training.eval_on_start=true") == [0, 3, 6, 8]
    assert steps("no") == []
    assert read_run(tmp_path / "no")["eval"]["best_step"] is None


def test_the_best_adapter_is_kept(recipe: Path, tmp_path: Path) -> None:
    constant = "training.lr_scheduler_type=constant"
    last = run_recipe(recipe, *EVAL, constant, f"training.output_dir={tmp_path}/last")
    losses = {entry["step"]: entry["eval_loss"] for entry in last.metrics if "eval_loss" in entry}
    worst = max(losses, key=lambda step: losses[step])
    assert worst < 8
    best = run_recipe(
        recipe, *EVAL, constant, "training.load_best_model_at_end=true", "training.greater_is_better=true"
    )
    there = run_recipe(recipe, constant, f"training.output_dir={tmp_path}/there", f"training.max_steps={worst}")
    assert best.run["eval"]["best_step"] == worst
    assert best.run["eval"]["kept"]["eval_loss"] == losses[worst]
    assert best.run["eval"]["last"]["eval_loss"] == losses[8]
    assert best.weights == there.weights
    assert best.weights != last.weights


@pytest.mark.parametrize(
    ("task", "metric", "less_is_better"),
    [
        ("causal_lm", "loss", True),
        ("token_classification", "eval_loss", True),
        ("token_classification", "eval_f1_loss", False),
        ("semantic_segmentation", "eval_iou_loss", False),
        ("speech_recognition", "eval_wer", True),
        ("preference", "eval_kl", True),
        ("preference", "eval_reward_rejected", True),
        ("preference", "eval_reward_chosen", False),
    ],
)
def test_which_metrics_are_better_when_they_are_smaller(task: str, metric: str, less_is_better: bool) -> None:
    """An entity or a class may be called loss."""
    loop = object.__new__(TrainingLoop)
    loop.training, loop.progress = Training(output_dir="out", metric_for_best_model=metric), Progress()
    loop.data = Mock(task=importlib.import_module(f"peftcli.tasks.{task}").TASK)
    name = f"eval_{metric.removeprefix('eval_')}"
    assert [loop._record_metrics({name: value}, {name: value}) for value in (1.0, 0.5)] == [True, less_is_better]


@pytest.mark.slow
def test_less_loss_and_more_accuracy_are_better(recipe: Path, tmp_path: Path) -> None:
    settings = (*EVAL, "training.load_best_model_at_end=true", "training.learning_rate=0.1", "training.max_steps=12")
    loss = run_recipe(recipe, *settings, f"training.output_dir={tmp_path}/loss")
    accuracy = run_recipe(
        recipe, *settings, f"training.output_dir={tmp_path}/accuracy", "training.metric_for_best_model=token_accuracy"
    )
    for done, name, choose in ((loss, "eval_loss", min), (accuracy, "eval_token_accuracy", max)):
        values = [entry[name] for entry in done.metrics if name in entry]
        assert len(set(values)) > 1
        assert done.run["eval"]["kept"][name] == choose(values)


def test_the_next_commands_are_those_that_may_run_the_models_code(recipe: Path) -> None:
    done = run_recipe(recipe, "base_model.trust_remote_code=true", "training.max_steps=1")
    following = summary(done.run, str(done.folder)).partition("next:\n")[2].splitlines()
    assert [line.split()[1] for line in following] == ["evaluate", "push"]


def test_an_adapter_that_fails_a_gate_is_not_said_to_be_merged_or_pushed_next(recipe: Path) -> None:
    done = run_recipe(recipe, *EVAL, "training.max_steps=1", "gates.eval_loss=< 0")
    following = summary(done.run, str(done.folder)).partition("next:\n")[2].splitlines()
    assert [line.split()[1] for line in following] == ["generate"]


def test_training_stops_where_evaluations_get_no_better(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.eval_strategy=steps", "training.eval_steps=1", "training.early_stopping_patience=2")
    stuck = (*settings, "training.learning_rate=0")
    done = run_recipe(recipe, *stuck)
    assert done.run["steps"] == {"done": 3, "total": 8}
    assert done.run["status"] == "complete"
    assert "done: 3 steps of 8, stopped early" in summary(done.run, str(done.folder))
    assert run_recipe(recipe, *stuck).run == done.run, "it is complete"
    resumed = [*stuck, f"training.output_dir={tmp_path}/resumed"]
    run_until(2, recipe, *resumed)
    assert run_recipe(recipe, *resumed).metrics == done.metrics
    lost = [*stuck, "training.save_strategy=steps", f"training.output_dir={tmp_path}/lost"]
    with monkeypatch.context() as patched:
        patched.setattr("peftcli.train.run.finish", Mock(side_effect=StorageError("no space left")))
        with pytest.raises(StorageError):
            run_recipe(recipe, *lost)
    found = run_recipe(recipe, *lost)
    assert ([each["from_step"] for each in found.run["attempts"]], found.metrics) == ([0, 3], done.metrics)
    learning = (*settings, "training.learning_rate=1e-3", f"training.output_dir={tmp_path}/learning")
    assert run_recipe(recipe, *learning).run["steps"]["done"] == 8


@pytest.mark.slow
def test_an_evaluation_counts_where_it_is_better_by_the_threshold(recipe: Path) -> None:
    settings = ("training.eval_strategy=steps", "training.eval_steps=1", "training.early_stopping_patience=2")
    done = run_recipe(recipe, *settings, "training.early_stopping_threshold=100")
    assert done.run["steps"]["done"] == 3


def test_too_little_memory_names_the_batch_and_what_to_change(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("training.eval_strategy=steps", "training.eval_steps=3", "training.per_device_train_batch_size=4")
    losses = LanguageModel.loss

    def fails_at(count: int, message: str) -> str:
        calls = iter(range(100))

        def loss(*args: Any) -> Any:
            if next(calls) == count:
                raise torch.OutOfMemoryError(message)
            return losses(*args)

        monkeypatch.setattr(LanguageModel, "loss", loss)
        with pytest.raises(OutOfMemory) as caught:
            run_recipe(recipe, *settings)
        run = read_run(recipe.parent / "out")
        assert run["exit_code"] == 8
        return f"{caught.value.message} | {caught.value.hint}"

    assert re.fullmatch(
        r"not enough memory for step 2, after a peak of \d+\.\d GiB: 4 examples at once with \d+ tokens, "
        r"\d+ in the longest \| training\.per_device_train_batch_size: 2 with gradient_accumulation_steps: 2, "
        r"the same batch in smaller parts; or training\.gradient_checkpointing: true, .*; or training\.bf16: true",
        fails_at(1, "CUDA out of memory"),
    )
    assert re.fullmatch(
        r"not enough memory to evaluate, .*: a batch of 2 examples \| training\.per_device_eval_batch_size: 1",
        fails_at(3, "CUDA out of memory"),
    )


@pytest.mark.parametrize(("loss", "same"), [("dpo", True), ("kto", False)])
def test_smaller_parts_are_the_same_batch_unless_its_rows_are_compared(loss: str, same: bool, tmp_path: Path) -> None:
    recipe = load_recipe(CASES["preference"].write(tmp_path), [f"task.loss={loss}"])
    task = open_task(recipe, open_base(recipe.base_model))
    hint = too_large_a_step(2, [9, 9, 9, 9], recipe, task, saved=False).hint
    assert hint is not None
    assert ("the same batch in smaller parts" in hint) is same


def test_an_evaluation_that_fails_at_the_end_loses_no_step(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("training.eval_strategy=epoch", "training.save_strategy=epoch", "training.num_train_epochs=1")
    whole = run_recipe(recipe, *settings, f"training.output_dir={recipe.parent}/whole", "training.max_steps=-1")
    metrics = LanguageModel.metrics
    monkeypatch.setattr(LanguageModel, "metrics", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(OutOfMemory):
        run_recipe(recipe, *settings, "training.max_steps=-1")
    monkeypatch.setattr(LanguageModel, "metrics", metrics)
    smaller, key = "training.per_device_eval_batch_size=1", "training.per_device_eval_batch_size"
    done = run_recipe(recipe, *settings, "training.max_steps=-1", smaller, allow_change=[key])
    assert done.run["attempts"][-1]["from_step"] == whole.run["steps"]["total"]
    assert done.weights == whole.weights


def test_an_unknown_metric_for_the_best_model(recipe: Path) -> None:
    with pytest.raises(UsageError, match="eval_loss"):
        run_recipe(recipe, *EVAL, "training.metric_for_best_model=bleu", "training.load_best_model_at_end=true")


@pytest.mark.slow
def test_eval_fraction_holds_rows_out(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    trainkit.write_rows(tmp_path / "train.jsonl", trainkit.MESSAGES)
    recipe.write_text(recipe.read_text().replace(f"eval: {tmp_path}/eval.jsonl", "eval_fraction: 0.25"))
    done = run_recipe(recipe, "training.eval_strategy=epoch")
    data = done.run["data"]
    assert data["rows"] + data["eval"]["rows"] == 13
    assert data["eval"]["rows"] in (3, 4)
    again = run_recipe(recipe, "training.eval_strategy=epoch", f"training.output_dir={tmp_path}/again")
    assert again.run["eval"] == done.run["eval"]


def test_prompt_tuning_starts_at_the_words_of_its_text(recipe: Path) -> None:
    method = (
        "method={type: prompt_tuning, num_virtual_tokens: 4, prompt_tuning_init: TEXT, prompt_tuning_init_text: tea}"
    )
    done = run_recipe(recipe, method, "training.learning_rate=0", "training.max_steps=1")
    model = AutoModelForCausalLM.from_pretrained(trainkit.base_folder())
    ids = AutoTokenizer.from_pretrained(trainkit.base_folder())("tea")["input_ids"]
    rows = model.get_input_embeddings().weight[[ids[n % len(ids)] for n in range(4)]]
    assert torch.equal(load(done.weights)["prompt_embeddings"], rows)


def test_an_adapter_that_has_learnt_nothing_is_said(recipe: Path) -> None:
    for rate, said in (("0", True), ("1e-3", False)):
        run = run_recipe(
            recipe,
            "training.max_steps=2",
            f"training.learning_rate={rate}",
            f"training.output_dir={recipe.parent}/{rate}",
        )
        texts = run.warnings
        assert ("no sign of learning: training has left the updates of all adapted modules at zero" in texts) is said
