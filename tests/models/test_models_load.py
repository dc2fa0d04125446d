"""How base models are loaded: quantised ones without their packages, and .gguf files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trainkit
from models_tiny import batch, labelled, logits, tiny
from opened import load_model
from safetensors.torch import load_file, save_file
from transformers import DistilBertConfig, DistilBertModel, SegformerConfig, SegformerModel

from peftcli.core.inject import inject
from peftcli.core.quantised import is_quantised
from peftcli.errors import ModelError
from peftcli.methods.lora import LoraConfig
from peftcli.models.open import open_base
from peftcli.models.quantization import trained_quantization
from peftcli.recipe import load_recipe
from peftcli.schema import BaseModel, Quantization
from peftcli.train.events import Event, Message
from peftcli.train.examine import examine
from peftcli.train.preview import deep_check


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the packages for quantised weights is installed."""
    find: Callable[..., Any] = importlib.util.find_spec
    missing = ("bitsandbytes", "torchao", "gptqmodel", "hqq", "optimum")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in missing else find(name, *rest))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return trainkit.write_recipe(tmp_path)


def stored(folder: Path, **quantization: Any) -> Path:
    """The tiny base model, whose config says that its weights are quantised."""
    shutil.copytree(trainkit.base_folder(), folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nf4", r"bitsandbytes: pip install 'peftcli\[bitsandbytes\]'"),
        ("int8", r"bitsandbytes: pip install 'peftcli\[bitsandbytes\]'"),
        ("int8_weight_only", r"torchao: pip install 'peftcli\[torchao\]'"),
        ("int4_weight_only", r"torchao: pip install 'peftcli\[torchao\]'"),
    ],
)
@pytest.mark.usefixtures("bare_machine")
def test_a_missing_package_is_named_before_data_is_read(recipe: Path, kind: str, message: str) -> None:
    events: list[Event] = []
    with pytest.raises(ModelError, match=f"{kind} weights need the package {message}"):
        trainkit.run_recipe(recipe, f"base_model.quantization={kind}", on_event=events.append)
    assert not any(isinstance(event, Message) for event in events)


@pytest.mark.usefixtures("bare_machine")
def test_check_deep_names_it_at_its_place(recipe: Path) -> None:
    errors = deep_check(load_recipe(recipe, ["base_model.quantization=nf4"])).errors
    assert [error.key for error in errors] == ["base_model.quantization"]
    assert "pip install 'peftcli[bitsandbytes]'" in errors[0].message


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq weights need the package gptqmodel: pip install gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "awq weights need the package gptqmodel: pip install gptqmodel"),
        ({"load_in_4bit": True}, "fp4 weights need the package bitsandbytes"),
        ({"quant_method": "hqq"}, "hqq weights need the package hqq: pip install hqq"),
        ({"quant_method": "quanto"}, "quanto weights need the package optimum: pip install optimum-quanto"),
    ],
)
@pytest.mark.usefixtures("bare_machine")
def test_a_model_that_is_stored_quantised_names_its_package(
    quantization: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        assert open_base(BaseModel(name=str(stored(tmp_path / "base", **quantization)))).quantization


def test_heads_are_not_quantised(tmp_path: Path) -> None:
    config = DistilBertConfig(vocab_size=8, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
    DistilBertModel(config).save_pretrained(tmp_path)
    classifier = ("AutoModelForSequenceClassification", torch.float32)
    opened = open_base(BaseModel(name=str(tmp_path), quantization=Quantization(type="int8")))
    left_out = opened.quantization_config(*classifier, num_labels=3).llm_int8_skip_modules
    assert {"pre_classifier", "classifier"} <= {*left_out}
    assert not any("transformer" in name for name in left_out)
    pictures = SegformerConfig(depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8)
    SegformerModel(pictures).save_pretrained(tmp_path)
    opened = open_base(BaseModel(name=str(tmp_path), quantization=Quantization(type="int8")))
    assert "decode_head" in opened.quantization_config("AutoModelForSemanticSegmentation", None).llm_int8_skip_modules


def test_groups_that_do_not_divide_a_layer_are_refused(recipe: Path) -> None:
    def said(size: int) -> list[str]:
        wanted = f"base_model.quantization={{type: int4_weight_only, group_size: {size}}}"
        return [
            str(each)
            for each in examine(load_recipe(recipe, [wanted])).errors
            if each.key == "base_model.quantization.group_size"
        ]

    (problem,) = said(24)
    assert (
        "24 weights are to share a scale, which does not divide the 32 inputs of model.layers.0.self_attn." in problem
    )
    assert "(set it to 8, which divides those of every layer)" in problem
    assert not said(16)


def test_what_transformers_dequantises_is_trained_on_as_it_is(tmp_path: Path) -> None:
    base = stored(tmp_path / "base", quant_method="fp8", weight_block_size=[16, 16], dequantize=True)
    path, name = base / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    tensors = load_file(path)
    tensors[f"{name}_scale_inv"] = torch.full([size // 16 for size in tensors[name].shape], 0.5)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path, {"format": "pt"})
    assert open_base(BaseModel(name=str(base))).quantization == {"type": "fp8", "stored": True}
    model: Any = load_model(BaseModel(name=str(base)), "AutoModelForCausalLM", torch.float32)
    assert torch.equal(model.get_parameter(name), tensors[name].float() / 2)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_is_not_quantised_twice(tmp_path: Path) -> None:
    base = stored(tmp_path / "base", quant_method="gptq", bits=4)
    with pytest.raises(ModelError, match=r"stored quantised already \(gptq\); it cannot become nf4"):
        assert open_base(BaseModel(name=str(base), quantization=Quantization(type="nf4"))).quantization


def test_a_run_tells_what_it_was_trained_on(tmp_path: Path) -> None:
    assert trained_quantization({}, tmp_path) is None
    for quantization in (None, {"type": "nf4", "double_quant": True, "of_a_later_version": 1}):
        run = {"recipe": {"base_model": {"name": "base", "quantization": quantization}}}
        expected = quantization and Quantization(type="nf4", double_quant=True)
        assert trained_quantization(run, tmp_path) == expected


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its linear weights in blocks of 8 bits, as llama.cpp writes them."""
    gguf: Any = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model = tiny("llama")
    settings: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(settings.num_hidden_layers)
    writer.add_context_length(settings.max_position_embeddings)
    writer.add_embedding_length(settings.hidden_size)
    writer.add_feed_forward_length(settings.intermediate_size)
    writer.add_head_count(settings.num_attention_heads)
    writer.add_head_count_kv(settings.num_key_value_heads)
    writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    writer.add_rope_dimension_count(settings.hidden_size // settings.num_attention_heads)
    writer.add_vocab_size(settings.vocab_size)
    writer.add_bos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, settings.num_hidden_layers)
    heads = {"q_proj": settings.num_attention_heads, "k_proj": settings.num_key_value_heads}
    for name, value in model.state_dict().items():
        if count := heads.get(name.split(".")[-2]):  # llama.cpp turns the halves of each head into pairs
            value = value.view(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        path_there, _, leaf = name.rpartition(".")
        data = value.numpy()
        kind = gguf.GGMLQuantizationType.Q8_0 if "proj" in name else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{names.get_name(path_there)}.{leaf}", gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_unpacked_and_trained_on(gguf_file: Path) -> None:
    base = BaseModel(name=str(gguf_file))
    assert open_base(base).quantization is None
    model: Any = load_model(base, "AutoModelForCausalLM", torch.float32)
    assert not any(map(is_quantised, model.modules()))
    assert not hasattr(model.config, "quantization_config")
    expected = logits(tiny("llama"), batch("llama"))
    assert 0 < (logits(model, batch("llama")) - expected).abs().max() < 0.1 * expected.std()
    inject(model, LoraConfig(target_modules="all-linear"))
    model(**labelled("llama")).loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_a_gguf_file_is_parsed_once_for_the_config_and_once_for_the_weights(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, parsed = pytest.importorskip("gguf").GGUFReader, list[Path]()
    parse = reader.__init__
    monkeypatch.setattr(
        reader, "__init__", lambda self, path, *rest: (parsed.append(path), parse(self, path, *rest))[1]
    )
    opened = open_base(BaseModel(name=str(gguf_file)))
    assert opened.config.num_labels == 2
    loaded = opened.model("AutoModelForSequenceClassification", torch.float32, num_labels=5)
    assert loaded.model.score.out_features == 5
    assert len(parsed) <= 2


def test_compiled_kernels_of_the_hub_are_not_used() -> None:
    base = open_base(BaseModel(name=str(trainkit.base_folder())))
    model = base.model("AutoModelForCausalLM", torch.float32).model
    assert not model.train().use_kernels  # True by default from transformers 5.25 on
