"""The loss in chunks is the plain one, with its gradients, whatever the model does with its head's output."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from classifierkit import encoded, open_task
from models_tiny import _DECODER, _IDS, VOCABULARY, batch, ids, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from trainkit import PROMPTS, base_folder
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.methods.lora import LoraConfig
from peftcli.methods.prompt_tuning import PromptTuningConfig
from peftcli.tasks.text.chat import IGNORED
from peftcli.tasks.text.fast import losses as fast_losses
from peftcli.tasks.text.fast.losses import chunked_losses, output_head
from peftcli.tasks.text.language_model import target_losses
from peftcli.tasks.text.token_ids import next_tokens, plain_losses


def _bart() -> PreTrainedModel:
    rates = {"dropout": 0.0, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    model = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=32, **rates, **heads, **_IDS))
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    return model


BUILT: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_DECODER, head_dim=8, final_logit_softcapping=2.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**_DECODER, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**_DECODER, logits_scaling=4.0)),
    "bart": _bart,
}
"""Models that soft-cap their logits, scale them, divide them and add a bias to them."""
SEQ2SEQ = ("t5", "bart")


def model_of(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = (BUILT[kind]() if kind in BUILT else tiny(kind)).to(dtype)
    inject(model.eval(), LoraConfig(r=4, init_lora_weights=False, **{"target_modules": "all-linear", **settings}))
    return model


def rows_of(kind: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Two rows, the second padded, and the targets: few in the first, and none at the first positions of both."""
    inputs = batch(kind)
    if kind in SEQ2SEQ:
        inputs["decoder_input_ids"] = ids(2, 5, seed=1)
        return inputs, torch.where(ids(2, 5, seed=2) % 3 > 0, ids(2, 5, seed=3), IGNORED)
    inputs["attention_mask"][1, 6:] = 0
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), IGNORED)
    labels[:, :3] = IGNORED
    labels[0, 5] = IGNORED
    return inputs, next_tokens(labels)


def found_by(losses: Any, model: nn.Module, *given: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The losses, whether each was right, and the gradients of a sum of them with other weights."""
    torch.manual_seed(0)
    each, correct = losses(model, *given)
    (each * torch.linspace(0.5, 2, len(each))).sum().backward()
    tensors = {name: parameter for name, (_, _, parameter) in named_tensors(model).items()}
    gradients = {name: each.grad.float() for name, each in tensors.items() if each.grad is not None}
    assert gradients.keys() == tensors.keys()
    model.zero_grad()
    return each.detach(), correct, gradients


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a chunk, so that even these targets take several."""
    monkeypatch.setitem(fast_losses._ROWS, "cpu", 2)


HEADS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "saved": {"modules_to_save": ["lm_head"]},
    "adapted": {"target_modules": r"lm_head|.*\.(q_proj|c_attn|q)"},
    "rows": {"trainable_token_indices": batch("llama")["input_ids"][0, :2].tolist()},
}
TRAINED = ("llama", "llama_tied", "gpt2", "qwen2", "gemma3", "t5", "gemma2", "cohere", "granite")
"""Models whose head is tried with what trains in it."""
KINDS = ("llama", "llama_tied", "gpt2", "opt", "qwen2", "gemma3", "bloom", "mixtral", "t5", *BUILT)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize(
    ("kind", "head"),
    [*((kind, "frozen") for kind in KINDS), *((kind, head) for kind in TRAINED for head in HEADS if head != "frozen")],
)
def test_chunks_have_the_losses_and_gradients_of_one_piece(kind: str, head: str, precision: str) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = model_of(kind, dtype, **HEADS[head]).train()
    inputs, targets = rows_of(kind)
    with torch.autocast("cpu", enabled=precision == "autocast"):
        assert output_head(model, inputs) is not None
        losses, correct, gradients = found_by(target_losses, model, inputs, targets)
        plain = found_by(plain_losses, model, inputs, targets)
        with torch.no_grad():  # a LoRA layer rounds elsewhere there
            evaluated, plainly = (way(model, inputs, targets)[0] for way in (target_losses, plain_losses))
    exact = precision == "float32"
    torch.testing.assert_close(losses, plain[0], rtol=0, atol=1e-5 if exact else 0.1)
    torch.testing.assert_close(evaluated, plainly, rtol=0, atol=1e-5 if exact else 0.1)
    if exact:
        torch.testing.assert_close(evaluated, losses, rtol=0, atol=1e-5)
    assert torch.equal(correct, plain[1]) or not exact
    for name, gradient in gradients.items():
        off = (gradient - plain[2][name]).norm() / plain[2][name].norm()
        assert float(off) < (1e-5 if exact else 0.1), name


def test_virtual_tokens_are_no_targets() -> None:
    model = tiny("llama")
    inject(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    inputs, targets = rows_of("llama")
    assert output_head(model, inputs) is not None
    losses, _, gradients = found_by(target_losses, model, inputs, targets)
    plain, _, expected = found_by(plain_losses, model, inputs, targets)
    torch.testing.assert_close(losses, plain)
    torch.testing.assert_close(gradients, expected)


def _as_it_is(logits: torch.Tensor) -> torch.Tensor:
    return logits


@pytest.mark.parametrize(
    "shaped",
    [
        _as_it_is,
        lambda logits: 3 * torch.tanh(logits / 3),
        lambda logits: 0.25 * logits,
        lambda logits: logits + torch.linspace(-1, 1, 5000, dtype=torch.float64).to(logits.dtype),
    ],
    ids=["as it is", "soft-capped", "scaled", "with a bias"],
)
def test_the_gradient_is_that_of_a_head_in_float64(shaped: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The plain one is off by more: it takes shares from logarithms of shares."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=generator)
    hidden = (2 * torch.randn(40, 64, generator=generator)).requires_grad_()
    targets = torch.randint(5000, (40,), generator=generator)

    def gradient(losses: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        start = hidden.detach().to(dtype).requires_grad_()
        losses(start).sum().backward()
        assert start.grad is not None
        return start.grad.double()

    exact = gradient(lambda x: F.cross_entropy(shaped(x @ weight.double().T), targets, reduction="none"), torch.float64)
    found = gradient(lambda x: chunked_losses(x, targets, lambda part: shaped(part @ weight.T))[0], torch.float32)
    plain = gradient(lambda x: F.cross_entropy(shaped(x @ weight.T), targets, reduction="none"), torch.float32)
    off, plainly_off = (float((each - exact).norm() / exact.norm()) for each in (found, plain))
    assert off < 5e-6
    assert off < plainly_off or shaped is not _as_it_is


def test_a_target_that_is_nearly_certain_has_the_exact_gradient() -> None:
    """What 50,000 other tokens are given counts, though it is nothing beside 1 in float32, as to torch's softmax."""
    logits = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = 20
    targets = torch.tensor([7, 7])

    def found(losses: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        start = logits.to(dtype).requires_grad_()
        loss = losses(start)
        (gradients,) = torch.autograd.grad(loss.sum(), start)
        return torch.cat([loss.detach(), gradients[:, 7]]).double()

    exact = found(lambda x: F.cross_entropy(x, targets, reduction="none"), torch.float64)
    ours = found(lambda x: chunked_losses(x, targets, lambda part: 1.0 * part)[0], torch.float32)
    torch.testing.assert_close(ours, exact, rtol=0.01, atol=0.0)


class Watch(TorchDispatchMode):
    """The rows of all that is computed with a side of V, and how many of them at once."""

    def __init__(self, weights: set[int]):
        super().__init__()
        self.weights, self.most, self.products = weights, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        wide = isinstance(made, torch.Tensor) and made.ndim > 1 and made.shape[-1] == VOCABULARY
        if wide and made.untyped_storage().data_ptr() not in self.weights:
            self.most = max(self.most, made.numel() // VOCABULARY)
            self.products += (
                made.numel() // VOCABULARY * (func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm))
            )
        return made


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_targets_two_at_a_time(training: bool) -> None:
    model = model_of("llama")
    inputs, targets = rows_of("llama")
    output_head(model, inputs)
    with (
        Watch({each.untyped_storage().data_ptr() for each in model.parameters()}) as watch,
        torch.set_grad_enabled(training),
    ):
        losses, _ = target_losses(model, inputs, targets)
    assert len(losses) == (targets != IGNORED).sum()
    assert (watch.most, watch.products) == (2, len(losses))


class Mixing(nn.Module):
    """A model whose logits at one position depend on others."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def get_output_embeddings(self) -> nn.Module:
        return self.model.get_output_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        output.logits = output.logits.cumsum(1)
        return output


class Unused(Mixing):
    """A model that says it has another head than it calls."""

    def get_output_embeddings(self) -> nn.Module:
        return nn.Linear(32, VOCABULARY)


@pytest.mark.parametrize("kind", [Mixing, Unused])
def test_other_models_keep_the_plain_path(kind: type[Mixing]) -> None:
    model = kind(model_of("llama"))
    inputs, targets = rows_of("llama")
    assert output_head(model, inputs) is None
    with torch.no_grad():
        losses, plain = target_losses(model, inputs, targets), plain_losses(model, inputs, targets)
    assert torch.equal(losses[0], plain[0])


def test_looking_for_the_head_leaves_no_trace() -> None:
    model = model_of("llama", lora_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    output_head(model, rows_of("llama")[0])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model.lm_head)


class Guess(nn.Module):
    """A model that answers with these logits, whatever it reads."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits)


@pytest.mark.parametrize(("task", "kind"), [("causal_lm", "llama"), ("seq2seq_lm", "t5")])
def test_perplexity_and_accuracy_of_a_perfect_and_of_a_random_predictor(task: str, kind: str) -> None:
    opened = open_task(task, base_folder(kind))
    examples = encoded(opened, PROMPTS * 20)
    batch = opened.collate(examples, training=False)
    targets = next_tokens(batch["labels"]) if task == "causal_lm" else batch["labels"]
    count, vocabulary = int((targets != IGNORED).sum()), opened.base.config.vocab_size

    def measured(logits: torch.Tensor) -> dict[str, float]:
        sums = opened.loss(Guess(logits).eval(), batch).sums
        found: dict[str, float] = opened.metrics({name: each.numpy() for name, each in sums.items()}, [], count)
        return found

    perfect = measured(100.0 * F.one_hot(targets.clamp(min=0), vocabulary))
    assert perfect == pytest.approx({"loss": 0, "perplexity": 1, "token_accuracy": 1}, abs=1e-6)
    assert measured(torch.zeros(*targets.shape, vocabulary))["perplexity"] == pytest.approx(vocabulary, rel=1e-5)
    draws = torch.randn(*targets.shape, vocabulary, generator=torch.Generator().manual_seed(0))
    random = measured(draws)
    # the mean of the exponential of a normal variable is the root of e
    assert random["perplexity"] == pytest.approx(vocabulary * math.exp(0.5), rel=0.1)
    assert random["token_accuracy"] == pytest.approx(1 / vocabulary, abs=0.005)
