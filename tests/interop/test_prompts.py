"""Soft prompts: PEFT as oracle of the file, the forward pass, the loss and the starts; not of ``generate``."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import PAD, batch, ids, labelled, logits, randomise, tiny
from oracle import (
    adapter_size,
    file_of,
    loaded_by_peft,
    loaded_here,
    ours,
    same_logits,
    saved_by_peft,
    silence,
    theirs,
    written_by_us,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli import peft_api
from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.prompts.generate import generate
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict
from peftcli.methods.prompt_tuning import PromptTuningConfig

N = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "prompt_tuning": {},
    "p_tuning": {"encoder_hidden_size": 24},
    "p_tuning, LSTM": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 16, "encoder_num_layers": 3},
    "multitask_prompt_tuning": {"num_tasks": 3, "num_ranks": 2},
    "prefix_tuning": {},
    "prefix_tuning, projected": {"prefix_projection": True, "encoder_hidden_size": 24},
}
CASES = [(name, kind) for name in SETTINGS for kind in ("llama", "gpt2", "opt", "t5")]
CASES += [("prefix_tuning", kind) for kind in ("qwen2", "gemma3", "bloom", "mixtral")]
CASES += [("prompt_tuning", kind) for kind in ("qwen2", "gemma3", "bloom")]
every_case = pytest.mark.parametrize(("name", "kind"), CASES)

pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")  # PEFT's


def _method(name: str) -> str:
    return name.partition(",")[0]


def _settings(name: str, kind: str) -> dict[str, Any]:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    one = {"num_transformer_submodules": 1} if kind == "t5" and name == "multitask_prompt_tuning" else {}
    return {"task_type": task, "num_virtual_tokens": N, **SETTINGS[name], **one}


def _peft_settings(name: str, kind: str) -> dict[str, Any]:
    # PEFT takes hidden_size, which is not the size of this model's input embedding
    width = {"token_dim": 16} if kind == "opt" and _method(name) != "prefix_tuning" else {}
    return {**_settings(name, kind), **width}


def _more(name: str, kind: str) -> dict[str, torch.Tensor]:
    if name != "multitask_prompt_tuning":
        return {}
    # with one submodule PEFT's multitask prompts pass labels on, and no decoder_input_ids
    labels = {"labels": labelled(kind)["labels"], "decoder_input_ids": None} if kind == "t5" else {}
    return {"task_ids": torch.tensor([2, 0]), **labels}


def _padded(kind: str) -> dict[str, torch.Tensor]:
    """A batch whose second row has five tokens."""
    inputs = batch(kind)
    inputs["attention_mask"][1, 5:] = 0
    if kind != "bert":
        inputs["input_ids"][1, 5:] = PAD
    return inputs


@pytest.mark.grid(each="name")
@every_case
def test_what_we_write_peft_reads(name: str, kind: str, tmp_path: Path) -> None:
    model, folder = written_by_us((_method(name), kind, _settings(name, kind)), tmp_path)
    more = _more(name, kind)
    same_logits(kind, loaded_by_peft(kind, folder), model, **more)
    got, plain = logits(model, {**batch(kind), **more}), logits(tiny(kind), batch(kind))
    assert not torch.allclose(got[:, -plain.shape[1] :], plain, atol=1e-2)
    assert file_of(folder)[0]["num_virtual_tokens"] == N


@pytest.mark.grid(each="name")
@every_case
def test_what_peft_writes_we_read(name: str, kind: str, tmp_path: Path) -> None:
    oracle = theirs(kind, _method(name), **_peft_settings(name, kind))
    same_logits(kind, loaded_here(kind, saved_by_peft(oracle, tmp_path)), oracle, **_more(name, kind))


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


@pytest.mark.grid(each="name")
@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[1] != "t5"])
def test_logits_and_loss_of_right_padded_rows_are_pefts(name: str, kind: str, tmp_path: Path) -> None:
    model, folder = written_by_us((_method(name), kind, _settings(name, kind)), tmp_path)
    inputs = {**_padded(kind), **_more(name, kind)}
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        here, there = model(**inputs), loaded_by_peft(kind, folder)(**inputs)
    virtual = torch.ones(2, here.logits.shape[1] - inputs["input_ids"].shape[1], dtype=torch.long)
    seen = torch.cat([virtual, inputs["attention_mask"]], 1).bool()
    torch.testing.assert_close(here.logits[seen], there.logits[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(here.loss, there.loss, atol=1e-6, rtol=1e-6)


def test_forward_of_an_encoder_decoder_with_padding_and_labels_is_pefts(tmp_path: Path) -> None:
    model, folder = written_by_us(("prompt_tuning", "t5", _settings("prompt_tuning", "t5")), tmp_path)
    inputs = batch("t5")
    inputs["attention_mask"][1, 5:] = 0
    labels = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        here, there = (each(**inputs, labels=labels) for each in (model, loaded_by_peft("t5", folder)))
    torch.testing.assert_close(here.logits, there.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(here.loss, there.loss, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_forward_of_an_encoder_is_pefts(method: str, tmp_path: Path) -> None:
    model: Any = tiny("bert").bert
    config = METHODS[method].config_class()(num_virtual_tokens=N, task_type="FEATURE_EXTRACTION")
    inject(model, config)
    set_trainable(model, True)
    randomise(model)
    save_adapter(model, config, tmp_path)
    oracle = peft.PeftModel.from_pretrained(tiny("bert").bert, tmp_path).eval()
    inputs = _padded("bert")
    with torch.no_grad():
        here, there = model(**inputs).last_hidden_state, oracle(**inputs).last_hidden_state
    seen = torch.cat([torch.ones(2, here.shape[1] - 9, dtype=torch.long), inputs["attention_mask"]], 1).bool()
    torch.testing.assert_close(here[seen], there[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("p_") or name.startswith("prefix")])
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
    same_logits(kind, model, oracle)
    save_adapter(model, config, tmp_path / "ours")
    saved_by_peft(oracle, tmp_path / "theirs")
    here, there = (file_of(tmp_path / folder)[1]["prompt_embeddings"] for folder in ("ours", "theirs"))
    torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("kind", "length"), [("llama", 9), ("gemma3", 40)])
def test_positions_of_a_prefix_are_pefts(kind: str, length: int, tmp_path: Path) -> None:
    """The caller may count them; and Gemma 3's window of 16 tokens slides over the prefix, too."""
    model, folder = written_by_us(("prefix_tuning", kind, _settings("prefix_tuning", kind)), tmp_path)
    inputs = {"input_ids": ids(2, length), "attention_mask": torch.ones(2, length, dtype=torch.long)}
    inputs |= {"position_ids": torch.arange(3, 12)[None]} if kind == "llama" else {}
    same_logits(kind, model, loaded_by_peft(kind, folder), **inputs)


@pytest.mark.parametrize("method", ["prompt_tuning", pytest.param("p_tuning", marks=pytest.mark.slow)])
def test_pefts_two_halves_of_an_encoder_decoders_prompt_are_read_and_one_is_written(
    method: str, tmp_path: Path
) -> None:
    saved_by_peft(theirs("t5", method, **_settings("prompt_tuning", "t5")), tmp_path / "theirs")
    config, tensors = file_of(tmp_path / "theirs")
    assert tuple(tensors["prompt_embeddings"].shape) == (2 * N, 32)
    assert config["num_transformer_submodules"] == 2
    model, read = tiny("t5"), config_from_dict(read_config(tmp_path / "theirs"))
    load_adapter(model, read, tmp_path / "theirs")
    torch.testing.assert_close(adapter_state(model)["prompt_embeddings"], tensors["prompt_embeddings"][:N])
    save_adapter(model, read, tmp_path / "ours")
    config, tensors = file_of(tmp_path / "ours")
    assert tuple(tensors["prompt_embeddings"].shape) == (N, 32)
    assert config["num_transformer_submodules"] == 1


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_three_times_the_rows_do_not_fit(method: str, tmp_path: Path) -> None:
    saved_by_peft(theirs("llama", method, **_settings("prompt_tuning", "llama")), tmp_path)
    save_file({"prompt_embeddings": torch.zeros(3 * N, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"shape: prompt_embeddings is \(12, 32\), the model needs \(4, 32\)"):
        loaded_here("llama", tmp_path)


def test_a_second_prompt_for_the_decoder_is_refused(tmp_path: Path) -> None:
    saved_by_peft(theirs("t5", "multitask_prompt_tuning", **_settings("prompt_tuning", "t5")), tmp_path)
    with pytest.raises(AdapterError, match="num_transformer_submodules: the adapter holds a second prompt"):
        loaded_here("t5", tmp_path)


@pytest.mark.grid(keep=5)
@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning", "prefix_tuning"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "opt"])
def test_generate_is_a_greedy_loop_over_pefts_forward(name: str, kind: str, tmp_path: Path) -> None:
    """PEFT's own is not: see test_where_peft_is_wrong.py."""
    model, folder = written_by_us((name, kind, _settings(name, kind)), tmp_path)
    oracle = loaded_by_peft(kind, folder)
    inputs = {"input_ids": ids(1, 6), "attention_mask": torch.ones(1, 6, dtype=torch.long)}
    expected = inputs["input_ids"]
    for _ in range(10):
        step = logits(oracle, {"input_ids": expected, "attention_mask": torch.ones_like(expected)})
        expected = torch.cat([expected, step[:, -1].argmax(-1, keepdim=True)], 1)
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    assert torch.equal(generate(model, **inputs, **options), expected)


def test_a_prefix_in_a_classifier_is_pefts_where_it_finds_the_cache(tmp_path: Path) -> None:
    """It looks for ``past_key_values``, which transformers 5.24 calls ``cache``."""
    settings = {"task_type": "SEQ_CLS", "num_virtual_tokens": N}
    model, folder = written_by_us(("prefix_tuning", "bert", settings), tmp_path)
    if "cache" not in inspect.signature(LlamaForCausalLM.forward).parameters:
        same_logits("bert", model, loaded_by_peft("bert", folder))


def test_a_prefix_of_an_encoder_decoder_shares_pairs_and_leaves_others_out_as_pefts() -> None:
    """With two layers, both see the first pair of keys and values; the second gets no gradient."""
    for build in (theirs, lambda *args, **settings: ours(*args, **settings)[0]):
        model = build("t5", "prefix_tuning", **_settings("prefix_tuning", "t5"))
        model(**labelled("t5")).loss.backward()
        gradient = next(value.grad for value in model.parameters() if value.requires_grad)
        assert gradient is not None
        assert gradient[:, :64].abs().sum() > 0
        assert gradient[:, 64:].abs().sum() == 0


# where a prompt starts


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<s>", "answer", "the", "question", "<unk>"])}
    built = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize("text", ["answer the question", "the", "answer the question answer the question the"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_a_prompt_from_text_starts_where_pefts_does_and_is_read_by_it(
    kind: str, text: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    settings = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": text}
    settings |= {"tokenizer_name_or_path": tokenizer.name_or_path}
    oracle = peft.get_peft_model(
        tiny(kind), peft.PromptTuningConfig(**_peft_settings("prompt_tuning", kind), **settings)
    )
    model, config = tiny(kind), PromptTuningConfig(**_settings("prompt_tuning", kind), **settings)
    config.prepare(lambda name: tokenizer)
    inject(model, config)
    found, expected = adapter_state(model), peft.get_peft_model_state_dict(oracle)
    torch.testing.assert_close(found["prompt_embeddings"], expected["prompt_embeddings"])
    save_adapter(model, config, tmp_path)
    assert "init_token_ids" not in file_of(tmp_path)[0]
    same_logits(kind, loaded_by_peft(kind, tmp_path), model)
    same_logits(kind, loaded_here(kind, tmp_path), model)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "opt"])
def test_a_prompt_from_the_vocabulary_holds_what_the_embedding_gives(kind: str) -> None:
    model, base = tiny(kind), tiny(kind)
    inject(model, PromptTuningConfig(**_settings("prompt_tuning", kind), prompt_tuning_init="SAMPLE_VOCAB"))
    every = base.get_input_embeddings()(torch.arange(96)).detach()
    for vector in adapter_state(model)["prompt_embeddings"]:
        assert (every == vector).all(-1).any()


def _source(folder: Path, tasks: int = 3) -> Path:
    """An adapter that PEFT trained on several tasks."""
    settings = {**_settings("multitask_prompt_tuning", "llama"), "num_tasks": tasks}
    saved_by_peft(theirs("llama", "multitask_prompt_tuning", **settings), folder)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_target_task_starts_where_pefts_does(init: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N, "num_ranks": 2}
    settings |= {"prompt_tuning_init": init, "prompt_tuning_init_task": 1}
    settings |= {"prompt_tuning_init_state_dict_path": str(_source(tmp_path))}
    with silence():
        oracle = peft.get_peft_model(tiny("llama"), peft.MultitaskPromptTuningConfig(**settings))
    model, config = tiny("llama"), METHODS["multitask_prompt_tuning"].config_class()(**settings)
    inject(model, config)
    here, there = adapter_state(model), peft.get_peft_model_state_dict(oracle)
    for name in here if init != "ONLY_SOURCE_SHARED" else ["prompt_embeddings"]:
        torch.testing.assert_close(here[name], there[name])
    save_adapter(model, config, tmp_path / "target")
    (tmp_path / "adapter_model.safetensors").unlink()  # PEFT would read it again, if our file named it
    same_logits("llama", loaded_by_peft("llama", tmp_path / "target"), model, task_ids=torch.zeros(2, dtype=torch.long))


def test_pefts_target_is_read_without_its_source(tmp_path: Path) -> None:
    """PEFT itself needs it again."""
    settings = {**_settings("multitask_prompt_tuning", "llama"), "prompt_tuning_init": "EXACT_SOURCE_TASK"}
    settings |= {"num_tasks": 1, "prompt_tuning_init_state_dict_path": str(_source(tmp_path / "source", tasks=1))}
    config = peft.MultitaskPromptTuningConfig(**settings)
    saved_by_peft(peft.get_peft_model(tiny("llama"), config), tmp_path)
    Path(settings["prompt_tuning_init_state_dict_path"]).unlink()
    assert adapter_state(loaded_here("llama", tmp_path)).keys() == file_of(tmp_path)[1].keys()


# CPT and cartridges

CPT: dict[str, Any] = {
    "cpt_token_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13],
    "cpt_tokens_type_mask": [1, 2, 2, 3, 4, 5, 6, 7, 8],
    "opt_weighted_loss_type": "decay",
    "opt_loss_decay_factor": 0.5,
    "opt_projection_epsilon": 20.0,
    "opt_projection_format_epsilon": 10.0,
    "task_type": "CAUSAL_LM",
}
CARTRIDGE: dict[str, Any] = {"num_virtual_tokens": 9, "num_frozen_tokens": 2, "task_type": "CAUSAL_LM"}
TYPES = torch.tensor([[1, 2, 2, 2, 3, 3, 4, 4, 0], [1, 2, 3, 3, 3, 3, 4, 4, 4]])
both = pytest.mark.parametrize(
    ("method", "settings"), [("cpt", CPT), ("cartridge", CARTRIDGE)], ids=["cpt", "cartridge"]
)


def _trained(model: torch.nn.Module) -> torch.nn.Parameter:
    [parameter] = [value for value in model.parameters() if value.requires_grad]
    return parameter


@both
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_loss_gradients_and_counts_are_pefts(kind: str, method: str, settings: dict[str, Any]) -> None:
    oracle, (model, _) = theirs(kind, method, **settings), ours(kind, method, **settings)
    with torch.no_grad():
        _trained(model).copy_(_trained(oracle))
        if method == "cartridge":
            frozen = next(value for name, value in model.named_parameters() if name.endswith("frozen_embedding"))
            frozen.copy_(oracle.prompt_encoder["default"].frozen_embedding)
    same_logits(kind, model, oracle)
    inputs = labelled(kind) | ({"input_type_mask": TYPES} if method == "cpt" else {})
    inputs["labels"] = inputs["labels"].clone()
    inputs["labels"][1, 7:] = -100
    for each in (oracle, model):
        loss = each.train()(**{name: value.clone() for name, value in inputs.items()}).loss  # PEFT writes into them
        loss.backward()
        each.loss = loss.detach()
    torch.testing.assert_close(model.loss, oracle.loss, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(_trained(model).grad, _trained(oracle).grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(_trained(model), _trained(oracle))  # CPT's is cut to its bound
    total = sum(value.numel() for value in model.parameters())
    assert oracle.get_nb_trainable_parameters() == (_trained(model).numel(), total)


@both
def test_files_go_both_ways(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model, folder = written_by_us((method, "llama", settings), tmp_path / "ours")
    same_logits("llama", loaded_by_peft("llama", folder), model)
    oracle = theirs("llama", method, **settings)
    same_logits("llama", loaded_here("llama", saved_by_peft(oracle, tmp_path / "theirs")), oracle)
    here, there = (file_of(tmp_path / place)[1] for place in ("ours", "theirs"))
    assert {name: value.shape for name, value in here.items()} == {name: value.shape for name, value in there.items()}


def test_code_for_pefts_cpt_runs_with_another_import() -> None:
    losses = []
    for library in (peft, peft_api):
        model: Any = library.get_peft_model(tiny("llama"), library.CPTConfig(**CPT))
        losses.append(model(**labelled("llama"), input_type_mask=TYPES.clone()).loss)
    torch.testing.assert_close(*losses)
    default, _ = ours("llama", "cpt", task_type="CAUSAL_LM")  # of whose labels PEFT counts none
    assert torch.isfinite(default(**labelled("llama")).loss)


def test_a_cartridge_starts_and_is_composed_as_pefts(tmp_path: Path) -> None:
    tokens = ids(1, 12)
    for library, folder in ((peft, "theirs"), (peft_api, "ours")):
        model: Any = library.get_peft_model(tiny("llama"), library.CartridgeConfig(**CARTRIDGE)).eval()
        with torch.no_grad(), model.disable_adapter():
            output = model(input_ids=tokens, use_cache=True)
        cache = output["cache"] if "cache" in output else output["past_key_values"]
        values = library.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache)
        assert torch.equal(values, library.prompt_embeddings_from_past_key_values(cache, num_virtual_tokens=9))
        saved_by_peft(model, tmp_path / folder)
        library.compose_cartridge_adapters([tmp_path / folder] * 2, output_path=tmp_path / folder / "two")
    for part in ("", "two"):
        own, its = tmp_path / "ours" / part, tmp_path / "theirs" / part
        same_logits("llama", loaded_here("llama", own), loaded_by_peft("llama", its))
        torch.testing.assert_close(file_of(own)[1], file_of(its)[1])
    assert len(adapter_state(loaded_here("llama", tmp_path / "theirs/two"))["prompt_embeddings"]) == 18
