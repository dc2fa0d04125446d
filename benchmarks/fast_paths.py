"""CPU seconds of a training step: logits at targets only and LoRA as one function, each against its plain path.

One row of random tokens, the second half of them targets; the ways take turns in one process, and the losses and
gradient norms of the first round are printed. Needs ``make quickstart`` to have fetched the model.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fast_paths.py --precision autocast --rounds 5
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.fused import FUSED
from peftcli.tasks.text.token_loss import next_tokens, plain_losses, target_losses

MODEL = "models/SmolLM2-135M-Instruct"
HEADS = {"plain": plain_losses, "targets": target_losses}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=("float32", "bfloat16", "autocast"), default="autocast")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.float32 if given.precision == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype).train()
    inject(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    ids = torch.randint(100, 40_000, (1, given.tokens))
    labels = ids.where(torch.arange(given.tokens) >= given.tokens // 2, -100)
    parameters = [parameter for _, _, parameter in named_tensors(model).values()]
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def step(head: str, fused: bool) -> tuple[float, float, float]:
        """Return the loss, the norm of the gradients, and the MiB that are kept for the backward pass."""
        kept: dict[int, torch.Tensor] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        FUSED.enabled = fused
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.autocast("cpu", enabled=given.precision == "autocast"), saved_tensors_hooks(note, lambda each: each):
            losses, _ = HEADS[head](model, inputs, next_tokens(labels))
        size = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights) / 2**20
        kept.clear()
        losses.mean().backward()
        norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        model.zero_grad()
        return float(losses.detach().mean()), float(norm), size

    sides = list(itertools.product(HEADS, (False, True)))
    seconds: dict[tuple[str, bool], list[float]] = {side: [] for side in sides}
    first = {side: step(*side) for side in sides}
    for _, side in itertools.product(range(given.rounds), sides):
        start = time.process_time()
        step(*side)
        seconds[side].append(time.process_time() - start)
    print("| logits | LoRA | median CPU s | least | MiB kept | loss | gradient norm |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (head, fused), times in seconds.items():
        loss, norm, size = first[head, fused]
        figures = f"{statistics.median(times):.2f} | {min(times):.2f} | {size:.0f} | {loss:.5f} | {norm:.4f}"
        print(f"| {head} | {'one function' if fused else 'plain'} | {figures} |")


if __name__ == "__main__":
    main()
