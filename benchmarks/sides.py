"""The sides that train the same rows, each in a process of its own: peftcli, peft with Trainer, and TRL.

Each returns what it measured over one pass over the rows: CPU seconds from the beginning of training to the end of the
last step, memory, the loss of each step and over all targets, and which token ids the model was given.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import MODEL, TOKENIZER, clock, reset_peak, resident

METHODS = {
    "lora": {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
    "prompt_tuning": {
        "num_virtual_tokens": 20,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "Answer briefly, as an expert of Python who knows its standard library by heart.",
        "tokenizer_name_or_path": TOKENIZER,
    },
}
VOCABULARY, WIDTH = 49_152, 576
"""Of the base model."""

Rows = list[dict[str, Any]]


class Notes:
    """What is noted of a training."""

    def __init__(self, count: bool):
        self.counts = logits_count() if count else None
        self.steps_done = 0
        self.steps: list[tuple[int, float]] = []
        """Targets and loss of each."""
        self.seen: list[list[int]] = []
        self.warm_up, self.untimed = int(os.environ.get("BENCH_WARM_UP", "0")), 0
        """Steps before the clock starts, and the rows that were seen in them."""

    def begin(self) -> None:
        """Training begins: start the clock."""
        self.before = reset_peak()
        self.start = clock()

    def end_step(self) -> None:
        """A step is done: stop the clock, unless another follows."""
        if self.counts and not self.steps_done:
            self.counts.__enter__()  # in the first step peftcli looks for the head, once
        self.steps_done += 1
        if self.steps_done == self.warm_up:
            self.start, self.untimed = clock(), len(self.seen)
        self.seconds = clock() - self.start
        self.peak = resident()

    def see(self, input_ids: Any, mask: Any = None, positions: Any = None) -> None:
        """Note the rows of token ids that a model is given: padded, or as one row that restarts at position 0."""
        if mask is not None:
            rows = [ids[kept.bool()].tolist() for ids, kept in zip(input_ids, mask, strict=True)]
        elif positions is not None:
            starts = [*(positions.flatten() == 0).nonzero().flatten().tolist(), positions.numel()]
            rows = [input_ids.flatten()[start:end].tolist() for start, end in pairwise(starts)]
        else:
            rows = input_ids.tolist()
        self.seen += [[each for each in row if each < VOCABULARY] for row in rows]  # the others are virtual tokens

    def found(self, rows: Rows) -> dict[str, Any]:
        """Return the figures."""
        if self.counts:
            self.counts.__exit__(None, None, None)
        tokens, targets = sum(len(row["input_ids"]) for row in rows), sum(count for count, _ in self.steps)
        figures = {
            "tokens": tokens,
            "targets": targets,
            "steps": len(self.steps),
            "per_thousand": self.seconds
            / (sum(map(len, self.seen[self.untimed :])) if self.warm_up else tokens)
            * 1000,
            "peak": self.peak,
            "growth": self.peak - self.before,
            "first_loss": self.steps[0][1],
            "loss": sum(count * loss for count, loss in self.steps) / targets,
            "ids": hashlib.sha256(json.dumps(sorted(self.seen)).encode()).hexdigest()[:12],
        }
        return figures | (self.counts.found(sum(count for count, _ in self.steps[1:])) if self.counts else {})


def logits_count() -> Any:
    """Return a mode in which all tensors with a side of V are counted, but for the head's weight."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mode(TorchDispatchMode):
        rows = largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            for each in output if isinstance(output, (tuple, list)) else [output]:
                if isinstance(each, torch.Tensor) and VOCABULARY in each.shape and WIDTH not in each.shape:
                    self.largest = max(self.largest, each.numel() // VOCABULARY)
                    if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "matmul", "linear"):
                        self.rows += each.numel() // VOCABULARY
            return output

        def found(self, targets: int) -> dict[str, float]:
            return {"rows_per_target": self.rows / targets, "largest_rows": self.largest}

    return Mode()


def peftcli(
    rows: Rows,
    *,
    max_length: int,
    batch: int,
    precision: str,
    method: str = "lora",
    order: str = "sequential",
    packing: bool = False,
    checkpointing: bool = False,
    count: bool = False,
    **sections: dict[str, Any],
) -> dict[str, Any]:
    """Train with peftcli: by a recipe, as ``peftcli train`` does. Also the side of earlier versions.

    ``sections`` are more settings of the recipe, by section.
    """
    with contextlib.suppress(ImportError):  # the version that is compared with sets none
        from peftcli.system.cores import set_variables

        set_variables()
    from transformers import LlamaForCausalLM

    notes, forward = Notes(count), LlamaForCausalLM.forward

    @functools.wraps(forward)
    def noted(model: Any, *args: Any, **given: Any) -> Any:
        import torch

        if model.training and torch.is_grad_enabled() and given.get("input_ids") is not None:
            notes.see(given["input_ids"], given.get("attention_mask"), given.get("position_ids"))
        return forward(model, *args, **given)

    LlamaForCausalLM.forward = noted
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PEFTCLI_CACHE"] = f"{folder}/cache"
        Path(folder, "train.jsonl").write_text("".join(json.dumps(row["row"]) + "\n" for row in rows))
        training = {
            "output_dir": f"{folder}/run",
            "num_train_epochs": 1,
            "per_device_train_batch_size": batch,
            "learning_rate": 0.0,
            "train_sampling_strategy": order,
            "gradient_checkpointing": checkpointing,
            "bf16": precision != "fp32",
            "save_strategy": "no",
        }
        recipe: dict[str, Any] = {
            "base_model": {"name": MODEL},
            "task": "causal_lm",
            "method": {"type": method, **METHODS[method]},
            "dataset": {
                "train": f"{folder}/train.jsonl",
                "max_length": max_length,
                "packing": packing,
                "allow": ["answers_cut"],  # rows of equal length are cut
            },
            "training": training,
        }
        for name, more in sections.items():
            recipe[name] = {**recipe.get(name, {}), **more}
        Path(folder, "recipe.yaml").write_text(json.dumps(recipe))  # which is YAML, too
        _train(Path(folder, "recipe.yaml"), notes)
    return notes.found(rows)


def _train(path: Path, notes: Notes) -> None:
    from peftcli.recipe import load_recipe
    from peftcli.train.events import Ready, Stepped
    from peftcli.train.run import train

    steps: list[int] = []

    def note(event: object) -> None:
        if isinstance(event, Ready):
            steps.append(event.total_steps)
            notes.begin()
        elif isinstance(event, Stepped):
            notes.end_step()
            notes.steps.append((event.result.num_targets, event.result.loss))
            if event.result.step == steps[0]:
                raise EOFError  # what follows the last step is not measured

    try:
        train(load_recipe(path), on_event=note)
    except Exception:
        if not steps or len(notes.steps) < steps[0]:
            raise


def trainer(
    rows: Rows,
    *,
    max_length: int,
    batch: int,
    precision: str,
    method: str = "lora",
    order: str = "sequential",
    base: str = "float32",
    library: str = "transformers",
    count: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train with peft and transformers' Trainer, or with TRL's SFTTrainer.

    Args:
        rows: What is trained.
        max_length: Of a packed row.
        batch: Rows of a step.
        precision: fp32 or bf16, in which the model computes under autocast.
        method: LoRA or prompt tuning.
        order: Of the rows.
        base: Number format of the base model's weights.
        library: transformers or trl.
        count: Whether to count logits.
        **options: More of TrainingArguments, or of SFTConfig.
    """
    import peft
    import torch
    import transformers

    kind = {"lora": peft.LoraConfig, "prompt_tuning": peft.PromptTuningConfig}[method]
    config = kind(task_type="CAUSAL_LM", **METHODS[method])
    parts: list[tuple[int, float]] = []  # targets and summed loss of the micro-batches of a step
    notes, tokenizer = Notes(count), transformers.AutoTokenizer.from_pretrained(TOKENIZER)

    class Clock(transformers.TrainerCallback):
        """Notes when training begins and when a step is done."""

        def on_train_begin(self, *args: Any, **given: Any) -> None:
            notes.begin()

        def on_step_end(self, *args: Any, **given: Any) -> None:
            targets = sum(count for count, _ in parts)
            notes.steps.append((targets, sum(loss for _, loss in parts) / targets))
            parts.clear()
            notes.end_step()

    class Noted:
        """Notes what a trainer computes."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
            notes.see(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids"))
            targets = int((inputs["labels"][:, 1:] != -100).sum())
            loss = super().compute_loss(model, inputs, *args, **given)  # type: ignore[misc]
            divisor = given.get("num_items_in_batch")  # targets of the step
            parts.append((targets, float(loss.detach()) * int(targets if divisor is None else divisor)))
            return loss

    if order == "group_by_length":
        # of less than 8 batches it would sort none among each other; so it gets them as it finds them among all rows
        rows, order = sorted(rows, key=lambda row: -len(row["input_ids"])), "sequential"
    examples = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "num_train_epochs": 1,
            "per_device_train_batch_size": batch,
            "learning_rate": 0.0,
            "train_sampling_strategy": order,
            "bf16": precision != "fp32",
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": not torch.cuda.is_available(),
            "disable_tqdm": True,
            "logging_strategy": "no",
            **options,
        }
        if library == "trl":
            import datasets
            import trl

            datasets.disable_progress_bars()
            made = type("Side", (Noted, trl.SFTTrainer), {})(
                model=MODEL,
                args=trl.SFTConfig(max_length=max_length, model_init_kwargs={"dtype": base}, **common),
                train_dataset=datasets.Dataset.from_list(examples),
                processing_class=tokenizer,
                peft_config=config,
                callbacks=[Clock()],
            )
        else:
            transformers.set_seed(42)
            model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=getattr(torch, base))
            made = type("Side", (Noted, transformers.Trainer), {})(
                model=peft.get_peft_model(model, config),
                args=transformers.TrainingArguments(remove_unused_columns=False, **common),
                train_dataset=examples,
                data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),
                callbacks=[Clock()],
            )
        made.train()
    return notes.found(rows)


def earlier(rows: Rows, **settings: Any) -> dict[str, Any]:
    """Train with peftcli as it was before the work on speed, in this process."""
    from common import earlier_version

    sys.path.insert(0, str(earlier_version()))
    return peftcli(rows, **settings)


SIDES: dict[str, Callable[..., dict[str, Any]]] = {"peftcli": peftcli, "earlier": earlier, "trainer": trainer}
