"""A combined adapter is the weighted sum, exactly or by an error that is said; what cannot be combined is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from models_tiny import batch, labelled, logits, randomise, tiny
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import peftcli
from peftcli.core.files import load_adapter, read_config, write_adapter
from peftcli.core.inject import inject
from peftcli.core.layer import adapter_layers
from peftcli.core.merge import merge
from peftcli.core.weights import adapter_state, load_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.combinations import COMBINATIONS, Adapter, Combination, Combined
from peftcli.methods.lora.combine import combine
from peftcli.methods.updates import Update, distance, effective_r, find_updates, weighted_sum
from peftcli.peft_api import get_peft_model

# updates


def _update(out: int = 7, width: int = 5, r: int = 3, scaling: float = 1.5, seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    return Update(torch.randn(out, r, generator=generator), torch.randn(r, width, generator=generator), scaling)


def _dense(update: Update) -> torch.Tensor:
    return update.scaling * update.left.double() @ update.right.double()


@pytest.mark.parametrize(("out", "width", "r"), [(7, 5, 3), (5, 7, 1), (4, 6, 6), (3, 9, 8), (1, 1, 1), (40, 2, 30)])
def test_norms_and_products_are_those_of_the_dense_update(out: int, width: int, r: int) -> None:
    one, two = _update(out, width, r), _update(out, width, 4, -0.3, seed=1)
    dense, other = _dense(one), _dense(two)
    assert one.norm() == pytest.approx(float(dense.norm()), rel=1e-9)
    found, values = one.singular_values(), torch.linalg.svdvals(dense)
    shared = min(len(found), len(values))
    torch.testing.assert_close(found[:shared], values[:shared], atol=1e-9, rtol=1e-9)
    assert float(found[shared:].abs().sum() + values[shared:].abs().sum()) < 1e-9
    assert one.dot(two) == pytest.approx(float((dense * other).sum()), rel=1e-9)
    assert distance(one, two) == pytest.approx(float((dense - other).norm()), rel=1e-9)
    assert distance(one, one) < 1e-12 * one.norm()
    torch.testing.assert_close(
        _dense(weighted_sum([(0.7, one), (-2, two)])), 0.7 * dense - 2 * other, atol=1e-5, rtol=1e-5
    )
    for smaller in (1, 2):
        kept = torch.linalg.svd(dense, full_matrices=False)
        nearest = kept.U[:, :smaller] * kept.S[:smaller] @ kept.Vh[:smaller]
        torch.testing.assert_close(_dense(one.truncated(smaller)), nearest, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", ["svd", "magnitude_prune_svd"])
def test_what_no_number_holds_is_refused(method: str) -> None:
    how = Combination(method, density=None if method == "svd" else 1.0)
    with pytest.raises(AdapterError, match="not finite"):
        how.combined([(3e38, _update(scaling=1e300))], "q_proj", 3)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("method", [each for each in COMBINATIONS if each != "svd"])
def test_a_combination_stays_on_its_device(method: str) -> None:
    """With tensors that have shapes and no values: a GPU is not needed."""
    drops = method.startswith(("ties", "dare", "magnitude"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        update = Update(torch.empty(8, 2, device="cuda"), torch.empty(2, 8, device="cuda"))
        try:
            parts = [(0.5, update), (0.5, update)]
            found = Combination(method, density=0.5 if drops else None).combined(parts, "q", 2)
        except DataDependentOutputException:
            assert method.endswith("svd")  # which looks at values, to see that they are finite
        else:
            assert {found.left.device.type, found.right.device.type} == {"cuda"}


def test_effective_r() -> None:
    assert effective_r(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_r(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    assert effective_r(torch.zeros(4)) == 0
    assert 1 < effective_r(torch.tensor([5.0, 1.0])) < 2


# adapters

CASES: dict[str, tuple[str, list[dict[str, Any]], list[float]]] = {
    "alike": ("llama", [{}, {}], [0.7, 0.3]),
    "another r": ("llama", [{"r": 4}, {"r": 6, "lora_alpha": 3}], [0.7, 0.3]),
    "negative": ("llama", [{}, {}], [1.0, -1.5]),
    "one": ("llama", [{"r": 3, "lora_alpha": 7}], [2.0]),
    "three": ("llama", [{"r": 2}, {"r": 3}, {"r": 4}], [0.5, 0.25, 0.0]),
    "rslora": ("llama", [{"use_rslora": True, "r": 4}, {}], [0.7, 0.3]),
    "other modules": ("llama",
     [{"target_modules": ["q_proj", "k_proj"]}, {"target_modules": ["k_proj", "o_proj"], "r": 3}], [0.7, 0.3]),
    "patterns": ("llama",
     [{"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 5}, "alpha_pattern": {"v_proj": 3}},
      {"rank_pattern": {"layers.0.*": 3}, "alpha_pattern": {r".*\.1\..*": 30}}],
     [0.7, 0.3]),
    "a regex and all-linear": ("llama", [{"target_modules": r".*\.0\..*_proj"}, {"target_modules": "all-linear"}],
     [1, 1]),
    "some layers": ("llama",
     [{"target_modules": ["q_proj"], "layers_to_transform": [layer]} for layer in (1, 0)],
     [1, 1]),
    "the same layers": ("llama", [{"target_modules": ["q_proj"], "layers_to_transform": [1]}] * 2, [1, 1]),
    "gpt2": ("gpt2", [{"target_modules": ["c_attn", "wte"]}, {"target_modules": ["c_fc", "wte"], "r": 3}], [0.7, 0.3]),
    "t5": ("t5", [{}, {"target_modules": "all-linear"}], [0.7, 0.3]),
    "convolutions": ("convnet", [{"target_modules": ["convolution"]}, {"target_modules": ["convolution"], "r": 4}],
     [0.7, -0.3]),
    "pissa": ("llama", [{"init_lora_weights": "pissa"}, {}], [0.7, 0.3]),
    "bias of B": ("gpt2", [{"lora_bias": True}, {"r": 3}], [0.7, 0.3]),
    "heads": ("bert", [{"modules_to_save": ["classifier"]}, {"modules_to_save": ["classifier"]}], [0.7, 0.3]),
    "biases": ("gpt2", [{"bias": "lora_only"}, {"bias": "lora_only", "r": 4}], [1.5, -0.5]),
    "tokens": ("llama", [{"trainable_token_indices": [5, 9]}, {"trainable_token_indices": [5, 9]}], [0.7, 0.3]),
}  # fmt: skip


def _adapter(kind: str, settings: dict[str, Any], name: str, seed: int) -> tuple[Adapter, nn.Module]:
    model, config = tiny(kind), peftcli.LoraConfig(**copy.deepcopy(settings))
    inject(model, config)
    randomise(model, seed)
    return Adapter(name, config, {key: value.clone() for key, value in adapter_state(model).items()}), model.eval()


def _combined(case: str, **how: Any) -> tuple[Combined, list[nn.Module]]:
    kind, settings, weights = CASES[case]
    made = [_adapter(kind, each, name, seed) for seed, (name, each) in enumerate(zip("ABC", settings, strict=False), 1)]
    return combine([adapter for adapter, _ in made], weights, Combination(**how)), [model for _, model in made]


def _merged(model: nn.Module) -> dict[str, torch.Tensor]:
    """The values of the base model with the adapter folded in, by their names in the base model."""
    twin = copy.deepcopy(model)
    merge(twin)
    return {name: value.detach() for name, value in twin.named_parameters(remove_duplicate=False)}


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("case", CASES)
def test_the_default_is_the_weighted_sum_exactly(case: str, tmp_path: Any) -> None:
    kind, _, weights = CASES[case]
    made, models = _combined(case)
    assert made.error == 0
    assert set(made.errors.values()) == {0.0}
    write_adapter(made.tensors, made.config, tmp_path)
    loaded = tiny(kind)
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    scales = {layer.scaling for layer in adapter_layers(loaded).values() if hasattr(layer, "scaling")}
    assert scales == {1.0}
    base = dict(tiny(kind).named_parameters(remove_duplicate=False))
    each, found = [_merged(model) for model in models], _merged(loaded)
    assert found.keys() == each[0].keys()
    for name, value in found.items():
        change = sum(w * (one[name] - base[name]) for w, one in zip(weights, each, strict=True))
        torch.testing.assert_close(value, base[name] + change, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", ["alike", "other modules", "patterns", "some layers", "convolutions"])
def test_svd_is_nearest_and_says_its_error(case: str) -> None:
    exact, _ = _combined(case)
    made, _ = _combined(case, method="svd", r=3)
    whole, sizes = find_updates(exact.config, exact.tensors), {}
    found = find_updates(made.config, made.tensors)
    assert found.keys() == whole.keys()
    for path, update in whole.items():
        values = update.singular_values()
        assert found[path].r == min(3, update.r)
        lost = float(values[3:].norm())
        assert made.errors[path] == pytest.approx(lost / update.norm(), abs=1e-6)
        sizes[path] = (lost, update.norm())
    total = math.hypot(*(lost for lost, _ in sizes.values())) / math.hypot(*(size for _, size in sizes.values()))
    assert made.error == pytest.approx(total, abs=1e-6)
    assert 0 < made.error < 1


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("method", [name for name in COMBINATIONS if name != "cat"])
def test_every_other_way_says_how_far_it_is_off(method: str) -> None:
    drops = {} if method in ("svd", "linear") else {"density": 0.5}
    made, models = _combined("alike", method=method, generator=torch.Generator().manual_seed(0), **drops)
    exact, _ = _combined("alike")
    whole, found = find_updates(exact.config, exact.tensors), find_updates(made.config, made.tensors)
    for path, update in whole.items():
        off = float((_dense(found[path]) - _dense(update)).norm() / _dense(update).norm())
        assert made.errors[path] == pytest.approx(off, rel=1e-4)
        assert off > 0.01
    inject(loaded := tiny("llama"), made.config)
    load_state(loaded, made.tensors)
    assert torch.isfinite(logits(loaded, batch("llama"))).all()
    assert len(models) == 2


@pytest.mark.parametrize("method", ["linear", "ties", "magnitude_prune", "dare_linear"])
def test_one_adapter_of_weight_one_stays_itself_whatever_the_way(method: str) -> None:
    adapter, model = _adapter("llama", {"r": 3, "lora_alpha": 7}, "A", 1)
    made = combine([adapter], [1.0], Combination(method, density=None if method == "linear" else 1.0))
    assert made.error < 1e-6
    inject(loaded := tiny("llama"), made.config)
    load_state(loaded, made.tensors)
    torch.testing.assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")), atol=1e-4, rtol=1e-4)


def test_ties_by_hand() -> None:
    values = torch.tensor([[4.0, -3.0, 0.1, 2.0], [2.0, 5.0, 3.0, -0.2]])
    how = Combination("ties", density=0.75)
    kept = how._drop_small(values)
    assert kept.tolist() == [[4.0, -3.0, 0.0, 2.0], [2.0, 5.0, 3.0, 0.0]]
    # signs: both +; + wins 5 to 3; only the second; only the first
    assert how._agreed_mean(kept, torch.tensor([1.0, 1.0])).tolist() == [3.0, 5.0, 3.0, 2.0]
    by_count = Combination("ties", density=0.75, majority_sign="frequency")
    assert by_count._agreed_mean(kept, torch.tensor([1.0, 1.0])).tolist() == [3.0, 5.0, 3.0, 2.0]


def test_what_dare_keeps_is_enlarged_so_that_the_mean_stays() -> None:
    how = Combination("dare_linear", density=0.25, generator=torch.Generator().manual_seed(0))
    dropped = how._drop_some(torch.ones(1, 40_000))
    assert set(dropped.unique().tolist()) == {0.0, 4.0}
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)


def test_a_seed_decides_what_dare_drops() -> None:
    first, again, other = (
        _combined("alike", method="dare_ties", density=0.5, generator=torch.Generator().manual_seed(seed))[0]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not all(torch.equal(first.tensors[name], other.tensors[name]) for name in first.tensors)


def test_what_is_written_is_plain() -> None:
    made, _ = _combined("other modules")
    values = made.config.file_dict()
    assert (values["r"], values["lora_alpha"]) == (8, 8)
    assert values["target_modules"] == ["k_proj", "o_proj", "q_proj"]
    assert values["rank_pattern"] == values["alpha_pattern"] == {"k_proj": 11, "o_proj": 3}
    assert "use_rslora" not in values
    assert {value.dtype for value in made.tensors.values()} == {torch.float32}


def test_adapters_in_bf16_are_added_in_float32() -> None:
    adapter, _ = _adapter("llama", {}, "A", 1)
    narrow = {name: value.bfloat16() for name, value in adapter.tensors.items()}
    made = combine([Adapter("A", adapter.config, narrow)], [1 / 3], Combination())
    name = next(name for name in narrow if "lora_B" in name)
    torch.testing.assert_close(made.tensors[name], narrow[name].float() / 3, atol=0, rtol=1e-6)


def test_pefts_copies_of_base_weights_are_kept() -> None:
    one, _ = _adapter("llama", {"target_modules": ["lm_head"]}, "A", 1)
    two, _ = _adapter("llama", {"target_modules": ["lm_head"]}, "B", 2)
    name = "base_model.model.lm_head.base_layer.weight"
    carrying = Adapter("A", one.config, {**one.tensors, name: torch.ones(96, 32)})
    assert torch.equal(combine([carrying, two], [2.0, 3.0], Combination()).tensors[name], torch.ones(96, 32))
    other = Adapter("B", two.config, {**two.tensors, name: torch.zeros(96, 32)})
    with pytest.raises(AdapterError, match="base models with another"):
        combine([carrying, other], [2.0, 3.0], Combination())


# refusals

PAIRS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[float], str]] = {
    "base models": ("llama", {"base_model_name_or_path": "org/a"}, {"base_model_name_or_path": "org/b"}, [1, 1],
     "A is for org/a, B is for org/b"),
    "tasks": ("llama", {"task_type": "CAUSAL_LM"}, {"task_type": "SEQ_CLS"}, [1, 1],
     "A is for CAUSAL_LM, B is for SEQ_CLS"),
    "dora": ("llama", {}, {"use_dora": True}, [1, 1], "B cannot be combined: what DoRA adds depends on the base"),
    "heads, weights": ("bert", {"modules_to_save": ["classifier"]}, {"modules_to_save": ["classifier"]}, [1, 1],
     "can only be averaged, and the weights add up to 2, not 1"),
    "heads, one": ("bert", {"modules_to_save": ["classifier"]}, {}, [0.5, 0.5], "modules_to_save: must be the same"),
    "biases": ("gpt2", {"bias": "lora_only"}, {}, [0.5, 0.5],
     "bias: must be the same to be combined: A has 'lora_only', B has 'none'"),
    "tokens": ("llama", {"trainable_token_indices": [1]}, {"trainable_token_indices": [2]}, [0.5, 0.5],
     "trainable_token_indices: must be the same"),
    "replication": ("llama", {"layer_replication": [[0, 2], [0, 2]]}, {}, [1, 1],
     "layer_replication: must be the same"),
    "biases elsewhere": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn"]},
     {"bias": "lora_only", "target_modules": ["c_fc"]}, [0.5, 0.5],
     "does not hold .*bias, which another of the adapters replaces"),
    "experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj"]},
     {"target_parameters": ["experts.gate_up_proj"]}, [1, 1], "target_parameters: A adapts parameters without layers"),
    "not a number": ("llama", {}, {}, [1, math.nan], "weights: must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", PAIRS)
def test_what_cannot_be_combined_is_refused_with_the_reason(case: str) -> None:
    kind, one, two, weights, message = PAIRS[case]
    with pytest.raises(AdapterError, match=message):
        combine([_adapter(kind, one, "A", 1)[0], _adapter(kind, two, "B", 2)[0]], weights, Combination())


@pytest.mark.parametrize("method", ["ia3", "adalora", "prompt_tuning"])
def test_other_methods_are_refused_by_name(method: str) -> None:
    config = METHODS[method].config_class()(**({"num_virtual_tokens": 3} if method == "prompt_tuning" else {}))
    with pytest.raises(AdapterError, match=f"B is {METHODS[method].peft_type}; only LoRA adapters can be combined"):
        combine([_adapter("llama", {}, "A", 1)[0], Adapter("B", config, {})], [1, 1], Combination())


def test_sizes_that_do_not_fit_are_refused() -> None:
    one, two = (_adapter("llama", {}, name, 1)[0] for name in "AB")
    tensors = {name: value.repeat(1, 2) if "lora_A" in name else value for name, value in two.tensors.items()}
    with pytest.raises(AdapterError, match=r"q_proj is of other sizes in other adapters: 32 x 32 and 32 x 64"):
        combine([one, Adapter("B", two.config, tensors)], [1, 1], Combination())
    without = {name: value for name, value in two.tensors.items() if "0.self_attn.q_proj.lora_B" not in name}
    with pytest.raises(AdapterError, match=r"missing: .*0.self_attn.q_proj.lora_B.weight"):
        combine([one, Adapter("B", two.config, without)], [1, 1], Combination())
    with pytest.raises(AdapterError, match="1 weights for 2 adapters"):
        combine([one, two], [1.0], Combination())


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"method": "sum"}, "no way to combine is called 'sum'; there are: cat, svd"),
    "r of cat": ({"r": 4}, "r: cat chooses its own"),
    "r 0": ({"method": "svd", "r": 0}, "r: must be at least 1"),
    "no density": ({"method": "ties"}, "density: ties needs the share of values to keep"),
    "density 0": ({"method": "dare_linear", "density": 0.0}, "density: dare_linear needs"),
    "density 2": ({"method": "magnitude_prune_svd", "density": 2.0}, "density: magnitude_prune_svd needs"),
    "clamp of cat": ({"clamp": 0.9}, "svd_clamp: cat decomposes nothing"),
    "clamp 2": ({"method": "svd", "clamp": 2.0}, "svd_clamp: must be above 0 and at most 1"),
    "useless density": ({"method": "svd", "density": 0.5}, "density: svd drops nothing"),
    "votes": ({"method": "ties", "density": 0.5, "majority_sign": "some"}, "majority_sign_method: must be total or"),
    "two r's": ({"method": "linear"}, r"linear needs adapters of one r; .*q_proj has 8, 4\ncat or svd do not"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_mean_nothing_are_refused(case: str) -> None:
    how, message = SETTINGS[case]
    given = [_adapter("llama", {"r": r}, name, 1)[0] for r, name in ((8, "A"), (4, "B"))]
    with pytest.raises(AdapterError, match=message):
        combine(given, [1, 1], Combination(**how))


# in a model


def test_a_combined_adapter_in_a_model_is_the_weighted_sum() -> None:
    model = get_peft_model(tiny("llama"), peftcli.LoraConfig(r=4), "a")
    model.add_adapter("b", peftcli.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], use_rslora=True))
    for seed, name in enumerate("ab"):
        model.set_adapter(name)
        randomise(model, seed + 1)
    expected = tiny("llama")
    for name, weight in (("a", 0.7), ("b", -0.4)):
        for path, layer in adapter_layers(model, name).items():
            module = expected.get_submodule(path.removeprefix("base_model.model.").replace(".base_layer", ""))
            module.weight.data += weight * layer.delta()
    before = logits(model.eval(), batch("llama"))
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum")
    assert torch.equal(logits(model, batch("llama")), before)
    assert model.active_adapter == "b"
    model.set_adapter("sum")
    torch.testing.assert_close(logits(model, batch("llama")), logits(expected, batch("llama")), atol=1e-4, rtol=1e-4)
    model(**labelled("llama")).loss.backward()
    for act, message in (
        (lambda: model.add_weighted_adapter(["x"], [1.0], "y"), "Adapter x does not exist"),
        (lambda: model.add_weighted_adapter(["a"], [1.0], "y", "mean"), "no way to combine is called 'mean'"),
    ):
        with pytest.raises(AdapterError, match=message):
            act()
    before = logits(model, batch("llama"))
    with pytest.warns(UserWarning, match="an adapter called 'sum' already"):
        model.add_weighted_adapter(["a"], [1.0], "sum")
    assert torch.equal(logits(model, batch("llama")), before)
    assert list(model.peft_config) == ["a", "b", "sum"]


def test_every_way_goes_through_a_model() -> None:
    model = get_peft_model(tiny("llama"), peftcli.LoraConfig(init_lora_weights=False), "a")
    model.add_adapter("b", peftcli.LoraConfig(init_lora_weights=False))
    for name in COMBINATIONS:
        drops = None if name in ("cat", "svd", "linear") else 0.5
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], name, name, density=drops)
    assert list(model.peft_config)[2:] == list(COMBINATIONS)
