"""Whether the fast ways of training give the gradients of the plain ones: SmolLM2-135M-Instruct in float32, four chats.

LoRA's B, which starts at zero, gets random values first, or A would have no gradient. Compared is the worst of all
tensors, by the norm of the difference relative to the tensor's norm. The plain way's loss is computed in float64: over
49,152 tokens the shares that torch's cross-entropy gives in float32 on a CPU add up to 1 within 2e-5 only.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/gradients.py '{}'
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

from common import MODEL, Cell, Found, Part, answer
from rows import BATCH, rows

FIGURES = {
    "unpadded": "without padding, against padded",
    "fused": "LoRA as one function, against the plain layer",
    "loss": "the chunked loss, against a loss in float64",
    "all": "all three, against all that is plain",
    "torch_loss": "for comparison, torch's cross-entropy, against a loss in float64",
    "chunked": "the chunked loss, against a head in float64: gradient of the hidden states",
    "cross_entropy": "for comparison, torch's cross-entropy, against that head",
    "chunked_normal": "the chunked loss, with normally distributed hidden states",
    "cross_entropy_normal": "for comparison, torch's cross-entropy, with those",
}


def measure() -> dict[str, float]:
    """Return the largest relative error of each way."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from peftcli.core.inject import inject
    from peftcli.core.weights import named_tensors
    from peftcli.methods.lora import LoraConfig
    from peftcli.methods.lora.fused import FUSED
    from peftcli.tasks.text import token_ids
    from peftcli.tasks.text.fast.losses import chunked_losses
    from peftcli.tasks.text.fast.unpadded import unpad
    from peftcli.tasks.text.language_model import target_losses
    from peftcli.tasks.text.token_ids import padded

    chosen, config = rows("unequal", 0, 8)[:BATCH], LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).train()
    inject(model, config)
    tensors = {name: parameter for name, (_, _, parameter) in named_tensors(model).items()}
    for name, parameter in tensors.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    inputs = {
        "input_ids": padded([row["input_ids"] for row in chosen], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in chosen], 0),
    }
    targets = token_ids.next_tokens(padded([row["labels"] for row in chosen], -100))

    def gradients(losses: Any, fused: bool, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
        """The gradients; ``dtype`` is that of the plain loss."""

        def of_logits(logits: torch.Tensor, wanted: torch.Tensor) -> token_ids.Losses:
            found = F.cross_entropy(logits.to(dtype), wanted, reduction="none")
            return found, logits.detach().argmax(-1) == wanted

        FUSED.enabled = fused
        model.zero_grad()
        with mock.patch.object(token_ids, "losses_of", of_logits):
            losses(model, inputs, targets)[0].mean().backward()
        return {name: parameter.grad.clone() for name, parameter in tensors.items() if parameter.grad is not None}

    def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
        assert set(found) == set(wanted) == set(tensors)
        return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)

    def of_hidden(states: torch.Tensor, losses: Any, dtype: torch.dtype) -> torch.Tensor:
        states, weight = states.to(dtype).clone().requires_grad_(), model.lm_head.weight.detach().to(dtype)
        losses(states, lambda each: F.linear(each, weight)).mean().backward()
        return states.grad.double()

    plain = gradients(token_ids.plain_losses, False)
    result = {
        "fused": worst(gradients(token_ids.plain_losses, True), plain),
        "loss": worst(gradients(target_losses, False), plain),
        "torch_loss": worst(gradients(token_ids.plain_losses, False, torch.float32), plain),
    }
    wanted = targets[targets != -100]
    with torch.no_grad():
        hidden = model.get_decoder()(**inputs).last_hidden_state[targets != -100]
    ways = {
        "chunked": lambda states, head: chunked_losses(states, wanted, head)[0],
        "cross_entropy": lambda states, head: F.cross_entropy(head(states), wanted, reduction="none"),
    }
    for suffix, states in (("", hidden), ("_normal", torch.randn_like(hidden))):
        exact = of_hidden(states, ways["cross_entropy"], torch.float64)
        for name, way in ways.items():
            result[name + suffix] = float((of_hidden(states, way, torch.float32) - exact).norm() / exact.norm())
    if not unpad(model, config):
        raise SystemExit("the model is padded")
    result["unpadded"] = worst(gradients(token_ids.plain_losses, False), plain)
    result["all"] = worst(gradients(target_losses, True), plain)
    return result


def cells(rounds: int) -> list[Cell]:
    """One cell: it is no matter of chance."""
    return [{}]


def section(found: Found) -> Iterator[str]:
    """A line for each way."""
    yield "## Gradients"
    yield from ("", *__doc__.split("\n\n")[0].splitlines(), *__doc__.split("\n\n")[1].splitlines(), "")
    yield "| way | relative error |"
    yield "| --- | ---: |"
    for figures in found.of().values():
        yield from (f"| {text} | {figures[name]:.1e} |" for name, text in FIGURES.items())


PARTS = {"gradients": Part("gradients", cells, section, 1)}

if __name__ == "__main__":
    answer(measure)
