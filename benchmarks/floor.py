"""The floor of useful work: the matrix products without which the useful tokens cannot be trained, and nothing else.

Of each layer: the base weight's product forward and the gradient of its input (the base is frozen), LoRA's two products
forward and four backward; of attention, for each row by itself, two products forward and four backward, of which causal
rows need half; of the head, logits of targets and the gradient of their hidden states. Below the first layer nothing
trains, so its query, key and value need no gradient of their input.
"""

from __future__ import annotations

import time
from typing import Any

from rows import BATCH, num_targets

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY, R = 30, 576, 1536, 9, 3, 64, 49_152, 16
"""Of SmolLM2-135M, and of the adapter."""
LINEAR = [
    (WIDTH, WIDTH),
    (WIDTH, KV_HEADS * HEAD),
    (WIDTH, KV_HEADS * HEAD),
    (WIDTH, WIDTH),
    (WIDTH, INNER),
    (WIDTH, INNER),
    (INNER, WIDTH),
]
"""Inputs and outputs of a layer's linear layers; the first three are query, key and value."""


def products(rows: list[dict[str, Any]], precision: str) -> dict[str, Any]:
    """Time the products of all batches."""
    import torch

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    layers = [[(random(out, into), random(R, into), random(out, R)) for into, out in LINEAR] for _ in range(LAYERS)]
    head, seconds = random(VOCABULARY, WIDTH), 0.0
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        sizes, targets = [len(row["input_ids"]) for row in batch], sum(map(num_targets, batch))
        states = {size: random(sum(sizes), size) for size in (WIDTH, INNER, KV_HEADS * HEAD)}
        small, chosen, logits = random(sum(sizes), R), random(targets, WIDTH), random(targets, VOCABULARY)
        parts = [(random(HEADS, size, HEAD), random(HEADS, size, size)) for size in sizes]
        begin = time.process_time()
        for number, weights in enumerate(layers):
            for at, (weight, a, b) in enumerate(weights):
                x, gradient = (states[size] for size in reversed(weight.shape))
                x @ weight.T, x @ a.T, small @ b.T
                gradient @ b, gradient.T @ small, small.T @ x
                if number or at > 2:
                    gradient @ weight, small @ a
        chosen @ head.T, logits @ head
        seconds += time.process_time() - begin
        begin = time.process_time()
        for vectors, scores in parts:
            for _ in range(LAYERS):
                vectors @ vectors.mT, vectors @ vectors.mT
                scores @ vectors, scores @ vectors, scores @ vectors, scores.mT @ vectors
        seconds += (time.process_time() - begin) / 2
    tokens = sum(len(row["input_ids"]) for row in rows)
    return {"per_thousand": seconds / tokens * 1000, "tokens": tokens}
