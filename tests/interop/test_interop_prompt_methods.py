"""P-tuning, multitask prompt tuning and prefix tuning: PEFT as oracle of the file and of the forward pass."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import PAD, batch, ids, labelled, logits, randomise, tiny
from oracle import adapter_size, file_of, loaded_by_peft, ours, saved_by_peft, silence, theirs
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.prompts.generate import generate
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict

N = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "p_tuning": {"encoder_hidden_size": 24},
    "p_tuning, LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16, "encoder_num_layers": 3},
    "multitask_prompt_tuning": {"num_tasks": 3, "num_ranks": 2},
    "prefix_tuning": {},
    "prefix_tuning, projected": {"prefix_projection": True, "encoder_hidden_size": 24},
}
KINDS = ("llama", "gpt2", "opt", "t5")
CASES = [(name, kind) for name in SETTINGS for kind in KINDS]
CASES += [("prefix_tuning", kind) for kind in ("qwen2", "gemma3", "bloom", "mixtral")]
every_case = pytest.mark.parametrize(("name", "kind"), CASES)

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT's


def _settings(name: str, kind: str) -> dict[str, Any]:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    settings = {"task_type": task, "num_virtual_tokens": N, **SETTINGS[name]}
    if kind == "t5" and _method(name) == "multitask_prompt_tuning":
        settings["num_transformer_submodules"] = 1
    return settings


def _peft_settings(name: str, kind: str) -> dict[str, Any]:
    # PEFT takes hidden_size, which is not the size of this model's input embedding
    width = {"token_dim": 16} if kind == "opt" and _method(name) != "prefix_tuning" else {}
    return {**_settings(name, kind), **width}


def _method(name: str) -> str:
    return name.partition(",")[0]


def _inputs(name: str, kind: str) -> dict[str, torch.Tensor]:
    # with one submodule PEFT's multitask prompts pass labels on, and no decoder_input_ids
    inputs = labelled(kind) if kind == "t5" else batch(kind)
    return {**inputs, "task_ids": torch.tensor([2, 0])} if _method(name) == "multitask_prompt_tuning" else inputs


def _read(kind: str, folder: Path) -> nn.Module:
    model = tiny(kind)
    load_adapter(model, config_from_dict(read_config(folder)), folder)
    return model


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    scale = float(expected.std())
    torch.testing.assert_close(got, expected, atol=1e-5 * max(scale, 1.0), rtol=1e-5)


@pytest.mark.grid(each="name")
@every_case
def test_what_we_write_peft_reads(name: str, kind: str, tmp_path: Path) -> None:
    model, config = ours(kind, _method(name), **_settings(name, kind))
    save_adapter(model, config, tmp_path)
    oracle, inputs = loaded_by_peft(kind, tmp_path), _inputs(name, kind)
    got = logits(model, inputs)
    _close(got, logits(oracle, inputs))
    inputs.pop("task_ids", None)
    plain = logits(tiny(kind), inputs)
    assert not torch.allclose(got[:, -plain.shape[1] :], plain, atol=1e-2)
    assert file_of(tmp_path)[0]["num_virtual_tokens"] == N


@pytest.mark.grid(each="name")
@every_case
def test_what_peft_writes_we_read(name: str, kind: str, tmp_path: Path) -> None:
    oracle = theirs(kind, _method(name), **_peft_settings(name, kind))
    saved_by_peft(oracle, tmp_path)
    inputs = _inputs(name, kind)
    _close(logits(_read(kind, tmp_path), inputs), logits(oracle, inputs))


@pytest.mark.grid(each="name")
@every_case
def test_names_shapes_dtypes_and_counts_are_pefts(name: str, kind: str) -> None:
    model, _ = ours(kind, _method(name), **_settings(name, kind))
    submodules = {} if _method(name) == "prefix_tuning" else {"num_transformer_submodules": 1}
    oracle = theirs(kind, _method(name), **{**_peft_settings(name, kind), **submodules})
    here, there = adapter_state(model), peft.get_peft_model_state_dict(oracle)
    described = [{name: (tuple(value.shape), value.dtype) for name, value in one.items()} for one in (here, there)]
    assert described[0] == described[1]
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained == oracle.get_nb_trainable_parameters()[0]
    assert (trained == adapter_size(model)) == (name not in ("p_tuning", "p_tuning, LSTM", "prefix_tuning, projected"))


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_of_right_padded_rows_is_pefts(name: str, tmp_path: Path) -> None:
    for kind in ("llama", "gpt2"):
        model, config = ours(kind, _method(name), **_settings(name, kind))
        save_adapter(model, config, tmp_path / kind)
        oracle, inputs = loaded_by_peft(kind, tmp_path / kind), _inputs(name, kind)
        inputs["attention_mask"][1, 5:], inputs["input_ids"][1, 5:] = 0, PAD
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).loss, oracle(**inputs).loss, atol=1e-6, rtol=1e-6)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "multitask_prompt_tuning"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_network_is_pefts(name: str, kind: str, tmp_path: Path) -> None:
    """Its weights moved over, the vectors that it makes are the same, and they are what both write."""
    oracle = theirs(kind, _method(name), **_settings(name, kind))
    model, config = tiny(kind), METHODS[_method(name)].config_class()(**_settings(name, kind))
    layers = list(inject(model, config).layers.values())
    network = next(module for part in ("prompt_encoder", "prefix") if (module := getattr(layers[0], part, None)))
    tensors = oracle.prompt_encoder["default"].state_dict()
    if name == "prefix_tuning":
        tensors = {"prompt_embeddings": tensors["embedding.weight"]}
    network.load_state_dict(tensors)
    _close(logits(model, batch(kind)), logits(oracle, batch(kind)))
    save_adapter(model, config, tmp_path / "ours")
    saved_by_peft(oracle, tmp_path / "theirs")
    _close(*(file_of(tmp_path / folder)[1]["prompt_embeddings"] for folder in ("ours", "theirs")))


def test_a_prefix_of_a_feature_extractor_is_pefts(tmp_path: Path) -> None:
    def base() -> Any:
        return tiny("bert").bert

    model, config = (
        base(),
        METHODS["prefix_tuning"].config_class()(num_virtual_tokens=N, task_type="FEATURE_EXTRACTION"),
    )
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    save_adapter(model, config, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
        inputs = batch("bert")
        inputs["attention_mask"][1, 5:] = 0
        with torch.no_grad():
            here, there = model(**inputs), oracle(**inputs)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(here.last_hidden_state[seen], there.last_hidden_state[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(here.pooler_output, there.pooler_output, atol=1e-5, rtol=1e-5)


def test_positions_that_the_caller_counts_are_pefts(tmp_path: Path) -> None:
    model, config = ours("llama", "prefix_tuning", task_type="CAUSAL_LM", num_virtual_tokens=N)
    save_adapter(model, config, tmp_path)
    inputs = {**batch("llama"), "position_ids": torch.arange(3, 12)[None]}
    _close(logits(model, inputs), logits(loaded_by_peft("llama", tmp_path), inputs))


def test_a_window_that_the_prefix_leaves_is_pefts(tmp_path: Path) -> None:
    """Gemma 3's window of 16 tokens slides over the prefix, too."""
    model, config = ours("gemma3", "prefix_tuning", task_type="CAUSAL_LM", num_virtual_tokens=N)
    save_adapter(model, config, tmp_path)
    inputs = {"input_ids": ids(2, 40), "attention_mask": torch.ones(2, 40, dtype=torch.long)}
    _close(logits(model, inputs), logits(loaded_by_peft("gemma3", tmp_path), inputs))


@pytest.mark.slow
def test_pefts_two_halves_of_p_tuning_are_read(tmp_path: Path) -> None:
    saved_by_peft(theirs("t5", "p_tuning", task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N), tmp_path)
    config, tensors = file_of(tmp_path)
    assert config["num_transformer_submodules"] == 2
    read = adapter_state(_read("t5", tmp_path))["prompt_embeddings"]
    torch.testing.assert_close(read, tensors["prompt_embeddings"][:N])


def _source(folder: Path, tasks: int = 3) -> Path:
    """An adapter that PEFT trained on several tasks."""
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N, "num_tasks": tasks, "num_ranks": 2}
    saved_by_peft(theirs("llama", "multitask_prompt_tuning", **settings), folder)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_target_task_starts_where_pefts_does(init: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": N,
        "num_ranks": 2,
        "prompt_tuning_init": init,
        "prompt_tuning_init_state_dict_path": str(_source(tmp_path)),
        "prompt_tuning_init_task": 1,
    }
    with silence():
        oracle = peft.get_peft_model(tiny("llama"), peft.MultitaskPromptTuningConfig(**settings))
    model, config = tiny("llama"), METHODS["multitask_prompt_tuning"].config_class()(**settings)
    inject(model, config)
    here, there = adapter_state(model), peft.get_peft_model_state_dict(oracle)
    for name in here if init != "ONLY_SOURCE_SHARED" else ["prompt_embeddings"]:
        torch.testing.assert_close(here[name], there[name])
    save_adapter(model, config, tmp_path / "target")
    (tmp_path / "adapter_model.safetensors").unlink()  # PEFT would read it again, if our file named it
    inputs = {**batch("llama"), "task_ids": torch.zeros(2, dtype=torch.long)}
    _close(logits(loaded_by_peft("llama", tmp_path / "target"), inputs), logits(model, inputs))


def test_peft_needs_the_source_again_to_load_a_target_of_its_own(tmp_path: Path) -> None:
    source = _source(tmp_path / "source", tasks=1)
    settings: dict[str, Any] = {"num_ranks": 2, "prompt_tuning_init": "EXACT_SOURCE_TASK"}
    config = peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, prompt_tuning_init_state_dict_path=str(source), **settings
    )
    saved_by_peft(peft.get_peft_model(tiny("llama"), config), tmp_path)
    source.unlink()
    with pytest.raises(FileNotFoundError):
        loaded_by_peft("llama", tmp_path)
    assert adapter_state(_read("llama", tmp_path)).keys() == file_of(tmp_path)[1].keys()


def test_a_second_prompt_for_the_decoder_is_refused(tmp_path: Path) -> None:
    saved_by_peft(theirs("t5", "multitask_prompt_tuning", task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N), tmp_path)
    with pytest.raises(AdapterError, match="num_transformer_submodules: the adapter holds a second prompt"):
        _read("t5", tmp_path)


def test_three_times_the_rows_do_not_fit(tmp_path: Path) -> None:
    saved_by_peft(theirs("llama", "p_tuning", task_type="CAUSAL_LM", num_virtual_tokens=N), tmp_path)
    save_file({"prompt_embeddings": torch.zeros(3 * N, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"shape: prompt_embeddings is \(12, 32\), the model needs \(4, 32\)"):
        _read("llama", tmp_path)


# where PEFT is wrong


def test_interop_3_1_pefts_generate_differs_from_its_own_forward_and_ours_does_not(tmp_path: Path) -> None:
    for name in ("p_tuning", "prefix_tuning"):
        differs: dict[str, Any] = {}
        for kind in ("llama", "opt"):
            model, config = ours(kind, name, **_settings(name, kind))
            save_adapter(model, config, tmp_path / name / kind)
            oracle = loaded_by_peft(kind, tmp_path / name / kind)
            inputs = {"input_ids": ids(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
            settings: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
            expected = inputs["input_ids"]
            for _ in range(10):
                step = logits(oracle, {"input_ids": expected, "attention_mask": torch.ones_like(expected)})
                expected = torch.cat([expected, step[:, -1].argmax(-1, keepdim=True)], 1)
            assert torch.equal(generate(model, **inputs, **settings), expected)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    differs[kind] = not torch.equal(oracle.generate(**inputs, **settings), expected)
            except RuntimeError as error:
                differs[kind] = type(error).__name__
        if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters:
            assert all(differs.values()), f"{name}: PEFT generates as it should on some: {differs}"


def test_peft_finds_no_cache_for_a_prefix_in_a_classifier(tmp_path: Path) -> None:
    """It looks for ``past_key_values``, which transformers 5.24 calls ``cache``. Before, ours is the same."""
    model, config = ours("bert", "prefix_tuning", task_type="SEQ_CLS", num_virtual_tokens=N)
    save_adapter(model, config, tmp_path)
    oracle = loaded_by_peft("bert", tmp_path)
    if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters:
        with pytest.raises(ValueError, match="does not support past key values"):
            logits(oracle, batch("bert"))
    else:
        _close(logits(model, batch("bert")), logits(oracle, batch("bert")))


def test_pefts_prefix_of_an_encoder_decoder_shares_pairs_and_leaves_others_out() -> None:
    """With two layers, both see the first pair of keys and values; the second gets no gradient. Ours is the same."""
    for build in (theirs, lambda *args, **settings: ours(*args, **settings)[0]):
        model = build("t5", "prefix_tuning", task_type="SEQ_2_SEQ_LM", num_virtual_tokens=N)
        model(**labelled("t5")).loss.backward()
        gradient = next(value.grad for value in model.parameters() if value.requires_grad)
        assert gradient is not None
        assert gradient[:, :64].abs().sum() > 0
        assert gradient[:, 64:].abs().sum() == 0
