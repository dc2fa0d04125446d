"""What is special of the methods with low-rank updates: what layers share, draw, start from and leave out."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import PAD, batch, checkpoint_activations, ids, labelled, logits, tiny
from oracle import file_of, ours, theirs
from peft.tuners.lokr.layer import factorization
from torch import nn

from peftcli.core.files import load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import disabled, inject, unload
from peftcli.core.layer import AdapterLayer, adapter_layers
from peftcli.core.merge import merge
from peftcli.core.protocols import layers_of
from peftcli.core.targets import wrap
from peftcli.core.weights import adapter_state, load_state, load_training_state, named_tensors, training_state
from peftcli.errors import AdapterError
from peftcli.methods import config_from_dict
from peftcli.methods._task_ids import generate
from peftcli.methods.delora import DeloraConfig
from peftcli.methods.delora.layers import DeloraLinear
from peftcli.methods.gralora import GraloraConfig
from peftcli.methods.gralora.layers import GraloraLinear
from peftcli.methods.hira import HiraConfig
from peftcli.methods.lily import LilyConfig
from peftcli.methods.lily.layers import LilyLinear
from peftcli.methods.loha import LoHaConfig
from peftcli.methods.lokr import LoKrConfig
from peftcli.methods.lokr.layers import factors
from peftcli.methods.lora import LoraConfig
from peftcli.methods.poly import PolyConfig
from peftcli.methods.poly.layers import PolyLinear
from peftcli.methods.pvera import PveraConfig
from peftcli.methods.pvera.layers import PveraLinear
from peftcli.methods.tinylora import TinyLoraConfig
from peftcli.methods.tinylora.layers import TinyLoraEmbedding
from peftcli.methods.unilora import UniLoraConfig
from peftcli.methods.unilora.layers import UniLoraLinear
from peftcli.methods.vblora import VBLoRAConfig
from peftcli.methods.vera import VeraConfig
from peftcli.peft_api import PeftModel, get_peft_model


def _filled(base: nn.Module, **settings: object) -> DeloraLinear:
    layer = DeloraLinear(base, "x", DeloraConfig(**settings)).eval()  # type: ignore[arg-type]
    nn.init.normal_(layer.delora_B)
    return layer


def test_lengths_do_not_count_and_lambda_does() -> None:
    layer = _filled(nn.Linear(5, 7), r=3)
    with torch.no_grad():
        before = layer.delta()
        layer.delora_A.mul_(3)
        layer.delora_B.mul_(0.2)
        torch.testing.assert_close(layer.delta(), before)
        layer.delora_lambda.mul_(2)
        torch.testing.assert_close(layer.delta(), 2 * before)


def test_the_norms_are_saved_and_do_not_train() -> None:
    base = nn.Linear(5, 7)
    layer = _filled(base, r=2)
    assert layer.own_tensors().keys() == {"delora_A", "delora_B", "delora_lambda"}
    assert layer.file_tensors().keys() - layer.own_tensors().keys() == {"delora_w_norm"}
    nn.init.zeros_(base.weight)
    assert layer.delta().any(), "the norms are those of the weight as it was"


def test_the_parameters_are_loras_and_the_rank_is_k_times_as_high() -> None:
    layer = GraloraLinear(nn.Linear(24, 24), "x", GraloraConfig(r=4, gralora_k=4))
    nn.init.normal_(layer.gralora_B)
    assert sum(value.numel() for value in layer.own_tensors().values()) == 4 * (24 + 24)
    assert torch.linalg.matrix_rank(layer.delta()) == 16


def test_how_a_and_b_start() -> None:
    layer = GraloraLinear(nn.Linear(400, 300), "x", GraloraConfig(hybrid_r=8))
    assert not layer.delta().any()
    assert 0.99 / math.sqrt(200) < layer.gralora_A.abs().max() <= 1 / math.sqrt(200)
    free = GraloraLinear(nn.Linear(400, 300), "x", GraloraConfig(init_weights=False))
    assert 0.99 / math.sqrt(32) < free.gralora_B.abs().max() <= 1 / math.sqrt(32)


@pytest.mark.parametrize(
    ("method", "kind", "targets"),
    [
        ("hira", "gemma3", ["embed_tokens", "q_proj"]),
        ("tinylora", "gemma3", ["embed_tokens"]),
        ("hira", "whisper", ["conv1", "conv2", "q_proj"]),
    ],
)
def test_embeddings_that_scale_and_convolutions_are_merged_right(method: str, kind: str, targets: list[str]) -> None:
    model, config = ours(kind, method, r=4, target_modules=targets)
    expected = logits(model, batch(kind))
    assert not torch.allclose(expected, logits(tiny(kind), batch(kind)), atol=1e-3)
    assert merge(model, config) == (kind == "gemma3"), "an embedding had the head's weight too"
    torch.testing.assert_close(logits(model, batch(kind)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("start", "deviation"), [(True, math.sqrt(1 / 400 / 3)), ("gaussian", 1 / 50), (False, 1.0)])
def test_hira_how_a_and_b_start(start: Any, deviation: float) -> None:
    layer = wrap(nn.Linear(400, 300), "x", HiraConfig(r=50, init_weights=start))
    assert layer.hira_A.std().item() == pytest.approx(deviation, rel=0.05)
    assert bool(layer.hira_B.any()) == (start is False)


SETTINGS: dict[str, Any] = {"r": 4, "num_B": 3, "target_modules": ["q_proj", "down_proj"]}


def test_the_update_is_a_mixture_that_all_positions_agree_on() -> None:
    base = nn.Linear(5, 7)
    layer = LilyLinear(base, "x", LilyConfig(r=4, num_B=3, scaling=0.5, init_weights=False))
    x = torch.randn(2, 6, 5)
    with torch.no_grad():
        hidden = x @ layer.lily_A.weight.T
        shares = (hidden @ layer.lily_router.weight.T).softmax(-1).mean((0, 1))
        mixed = sum(share * part for share, part in zip(shares, layer.lily_B.weight.view(3, 4, 7), strict=True))
        torch.testing.assert_close(layer(x), base(x) + 0.5 * hidden @ mixed)
        assert not torch.allclose(layer(x[:1]), layer(x)[:1]), "a row's result depends on the others of its batch"


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(5))


def test_neighbours_share_a_and_all_layers_of_a_kind_share_b() -> None:
    model = Stack()
    layers = inject(model, LilyConfig(r=2, stride_A=2, target_modules=["up", "down"])).layers
    for kind in ("up", "down"):
        group: list[Any] = [layers[f"layers.{number}.{kind}"] for number in range(5)]
        assert len({id(layer.lily_B) for layer in group}) == 1
        a = [layer.lily_A for layer in group]
        assert a[0] is a[1] is not a[2] is a[3] is not a[4]
    assert len({id(layer.lily_router) for layer in layers.values()}) == 10


@pytest.mark.parametrize(
    "left_out",
    [
        {"layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"},
        {"exclude_modules": ["4.down"]},
        {"exclude_modules": r".*\.0\.up", "unreached": ["layers.4.down"]},
    ],
)
def test_layers_that_are_left_out_leave_the_others_sharing(left_out: dict[str, Any]) -> None:
    config = LilyConfig(r=2, **left_out)
    layers: dict[str, Any] = inject(Stack(), config).layers
    assert len(layers) < 10
    for kind in ("up", "down"):
        assert len({layer.lily_B for name, layer in layers.items() if name.endswith(kind)}) == 1
    read: Any = config_from_dict(config.file_dict())
    assert read.target_modules == {"up", "down"}, "by these names PEFT shares"
    assert inject(Stack(), read).layers.keys() == layers.keys()


def test_layers_of_one_name_and_several_shapes_do_not_share() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6)), nn.Sequential(nn.Linear(4, 8)))
    first, second = inject(model, LilyConfig(r=2, stride_A=2, target_modules=["0.0", "1.0"])).layers.values()
    assert first.lily_A is not second.lily_A
    both = inject(nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 8)), LilyConfig(r=2, target_modules=r"\d")).layers
    assert len({id(layer.lily_B) for layer in both.values()}) == 2


def test_what_is_shared_trains_once_and_is_written_for_each_layer(tmp_path: Path) -> None:
    model, config = ours("llama", "lily", **SETTINGS, stride_A=2)
    trained, written = named_tensors(model), adapter_layers(model)
    assert len(trained) == 2 + 2 + 4, "A and B of each kind, and a router each"
    assert len({id(parameter) for _, _, parameter in trained.values()}) == len(trained)
    before = {name: parameter.clone() for name, (_, _, parameter) in trained.items()}
    optimizer = torch.optim.AdamW([parameter for _, _, parameter in trained.values()], lr=1e-2)
    model(**labelled("llama")).loss.backward()
    optimizer.step()
    assert not any(torch.equal(before[name], parameter) for name, (_, _, parameter) in trained.items())
    save_adapter(model, config, tmp_path)
    tensors = read_tensors(tmp_path)
    assert len(tensors) == 3 * len(written)
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        first, second = (tensors[f"base_model.model.model.layers.{n}.{kind}.lily_B.weight"] for n in (0, 1))
        assert torch.equal(first, second)


def test_a_loaded_adapter_shares_again_and_trains_on(tmp_path: Path) -> None:
    model, config = ours("llama", "lily", **SETTINGS, stride_A=2)
    save_adapter(model, config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path, trainable=True)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))
    assert named_tensors(loaded).keys() == named_tensors(model).keys()
    assert all(parameter.requires_grad for _, _, parameter in named_tensors(loaded).values())


SETTINGS_TINYLORA: dict[str, Any] = {"r": 3, "u": 5, "init_weights": "uniform", "init_v_bound": 0.5}


def test_an_embeddings_update_is_looked_up() -> None:
    base, config, ids = nn.Embedding(9, 6), TinyLoraConfig(**SETTINGS_TINYLORA), torch.tensor([[3, 0, 3]])
    layer = TinyLoraEmbedding(base, "x", config)
    layers_of(config).attach(base, config, {"x": layer})
    with torch.no_grad():
        merged = layer.merged_tensors({"weight": base.weight})["weight"]
        torch.testing.assert_close(layer(ids), merged[ids])
        assert (merged - base.weight).norm() > 0.1


@pytest.mark.parametrize(
    ("tying", "groups"), [(0.0, [0, 1, 2, 3, 4]), (0.4, [0, 1, 2, 2, 2]), (0.5, [0, 0, 1, 1, 1]), (1.0, [0] * 5)]
)
def test_neighbours_share_their_numbers(tying: float, groups: list[int]) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    layers: list[Any] = list(inject(model, TinyLoraConfig(weight_tying=tying, target_modules=r"\d")).layers.values())
    assert [layer.group for layer in layers] == groups
    assert len({id(layer.tinylora_v) for layer in layers}) == len(set(groups)) == len(named_tensors(model))


TARGETS = {"target_modules": ["q_proj", "down_proj"], "r": 3}


def test_every_layer_has_the_same_matrices_and_the_file_has_them_once() -> None:
    fresh: dict[str, Any] = inject(tiny("llama"), VeraConfig(**TARGETS, d_initial=0.25)).layers  # type: ignore[arg-type]
    assert all((layer.vera_lambda_d == 0.25).all() for layer in fresh.values())
    model, _ = ours("llama", "vera", **TARGETS)
    layers = list(adapter_layers(model).values())
    assert len({id(layer.vera_A) for layer in layers} | {id(layer.vera_B) for layer in layers}) == 2
    state = adapter_state(model)
    assert state["base_model.vera_A"].shape == (3, 64), "as wide as the widest layer"
    assert state["base_model.vera_B"].shape == (32, 3)
    assert not any(name.endswith((".vera_A", ".vera_B")) and name.count(".") > 1 for name in state)
    assert not any(layer.vera_A.requires_grad for layer in layers)


def _layer(**settings: object) -> tuple[nn.Linear, PveraLinear]:
    base, config = nn.Linear(5, 7), PveraConfig(r=3, init_weights=False, **settings)  # type: ignore[arg-type]
    layer = PveraLinear(base, "x", config)
    layers_of(config).attach(base, config, {"x": layer})
    return base, layer


@pytest.mark.parametrize(("training", "always"), [(True, False), (False, True)])
def test_what_is_drawn_has_the_mean_and_the_variance_that_it_should(training: bool, always: bool) -> None:
    base, layer = _layer(sample_at_inference=always)
    layer.train(training)
    torch.manual_seed(0)
    x = torch.randn(5).expand(20000, 5)
    with torch.no_grad():
        a, b = layer.pvera_lambda_d.unsqueeze(1) * layer.pvera_A, torch.diag(layer.pvera_lambda_b) @ layer.pvera_B
        found = layer(x) - base(x)
        variance = b.square() @ (a[3:] @ x[0]).exp()
        torch.testing.assert_close(found.mean(0), b @ a[:3] @ x[0], atol=0.1, rtol=0.1)
        torch.testing.assert_close(found.var(0), variance, atol=0.1, rtol=0.1)


def test_a_new_adapter_changes_nothing_though_it_draws() -> None:
    model = tiny("llama").train()
    inject(model, PveraConfig(**TARGETS))  # type: ignore[arg-type]
    assert torch.equal(logits(model, batch("llama")), logits(tiny("llama").train(), batch("llama")))


def test_an_adapter_that_always_draws_is_not_merged() -> None:
    model, config = ours("llama", "pvera", **TARGETS, sample_at_inference=True)
    with pytest.raises(AdapterError, match="drawn anew"):
        merge(model, config)


def test_pefts_seed_is_for_its_files_only() -> None:
    with pytest.raises(AdapterError, match="not used in training; set the run's seed"):
        inject(tiny("llama"), PveraConfig(generator_seed=3))
    inject(tiny("llama"), PveraConfig(generator_seed=3, inference_mode=True))


SETTINGS_UNILORA: dict[str, Any] = {"r": 2, "theta_d_length": 20}


def test_every_number_stands_at_as_many_places_and_lengths_are_kept() -> None:
    layers, config = (
        [UniLoraLinear(nn.Linear(5, 7), "x", UniLoraConfig(**SETTINGS_UNILORA)) for _ in range(2)],
        UniLoraConfig(**SETTINGS_UNILORA),
    )
    layers_of(config).attach(layers[0], config, dict(zip("ab", layers, strict=True)))
    places = torch.cat(
        [value.flatten() for layer in layers for value in (layer.unilora_indices_A, layer.unilora_indices_B)]
    )
    counts = places.bincount(minlength=20)
    assert len(places) == 2 * 2 * (5 + 7)
    assert {int(count) for count in counts} == {2, 3}
    with torch.no_grad():
        numbers = torch.cat([layer._matrix(which).flatten() for layer in layers for which in "AB"])
        torch.testing.assert_close(numbers.norm(), layers[0].unilora_theta_d.norm())


def test_saved_places_count_whatever_the_seed_would_give(tmp_path: Path) -> None:
    model, config = ours("llama", "unilora", **SETTINGS_UNILORA, save_indices=True)
    config.proj_seed = 1
    save_adapter(model, config, tmp_path)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), logits(model, batch("llama")))


SETTINGS_VBLORA: dict[str, Any] = {"num_vectors": 12, "vector_length": 8}


def test_the_bank_is_one_trained_tensor() -> None:
    model, _ = ours("llama", "vblora", **SETTINGS_VBLORA)
    assert len({id(layer.vblora_vector_bank) for layer in adapter_layers(model).values()}) == 1
    assert "base_model.vblora_vector_bank" in named_tensors(model)
    model(**labelled("llama")).loss.backward()
    assert named_tensors(model)["base_model.vblora_vector_bank"][2].grad.any()


@pytest.mark.grid
@pytest.mark.parametrize(("count", "dtype"), [(255, torch.uint8), (256, torch.int16), (40000, torch.int32)])
def test_mixtures_are_saved_without_their_last_weight(count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    settings = {"num_vectors": count, "vector_length": 16, "topk": 4, "r": 1, "save_only_topk_weights": True}
    model, config = ours("llama", "vblora", **settings, target_modules=["v_proj"])
    save_adapter(model, config, tmp_path)
    tensors = {name.rpartition(".")[2]: value for name, value in file_of(tmp_path)[1].items()}
    assert tensors["vblora_logits_A_topk_indices"].dtype == dtype
    assert tensors["vblora_logits_A_topk_weights"].shape == (1, 2, 3)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    torch.testing.assert_close(logits(loaded, batch("llama")), logits(model, batch("llama")), atol=1e-5, rtol=1e-5)


def test_saved_mixtures_train_on_with_the_vectors_they_have(tmp_path: Path) -> None:
    model, config = ours("llama", "vblora", **SETTINGS_VBLORA, save_only_topk_weights=True)
    save_adapter(model, config, tmp_path)
    again, read = tiny("llama"), config_from_dict(read_config(tmp_path))
    load_adapter(again, read, tmp_path, trainable=True)
    optimizer = torch.optim.SGD([value for value in again.parameters() if value.requires_grad], lr=0.1)
    again(**labelled("llama")).loss.backward()
    optimizer.step()
    save_adapter(again, read, tmp_path / "more")
    before, after = file_of(tmp_path)[1], file_of(tmp_path / "more")[1]
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if not name.endswith("indices")}
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path / "more")), tmp_path / "more")
    assert torch.equal(logits(loaded, batch("llama")), logits(again, batch("llama")))


def test_training_state_is_the_scores_whatever_the_file_holds() -> None:
    model, _ = ours("llama", "vblora", **SETTINGS_VBLORA, save_only_topk_weights=True)
    other = tiny("llama")
    inject(other, VBLoRAConfig(**SETTINGS_VBLORA, save_only_topk_weights=True))
    load_training_state(other, training_state(model))
    assert torch.equal(logits(other, batch("llama")), logits(model, batch("llama")))
    with pytest.raises(AdapterError, match="not what its file holds"):
        load_state(other, adapter_state(model))


SETTINGS_POLY: dict[str, Any] = {"r": 3, "n_tasks": 3, "n_skills": 2, "n_splits": 2}
TASKS = torch.tensor([2, 0])


def test_a_row_gets_its_tasks_mixture_of_skills() -> None:
    base, config = nn.Linear(8, 6), PolyConfig(**SETTINGS_POLY)
    layer = PolyLinear(base, "x", config).eval()
    layers_of(config).attach(base, config, {"x": layer})
    x = torch.randn(2, 4, 8)
    layer.task_ids.of_call = TASKS
    with torch.no_grad():
        assert torch.equal(layer(x), base(x)), "B starts at zero"
        layer.poly_lora_B.normal_()
        layer.poly_router.module_logits.normal_()
        found = layer(x)
        for row, task in enumerate(TASKS.tolist()):
            shares = layer.poly_router.module_logits[task].sigmoid().view(2, 2)
            shares = shares / shares.sum(1, keepdim=True)
            a = torch.cat([sum(shares[q, s] * layer.poly_lora_A[q, s] for s in range(2)) for q in range(2)])
            b = torch.cat([sum(shares[q, s] * layer.poly_lora_B[q, s] for s in range(2)) for q in range(2)], dim=1)
            torch.testing.assert_close(found[row], base(x[row]) + x[row] @ a @ b / 3)
        torch.testing.assert_close(layer(x[:, 0]), found[:, 0], msg="rows without positions")


def test_the_shares_drawn_while_training_are_pefts() -> None:
    settings = SETTINGS_POLY | {"task_type": "CAUSAL_LM"}
    model, oracle = ours("llama", "poly", **settings)[0].train(), theirs("llama", "poly", **settings).train()
    own = {name: value for name, value in oracle.named_parameters() if value.requires_grad}
    for name, value in model.named_parameters():
        if value.requires_grad:
            end = ".module_logits" if name.endswith(".module_logits") else ""
            own[f"base_model.model.{name.removesuffix(end)}.default{end}"].data.copy_(value)
    losses = []
    for one in (model, oracle):
        torch.manual_seed(0)
        losses.append(one(**labelled("llama"), task_ids=TASKS).loss)
    torch.testing.assert_close(losses[0], losses[1])
    assert not torch.allclose(losses[0], model.eval()(**labelled("llama"), task_ids=TASKS).loss, atol=1e-3)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("kind", ["llama", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_generated_rows_are_those_that_each_task_gives_alone(kind: str, options: dict[str, Any]) -> None:
    model, _ = ours(kind, "poly", **SETTINGS_POLY)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.poly_lora_B.mul_(20)
            layer.poly_router.module_logits.mul_(20)
    inputs, tasks = {"input_ids": ids(3, 6), "attention_mask": torch.ones(3, 6).long()}, torch.tensor([1, 0, 2])
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    together = generate(model, **inputs, task_ids=tasks, **settings, **options)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = generate(model, **one, task_ids=tasks[row : row + 1], **settings, **options)
        assert torch.equal(together[row], alone[0])
    other = generate(model, **inputs, task_ids=torch.tensor([0]), **settings, **options)
    assert not torch.equal(together, other)
    with pytest.raises(AdapterError, match="say the task of each row"):
        generate(model, **inputs, **settings, **options)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (None, "has 3 tasks; say the task of each row"),
        ([0, 1], r"must be a tensor, not \[0, 1\]"),
        (torch.tensor([0, 3]), "tasks are 0 to 2"),
        (torch.tensor([-1]), "tasks are 0 to 2"),
        (torch.tensor([0, 1, 2]), "must be 2 whole numbers"),
        (torch.tensor([0.0, 1.0]), "must be 2 whole numbers"),
    ],
)
def test_tasks_that_cannot_be_right_are_refused(tasks: Any, message: str) -> None:
    model, _ = ours("llama", "poly", **SETTINGS_POLY)
    with pytest.raises(AdapterError, match=message):
        model(**batch("llama"), task_ids=tasks)
    if tasks is not None:
        with pytest.raises(AdapterError, match=message):
            generate(model, **batch("llama"), task_ids=tasks, max_new_tokens=2)
    model(**batch("llama"), task_ids=TASKS)
    with pytest.raises(IndexError):
        model(torch.tensor([[9999], [9999]]), task_ids=TASKS)
    with pytest.raises(AdapterError, match="say the task of each row"):
        model(**batch("llama"))
    with pytest.raises(AdapterError, match="say the task"):  # those of the last call are forgotten
        model(**batch("llama"))


def test_a_model_without_tasks_generates_for_none() -> None:
    model = tiny("llama")
    inject(model, LoraConfig())
    with pytest.raises(AdapterError, match="no adapter of this model has tasks"):
        generate(model, **batch("llama"), task_ids=TASKS)


def test_disabled_the_tasks_do_not_matter_and_a_copy_has_its_own() -> None:
    model, _ = ours("llama", "poly", **SETTINGS_POLY)
    expected = logits(model, {**batch("llama"), "task_ids": TASKS})
    with disabled(model):
        found = logits(model, {**batch("llama"), "task_ids": torch.tensor([7, 7])})
        assert torch.equal(found, logits(tiny("llama"), batch("llama")))
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, {**batch("llama"), "task_ids": TASKS}), expected)
    unload(model)
    with pytest.raises(AdapterError, match="say the task"):
        twin(**batch("llama"))


def test_one_task_needs_no_ids_and_is_merged_several_are_not() -> None:
    model, config = ours("llama", "poly", r=3, n_splits=4)
    expected = logits(model, batch("llama"))
    assert torch.equal(logits(model, {**batch("llama"), "task_ids": torch.tensor([0, 0])}), expected)
    merge(model, config)
    torch.testing.assert_close(logits(model, batch("llama")), expected, atol=1e-4, rtol=1e-4)
    model, config = ours("llama", "poly", **SETTINGS_POLY)
    with pytest.raises(AdapterError, match="depends on the row's task, so it cannot be merged"):
        merge(model, config)


def test_several_tasks_and_activations_that_are_computed_again_are_refused() -> None:
    model: Any = ours("llama", "poly", **SETTINGS_POLY)[0].train()
    checkpoint_activations(model)
    loss = model(**labelled("llama"), task_ids=TASKS).loss
    with pytest.raises(AdapterError, match="Gradient checkpointing"):
        loss.backward()


def test_two_adapters_from_python_take_the_same_tasks() -> None:
    model: Any = get_peft_model(tiny("t5"), PolyConfig(**SETTINGS_POLY, task_type="SEQ_2_SEQ_LM", init_weights=False))
    assert isinstance(model, PeftModel)
    model.add_adapter("other", PolyConfig(**SETTINGS_POLY, task_type="SEQ_2_SEQ_LM", init_weights=False))
    found = []
    for name in ("default", "other"):
        model.set_adapter(name)
        found.append(logits(model.eval(), {**batch("t5"), "task_ids": TASKS}))
        tokens = model.generate(input_ids=batch("t5")["input_ids"], task_ids=TASKS, max_new_tokens=3)
        assert len(tokens) == 2
    assert not torch.allclose(*found, atol=1e-3)


CONFIGS = [LoHaConfig, LoKrConfig]


def wrapped(config: Any, base: nn.Module, random: bool = True) -> Any:
    """The layer over a frozen base layer, its weights random."""
    layer: AdapterLayer = wrap(base.requires_grad_(False), "x.proj", config)
    for parameter in layer.own_tensors().values():
        if random:
            nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("base", "x"), [(nn.Linear(8, 400), (4, 8)), (nn.Conv1d(8, 400, 1), (4, 8, 1))])
def test_rank_dropout_leaves_out_outputs_in_training_only(kind: Any, base: nn.Module, x: tuple[int, ...]) -> None:
    layer = wrapped(kind(rank_dropout=0.25), base)
    inputs = torch.randn(x)
    full = (layer.eval()(inputs) - base(inputs)).flatten(1)
    thin = (layer.train()(inputs) - base(inputs)).flatten(1)
    gone = (thin == 0).all(0)
    assert 40 < gone.sum() < 160
    scale = 1 if kind is LoKrConfig else 1 / 0.75
    torch.testing.assert_close(thin[:, ~gone], scale * full[:, ~gone], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", CONFIGS)
def test_module_dropout_leaves_out_the_layer_and_not_its_gradients(kind: Any) -> None:
    base = nn.Linear(8, 4)
    layer, x = wrapped(kind(module_dropout=0.5), base), torch.randn(3, 8)
    outputs = [layer(x) for _ in range(40)]
    gone = [torch.equal(output, base(x)) for output in outputs]
    assert 5 < sum(gone) < 35
    outputs[gone.index(True)].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.own_tensors().values())


@pytest.mark.parametrize("first", [-1, 1, 2, 3, 4, 5, 8, 16, 100])
def test_sides_are_taken_apart_as_peft_does(first: int) -> None:
    for side in (1, 2, 7, 12, 64, 96, 127, 128, 360, 576, 1536):
        assert factors(side, first) == factorization(side, first), side
