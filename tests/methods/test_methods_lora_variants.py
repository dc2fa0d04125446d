"""LoRA's variants train as PEFT's do: the same gradients and penalties from the same weights and random numbers."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from lora_cases import ALORA, VARIANTS
from models_tiny import CACHE, batch, checkpoint_activations, logits, tiny
from oracle import ours, theirs
from peft.tuners.lora import variants as peft_variants
from torch import nn

import peftcli.peft_api
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.protocols import penalty
from peftcli.core.quantised import is_packed
from peftcli.core.weights import load_state, load_training_state, named_tensors, training_state
from peftcli.errors import AdapterError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.layers import wrap
from peftcli.methods.lora.updates import updates
from peftcli.methods.lora.variants.monteclora import MontecloraLinear, Sampler
from peftcli.methods.updates import UpdateUnknown
from peftcli.peft_api import PeftModel, get_peft_model

LONG = torch.tensor([[5, 56, 81, 9, 7, 56, 81, 4, 3], [0, 0, 0, 8, 56, 81, 4, 3, 2], [9] * 9, [1] * 7 + [56, 81]])
"""Rows with the invocation twice, once after padding, not at all, and at the end."""
STARTS = [5, 4, 9, 7]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _pair(kind: str, settings: dict[str, Any]) -> tuple[nn.Module, LoraConfig, Any]:
    """Our model in training with PEFT's weights, its config, and PEFT's model."""
    oracle = theirs(kind, "lora", **settings).train()
    model, config = ours(kind, "lora", **settings)
    load_state(model, peft.get_peft_model_state_dict(oracle))
    return model.train(), config, oracle


def _same_noise(model: nn.Module, oracle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let our samplers take the random numbers that PEFT's take next."""
    buffers = [
        module.lora_monteclora_sampler["default"].sampler
        for module in oracle.modules()
        if hasattr(module, "lora_monteclora_sampler")
    ]
    samplers = [layer.lora_monteclora_sampler for layer in adapter_layers(model).values()]
    numbers = {own: buffer.buffer[buffer.index] for own, buffer in zip(samplers, buffers, strict=True)}

    def draw(self: Sampler, inputs: int) -> torch.Tensor:
        found = numbers[self]
        return self.noise_of(found["z_wishart"].diag(), found["z_dirichlet"], found["z_mvn"])

    monkeypatch.setattr(Sampler, "draw", draw)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("name", [*VARIANTS, "alora"])
def test_gradients_are_pefts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = ALORA if name == "alora" else VARIANTS[name]
    model, _, oracle = _pair(kind, settings)
    if "monteclora_config" in settings:
        _same_noise(model, oracle, monkeypatch)
    inputs = {**batch(kind), "labels": batch(kind)["input_ids"]}
    loss, expected = model(**inputs).loss, oracle(**inputs).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    right = {
        key.replace(".default", ""): value.grad for key, value in oracle.named_parameters() if value.grad is not None
    }
    found = {key: value.grad for key, (_, _, value) in named_tensors(model).items()}
    assert {key.replace(".base_layer.bias", ".bias") for key in right} == found.keys()
    for key, gradient in right.items():
        torch.testing.assert_close(found[key.replace(".base_layer.bias", ".bias")], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["kasa", "monteclora"])
def test_the_penalty_is_pefts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, settings = VARIANTS[name]
    model, config, oracle = _pair(kind, settings)
    with monkeypatch.context() as patch:
        if name == "monteclora":
            _same_noise(model, oracle, patch)
        model(**batch(kind))
        oracle(**batch(kind))
    found, expected = penalty(model, config), getattr(oracle, f"_get_{name}_loss")()
    torch.testing.assert_close(found, expected)
    grad = [torch.autograd.grad(value, [p for p in net.parameters() if p.requires_grad], allow_unused=True)
            for value, net in ((found, model), (expected, oracle))]  # fmt: skip
    totals = [sum(part.abs().sum() for part in parts if part is not None) for parts in grad]
    torch.testing.assert_close(*totals)

    wrapped = get_peft_model(tiny(kind), LoraConfig(task_type="CAUSAL_LM", **copy.deepcopy(settings))).train()
    inputs = {**batch(kind), "labels": batch(kind)["input_ids"]}
    torch.manual_seed(0)
    loss = wrapped(**inputs).loss
    torch.manual_seed(0)
    assert torch.equal(loss, wrapped.get_base_model()(**inputs).loss), "as in PEFT, code of one's own adds it"
    added = getattr(wrapped, f"_get_{name}_loss")()
    assert added == penalty(wrapped.get_base_model(), wrapped.active_peft_config) != 0.0
    assert getattr(wrapped, f"_get_{name}_loss")("other") == 0.0


@pytest.mark.parametrize("name", ["kasa", "monteclora", "velora"])
def test_a_resumed_one_holds_all_that_training_needs(name: str) -> None:
    kind, settings = VARIANTS[name]
    model, _ = ours(kind, "lora", **settings)
    model.train()(**batch(kind))
    kept = {key: value.clone() for key, value in training_state(model).items()}
    again, _ = ours(kind, "lora", seed=2, **settings)
    load_training_state(again, kept)
    for value in (model, again):
        torch.manual_seed(3)
        value.train()(**batch(kind), labels=batch(kind)["input_ids"]).loss.backward()
    for one, two in zip(named_tensors(model).values(), named_tensors(again).values(), strict=True):
        assert torch.equal(one[2].grad, two[2].grad)  # type: ignore[arg-type]


def test_the_noise_of_monteclora_has_the_spread_that_is_trained() -> None:
    layer = wrap(nn.Linear(400, 6), "x", LoraConfig(r=4, monteclora_config={"num_samples": 1, "sample_scaler": 0.5}))
    assert isinstance(layer, MontecloraLinear)
    sampler = layer.lora_monteclora_sampler
    with torch.no_grad():
        sampler.std_prior.copy_(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
        draws = torch.stack([sampler.draw(400) for _ in range(200)])
    expected = 0.5**2 * 4 * (2 * sampler.std_prior).exp()  # a chi-square number of 4 degrees of freedom is 4 on average
    torch.testing.assert_close(draws.square().mean((0, 2)), expected, atol=0.0, rtol=0.2)


def test_kasa_takes_the_weakest_directions_from_the_weight_and_gives_them_back() -> None:
    linear = nn.Linear(6, 5)
    layer = wrap(linear, "x", LoraConfig(r=2, kasa_config={}))
    x, (u, s, v) = torch.randn(3, 6), torch.linalg.svd(linear.weight, full_matrices=False)
    strong = (u[:, :3] * s[:3]) @ v[:3]
    torch.testing.assert_close(layer(x), nn.functional.linear(x, strong, linear.bias))
    layer.enabled = False
    assert torch.equal(layer(x), linear(x))


def test_velora_keeps_the_direction_of_the_first_batch_when_asked() -> None:
    layer: Any = wrap(nn.Linear(6, 5), "x", LoraConfig(r=2, velora_config={"init_type": "batch_average_once"}))
    layer(torch.randn(3, 6))
    first = layer.lora_velora_embed.clone()
    layer(torch.randn(3, 6))
    assert torch.equal(layer.lora_velora_embed, first)
    assert first.any()


def test_velora_keeps_less_for_the_backward_pass() -> None:
    kept = {}
    for name, settings in {"plain": {}, "velora": {"velora_config": {"num_groups": 8}}}.items():
        layer, sizes = wrap(nn.Linear(256, 4), "x", LoraConfig(r=2, **settings)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            layer(torch.randn(100, 256))
        kept[name] = sum(sizes)
    assert kept["plain"] - kept["velora"] > 0.9 * 100 * 256


class _Packed(nn.Module):
    """A linear layer as GPTQ stores one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5).requires_grad_(False)
        self.register_buffer("qweight", torch.zeros(1, dtype=torch.int32))
        self.in_features, self.out_features, self.bias = 8, 5, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


def test_qalora_averages_groups_of_inputs_as_peft_does() -> None:
    base = _Packed()
    assert is_packed(base)
    layer: Any = wrap(base, "x", LoraConfig(r=2, use_qalora=True, qalora_group_size=4, init_lora_weights=False))
    assert layer.lora_A.weight.shape == (2, 2)
    x = torch.randn(3, 4, 8)
    stub = SimpleNamespace(
        lora_A={"a": layer.lora_A}, lora_B={"a": layer.lora_B}, lora_dropout={"a": nn.Identity()}, in_features=8,
        scaling={"a": layer.scaling}, qalora_group_size={"a": 4}, training=False,
    )  # fmt: skip
    expected = peft_variants.QALoraLinearVariant.forward(stub, active_adapter="a", x=x, result=base(x))  # type: ignore[arg-type]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x), base(x) + x @ layer.delta().T)
    [found] = updates(
        LoraConfig(r=2, use_qalora=True, qalora_group_size=4),
        {"x.lora_A.weight": layer.lora_A.weight, "x.lora_B.weight": layer.lora_B.weight},
    ).values()
    torch.testing.assert_close(found.scaling * found.left @ found.right, layer.delta())


def test_the_updates_in_a_file_of_bdlora_are_those_of_its_layers() -> None:
    kind, settings = VARIANTS["bdlora"]
    model, config = ours(kind, "lora", **settings)
    found = updates(config, {key: value for key, (_, _, value) in named_tensors(model).items()})
    for path, layer in adapter_layers(model).items():
        update = found[path]
        torch.testing.assert_close(update.scaling * update.left @ update.right, layer.delta())
    kind, settings = VARIANTS["kasa"]
    model, config = ours(kind, "lora", **settings)
    with pytest.raises(UpdateUnknown, match="base model's weights"):
        updates(config, {key: value for key, (_, _, value) in named_tensors(model).items()})


def _alora(**settings: Any) -> PeftModel:
    kind, own = ALORA
    model = get_peft_model(tiny(kind), LoraConfig(**{**own, "init_lora_weights": False, **settings}))
    return model.eval()


def test_alora_is_the_base_model_before_the_last_invocation_of_each_row() -> None:
    model = _alora()
    with torch.no_grad():
        found, cache = model(LONG).logits, model(LONG, use_cache=True)[CACHE]
        with model.disable_adapter():
            expected, of_base = model(LONG).logits, model(LONG, use_cache=True)[CACHE]
    for row, start in enumerate(STARTS):
        assert torch.equal(found[row, :start], expected[row, :start])
        assert not any(torch.equal(found[row, i], expected[row, i]) for i in range(start, 9))
        for mine, base in zip(cache.layers, of_base.layers, strict=True):
            assert torch.equal(mine.keys[row, :, :start], base.keys[row, :, :start])
            assert torch.equal(mine.values[row, :, :start], base.values[row, :, :start])


def test_alora_goes_on_from_a_cache_of_the_base_model() -> None:
    model, ids = _alora(), LONG[:1]
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(ids[:, :5], use_cache=True)[CACHE]
        second = model(ids[:, 5:8], use_cache=True, **{CACHE: cache}).logits
        third = model(ids[:, 8:], **{CACHE: cache}).logits
        torch.testing.assert_close(torch.cat([second, third], 1), model(ids).logits[:, 5:], atol=1e-5, rtol=1e-5)


def test_alora_goes_on_from_a_cache_in_a_tuple() -> None:
    model, ids = _alora(), LONG[:1]
    with torch.no_grad():
        output = model(ids[:, :8], use_cache=True, return_dict=False)
        more = model(ids[:, 8:], **{CACHE: output[1]}).logits
        torch.testing.assert_close(more, model(ids).logits[:, 8:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 2])
def test_alora_generates_what_a_loop_over_forward_gives(beams: int) -> None:
    model = _alora()
    mask = (LONG != 0).long()
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    found = model.generate(input_ids=LONG, attention_mask=mask, **options)
    assert torch.equal(found, model.generate(input_ids=LONG, attention_mask=mask, use_cache=False, **options))
    with model.disable_adapter():
        base = model.generate(input_ids=LONG, attention_mask=mask, **options)
    assert torch.equal(found[2], base[2])
    assert not torch.equal(found, base)
    if beams > 1:
        return
    ids = LONG
    with torch.no_grad():
        for _ in range(6):
            grown = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - 9, dtype=torch.long)], 1)
            scores = model(ids, attention_mask=grown).logits[:, -1].index_fill(1, torch.tensor([95]), -torch.inf)
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, ids)


def test_aloras_gradients_are_the_same_with_checkpointing_and_a_mixed_up_batch_is_an_error() -> None:
    model = _alora().train()
    inputs = {"input_ids": LONG[:2], "labels": LONG[:2]}
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_activations(model)
        model.zero_grad()
        model(**inputs).loss.backward()
        found.append([value.grad.clone() for value in model.parameters() if value.grad is not None])
    torch.testing.assert_close(*found)
    first = model(**inputs).loss
    model(LONG[1:3])
    with pytest.raises(AdapterError, match=r"needs backward\(\) after each forward"):
        first.backward()


def test_the_invocation_may_be_a_text_and_the_file_has_its_ids() -> None:
    config = LoraConfig(alora_invocation_tokens="ab")
    config.prepare(lambda name: lambda text, add_special_tokens: {"input_ids": [ord(letter) for letter in text]})
    assert config.to_dict()["alora_invocation_tokens"] == [97, 98]


def test_a_batch_without_the_invocation_is_told_in_training() -> None:
    with pytest.warns(UserWarning, match=r"no row of the batch holds the alora_invocation_tokens \[56, 81\]"):
        _alora().train()(LONG[2:3])


def test_aloras_offsets_may_be_given_as_in_peft() -> None:
    model = _alora()
    offsets = [9 - start or None for start in STARTS]
    assert torch.equal(model(LONG, alora_offsets=offsets).logits, model(LONG).logits)
    assert not torch.equal(model(LONG, alora_offsets=[9, 9, 9, 9]).logits, model(LONG).logits)


def test_rows_of_a_batch_have_aloras_of_their_own() -> None:
    model = _alora()
    model.add_adapter("plain", LoraConfig(init_lora_weights=False))
    model.add_adapter(
        "b", LoraConfig(init_lora_weights=False, alora_invocation_tokens=[9], target_modules="all-linear")
    )
    names = ["b", "default", "b", "plain", "default", "__base__"]
    ids = torch.cat([LONG[:1], LONG[:3], LONG[3:], LONG[3:]])
    with torch.no_grad():
        found = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name != "__base__":
                model.set_adapter(name)
            with model.disable_adapter() if name == "__base__" else nullcontext():
                expected = model(ids[row : row + 1]).logits
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-5)


def test_alora_needs_the_ids_and_cannot_be_merged() -> None:
    model = _alora()
    with pytest.raises(AdapterError, match="needs input_ids"):
        model(inputs_embeds=torch.randn(1, 3, 32))
    with pytest.raises(AdapterError, match="call that"):
        model.get_base_model().model(LONG)
    with pytest.raises(AdapterError, match="cannot be merged"):
        merge(model.get_base_model(), model.active_peft_config)
    base = model.unload()
    assert torch.equal(base(LONG).logits, tiny("llama")(LONG).logits)
    assert not base._forward_pre_hooks
    assert not base._forward_hooks


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two variants": ({"kasa_config": {}, "use_dora": True}, "kasa_config: does not go with use_dora"),
    "a residual start": ({"velora_config": {}, "init_lora_weights": "pissa"}, "velora_config: .*: pissa"),
    "parameters": ({"velora_config": {}, "target_parameters": ["a.weight"]}, "velora_config: .*target_parameters"),
    "an embedding": ({"kasa_config": {}, "target_modules": ["embed_tokens"]}, "kasa_config: adapts linear layers"),
    "a bias before the invocation": ({"alora_invocation_tokens": [1], "bias": "all"}, "does not go with bias"),
    "another task": ({"alora_invocation_tokens": [1], "task_type": "SEQ_CLS"}, "needs a causal language model"),
    "a text": ({"alora_invocation_tokens": "Answer:"}, "alora_invocation_tokens: must be token ids here"),
    "a token": ({"alora_invocation_tokens": [-1]}, "count from 0, not -1"),
    "no tokens": ({"alora_invocation_tokens": []}, "alora_invocation_tokens: names no token"),
    "an empty text": ({"alora_invocation_tokens": ""}, "alora_invocation_tokens: names no token"),
    "both lists": (
        {"use_bdlora": {"target_modules_bd_a": ["q"], "target_modules_bd_b": ["q_proj"]}},
        "use_bdlora: both lists name model.layers.0.self_attn.q_proj",
    ),
    "blocks of a Conv1D": ({"use_bdlora": {"target_modules_bd_a": ["c_attn"]}}, "c_attn is a Conv1D; BD-LoRA adapts"),
    "directions of a Conv1D": ({"kasa_config": {}}, "c_attn is a Conv1D; KaSA adapts Linear"),
    "no list": ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, "use_bdlora: no list names .*v_proj"),
    "blocks": (
        {"use_bdlora": {"target_modules_bd_a": ["q_proj", "v_proj"], "nblocks": 3}},
        "use_bdlora.nblocks: 3 does not divide .*q_proj's 32 and 8",
    ),
    "a bias of B": (
        {"use_bdlora": {"target_modules_bd_a": ["_proj"]}, "lora_bias": True},
        "use_bdlora: does not go with lora_bias",
    ),
    "a dense layer": ({"use_qalora": True}, "use_qalora: adapts layers of GPTQ and AWQ; .* is a Linear"),
    "all directions": ({"kasa_config": {}, "r": 16}, "r: 16 leaves nothing of .*v_proj"),
    "beta": ({"kasa_config": {"beta": -1.0}}, "kasa_config.beta: must not be negative, found -1.0"),
    "samples": ({"monteclora_config": {"num_samples": 0}}, "monteclora_config.num_samples: must be at least 1, not 0"),
    "prior": ({"monteclora_config": {"dirichlet_prior": 0.0}}, "dirichlet_prior: must be above 0"),
    "groups": ({"velora_config": {"num_groups": 0}}, "velora_config.num_groups: must be above 0"),
    "direction": ({"velora_config": {"init_type": "mean"}}, "velora_config.init_type: must be batch_average"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_means_nothing_is_named(name: str) -> None:
    settings, message = WRONG[name]
    kind = "gpt2" if "Conv1D" in name else "llama"
    model = tiny(kind)
    with pytest.raises(AdapterError, match=message):
        inject(model, LoraConfig(**settings))
    assert not adapter_layers(model)
    assert torch.equal(logits(model, batch(kind)), logits(tiny(kind), batch(kind)))


def test_two_kasas_take_a_direction_away_once_as_in_peft() -> None:
    made = []
    for module, kasa in ((peftcli.peft_api, {}), (peft, peft.KasaConfig())):
        model = module.get_peft_model(tiny("llama"), module.LoraConfig(r=2, kasa_config=kasa))
        model.add_adapter("b", module.LoraConfig(r=4, kasa_config=kasa))
        model.base_model.set_adapter(["default", "b"])
        for adapter in ("default", "b"):
            state = peft.get_peft_model_state_dict if module is peft else peftcli.peft_api.get_peft_model_state_dict
            generator = torch.Generator().manual_seed(len(adapter))
            for _, value in sorted(state(model, adapter_name=adapter).items()):
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))
        made.append(model.eval())
    expected = logits(made[1], batch("llama"))
    torch.testing.assert_close(logits(made[0], batch("llama")), expected, atol=1e-5, rtol=1e-5)
    merged = made[0].merge_and_unload()
    torch.testing.assert_close(logits(merged, batch("llama")), expected, atol=1e-5, rtol=1e-5)


def test_variants_are_not_combined(tmp_path: Path) -> None:
    model = get_peft_model(tiny("llama"), LoraConfig(velora_config={}))
    model.add_adapter("b", LoraConfig(velora_config={}))
    with pytest.raises(AdapterError, match="velora_config: default is a variant"):
        model.add_weighted_adapter(["default", "b"], [0.5, 0.5], "c")
