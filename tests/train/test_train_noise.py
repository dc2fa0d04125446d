"""NEFTune: noise on the embeddings of tokens in training, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_tiny import VOCABULARY, ids, tiny
from trainkit import run_recipe, stopped_copy

from peftcli.core.inject import inject
from peftcli.errors import ModelError
from peftcli.methods import METHODS
from peftcli.tasks.text.unpadded import unpad
from peftcli.train.forward import add_embedding_noise

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
