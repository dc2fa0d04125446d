"""The memory that `peftcli check --deep` says a run needs, against what runs take: peak RSS of their processes.

All rows have the same number of tokens, so that each step is the largest, or any number between the two that are named.
The estimate is made in a process of its own, before the run. SmolLM2-135M-Instruct, and models of other families with
random weights and its tokenizer.

    .venv/bin/python benchmarks/memory.py '{"model": "gpt2", "bf16": false, "batch": 2, "tokens": 256}'
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from common import MODEL, WORK, Cell, Found, Part, answer

STEPS, STEPS_OF_MANY_LENGTHS = 3, 8
LONG = (1024, 4096, 16384, 65536)
"""Tokens of long rows."""
TASKS = {
    "smollm2": "causal_lm",
    "llama": "causal_lm",
    "long": "causal_lm",
    "gpt2": "causal_lm",
    "t5": "seq2seq_lm",
    "bert": "classes",
}
TITLES = {
    "smollm2": "SmolLM2-135M-Instruct",
    "llama": "Llama, 0.6 B",
    "long": "Llama, 2 layers of width 512, MLP of 2,048",
    "gpt2": "GPT-2, 0.1 B",
    "t5": "T5, 0.1 B",
    "bert": "BERT, 0.1 B, classes of texts",
}
_WORDS = "the of and a to in is you that it he was for on are as with his they at be this have from or one had by"


def measure(
    model: str,
    bf16: bool,
    batch: int,
    tokens: int,
    checkpointing: bool | str = False,
    method: str = "lora",
    r: int = 16,
    saves: bool = False,
    evaluates: int = 0,
    quantised: str = "",
    strategy: str = "",
    shortest: int = 0,
    steps: int = STEPS,
) -> dict[str, float]:
    """Return the estimate and the peak of a run, in MiB.

    Args:
        model: A key of ``TASKS``.
        bf16: Whether it computes in bfloat16.
        batch: Rows of a step.
        tokens: Of a row; of the longest if there is a shortest.
        checkpointing: Whether activations are computed again; offload: and MLPs in pieces.
        method: lora or prompt_tuning.
        r: LoRA's.
        saves: Whether it writes a checkpoint after each step, evaluates before, and keeps the best adapter.
        evaluates: Rows of an evaluation's batch, after each step; 0: there is none.
        quantised: A type of bitsandbytes's.
        strategy: launch.strategy of two processes; without it there is one.
        shortest: Tokens of the shortest row; 0: all have the same number.
        steps: Of the run, where all rows have the same number of tokens.
    """
    own = {"type": method, "num_virtual_tokens": 20} if method == "prompt_tuning" else {"type": method, "r": r}
    if method == "lora":
        own["target_modules"] = "all-linear"
    with tempfile.TemporaryDirectory() as folder:
        words = _WORDS.split()
        rows = list[dict[str, str]]()
        for number in range(4 * batch):
            length = shortest + (tokens - shortest) * number // (4 * batch - 1) if shortest else tokens
            text = " ".join(words[place * 7 % len(words)] for place in range(length))
            row = {"causal_lm": {"text": text}, "seq2seq_lm": {"prompt": text, "completion": text}}
            rows.append(row.get(TASKS[model], {"text": text, "label": f"class {number % 4}"}))
        Path(folder, "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
        recipe: dict[str, Any] = {
            "base_model": {"name": MODEL if model == "smollm2" else str(made(model))},
            "task": TASKS[model].replace("classes", "sequence_classification"),
            "method": own,
            "dataset": {"train": f"{folder}/train.jsonl", "max_length": tokens, "allow": ["answers_cut"]},
            "training": {
                "output_dir": f"{folder}/run",
                "max_steps": STEPS_OF_MANY_LENGTHS if shortest else steps,
                "per_device_train_batch_size": batch,
                "gradient_checkpointing": checkpointing,
                "bf16": bf16,
                "save_strategy": "no",
                "verify": False,
            },
        }
        if evaluates or saves:
            recipe["dataset"]["eval"] = f"{folder}/train.jsonl"
            recipe["training"] |= {"eval_strategy": "steps", "eval_steps": 1}
            recipe["training"]["per_device_eval_batch_size"] = evaluates or batch
        if saves:
            recipe["training"] |= {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True}
        if quantised:
            recipe["base_model"]["quantization"] = {"type": quantised}
        if strategy:
            recipe["launch"] = {"num_processes": 2, "strategy": strategy}
        path = Path(folder, "recipe.yaml")
        path.write_text(json.dumps(recipe))
        os.environ["PEFTCLI_CACHE"] = f"{folder}/cache"
        said = _ran("train", "--dry-run", "--json", str(path))["memory"]
        peak = _ran("train", "--json", "--quiet", str(path))["peak_memory_bytes"]["rss"]
    return {"estimate": said["peak"] / 2**20, "peak": peak / 2**20}


def _ran(*command: str) -> dict[str, Any]:
    found = subprocess.run([sys.executable, "-m", "peftcli", *command], stdout=subprocess.PIPE, check=True)
    printed: dict[str, Any] = json.loads(found.stdout)
    return printed


def made(kind: str) -> Path:
    """Return the folder of a model with random weights."""
    import torch
    import transformers

    folder = WORK / "models" / kind
    if folder.exists():
        return folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 24}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**ids, **sizes, num_key_value_heads=8),
        "long": lambda: transformers.LlamaConfig(
            **ids,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=2,
            num_attention_heads=8,
            max_position_embeddings=LONG[-1],
        ),
        "gpt2": lambda: transformers.GPT2Config(**ids, bos_token_id=tokenizer.bos_token_id),
        "bert": lambda: transformers.BertConfig(**ids),
        "t5": lambda: transformers.T5Config(
            **ids, d_model=768, d_ff=2048, num_layers=8, num_heads=12, decoder_start_token_id=tokenizer.pad_token_id
        ),
    }
    auto = {"t5": transformers.AutoModelForSeq2SeqLM, "bert": transformers.AutoModelForMaskedLM}
    torch.manual_seed(0)
    model = auto.get(kind, transformers.AutoModelForCausalLM).from_config(configs[kind]())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cells(rounds: int) -> Iterator[Cell]:
    """Each setting once: peaks hardly differ between runs."""
    for bf16 in (False, True):
        for checkpointing in (False, True):
            more = {"bf16": bf16, "checkpointing": checkpointing}
            yield {"model": "smollm2", "batch": 4, "tokens": 512, **more}
            yield {"model": "llama", "batch": 1, "tokens": 512, **more}
        yield {"model": "smollm2", "bf16": bf16, "batch": 1, "tokens": 1536}
        yield {"model": "smollm2", "bf16": bf16, "batch": 8, "tokens": 64}
        yield {"model": "smollm2", "bf16": bf16, "batch": 2, "tokens": 256, "r": 256}
        yield {"model": "smollm2", "bf16": bf16, "batch": 2, "tokens": 256, "method": "prompt_tuning"}
        for batch in (2, 8):
            yield {"model": "gpt2", "bf16": bf16, "batch": batch, "tokens": 256}
            yield {"model": "bert", "bf16": bf16, "batch": 4 * batch, "tokens": 128}
            yield {"model": "t5", "bf16": bf16, "batch": batch, "tokens": 128}
        yield {"model": "smollm2", "bf16": bf16, "batch": 4, "tokens": 512, "shortest": 16}
        yield {"model": "bert", "bf16": bf16, "batch": 8, "tokens": 256, "shortest": 16}
        yield {"model": "t5", "bf16": bf16, "batch": 4, "tokens": 128, "shortest": 16}
        yield {"model": "smollm2", "bf16": bf16, "batch": 2, "tokens": 256, "r": 256, "saves": True}
        yield {"model": "smollm2", "bf16": bf16, "batch": 1, "tokens": 512, "evaluates": 16}
        yield {"model": "llama", "bf16": bf16, "batch": 1, "tokens": 512, "quantised": "nf4"}
        for strategy in ("replicate", "fsdp"):
            yield {"model": "llama", "bf16": bf16, "batch": 2, "tokens": 256, "strategy": strategy}


def section(found: Found) -> Iterator[str]:
    """A line for each setting."""
    yield "## Memory that is estimated"
    yield from ("", *(__doc__ or "").rpartition("\n\n    ")[0].splitlines(), "")
    yield "| model | precision | rows x tokens | | estimate, MiB | peak RSS, MiB | estimate / peak |"
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: |"
    for entry in found.entries:
        cell, figures = entry["cell"], entry["found"]
        more = [
            "activations computed again" if cell.get("checkpointing") else "",
            f"r {cell['r']}" if "r" in cell else "",
            "prompt tuning" if "method" in cell else "",
            "checkpoints, the best adapter" if "saves" in cell else "",
            f"evaluations of {cell['evaluates']} rows" if "evaluates" in cell else "",
            cell.get("quantised", ""),
            f"each of two processes, {cell['strategy']}" if "strategy" in cell else "",
        ]
        tokens = f"{cell['shortest']} to {cell['tokens']}" if "shortest" in cell else cell["tokens"]
        yield (
            f"| {TITLES[cell['model']]} | {'bf16' if cell['bf16'] else 'fp32'} | {cell['batch']} x {tokens} "
            f"| {', '.join(filter(None, more))} | {figures['estimate']:,.0f} | {figures['peak']:,.0f} "
            f"| {figures['estimate'] / figures['peak']:.2f} |"
        )
    ratios = [entry["found"]["estimate"] / entry["found"]["peak"] for entry in found.entries]
    yield ""
    yield f"{len(ratios)} settings: {min(ratios):.2f} to {max(ratios):.2f}, median {median(ratios):.2f}."


def long_cells(rounds: int) -> Iterator[Cell]:
    """Each length once, with activations computed again, and with MLPs in pieces, too."""
    for tokens in LONG:
        for checkpointing in (True, "offload"):
            yield {
                "model": "long",
                "bf16": True,
                "batch": 1,
                "tokens": tokens,
                "checkpointing": checkpointing,
                "steps": 1,
            }


def long_section(found: Found) -> Iterator[str]:
    """A line for each length, and what 1,000 tokens more take."""
    yield "## Memory of long rows"
    yield ""
    yield f"{TITLES['long']}, bfloat16, one row, one step. On a CPU `offload` moves nothing, so that what it saves here"
    yield "is what MLPs in pieces of 2,048 tokens save. Growth is that of the peak from the length above."
    yield ""
    yield "| gradient_checkpointing | tokens | estimate, MiB | peak RSS, MiB | MiB for each 1,000 tokens more |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for checkpointing in (True, "offload"):
        before: tuple[int, float] | None = None
        for tokens in LONG:
            for figures in found.of(tokens=tokens, checkpointing=checkpointing).values():
                growth = f"{1000 * (figures['peak'] - before[1]) / (tokens - before[0]):.1f}" if before else ""
                before = tokens, figures["peak"]
                named = "true" if checkpointing is True else checkpointing
                yield f"| {named} | {tokens:,} | {figures['estimate']:,.0f} | {figures['peak']:,.0f} | {growth} |"


PARTS = {
    "memory": Part("memory", cells, section, 25),
    "long": Part("memory", long_cells, long_section, 40, threads=2),
}

if __name__ == "__main__":
    answer(measure)
