"""Soft prompts before the input: CPT's bounds, the tasks of multitask prompt tuning, the network of p-tuning."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import batch, labelled, logits, randomise, tiny
from safetensors.torch import save_file
from torch import nn
from trainkit import run_recipe, write_recipe

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.weights import adapter_state, load_training_state, named_tensors, unsaved_state
from peftcli.errors import AdapterError, DataError, Interrupted
from peftcli.methods import config_from_dict
from peftcli.methods.cpt import CPTConfig
from peftcli.methods.multitask_prompt_tuning import MultitaskPromptTuningConfig
from peftcli.methods.p_tuning import PromptEncoderConfig
from peftcli.methods.prompt_tuning import PromptTuningConfig
from peftcli.train.events import Event, Stepped
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


def test_a_tuple_and_a_part_of_the_logits_have_no_place_for_the_loss() -> None:
    model, _, _ = _adapted()
    with pytest.raises(AdapterError, match="return_dict"):
        model(**labelled("llama"), return_dict=False)
    with pytest.raises(AdapterError, match="logits_to_keep"):
        model(**labelled("llama"), logits_to_keep=2)
    assert model(**batch("llama"), return_dict=False)[0].shape[1] == 9 + len(IDS)


N = 4


def _adapted_multitask_prompt_tuning(**settings: Any) -> tuple[Any, MultitaskPromptTuningConfig]:
    model, config = tiny("llama"), MultitaskPromptTuningConfig(num_virtual_tokens=N, **settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model, config


def test_each_tasks_prompt_is_the_shared_one_times_its_factor() -> None:
    model, _ = _adapted_multitask_prompt_tuning(num_tasks=3, num_ranks=2)
    state = adapter_state(model)
    for task in range(3):
        plain = tiny("llama")
        inject(plain, PromptTuningConfig(num_virtual_tokens=N))
        factor = torch.einsum("nr,rd->nd", state["prefix_task_cols"][task], state["prefix_task_rows"][task])
        with torch.no_grad():
            nn.Module.get_parameter(plain, "model.embed_tokens.prompt_embeddings").copy_(
                state["prompt_embeddings"] * factor
            )
        got = logits(model, {**batch("llama"), "task_ids": torch.tensor([task, task])})
        torch.testing.assert_close(got, logits(plain, batch("llama")), atol=1e-5, rtol=1e-4)


def test_only_the_factors_of_a_batchs_tasks_get_gradients() -> None:
    model, _ = _adapted_multitask_prompt_tuning(num_tasks=3)
    inputs = batch("llama")
    model(**inputs, labels=inputs["input_ids"], task_ids=torch.tensor([2, 2])).loss.backward()
    found = {name.rpartition(".")[2]: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert found["prefix_task_cols"].abs().sum((1, 2)).bool().tolist() == [False, False, True]
    assert found["prompt_embeddings"].abs().sum() > 0


def test_one_task_needs_no_ids() -> None:
    model, _ = _adapted_multitask_prompt_tuning()
    given = logits(model, {**batch("llama"), "task_ids": torch.tensor([0, 0])})
    assert torch.equal(logits(model, batch("llama")), given)


def test_counts() -> None:
    model, _ = _adapted_multitask_prompt_tuning(num_tasks=3, num_ranks=2)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained == N * 32 + 3 * 2 * (N + 32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An adapter of three tasks."""
    model, config = _adapted_multitask_prompt_tuning(num_tasks=3, num_ranks=2)
    save_adapter(model, config, tmp_path)
    return tmp_path / "adapter_model.safetensors"


def _start(source: Path, init: str, **settings: Any) -> dict[str, torch.Tensor]:
    model = tiny("llama")
    given = {"num_virtual_tokens": N, "num_ranks": 2, "prompt_tuning_init": init, **settings}
    inject(model, MultitaskPromptTuningConfig(**given, prompt_tuning_init_state_dict_path=str(source)))
    return adapter_state(model)


@pytest.mark.parametrize(
    ("init", "settings", "message"),
    [
        (
            "EXACT_SOURCE_TASK",
            {"prompt_tuning_init_task": 3},
            "prompt_tuning_init_task: 3: the source's tasks are 0 to 2",
        ),
        ("EXACT_SOURCE_TASK", {"num_tasks": 2}, "num_tasks: EXACT_SOURCE_TASK starts one task, not 2"),
        (
            "AVERAGE_SOURCE_TASKS",
            {"num_ranks": 1},
            r"prefix_task_cols is \(1, 4, 2\), the settings ask for \(1, 4, 1\)",
        ),
        (
            "ONLY_SOURCE_SHARED",
            {"num_virtual_tokens": 5},
            r"prompt_embeddings is \(4, 32\), the settings ask for \(5, 32\)",
        ),
    ],
)
def test_a_source_that_does_not_fit_is_refused(source: Path, init: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        _start(source, init, **settings)


def test_a_source_that_cannot_be_read_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: cannot be read"):
        _start(tmp_path / "none.safetensors", "EXACT_SOURCE_TASK")
    with pytest.raises(AdapterError, match=r"must be a \.safetensors file; others can run code"):
        _start(tmp_path / "adapter_model.bin", "EXACT_SOURCE_TASK")
    whole = source.read_bytes()
    save_file({"prompt_embeddings": torch.full((N, 32), torch.nan)}, source)
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: contains NaN or Inf"):
        _start(source, "ONLY_SOURCE_SHARED")
    source.write_bytes(whole[:100])
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: damaged"):
        _start(source, "ONLY_SOURCE_SHARED")
    with pytest.raises(AdapterError, match="prompt_tuning_init_state_dict_path: EXACT_SOURCE_TASK needs it"):
        inject(tiny("llama"), MultitaskPromptTuningConfig(prompt_tuning_init="EXACT_SOURCE_TASK"))


def test_several_tasks_may_go_on_from_the_shared_prompt(source: Path) -> None:
    state = _start(source, "ONLY_SOURCE_SHARED", num_tasks=5)
    assert state["prefix_task_rows"].shape == (5, 2, 32)


def test_a_text_starts_the_shared_prompt() -> None:
    config = MultitaskPromptTuningConfig(
        num_virtual_tokens=N,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a text",
        base_model_name_or_path="base",
    )
    config.prepare(lambda name: lambda text: {"input_ids": [5, 6, 7]})
    model = tiny("llama")
    inject(model, config)
    expected = model.get_input_embeddings().base_layer.weight[[5, 6, 7, 5]]
    assert torch.equal(adapter_state(model)["prompt_embeddings"], expected)
    assert config.file_dict()["tokenizer_name_or_path"] == "base"  # PEFT reads no TEXT without one


LSTM: dict[str, Any] = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 8}


def _adapted_p_tuning(**settings: Any) -> tuple[nn.Module, PromptEncoderConfig]:
    model, config = tiny("llama"), PromptEncoderConfig(num_virtual_tokens=N, **settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    return model, config


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_the_network_is_counted_and_the_vectors_are_saved() -> None:
    model, _ = _adapted_p_tuning(encoder_hidden_size=10)
    assert _size(model) == N * 32 + (32 * 10 + 10) + (10 * 10 + 10) + (10 * 32 + 32)
    assert {name: tuple(value.shape) for name, value in adapter_state(model).items()} == {"prompt_embeddings": (N, 32)}
    model, _ = _adapted_p_tuning(**LSTM, encoder_num_layers=1)
    lstm = 2 * 4 * 8 * (32 + 8 + 2)
    assert _size(model) == N * 32 + lstm + (16 * 16 + 16) + (16 * 32 + 32)


def test_the_hidden_size_is_the_embeddings_unless_it_is_given() -> None:
    assert _size(_adapted_p_tuning()[0]) == N * 32 + 3 * (32 * 32 + 32)


@pytest.mark.parametrize("settings", [{}, LSTM])
def test_a_loaded_adapter_trains_its_vectors(settings: dict[str, Any], tmp_path: Path) -> None:
    model, config = _adapted_p_tuning(**settings)
    save_adapter(model, config, tmp_path)
    again, read = tiny("llama"), config_from_dict(read_config(tmp_path))
    load_adapter(again, read, tmp_path, trainable=True)
    assert [name for name, value in again.named_parameters() if value.requires_grad] == [
        "model.embed_tokens.prompt_embeddings"
    ]
    # an LSTM rounds otherwise where no gradients are wanted
    torch.testing.assert_close(logits(again, batch("llama")), logits(model, batch("llama")), atol=1e-6, rtol=1e-5)
    save_adapter(again, read, tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_dropout_is_for_training_only() -> None:
    model, _ = _adapted_p_tuning(**LSTM, encoder_dropout=0.5)
    model.train()
    torch.manual_seed(0)
    first, second = (model(**labelled("llama")).loss.item() for _ in range(2))
    assert first != second
    assert torch.equal(adapter_state(model)["prompt_embeddings"], adapter_state(model)["prompt_embeddings"])
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(logits(model, batch("llama")), logits(model, batch("llama")))


def test_the_network_computes_in_full_precision_under_autocast() -> None:
    model, _ = _adapted_p_tuning(**LSTM)
    saved = adapter_state(model)["prompt_embeddings"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter_state(model)["prompt_embeddings"], saved)
        assert torch.equal(model.get_input_embeddings().table(), saved)


def test_what_the_file_leaves_out_restores_the_network() -> None:
    model, _ = _adapted_p_tuning()
    state = {**adapter_state(model), **unsaved_state(model)}
    assert state.keys() - adapter_state(model).keys() == named_tensors(model).keys()
    other, _ = _adapted_p_tuning()
    randomise(other, seed=5)
    load_training_state(other, state)
    for name, (_, _, value) in named_tensors(other).items():
        assert torch.equal(value, named_tensors(model)[name][2])


def test_a_files_settings_of_the_network_that_it_does_not_hold_change_nothing() -> None:
    settings: dict[str, Any] = {"encoder_dropout": 0.1, "encoder_num_layers": 4}
    assert [key for key, _ in PromptEncoderConfig.unchecked(**settings).problems()] == [
        "encoder_num_layers",
        "encoder_dropout",
    ]
    assert PromptEncoderConfig.unchecked(**settings, inference_mode=True).problems() == []


def _stop(event: Event) -> None:
    if isinstance(event, Stepped) and event.result.step == 4:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.grid
@pytest.mark.parametrize(
    "method",
    [
        "{type: p_tuning, num_virtual_tokens: 5, encoder_reparameterization_type: LSTM, encoder_hidden_size: 8,"
        " encoder_dropout: 0.2}",
        "{type: prefix_tuning, num_virtual_tokens: 5, prefix_projection: true}",
        "{type: prefix_tuning, num_virtual_tokens: 5}",
        "{type: multitask_prompt_tuning, num_virtual_tokens: 5}",
        "{type: cartridge, num_virtual_tokens: 5, num_frozen_tokens: 2}",
        "{type: cpt, cpt_token_ids: [5, 6, 7], opt_projection_format_epsilon: 4}",
    ],
    ids=["p_tuning", "projected prefix_tuning", "prefix_tuning", "multitask_prompt_tuning", "cartridge", "cpt"],
)
def test_stopped_and_resumed_ends_with_the_same_bytes(method: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "run")
    settings = (f"method={method}", "training.learning_rate=0.05")
    whole = run_recipe(recipe, *settings, f"training.output_dir={tmp_path}/whole")
    with pytest.raises(Interrupted):
        run_recipe(recipe, *settings, on_event=_stop)
    again = run_recipe(recipe, *settings)
    assert again.weights == whole.weights
    assert again.losses == whole.losses
    assert trainkit.read_run(again.folder)["steps"]["done"] == 8
    assert whole.losses[-1] < whole.losses[0]
