"""Batches without their padding: the same hidden states, losses and gradients."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models_tiny import DECODERS, EOS, VOCABULARY, checkpoint_activations, tiny
from task_methods import settings_of
from taskkit import CASES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from trainkit import run_recipe
from transformers import (
    AlbertConfig,
    AlbertModel,
    AttentionInterface,
    AttentionMaskInterface,
    DistilBertConfig,
    DistilBertForTokenClassification,
    FalconH1Config,
    FalconH1ForCausalLM,
    LayoutLMConfig,
    LayoutLMForTokenClassification,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForQuestionAnswering,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.methods import METHODS
from peftcli.tasks.text.fast import segments as module
from peftcli.tasks.text.fast import unpadded
from peftcli.tasks.text.fast.segments import ATTENTION, Layout, Segment, Segments, attend
from peftcli.tasks.text.fast.unpadded import _spread, is_unpadded, unpad

WINDOW = 16
LENGTHS = (7, 30, 2, 19)
"""One is longer than the window."""
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LOCAL: dict[str, Any] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES, head_dim=8, num_key_value_heads=2)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=WINDOW, num_key_value_heads=2)),
    "roberta": lambda: RobertaForQuestionAnswering(RobertaConfig(**_SIZES, **_NO_DROPOUT)),
    "distilbert": lambda: DistilBertForTokenClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY, dim=32, hidden_dim=64, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0
        )
    ),
    "modernbert": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**_SIZES, local_attention=WINDOW, bos_token_id=1, eos_token_id=2)
    ),
}
ABLE = ["llama", "llama_tied", "qwen2", "gpt2", "gemma3", "gemma3_towers", "mixtral", "opt", "bert", *_LOCAL]


def base(kind: str) -> PreTrainedModel:
    """A model whose tokens depend on one another a lot."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = (_LOCAL[kind]() if kind in _LOCAL else tiny(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    return model


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, EOS, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def tokens_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What a model says of the tokens that are no padding, or of each row."""
    output = model(**inputs)
    found = output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits], -1)
    mask = inputs["attention_mask"].bool()
    return found[:, -mask.shape[1] :][mask] if found.ndim == 3 else found  # virtual tokens stand before


def with_gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What it says, and the gradients of a sum with weights of their own."""
    model.zero_grad()
    said = tokens_of(model, inputs)
    (said * torch.randn(said.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    tensors = {name: parameter for name, (_, _, parameter) in named_tensors(model).items()}
    return said.detach(), {name: each.grad.clone() for name, each in tensors.items() if each.grad is not None}


Measured = tuple[torch.Tensor, dict[str, torch.Tensor]]


def assert_same(found: Measured, expected: Measured) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert float((found[1][name] - gradient).abs().max()) <= 1e-5 * float(gradient.abs().max()), name


def adapted(kind: str, method: str = "lora") -> PreTrainedModel:
    """A model with an adapter that changes it."""
    model = base(kind)
    config = METHODS[method].config_class()(**({"num_virtual_tokens": 5} if method.endswith("tuning") else {}))
    inject(model, config)
    generator = torch.Generator().manual_seed(1)
    for _, _, parameter in named_tensors(model).values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.grid(keep=7)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ABLE)
def test_the_same_is_computed_without_padding(kind: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted(kind), batch(*LENGTHS)
    expected = with_gradients(model, inputs)
    assert unpad(model)
    widths: list[int] = []

    def watched(module: Any, query: torch.Tensor, *args: Any, **settings: Any) -> Any:
        widths.append(query.shape[0] * query.shape[2])
        return attend(module, query, *args, **settings)

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, watched)
    if checkpointing:
        model.train()
        checkpoint_activations(model)
    found = with_gradients(model, inputs)
    assert set(widths) == {sum(LENGTHS)}
    assert_same(found, expected)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "bert"])
def test_flash_attention_is_told_where_examples_stand(kind: str) -> None:
    """A stand-in on the CPU, which knows nothing but what transformers passes on."""
    seen = []

    def flash(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **given: Any) -> Any:
        if "cu_seq_lens_q" not in given:  # a padded batch
            return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **given)
        ends, longest = given["cu_seq_lens_q"], given["max_length_q"]
        assert (given["cu_seq_lens_k"] is ends, given["max_length_k"]) == (True, longest)
        seen.append((ends.dtype, ends.tolist(), longest))
        window, parts = given.get("sliding_window"), []
        for start, end in itertools.pairwise(ends.tolist()):
            q, k, v = (each[:, :, start:end] for each in (query, key, value))
            k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
            far = torch.arange(end - start)[:, None] - torch.arange(end - start)
            sees = (far >= 0) if module.is_causal else torch.ones_like(far, dtype=torch.bool)
            sees = sees & (far < window) if window else sees
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scaling))
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None

    model, inputs = adapted(kind), batch(*LENGTHS)
    expected = with_gradients(model, inputs)
    AttentionInterface.register("flash_stand_in", flash)
    AttentionMaskInterface.register("flash_stand_in", sdpa_mask)
    model.config._attn_implementation = "flash_stand_in"
    assert unpad(model)
    seen.clear()
    found = with_gradients(model, inputs)
    assert seen == [(torch.int32, [0, 7, 37, 39, 58], 30)] * 2  # layers
    assert_same(found, expected)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral", "bert", "gpt2", "virtual tokens"])
def test_a_gpu_computes_all_examples_at_once(kind: str, kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with a stand-in for torch's flash attention, which knows nothing but what it is given."""
    seen, plain = [], module.sdpa_attention_forward

    def flash(
        q: Any, k: Any, v: Any, ends: Any, same: Any, longest: int, most: int, *, scale: Any, **settings: Any
    ) -> Any:
        causal = {(-1, 0): True, (-1, -1): False}[settings["window_size"]]
        assert (same is ends, ends.dtype, most, len(k), len(v)) == (True, torch.int32, longest, len(q), len(q))
        assert settings["enable_gqa"] == (q.shape[1] != k.shape[1])
        seen.append((ends.tolist(), longest))
        parts = []
        for start, end in itertools.pairwise(ends.tolist()):
            part = (each[start:end].transpose(0, 1)[None] for each in (q, k, v))
            found = F.scaled_dot_product_attention(*part, is_causal=causal, scale=scale, enable_gqa=True)
            parts.append(found[0].transpose(0, 1))
        return torch.cat(parts)

    def padded(module: Any, query: torch.Tensor, *args: Any, **settings: Any) -> Any:
        seen.append(tuple(query.shape[::2]))
        return plain(module, query, *args, **settings)

    model = adapted("llama", "prompt_tuning") if kind == "virtual tokens" else adapted(kind)
    inputs, sizes = batch(*LENGTHS), [size + 5 * (kind == "virtual tokens") for size in LENGTHS]
    expected = with_gradients(model, inputs)
    monkeypatch.setattr(module, "_AT_ONCE", ("cpu",))
    monkeypatch.setattr(module, "_HAS_KERNEL", kernel)
    monkeypatch.setattr(module, "can_use_flash_attention", lambda parameters: True)
    monkeypatch.setattr(module, "varlen_attn", flash)
    assert unpad(model)
    monkeypatch.setattr(module, "sdpa_attention_forward", padded)
    seen.clear()
    found = with_gradients(model, inputs)
    by_kernel = kernel and kind != "mistral"  # which has a window
    assert seen == [([0, *itertools.accumulate(sizes)], max(sizes)) if by_kernel else (4, max(sizes))] * 2  # layers
    assert_same(found, expected)


def test_torchs_flash_attention_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shapes and its gradients' alone, since it computes on a GPU only."""
    if not module._HAS_KERNEL:
        pytest.skip("torch is older than 2.12")
    monkeypatch.setattr(module, "_AT_ONCE", ("cpu",))
    monkeypatch.setattr(module, "can_use_flash_attention", lambda parameters: True)
    monkeypatch.setattr(module, "_attend", None)  # the other way
    with FakeTensorMode():
        query, key, value = (
            torch.empty(1, heads, 15, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
        )
        rows = Segments(Layout(torch.arange(15), None, [Segment(0, 5), Segment(0, 10)], None), True, 10, None)
        attended, _ = attend(SimpleNamespace(), query, key, value, rows, scaling=0.3, dropout=0.0)
        assert (attended.shape, attended.dtype) == ((1, 15, 4, 8), torch.bfloat16)
        attended.sum().backward()
    assert [each.grad.shape for each in (query, key, value)] == [each.shape for each in (query, key, value)]


def test_a_long_example_is_asked_in_parts_whom_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 7)
    for kind in ("mistral", "bert", "modernbert"):
        model, inputs = base(kind), batch(*LENGTHS)
        with torch.no_grad():
            expected = tokens_of(model, inputs)
            assert unpad(model)
            torch.testing.assert_close(tokens_of(model, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("kind", "method"),
    [*((kind, "lora") for kind in ABLE), *((kind, "prompt_tuning") for kind in ABLE if kind in DECODERS)],
)
def test_in_bfloat16_it_is_as_close_to_float32_as_with_padding(kind: str, method: str, autocast: bool) -> None:
    inputs, found = batch(*LENGTHS), list[torch.Tensor]()
    for dtype, unpads in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = adapted(kind, method)
        rounded = dtype == torch.bfloat16
        if rounded and not autocast:
            for parameter in model.parameters():
                parameter.data = parameter.data.to(parameter.dtype if parameter.requires_grad else dtype)
        with torch.autocast("cpu", enabled=rounded):
            if unpads:
                assert unpad(model)
            said, gradients = with_gradients(model, inputs)
        found.append(torch.cat([said.float().flatten(), *(each.flatten() for each in gradients.values())]))
    exact, padded, without = found
    off, padded_off = (float((each - exact).norm() / exact.norm()) for each in (without, padded))
    assert off < 1.5 * padded_off + 2e-3


@pytest.mark.parametrize("kind", ["bloom", "t5"])
def test_a_model_that_cannot_is_left_as_it_is(kind: str) -> None:
    """They take no positions, or have a decoder beside an encoder."""
    model, inputs = base(kind), batch(*LENGTHS)
    if kind == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    before, attention = tokens_of(model, inputs), model.config._attn_implementation
    assert not unpad(model)
    assert not is_unpadded(model)
    assert model.config._attn_implementation == attention
    assert torch.equal(tokens_of(model, inputs), before)


def mixing() -> PreTrainedModel:
    model = base("llama")
    layer = model.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda x: forward(x + 0.1 * x.roll(1, dims=1))
    return model


def falcon_h1() -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    mamba = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
    config = FalconH1Config(**sizes, **heads, **mamba, mamba_chunk_size=16, initializer_range=0.15)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return FalconH1ForCausalLM(config)


_SMALL = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 37}
_CONVOLUTION = {**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
UNABLE: dict[str, Callable[[], PreTrainedModel]] = {
    "mixes tokens of a row": mixing,
    # its states of Mamba go on from one example to the next, by less than bfloat16 rounds in deep models
    "sees a little of other rows": falcon_h1,
    "makes its mask itself": lambda: LayoutLMForTokenClassification(LayoutLMConfig(**_SMALL, num_attention_heads=4)),
    # its weights may be as small as rounding in bfloat16
    "has a convolution along the row": lambda: Lfm2ForCausalLM(Lfm2Config(**_CONVOLUTION)),
}


@pytest.mark.grid(each="kind")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", UNABLE)
def test_a_model_that_does_not_keep_rows_apart_is_found_out(kind: str, dtype: torch.dtype) -> None:
    model = UNABLE[kind]().to(dtype)
    assert not unpad(model)
    assert not is_unpadded(model)


def test_a_pooler_that_the_model_calls_otherwise_is_found_out() -> None:
    model = AlbertModel(AlbertConfig(**_SIZES, embedding_size=16)).eval()  # of the first token alone, and tanh after it
    inputs = batch(*LENGTHS)
    expected = model(**inputs).pooler_output
    assert not unpad(model)
    assert torch.equal(model(**inputs).pooler_output, expected)


def test_a_pad_token_within_a_text_has_no_position() -> None:
    model, inputs = base("roberta"), batch(9, 4)
    inputs["input_ids"][0, 3] = 0
    alone = tokens_of(model, {name: value[:1] for name, value in inputs.items()})
    assert unpad(model)
    torch.testing.assert_close(tokens_of(model, inputs)[:9], alone[:9], rtol=0, atol=1e-5)


def test_the_last_token_may_be_the_padding() -> None:
    model = Qwen3ForCausalLM(Qwen3Config(**_SIZES | {"vocab_size": 8, "pad_token_id": 7}, num_key_value_heads=2))
    assert unpad(model)


def test_nothing_is_shared_where_tokens_look_ahead() -> None:
    """However little a token changes those before it, as in a model with small weights."""
    model = tiny("bert").eval()
    assert unpad(model)
    assert not model.get_decoder().forward.shares


def test_the_check_leaves_no_trace() -> None:
    model = base("gpt2").train()
    model.transformer.h[0].eval()
    model.transformer.h[1].mlp.dropout.p = 0.5
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert unpad(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.grid(each="kind")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "bert"])
def test_what_rows_have_in_common_is_computed_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = adapted(kind), batch(24, 30, 9, 20, 9)
    ids = inputs["input_ids"]
    ids[1, :5], ids[2:4, :8], ids[4] = ids[0, :5], ids[0, :8], ids[2]  # two are the same
    ids[3, 8:11] = ids[2, 8:11]
    ids[3, 9] = ids[2, 9] + 1  # more than with the first row
    expected = with_gradients(model, inputs)
    assert unpad(model)
    rows: list[int] = []
    layer = next(module for module in model.modules() if type(module).__name__.endswith("Norm"))
    layer.register_forward_hook(lambda module, args, output: rows.append(output[..., 0].numel()))
    found = with_gradients(model, inputs)
    assert rows[-1] == 92 - (0 if kind == "bert" else 5 + 8 + 9 + 9)
    assert_same(found, expected)


def test_threads_add_gradients_in_one_order() -> None:
    """Where rows share tokens, and the hidden states are large enough for several threads."""
    layout = Layout(torch.arange(40), torch.arange(1200) % 40, [], None)
    states = torch.randn(40, 64, requires_grad=True)
    weights = torch.randn(12, 100, 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [torch.autograd.grad((_spread(states, layout, 12, 100) * weights).sum(), states)[0] for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.grid(each="method")
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_virtual_tokens_stand_before_each_example(method: str, checkpointing: bool) -> None:
    model, inputs = adapted("llama", method), batch(*LENGTHS) | {"use_cache": False}
    expected = with_gradients(model, inputs)
    assert unpad(model)
    if checkpointing:
        model.train()
        checkpoint_activations(model)
    found = with_gradients(model, inputs)
    assert_same(found, expected)
    left = {name: value.flip(1) if name != "use_cache" else value for name, value in inputs.items()}
    with torch.no_grad():
        said = tokens_of(model.eval(), left)
        monkey = model.get_decoder().forward
        model.get_decoder().forward = monkey.forward
        torch.testing.assert_close(said, tokens_of(model, left), rtol=0, atol=1e-5)


def test_generation_goes_on_as_before() -> None:
    model, inputs = base("llama"), batch(9, 4)
    inputs = {name: value.flip(1) for name, value in inputs.items()}  # padded on the left
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert unpad(model)
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), expected)


# --- attention within segments ----------------------------------------------------------------------------------------


def banded(size: int, window: int | None) -> torch.Tensor:
    allowed = torch.ones(size, size).tril().bool()
    return allowed if window is None else allowed & ~allowed.tril(-window)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_equal_a_dense_mask(window: int | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [5, 1, 9]
    query, key, value = (
        torch.randn(1, heads, 15, 8, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)
    )
    plain = [each.detach().float().requires_grad_() for each in (query, key, value)]
    layout = Layout(torch.arange(15), None, [Segment(0, size) for size in sizes], None)
    segments = Segments(layout, True, 9 if window is None else window, None if window is None else banded(9, window))
    attended, _ = attend(SimpleNamespace(num_key_value_groups=2), query, key, value, segments, scaling=0.3)
    dense = torch.block_diag(*(banded(size, window).float() for size in sizes)).bool()
    repeated = [plain[0], *(each.repeat_interleave(2, dim=1) for each in plain[1:])]
    expected = F.scaled_dot_product_attention(*repeated, attn_mask=dense, scale=0.3).transpose(1, 2)
    assert attended.dtype == dtype
    exact = dtype == torch.float32
    torch.testing.assert_close(attended.float(), expected, rtol=0, atol=1e-6 if exact else 0.02)
    weight = torch.randn(expected.shape, generator=generator)
    (attended.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    for found, wanted in zip((query, key, value), plain, strict=True):
        torch.testing.assert_close(
            found.grad.float(), wanted.grad, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05
        )


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "bert"])
def test_no_mask_over_a_whole_row_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        seen.append(mask)
        return attend(module, query, key, value, mask, **settings)

    model = base(kind)
    assert unpad(model)
    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, watched)
    with torch.no_grad():
        model(**batch(9, 20, 1))
    assert all(isinstance(mask, Segments) and [row.size for row in mask.rows] == [9, 20, 1] for mask in seen)
    assert {mask.causal for mask in seen} == {kind != "bert"}
    widths = [[None if mask is None else mask.shape[0] for mask in each.masks] for each in seen]
    slides = [None, 20, None]  # only the second example is longer than the window
    plain = [None] * 3
    assert widths == {"llama": [plain] * 2, "bert": [plain] * 2, "mistral": [slides] * 2, "gemma3": [slides] * 2}[kind]


OTHERS = ("causal_lm", "sequence_classification", "question_answering", "token_classification", "preference", "reward")


@pytest.mark.parametrize(
    "task", ["feature_extraction", *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)]
)
def test_training_in_bfloat16_computes_no_padding(tmp_path: Path, task: str) -> None:
    done = run_recipe(CASES[task].write(tmp_path), "training.bf16=true", "training.max_steps=1")
    assert done.run["data"]["efficiency"] == 1


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning", "trainable_tokens"])
def test_an_adapter_in_float32_does_not_hide_that_the_model_rounds(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpadded, "_EXACT", -1.0)  # as good as none; the tiny model's rounding happens to be the same
    settings = f"method={json.dumps(settings_of(method, 'causal_lm'))}"
    done = run_recipe(CASES["causal_lm"].write(tmp_path), settings, "training.bf16=true", "training.max_steps=1")
    assert done.run["data"]["efficiency"] == 1
