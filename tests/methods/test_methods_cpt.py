"""CPT: the context's vectors within their bounds, its tokens from text, and what is no context."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import batch, labelled, logits, tiny

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError, DataError
from peftcli.methods import config_from_dict
from peftcli.methods.cpt import CPTConfig
from peftcli.train.examine import examine

IDS, KINDS = [50, 51, 52, 53, 54, 55], [1, 2, 3, 4, 0, 6]


def _adapted(kind: str = "llama", **settings: Any) -> tuple[Any, Any, CPTConfig]:
    """The model, the layer with the context, and the config."""
    model, config = tiny(kind), CPTConfig(**{"cpt_token_ids": IDS, "cpt_tokens_type_mask": KINDS, **settings})
    [layer] = inject(model, config).layers.values()
    set_trainable(model, True)
    return model, layer, config


def _train(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=1.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(**labelled("llama")).loss.backward()
        optimizer.step()
    model.eval()


def test_vectors_start_as_their_tokens_and_move_within_their_bounds() -> None:
    model, layer, _ = _adapted(opt_projection_epsilon=4.0, opt_projection_format_epsilon=2.0)
    start = adapter_state(model)["prompt_embeddings"].clone()
    assert torch.equal(start, model.get_input_embeddings()(torch.tensor(IDS)))
    _train(model)
    assert torch.equal(layer.prompt_embeddings, start)
    moved = (adapter_state(model)["prompt_embeddings"] - start).norm(dim=1)
    root = (32 / 2048) ** 0.5
    torch.testing.assert_close(moved, torch.tensor([2.0, 4.0, 2.0, 0.0, 0.0, 4.0]) * root)


def test_what_is_saved_is_what_the_model_computes_with_and_saving_changes_nothing(tmp_path: Path) -> None:
    model, layer, config = _adapted(opt_projection_epsilon=40.0)
    _train(model)
    before = layer.delta.clone()
    expected = logits(model, batch("llama"))
    save_adapter(model, config, tmp_path)
    assert torch.equal(layer.delta, before)
    loaded = tiny("llama")
    load_adapter(loaded, config_from_dict(read_config(tmp_path)), tmp_path)
    assert torch.equal(logits(loaded, batch("llama")), expected)


def test_loaded_for_further_training_the_bound_counts_from_the_file(tmp_path: Path) -> None:
    model, _, config = _adapted(opt_projection_epsilon=4.0)
    _train(model)
    save_adapter(model, config, tmp_path)
    again = tiny("llama")
    load_adapter(again, config_from_dict(read_config(tmp_path)), tmp_path, trainable=True)
    _train(again)
    moved = (adapter_state(again)["prompt_embeddings"] - adapter_state(model)["prompt_embeddings"]).norm(dim=1)
    assert moved[1] == pytest.approx(4.0 * (32 / 2048) ** 0.5)
    assert moved[3:5].sum() == 0


def test_padding_and_a_second_row_change_no_rows_loss() -> None:
    model, _, _ = _adapted()
    inputs = labelled("llama")
    alone = [model(**{name: value[row : row + 1] for name, value in inputs.items()}).loss for row in range(2)]
    torch.testing.assert_close(model(**inputs).loss, sum(alone) / 2)
    short = {name: value[:1, 3:] for name, value in inputs.items()}
    padded = {**{name: value[:1].clone() for name, value in inputs.items()}}
    padded["attention_mask"][:, :3], padded["labels"][:, :3] = 0, -100
    torch.testing.assert_close(model(**padded).loss, model(**short).loss)


def test_without_a_type_mask_the_labels_count_however_the_context_ends() -> None:
    """PEFT's default type mask, all 1, makes an input's labels none, and the loss NaN."""
    model, _, _ = _adapted(cpt_token_ids=None, cpt_tokens_type_mask=None)
    loss = model(**labelled("llama")).loss
    assert torch.isfinite(loss)
    output = model(**batch("llama"))
    shifted, targets = output.logits[:, 1:-1].flatten(0, 1), labelled("llama")["labels"][:, 1:].flatten()
    # its one token of the context is followed by the first of the input, which the model predicts too
    first = torch.nn.functional.cross_entropy(output.logits[:, 0], labelled("llama")["labels"][:, 0], reduction="sum")
    rest = torch.nn.functional.cross_entropy(shifted, targets, reduction="sum")
    torch.testing.assert_close(loss, (first + rest) / (2 * 9))


def test_a_recipe_gives_the_context_as_text(tmp_path: Path) -> None:
    context = '[{prompt: "Count: one two", completion: " three"}, {prompt: "Count: two three", completion: " four"}]'
    recipe = trainkit.write_recipe(tmp_path)
    done = trainkit.run_recipe(recipe, f"method={{type: cpt, context: {context}}}", "training.max_steps=2")
    written = read_config(done.folder)
    tokens = trainkit.tokenizer()
    parts = ["Count: one two", " three", "Count: two three", " four"]
    ids = [tokens(part, add_special_tokens=False)["input_ids"] for part in parts]
    assert written["cpt_token_ids"] == [token for part in ids for token in part]
    kinds = zip((2, 4, 6, 8), ids, strict=True)
    assert written["cpt_tokens_type_mask"] == [kind for kind, part in kinds for _ in part]
    assert written["num_virtual_tokens"] == len(written["cpt_token_ids"])
    assert "context" not in written
    assert examine(done.recipe).would["parameters"]["trainable"] == done.run["parameters"]["trainable"]


def test_a_context_of_text_takes_its_positions_from_the_rows(tmp_path: Path) -> None:
    recipe = trainkit.write_recipe(tmp_path, base=trainkit.base_folder("gpt2"))
    context = f"[{{prompt: '{'one ' * 40}', completion: ' two'}}]"
    data = trainkit.write_rows(tmp_path / "rows.jsonl", [{"text": "one " * 200}])
    rows = f"dataset={{train: {data}, eval: {data}, format: text, max_length: 200, allow: [answers_cut]}}"
    with pytest.raises(DataError, match=r"200 tokens, and the base model \d+ positions besides those of \d\d+ virtual"):
        trainkit.run_recipe(recipe, f"method={{type: cpt, context: {context}}}", rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cpt_tokens_type_mask": [1, 2]}, "cpt_tokens_type_mask: 2 numbers for the 6 of cpt_token_ids"),
        ({"cpt_token_ids": [5, -1], "cpt_tokens_type_mask": None}, "cpt_token_ids: holds a negative number"),
        ({"num_virtual_tokens": 20}, "num_virtual_tokens: is 20, and cpt_token_ids has 6"),
        ({"cpt_token_ids": [96], "cpt_tokens_type_mask": None}, "cpt_token_ids: 96 is not in the vocabulary"),
        ({"task_type": "SEQ_CLS"}, "task_type: CPT trains causal language models only"),
        ({"opt_projection_epsilon": -1.0}, "opt_projection_epsilon: must not be negative"),
        ({"opt_weighted_loss_type": "linear"}, "opt_weighted_loss_type: must be none or decay"),
        ({"context": [{"prompt": "a", "completion": "b"}]}, "context: is said by cpt_token_ids already"),
    ],
)
def test_what_is_no_context_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        _adapted(**settings)


def test_a_tuple_and_a_part_of_the_logits_have_no_place_for_the_loss() -> None:
    model, _, _ = _adapted()
    with pytest.raises(AdapterError, match="return_dict"):
        model(**labelled("llama"), return_dict=False)
    with pytest.raises(AdapterError, match="logits_to_keep"):
        model(**labelled("llama"), logits_to_keep=2)
    assert model(**batch("llama"), return_dict=False)[0].shape[1] == 9 + len(IDS)
