"""LoRA+ in a recipe, and adapters that start from the weights or the data: they train, stop and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import trainkit
import transformers
from models_tiny import tiny
from safetensors.torch import load_file

from peftcli.core.inject import inject
from peftcli.core.weights import named_tensors
from peftcli.errors import RecipeError, UsageError
from peftcli.methods import METHODS
from peftcli.recipe import load_recipe
from peftcli.schema import Training
from peftcli.train.optim import (
    _OPTIMIZERS,
    build_optimizer,
    build_schedule,
    keep_embeddings_exact,
    parameter_groups,
    state_bytes,
)
from peftcli.train.preview import preview

STARTS = {
    "pissa": "init_lora_weights: pissa",
    "fast pissa": "init_lora_weights: pissa_niter_2",
    "olora": "init_lora_weights: olora, use_rslora: true",
    "mica": "init_lora_weights: mica",
    "orthogonal": "init_lora_weights: orthogonal",
    "eva": "init_lora_weights: eva, eva_config: {rho: 1.5, tau: 0.9}",
    "corda": "init_lora_weights: corda, corda_config: {corda_method: kpm}",
    "loftq": "init_lora_weights: loftq, loftq_config: {loftq_bits: 4, loftq_iter: 2}",
    "lora_ga": "init_lora_weights: lora_ga, lora_ga_config: {direction: random, scale: gd_scale}",
}


def groups_of(method: str, kind: str = "llama", **settings: Any) -> dict[str, float]:
    """Name of each tensor -> its learning rate, where ``settings`` may hold some of the training's."""
    training = {name: settings.pop(name) for name in list(settings) if name.startswith("lora") and "plus" in name}
    model, config = tiny(kind), METHODS[method].config_class()(**settings)
    inject(model, config)
    tensors = named_tensors(model)
    optimizer = build_optimizer(
        parameter_groups(tensors, Training(output_dir="out", learning_rate=1e-3, **training)),
        Training(output_dir="out", learning_rate=1e-3),
    )
    names = {id(value): name for name, (_, _, value) in tensors.items()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return {names[id(value)]: group["lr"] for group in optimizer.param_groups for value in group["params"]}


def test_loraplus_trains_b_faster_and_embeddings_at_a_rate_of_their_own() -> None:
    settings = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    rates = groups_of("lora", loraplus_lr_ratio=16.0, loraplus_lr_embedding=1e-5, **settings)
    by_kind = {
        kind: {rate for name, rate in rates.items() if kind in name}
        for kind in ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lm_head")
    }
    assert by_kind == {
        "lora_A.weight": {1e-3},
        "lora_B.weight": {16e-3},
        "lora_embedding_A": {1e-5},
        "lora_embedding_B": {1e-5},
        "lm_head": {1e-3},
    }


def test_without_loraplus_all_learn_alike() -> None:
    assert set(groups_of("lora", target_modules=["q_proj", "embed_tokens"], bias="all", kind="opt").values()) == {1e-3}


def test_loraplus_gives_vectors_the_larger_rate() -> None:
    rates = groups_of("lora", kind="gpt2", bias="lora_only", use_dora=True, loraplus_lr_ratio=4.0)
    vectors = [rate for name, rate in rates.items() if name.endswith(("bias", "magnitude_vector"))]
    assert len(vectors) == 4
    assert set(vectors) == {4e-3}


def test_loraplus_is_refused_for_a_method_without_a_and_b() -> None:
    with pytest.raises(UsageError, match="has not") as caught:
        groups_of("prompt_tuning", loraplus_lr_ratio=4.0)
    assert caught.value.key == "training.loraplus_lr_ratio"


@pytest.mark.parametrize(
    ("base", "method", "settings", "ratio"),
    [
        ("opt", "lora", {"lora_bias": True, "modules_to_save": ["lm_head", "final_layer_norm"]}, None),
        ("opt", "lora", {"lora_bias": True, "modules_to_save": ["lm_head", "final_layer_norm"]}, 4.0),
        ("opt", "lora", {"bias": "all"}, None),
        ("gpt2", "ln_tuning", {}, None),
        ("llama", "ln_tuning", {}, None),
        ("opt", "beft", {}, None),
    ],
)
def test_what_trainer_does_not_decay_is_not_decayed(
    base: str, method: str, settings: dict[str, Any], ratio: float | None
) -> None:
    model = tiny(base)
    inject(model, METHODS[method].config_class()(**settings))
    training = Training(output_dir="out", learning_rate=1.0, weight_decay=0.5, loraplus_lr_ratio=ratio)
    optimizer = build_optimizer(parameter_groups(named_tensors(model), training), training)
    found = {each: group["weight_decay"] for group in optimizer.param_groups for each in group["params"]}
    decayed = transformers.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert found == {each: 0.5 * (name in decayed) for name, each in model.named_parameters() if each.requires_grad}
    assert 0.0 in found.values()


@pytest.mark.parametrize(
    ("optim", "arguments"),
    [
        ("adamw_torch", {}),
        ("adamw_torch", {"amsgrad": True}),
        ("sgd", {}),
        ("sgd", {"momentum": 0.9}),
        ("adafactor", {}),
        ("adafactor", {"beta1": 0.9}),
        ("adamw_8bit", {"min_8bit_size": 16}),
        ("lion_8bit", {"min_8bit_size": 16}),
    ],
)
def test_it_is_known_before_what_an_optimizer_remembers(optim: str, arguments: dict[str, Any]) -> None:
    """Those of 8 bits remember 32 of embeddings that train, as with Trainer."""
    if "8bit" in optim:
        pytest.importorskip("bitsandbytes")
    model, training = tiny("llama"), Training(output_dir="out", learning_rate=0.1, optim=optim, optim_args=arguments)
    inject(model, METHODS["lora"].config_class()(r=2, modules_to_save=["embed_tokens", "lm_head"]))
    tensors = named_tensors(model)
    optimizer = build_optimizer(parameter_groups(tensors, training), training)
    keep_embeddings_exact(optimizer, tensors)
    for _, _, parameter in tensors.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [(each, value) for each, state in optimizer.state.items() for value in state.values()]
    sizes = [value.nbytes for each, value in kept if torch.is_tensor(value) and value.numel() == each.numel()]
    assert sum(sizes) == state_bytes(tensors, training)


def test_the_schedule_moves_all_rates_alike() -> None:
    training = Training(output_dir="out", learning_rate=1e-3, loraplus_lr_ratio=8.0, warmup_steps=2)
    model, config = tiny("llama"), METHODS["lora"].config_class()()
    inject(model, config)
    optimizer = build_optimizer(parameter_groups(named_tensors(model), training), training)
    schedule = build_schedule(optimizer, training, 6)
    for factor in (0, 0.5, 1, 0.75, 0.5, 0.25):
        assert schedule.get_last_lr() == pytest.approx([factor * 1e-3, factor * 8e-3])
        optimizer.step()
        schedule.step()


def resumes_to_the_same_bytes(recipe: Path, tmp_path: Path, optim: str, arguments: str) -> None:
    settings = (f"training.optim={optim}", f"training.optim_args={arguments}", "training.learning_rate=1e-3")
    whole = trainkit.run_recipe(recipe, *settings, f"training.output_dir={tmp_path}/whole")
    assert len({entry["loss"] for entry in whole.metrics}) == 8
    trainkit.stopped_copy(recipe, settings)
    resumed = trainkit.run_recipe(recipe, *settings)
    assert [attempt["from_step"] for attempt in resumed.run["attempts"]] == [0, 4]
    assert resumed.weights == whole.weights


OPTIMIZERS = {
    "adamw_torch_fused": "{amsgrad: true}",
    "sgd": "{momentum: 0.9, nesterov: true}",
    "adafactor": "{beta1: 0.9}",
}


@pytest.mark.grid
@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_optimizers_train_and_resume_to_the_same_bytes(recipe: Path, tmp_path: Path, optim: str) -> None:
    resumes_to_the_same_bytes(recipe, tmp_path, optim, OPTIMIZERS[optim])


def test_every_name_of_a_recipe_is_an_optimizer() -> None:
    assert set(get_args(get_type_hints(Training)["optim"])) == _OPTIMIZERS.keys()


def test_another_optimizer_goes_on_without_what_the_one_before_remembers(recipe: Path) -> None:
    trainkit.stopped_copy(recipe)
    settings = ("training.optim=sgd", "training.optim_args={momentum: 0.9}")
    allowed = ["training.optim", "training.optim_args"]
    done = trainkit.run_recipe(recipe, *settings, allow_change=allowed)
    assert [attempt["from_step"] for attempt in done.run["attempts"]] == [0, 4]
    assert done.run["exact"] is False


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_8bit", "lion_32bit", "lion_8bit"])
def test_optimizers_of_bitsandbytes_do_so_too(recipe: Path, tmp_path: Path, optim: str) -> None:
    pytest.importorskip("bitsandbytes")
    resumes_to_the_same_bytes(recipe, tmp_path, optim, "{min_8bit_size: 16}")


@pytest.mark.parametrize(("given", "expected"), [(1, True), (0, False)])
def test_a_switch_may_be_0_or_1(given: int, expected: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = build_optimizer([weight], Training(output_dir="out", learning_rate=1e-3, optim_args={"amsgrad": given}))
    weight.sum().backward()
    optimizer.step()
    assert optimizer.defaults["amsgrad"] is expected


def test_what_an_optimizer_does_not_take_is_named(recipe: Path) -> None:
    for settings, message in {
        (
            "training.optim_args={momentum: 1}",
        ): r"optim_args\.momentum: adamw_torch has no such argument; it has amsgrad, ",
        ("training.optim_args={lr: 1}",): r"optim_args\.lr: other settings of the recipe give adamw_torch its lr",
        ("training.optim=sgd", "training.optim_args={momentum: -1}"): r"optim_args: sgd says: Invalid momentum value",
        ("training.optim_args={amsgrad: 'no'}",): r"optim_args\.amsgrad: cannot be 'no'; its default is False",
        (
            "training.optim=adafactor",
            "training.optim_args={eps: 0.1}",
        ): r"optim_args: adafactor says: 'float' object is",
        ("training.optim=adafactor", "training.optim_args={eps: []}"): r"optim_args: adafactor says: list index",
        ("training.optim_args={differentiable: true}",): r"optim_args: adamw_torch says: a leaf Variable",
    }.items():
        with pytest.raises(UsageError, match=message):
            trainkit.run_recipe(recipe, *settings)


def test_a_recipe_without_a_learning_rate_can_be_looked_at_before(recipe: Path) -> None:
    assert preview(load_recipe(recipe, ["training.learning_rate=auto"]))["steps"]


def test_an_automatic_rate_is_adamws(recipe: Path) -> None:
    with pytest.raises(RecipeError, match="auto is for AdamW, not sgd"):
        trainkit.run_recipe(recipe, "training.optim=sgd", "training.learning_rate=auto")


def test_a_larger_ratio_moves_b_further(recipe: Path, tmp_path: Path) -> None:
    def after_a_step(*settings: str) -> dict[str, torch.Tensor]:
        out = tmp_path / f"out{len(settings)}"
        done = trainkit.run_recipe(recipe, "training.max_steps=1", f"training.output_dir={out}", *settings)
        return load_file(done.folder / "adapter_model.safetensors")

    plain, faster = after_a_step(), after_a_step("training.loraplus_lr_ratio=4")
    for name, value in plain.items():
        expected = 4 * value if "lora_B" in name else value  # B starts at zero, and Adam's first step is its rate
        torch.testing.assert_close(faster[name], expected, atol=1e-6, rtol=1e-4)


@pytest.mark.grid
@pytest.mark.parametrize("name", STARTS)
def test_stopped_and_resumed_it_ends_with_the_same_bytes(name: str, recipe: Path) -> None:
    settings = [f"method={{type: lora, r: 4, target_modules: all-linear, {STARTS[name]}}}"]
    settings += ["training.loraplus_lr_ratio=2", "training.max_steps=4"]
    done, whole = trainkit.resumed_and_whole(recipe, *settings, step=2)
    assert done.weights == whole.weights
    written = json.loads((whole.folder / "adapter_config.json").read_text())
    assert written["init_lora_weights"] == (name if name in ("loftq", "mica") else True)
    assert written["r"] == (4 if name in ("mica", "orthogonal", "eva", "loftq") else 8)
    assert whole.losses[-1] < whole.losses[0]
    if name not in ("mica", "eva"):  # whose file holds what trains, or whose layers change their size
        return
    stored = sum(value.numel() for key, value in load_file(whole.folder / "adapter_model.safetensors").items())
    trained = whole.run["parameters"]["trainable"]
    assert trained == stored if name == "eva" else trained < stored


def test_loraplus_settings_are_checked(recipe: Path) -> None:
    from peftcli.recipe import read

    problems = read(recipe, ["training.loraplus_lr_ratio=0", "training.loraplus_lr_embedding=-1"]).problems
    assert [problem.key for problem in problems] == ["training.loraplus_lr_ratio", "training.loraplus_lr_embedding"]
