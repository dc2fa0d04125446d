"""What adapters of several models compute in one row of tokens is what each computes alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from models_tiny import ids, tiny
from promises import config_of
from torch import nn

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError, ModelError
from peftcli.methods import METHODS
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.joined import joined_linear
from peftcli.tasks.text.fast.joined import JoinedModels
from peftcli.tasks.text.fast.losses import frozen_losses
from peftcli.tasks.text.fast.shared_base import Randomness, sharing_copy
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.tasks.text.language_model import target_losses
from peftcli.tasks.text.token_ids import next_tokens

pytestmark = pytest.mark.slow

REFUSED = {
    "adaption_prompt": "changes more than the outputs of layers",
    "cartridge": "changes more than the outputs of layers",
    "cpt": "changes more than the outputs of layers",
    "lily": "mean over all tokens",
    "multitask_prompt_tuning": "changes more than the outputs of layers",
    "p_tuning": "changes more than the outputs of layers",
    "prefix_tuning": "changes more than the outputs of layers",
    "prompt_tuning": "changes more than the outputs of layers",
    "xlora": "needs padding",
    "alora": "only once per row",
}
"""What does not compute beside others, and why."""
VARIANTS = {
    "dora": {"use_dora": True},
    "biases": {"bias": "all", "lora_bias": True, "target_modules": ["c_attn", "c_fc"]},
    "ends": {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "init_lora_weights": False},
    "saved": {"modules_to_save": ["lm_head", "norm"]},
    "rows": {"trainable_token_indices": [5, 7]},
    "pissa": {"init_lora_weights": "pissa"},
    "kasa": {"kasa_config": {}},
    "monteclora": {"monteclora_config": {}},
    "alora": {"alora_invocation_tokens": [5, 6]},
}
"""Of LoRA."""


def labelled(lengths: tuple[int, ...], seed: int) -> dict[str, torch.Tensor]:
    """Rows of unequal lengths, padded on the right."""
    found = ids(len(lengths), max(lengths), seed=seed)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": found, "attention_mask": mask, "labels": found.masked_fill(mask == 0, -100)}


def with_adapter(base: nn.Module, config: Any, seed: int) -> Any:
    model = sharing_copy(base)
    torch.manual_seed(seed)
    inject(model, config)
    unpad(model, config)
    with torch.no_grad():
        for _, _, parameter in named_tensors(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {name: parameter for name, (_, _, parameter) in named_tensors(model).items()}
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True, retain_graph=True)
    return {name: gradient for name, gradient in zip(tensors, found, strict=True) if gradient is not None}


def config_of_case(case: str) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], **VARIANTS.get(case, {})}
    return LoraConfig(task_type="CAUSAL_LM", **settings) if case in VARIANTS else config_of(case, "llama")


@pytest.mark.parametrize("method", [*METHODS, *VARIANTS])
def test_a_method_computes_beside_lora_what_it_computes_alone_or_is_refused(method: str) -> None:
    base = tiny("gpt2" if method == "biases" else "llama")
    configs = [config_of_case(method), LoraConfig(r=3, target_modules="all-linear", lora_dropout=0.3)]
    models = [with_adapter(base, config, seed) for seed, config in enumerate(configs)]
    joined, members, batches = JoinedModels(sharing_copy(base)), [], [labelled((9, 4), 1), labelled((3, 7, 12), 2)]
    for seed, (model, config) in enumerate(zip(models, configs, strict=True)):
        torch.manual_seed(seed)
        random = Randomness(torch.device("cpu"))
        if method in REFUSED:
            with pytest.raises(AdapterError, match=REFUSED[method]):
                joined.add(model, config, random)
            return
        members.append(joined.add(model, config, random))
    calls = [
        (each, lambda m=model, b=batch: m(**b).loss)
        for each, model, batch in zip(members, models, batches, strict=True)
    ]
    losses = joined.call(calls)
    for seed, (model, batch, loss) in enumerate(zip(models, batches, losses, strict=True)):
        torch.manual_seed(seed)
        alone = model(**batch).loss
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)
        expected, found = gradients(model, alone), gradients(model, loss)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-4), name


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "qwen2", "gemma3", "mixtral", "opt", "bert", "gpt2"])
def test_lora_of_several_models_is_one_function(
    kind: str, precision: str, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout. In half precision it is about as close to float32 as each alone."""
    monkeypatch.setattr("peftcli.methods.lora.joined._WORTH_A_CALL", math.inf if few else 0)
    called = list[int]()

    def counted(x: torch.Tensor, base: nn.Linear, shares: Any) -> torch.Tensor:
        called.append(len(shares))
        return joined_linear(x, base, shares)

    monkeypatch.setattr("peftcli.methods.lora.lora.joined_linear", counted)
    dtype, autocast = torch.bfloat16 if precision == "bfloat16" else torch.float32, precision != "float32"
    base = tiny(kind, scale=1.0)
    exact_base, base = sharing_copy(base).float(), base.to(dtype)
    batches, losses = [labelled((9, 4), 1), labelled((3, 7, 12), 2)], list[torch.Tensor]()
    for inputs in batches if kind == "bert" else ():
        inputs["labels"] = torch.arange(len(inputs["input_ids"])) % 3
    targets = r"bert\.encoder\..*(query|value|dense)" if kind == "bert" else "all-linear"  # the pooler gets rows
    configs = [LoraConfig(r=r, lora_alpha=7, target_modules=targets) for r in (3, 5)]
    alone, models, exact = (
        [with_adapter(each, config, seed) for seed, config in enumerate(configs)] for each in (base, base, exact_base)
    )
    with torch.autocast("cpu", enabled=autocast):
        joined = JoinedModels(sharing_copy(base))
        members = [
            joined.add(model, config, Randomness(torch.device("cpu")))
            for model, config in zip(models, configs, strict=True)
        ]
        called.clear()
        losses = joined.call(
            [(member, lambda m=m, b=b: m(**b).loss) for member, m, b in zip(members, models, batches, strict=True)]
        )
        plain = [model(**inputs).loss for model, inputs in zip(alone, batches, strict=True)]
    wanted = [model(**inputs).loss for model, inputs in zip(exact, batches, strict=True)]
    assert called == ([] if kind == "gpt2" else [2] * len(called)), "GPT-2's layers are no nn.Linear"
    assert called or kind == "gpt2"

    def vector(model: nn.Module, loss: torch.Tensor) -> torch.Tensor:
        found = gradients(model, loss)
        return torch.cat([loss.detach().float().view(1), *(found[name].float().flatten() for name in sorted(found))])

    for own, model, of_exact, *given in zip(alone, models, exact, plain, losses, wanted, strict=True):
        by_itself, together, right = (
            vector(each, loss) for each, loss in zip((own, model, of_exact), given, strict=True)
        )
        off, alone_off = (float((each - right).norm() / right.norm()) for each in (together, by_itself))
        assert off < (1e-5 if precision == "float32" else 1.5 * alone_off + 2e-3)


@pytest.mark.parametrize("where", ["tokens", "gradients"])
def test_what_is_not_finite_of_one_model_stays_with_it(where: str) -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(6, 5).requires_grad_(False), torch.randn(7, 6)
    pairs = [(torch.randn(r, 6, requires_grad=True), torch.randn(5, r, requires_grad=True)) for r in (2, 3)]
    weights = torch.ones(7, 5)
    (x if where == "tokens" else weights)[5] = math.inf
    made = joined_linear(x, base, [(4, pairs[0], 2.0), (3, pairs[1], 1.5)])
    (made * weights).sum().backward()
    (a, b), (other_a, _) = pairs
    expected = torch.autograd.grad((2.0 * (x[:4] @ a.T) @ b.T).sum(), (a, b))
    torch.testing.assert_close((a.grad, b.grad), expected)
    assert torch.isfinite(made[:4]).all()
    assert not torch.isfinite(other_a.grad).all()


def test_the_head_of_all_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, computed = tiny("llama"), list[int]()

    def counted(hidden: torch.Tensor, *more: Any) -> Any:
        computed.append(len(hidden))
        return frozen_losses(hidden, *more)

    monkeypatch.setattr("peftcli.tasks.text.fast.joined.frozen_losses", counted)
    cases, batches = ("lora", "lora", "saved"), [labelled((9, 4), 1), labelled((3, 7, 12), 2), labelled((5,), 3)]
    configs = [config_of_case(case) for case in cases]
    models = [with_adapter(base, config, seed) for seed, config in enumerate(configs)]
    joined, calls = JoinedModels(sharing_copy(base)), list[Any]()
    for model, config, batch in zip(models, configs, batches, strict=True):
        inputs, targets = {name: batch[name] for name in ("input_ids", "attention_mask")}, next_tokens(batch["labels"])
        member = joined.add(model, config, Randomness(torch.device("cpu")))
        calls.append((member, lambda m=model, i=inputs, t=targets: target_losses(m, i, t)[0].sum()))
    losses = joined.call(calls)
    assert computed == [11 + 19], "the third has a head of its own"
    for model, loss, (_, function) in zip(models, losses, calls, strict=True):
        alone = function()
        torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)
        for name, gradient in gradients(model, alone).items():
            found = gradients(model, loss)[name]
            assert (found - gradient).abs().max() <= 1e-5 * gradient.abs().max().clamp(min=1e-4), name


def test_a_base_that_drops_out_is_refused() -> None:
    model = tiny("llama")
    model.config.attention_dropout = 0.1
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    with pytest.raises(ModelError, match="draws random numbers"):
        JoinedModels(model)


def test_an_encoder_decoder_is_refused() -> None:
    with pytest.raises(ModelError, match=r"T5ForConditionalGeneration .* does not compute batches without padding"):
        JoinedModels(tiny("t5"))
