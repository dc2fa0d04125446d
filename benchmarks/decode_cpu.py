"""CPU time of a generated token: peft's model, peftcli's with the adapter beside its weights, and what `generate` does.

`peftcli generate` merges the adapter in memory where that is exact. All sides answer the same prompts of the quickstart
greedily, the shortest alone and eight in a padded batch, with as many tokens each, and take turns in one process. The
texts must come out the same, but for those of the sides of `--more`: a static cache, and bfloat16. Needs ``make
quickstart`` to have fetched the model.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/decode_cpu.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftcli.adapters.generate import load_generator
from peftcli.tasks.text.generation import GenerationSettings, TextGenerator
from peftcli.tasks.text.stop_tokens import StopTokens

MODEL, ROWS = "models/SmolLM2-135M-Instruct", "configs/quickstart/train.jsonl"
PEFT, UNMERGED, GENERATE = "peft", "peftcli, not merged", "peftcli generate"
STATIC, BFLOAT16 = "merged, static cache", "merged, bfloat16"

Answer = Callable[[list[list[int]], int], list[str]]
"""Answers prompts (B, ...) with so many tokens each."""


def base_model() -> Any:
    """Return the base model."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def make_adapter(folder: Path) -> None:
    """Write a LoRA of all linear layers whose update is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(base_model(), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2e-3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)


def answers_of(model: Any, tokenizer: Any, **options: Any) -> Answer:
    """Return how a model answers by transformers' own generate."""

    def answer(rows: list[list[int]], count: int) -> list[str]:
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            found = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=count,
                pad_token_id=tokenizer.pad_token_id,
                do_sample=False,
                **options,
            )
        ids = found[:, batch["input_ids"].shape[1] :].tolist()
        return [tokenizer.decode(each, skip_special_tokens=True).strip() for each in ids]

    return answer


def answers_of_ours(generator: TextGenerator) -> Answer:
    """Return how peftcli answers."""

    def answer(rows: list[list[int]], count: int) -> list[str]:
        with torch.inference_mode():
            found = generator.continued(rows, GenerationSettings(max_new_tokens=count))
        assert all(tokens == count for _, tokens, _ in found)
        return [text for text, _, _ in found]

    return answer


def endless(model: Any) -> Any:
    """Return a model that ends no answer before its last token."""
    model.generation_config.eos_token_id = None
    return model


def main() -> None:
    """Let the sides take turns, and print medians as a table, then the gates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--more", action="store_true", help="a static cache, and bfloat16, too")
    given = parser.parse_args()
    prompts = [json.loads(line)["messages"][0]["content"] for line in Path(ROWS).read_text().splitlines()]
    prompts = sorted(prompts, key=len)[: max(given.batches)]
    with tempfile.TemporaryDirectory() as name:
        make_adapter(Path(name))

        def load(merge_for: list[str]) -> TextGenerator:
            loaded = load_generator(name, merge_for=merge_for, tell=print)
            endless(loaded.model)
            return replace(loaded, stop_tokens=StopTokens())

        apart, merged = load([]), load(prompts)
        tokenizer = apart.tokenizer
        sides = {
            PEFT: answers_of(endless(PeftModel.from_pretrained(base_model(), name).eval()), tokenizer),
            UNMERGED: answers_of_ours(apart),
            GENERATE: answers_of_ours(merged),
        }
        if given.more:
            sides[STATIC] = answers_of(merged.model, tokenizer, cache_implementation="static")
            rounded = load(prompts)
            rounded.model.to(torch.bfloat16)
            sides[BFLOAT16] = answers_of_ours(rounded)
    rows = [apart._ids(prompt) for prompt in prompts]
    gates = {}
    print("| prompts | side | CPU ms a token | least | peft / side | same text |\n|---|---|---:|---:|---:|---|")
    for batch in (rows[:count] for count in given.batches):
        spent: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(given.rounds + 1):
            texts = {}
            for side, answer in sides.items():
                started = time.process_time()
                texts[side] = answer(batch, given.tokens)
                spent[side].append((time.process_time() - started) / given.tokens / len(batch) * 1000)
        for side, (_, *values) in spent.items():  # the first round warms up
            same = texts[side] == texts[PEFT]
            if not same and side not in (STATIC, BFLOAT16):
                raise SystemExit(f"{side} says something else than {PEFT}")
            ratio = statistics.median(one / other for one, other in zip(spent[PEFT][1:], values, strict=True))
            least, middle = min(values), statistics.median(values)
            print(f"| {len(batch)} | {side} | {middle:.1f} | {least:.1f} | {ratio:.2f} | {'yes' if same else 'no'} |")
            if side == GENERATE:
                gates[f"decoding from an unmerged adapter's folder against peft, batch {len(batch)}"] = round(ratio, 3)
    print(
        f"{given.tokens} tokens after prompts of {min(map(len, rows))} to {max(map(len, rows))}, {given.rounds} rounds"
    )
    print(json.dumps(gates))


if __name__ == "__main__":
    main()
