"""How the model of a run computes: compiled layers, and noise on embeddings."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import trainkit
from models_tiny import VOCABULARY, ids, labelled, tiny
from trainkit import run_recipe, stopped_copy

from peftcli.core.inject import inject
from peftcli.errors import ModelError, UsageError
from peftcli.methods import METHODS
from peftcli.methods.lora import LoraConfig
from peftcli.schema import BaseModel, Dataset, Recipe, Training
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.train import pieces
from peftcli.train.forward import add_embedding_noise, checkpoint_activations, compile_layers

COMPILED = "training.torch_compile=true"


def test_the_layers_of_each_stack_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, expected in {"llama": ["LlamaDecoderLayer"] * 2, "t5": ["T5Block"] * 4}.items():
        compiled: list[str] = []
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda layer, into=compiled, **_: into.append(type(layer).__name__)
        )
        compile_layers(trainkit.build(kind))
        assert compiled == expected
    with pytest.raises(ModelError, match="no stack of layers"):
        compile_layers(torch.nn.Linear(2, 2))


def test_the_inputs_of_layers_wait_in_the_memory_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing else. The CPU stands for a GPU here, and what would be moved is noted."""
    moved = list[tuple[int, ...]]()

    class Moved(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool):
            assert pin_memory
            super().__init__(lambda value: (moved.append(tuple(value.shape)), value.clone())[1], lambda value: value)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Moved)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plain = _gradients("llama", CHECKPOINTED)
    assert not moved
    torch.testing.assert_close(_gradients("llama", OFFLOADED), plain, rtol=0, atol=0)
    config = tiny("llama").config
    expected = [(*labelled("llama")["input_ids"].shape, config.hidden_size)] * config.num_hidden_layers
    assert moved == expected
    monkeypatch.setattr(pieces, "PIECE", 4)
    _gradients("llama", OFFLOADED)
    assert moved == 2 * expected
    own = torch.nn.Linear(2, 2)
    own.gradient_checkpointing_enable = lambda options: None
    with pytest.raises(ModelError, match="offload is not for this model"):
        checkpoint_activations(own, OFFLOADED)


def _recipe(how: Literal["offload"] | bool) -> Recipe:
    training = Training(output_dir="out", gradient_checkpointing=how)
    return Recipe(base_model=BaseModel(name="tiny"), method={}, dataset=Dataset(train="rows"), training=training)


CHECKPOINTED, OFFLOADED = _recipe(True), _recipe("offload")


def _gradients(kind: str, recipe: Recipe, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Of one batch, with LoRA on all linear layers."""
    model = tiny(kind).to(dtype)
    torch.manual_seed(0)
    inject(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    checkpoint_activations(model.train(), recipe)
    model(**labelled(kind)).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("kind", "mlps"), [("llama", 2), ("gpt2", 2), ("t5", 4), ("opt", 0)])
def test_mlps_in_pieces_have_the_gradients_of_whole_rows(
    kind: str, mlps: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OPT's linear layers stand in the layer itself, which attends, too."""
    sizes = list[int]()
    compute = pieces.checkpoint
    monkeypatch.setattr(
        pieces, "checkpoint", lambda forward, x, **how: (sizes.append(x.shape[1]), compute(forward, x, **how))[1]
    )
    whole = _gradients(kind, OFFLOADED, dtype)
    assert not sizes
    monkeypatch.setattr(pieces, "PIECE", 7)
    found = _gradients(kind, OFFLOADED, dtype)
    assert len([size for size in sizes if size < 7]) == 2 * mlps  # the last of each, forward and again
    assert found.keys() == whole.keys()
    for name, gradient in found.items():
        assert (gradient - whole[name]).norm() <= tolerance * whole[name].norm(), name


def test_long_rows_in_pieces_resume_to_the_same_bytes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 16)
    wanted = "training.gradient_checkpointing=offload"
    stopped_copy(recipe, (wanted,))
    found = run_recipe(recipe, wanted)
    assert any("offload moves nothing on a CPU" in each for each in found.warnings)
    whole = run_recipe(recipe, wanted, f"training.output_dir={recipe.parent}/whole")
    assert found.weights == whole.weights


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch speaks up of itself while it compiles
def test_compiled_layers_learn_what_others_do_and_resume_to_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    plain = run_recipe(recipe, f"training.output_dir={tmp_path}/plain")
    compiled = run_recipe(recipe, COMPILED, f"training.output_dir={tmp_path}/compiled")
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    stopped_copy(recipe, (COMPILED,))
    assert run_recipe(recipe, COMPILED).weights == compiled.weights


def test_compiling_needs_a_compiler(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UsageError, match=r"training\.torch_compile: needs a C\+\+ compiler"):
        run_recipe(recipe, COMPILED)


def test_liger_kernel_needs_its_package_and_a_gpu(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = "training.use_liger_kernel=true"
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    with pytest.raises(UsageError, match=r"pip install 'peftcli\[liger\]'"):
        run_recipe(recipe, wanted)
    there = importlib.machinery.ModuleSpec("liger_kernel", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there if name == "liger_kernel" else find(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"training\.use_liger_kernel: needs a GPU"):
        run_recipe(recipe, wanted)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # torch's compiler recommends TF32
@pytest.mark.parametrize("setting", [COMPILED, "training.use_liger_kernel=true"])
def test_other_kernels_learn_the_same_on_a_gpu(recipe: Path, tmp_path: Path, setting: str) -> None:
    plain = run_recipe(recipe)
    other = run_recipe(recipe, setting, f"training.output_dir={tmp_path}/other")
    assert other.losses == pytest.approx(plain.losses, rel=1e-3)


NOISE = "training.neftune_noise_alpha=5"


@pytest.mark.parametrize("unpadded", [False, True])
def test_the_noise_is_as_large_as_the_length_of_an_example_says(unpadded: bool) -> None:
    model, seen = tiny("llama"), list[torch.Tensor]()
    if unpadded:
        assert unpad(model)
    embedding = model.get_input_embeddings()
    add_embedding_noise(model, 5.0)
    embedding.register_forward_hook(lambda module, args, out: seen.append(out - module.weight[args[0]]))
    tokens = ids(2, 10)
    mask = (torch.arange(10) < torch.tensor([[10], [4]])).long()
    torch.manual_seed(0)
    model.train()(input_ids=tokens, attention_mask=mask)
    noise, lengths = seen.pop(), [10, 4] if unpadded else [10, 10]
    if not unpadded:
        noise = noise[mask.bool()][None]
    for part, length in zip(noise[0].split([10, 4]), lengths, strict=True):
        bound = 5 / (length * part.shape[1]) ** 0.5
        assert 0.9 * bound < part.abs().max() <= bound * 1.0001
        assert part.mean().abs() < bound / 4
    model.eval()(input_ids=tokens, attention_mask=mask)
    assert not seen.pop().any()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"target_modules": ["embed_tokens"]}),
        ("lora", {"modules_to_save": ["embed_tokens"]}),
        ("lora", {"trainable_token_indices": [3, 5]}),
        ("prompt_tuning", {"num_virtual_tokens": 2}),
    ],
    ids=lambda each: each if isinstance(each, str) else next(iter(each)),
)
def test_each_token_gets_noise_whatever_trains_of_the_embedding(method: str, settings: dict[str, Any]) -> None:
    model = tiny("llama")
    inject(model, METHODS[method].config_class()(task_type="CAUSAL_LM", **settings))
    add_embedding_noise(model, 5.0)
    embedding = model.train().get_input_embeddings()
    tokens = torch.tensor([[3, 4, 5, VOCABULARY + 1 if method == "prompt_tuning" else 6]])
    differ = (embedding(tokens) != embedding(tokens)).any(-1)
    assert torch.equal(differ, tokens < VOCABULARY)


def test_a_run_with_noise_measures_without_and_resumes_to_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    measured = (
        f"dataset.eval={recipe.parent}/train.jsonl",
        "training.eval_strategy=epoch",
        "training.eval_on_start=true",
    )
    settings = (*measured, NOISE)
    plain = run_recipe(recipe, *measured, "training.max_steps=1", f"training.output_dir={tmp_path}/plain")
    noisy = run_recipe(recipe, *settings, f"training.output_dir={tmp_path}/noisy")
    assert noisy.run["eval"]["first"] == plain.run["eval"]["first"] != {}
    assert noisy.losses[0] != plain.losses[0]
    stopped_copy(recipe, settings)
    assert run_recipe(recipe, *settings).weights == noisy.weights


def test_noise_needs_tokens() -> None:
    with pytest.raises(ModelError, match=r"training\.neftune_noise_alpha: there is no embedding of tokens"):
        add_embedding_noise(tiny("convnet"), 5.0)
