"""What an adapter's name stands for, and loading it over its base model: head, labels and class included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trainkit
import transformers
from models_tiny import batch, logits, tiny
from safetensors.torch import load_file, save_file
from soundkit import whisper_base

import peftcli
from peftcli.adapters.load import find_adapter, other_base
from peftcli.adapters.merge import merge_adapter
from peftcli.errors import AdapterError
from peftcli.models.open import open_base
from peftcli.schema import BaseModel


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A language model, which has no head for classes."""
    tiny("llama").save_pretrained(tmp_path / "base")
    trainkit.tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(lib: Any, base: Path, folder: Path, labels: int = 3) -> torch.Tensor:
    """Save an adapter that classifies, and return the logits of its model."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    adapted = lib.get_peft_model(model, lib.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False))
    adapted.save_pretrained(folder)
    return logits(adapted.eval(), batch("llama"))


@pytest.mark.parametrize("lib", [peft, peftcli], ids=["peft", "peftcli"])
def test_the_number_of_labels_is_that_of_the_adapters_head(lib: Any, base: Path, tmp_path: Path) -> None:
    expected = classifier(lib, base, tmp_path / "adapter")
    assert expected.shape[1] == 3
    for auto_class in (peftcli.AutoPeftModelForSequenceClassification, peftcli.AutoPeftModel):
        model: Any = auto_class.from_pretrained(tmp_path / "adapter")
        assert model.config.num_labels == 3
        torch.testing.assert_close(logits(model, batch("llama")), expected)


@pytest.mark.parametrize("others", [False, True])
def test_a_classifier_is_merged_with_its_head_also_over_one_for_other_classes(
    others: bool, base: Path, tmp_path: Path
) -> None:
    expected, adapter = classifier(peftcli, base, tmp_path / "adapter"), tmp_path / "adapter"
    if others:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)
        model.save_pretrained(base)
        loaded: Any = peftcli.AutoPeftModelForSequenceClassification.from_pretrained(adapter)
        torch.testing.assert_close(logits(loaded, batch("llama")), expected)
    merge_adapter(str(adapter), tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.num_labels == 3
    torch.testing.assert_close(logits(merged.eval(), batch("llama")), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_without_the_head_leaves_it_random(base: Path, tmp_path: Path) -> None:
    classifier(peftcli, base, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    left = {name: value for name, value in tensors.items() if "score" not in name}
    assert len(left) == len(tensors) - 1
    save_file(left, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": None}))
    with pytest.raises(AdapterError, match="the weights would stay random"):
        peftcli.AutoPeftModel.from_pretrained(tmp_path)


def image_model(tmp_path: Path) -> Path:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.slow
def test_the_class_that_peft_noted_is_loaded(tmp_path: Path) -> None:
    """Models of pictures have no task_type."""
    model = transformers.ViTForImageClassification.from_pretrained(image_model(tmp_path), num_labels=3).eval()
    config = peft.LoraConfig(target_modules="all-linear", modules_to_save=["classifier"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    pixels = torch.randn(2, 3, 16, 16)
    expected = adapted.eval()(pixel_values=pixels).logits
    found: Any = peftcli.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(found(pixel_values=pixels).logits, expected)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "base")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert (tmp_path / "merged/preprocessor_config.json").is_file()
    merged = transformers.ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(pixel_values=pixels).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_what_peft_trains_of_sounds_is_merged_as_speech(tmp_path: Path) -> None:
    base = whisper_base()
    model = transformers.WhisperForConditionalGeneration.from_pretrained(base)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    made = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert made["max_logit_difference"] < 1e-3
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path / "merged")).__name__ == "WhisperProcessor"


def test_a_model_of_no_known_task_is_merged_with_its_processor_and_not_compared(tmp_path: Path) -> None:
    base, told = image_model(tmp_path), list[str]()
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(base)
    model = transformers.ViTModel.from_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    made = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", tell=told.append)
    assert made["max_logit_difference"] is None
    assert told[-1].startswith("not verified: the adapter's task is not known")
    assert (tmp_path / "merged/preprocessor_config.json").read_bytes() == (
        base / "preprocessor_config.json"
    ).read_bytes()


def _unfed(kind: str) -> Any:
    """A model that reads texts, but not as a language model does."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "SiglipModel":
        text, vision = {**sizes, "vocab_size": 320, "projection_size": 32}, {**sizes, "image_size": 16, "patch_size": 8}
        return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    return getattr(transformers, kind)(transformers.BertConfig(**sizes, vocab_size=320))


@pytest.mark.grid(each="compared")
@pytest.mark.parametrize(
    ("kind", "compared"), [("BertForPreTraining", True), ("BertForMultipleChoice", False), ("SiglipModel", False)]
)
def test_a_model_of_no_known_task_is_compared_where_it_takes_a_text_alone(
    tmp_path: Path, kind: str, compared: bool
) -> None:
    base = _unfed(kind)
    base.save_pretrained(tmp_path / "base")
    trainkit.tokenizer().save_pretrained(tmp_path / "base")
    adapted = type(base).from_pretrained(tmp_path / "base")
    names = ["q_proj"] if kind == "SiglipModel" else ["query"]
    config = peft.LoraConfig(target_modules=names, init_lora_weights=False)
    peft.get_peft_model(adapted, config).save_pretrained(tmp_path / "adapter")
    told = list[str]()
    made = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", tell=told.append)
    assert (made["max_logit_difference"] is not None) == compared
    assert told[-1].startswith("not verified: the adapter's task is not known") != compared


def test_too_little_memory_is_no_model_that_takes_other_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = _unfed("BertForPreTraining")
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["query"])
    adapted = type(base).from_pretrained(tmp_path / "base")
    peft.get_peft_model(adapted, config).save_pretrained(tmp_path / "adapter")

    def full(self: Any, **inputs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(base), "forward", full)
    with pytest.raises(MemoryError):
        merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "dtype", "size"), [(3, "float32", 1), (1, "bfloat16", 1000)])
def test_a_classifier_without_a_pad_token_is_compared(
    base: Path, tmp_path: Path, classes: int, dtype: str, size: int
) -> None:
    for name, removed in (("config.json", {"pad_token_id": None}), ("tokenizer_config.json", {"pad_token": None})):
        (base / name).write_text(json.dumps({**json.loads((base / name).read_text()), **removed}))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    model.score.weight.data *= size
    config = peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    made = merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", dtype=dtype)
    assert made["max_logit_difference"] < {1: 1e-3, 1000: 10}[size]


def test_what_a_model_of_no_known_task_writes_with_is_merged_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = {**sizes, "vocab_size": 320, "is_decoder": True, "add_cross_attention": True}
    config = transformers.VisionEncoderDecoderConfig(
        encoder=transformers.ViTConfig(**sizes, image_size=16, patch_size=8).to_dict(),
        decoder=transformers.BertConfig(**decoder).to_dict(),
    )
    base, model = tmp_path / "base", transformers.VisionEncoderDecoderModel(config)
    model.generation_config.max_length = 7
    model.save_pretrained(base)
    trainkit.tokenizer().save_pretrained(base)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tmp_path / "adapter"), tmp_path / "merged", base=str(base))
    written = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert written.get_vocab() == trainkit.tokenizer().get_vocab()
    assert written.chat_template == trainkit.tokenizer().chat_template
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "merged").max_length == 7


def write(folder: Path, adapter_config: dict[str, Any] | None = None, **files: dict[str, Any]) -> None:
    """Write the JSON files of an adapter."""
    config = {"peft_type": "LORA", "base_model_name_or_path": "x", **(adapter_config or {})}
    for name, values in {"adapter_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))


RECORDS: dict[str, tuple[dict[str, Any], str | None, str | None, str]] = {
    "recorded": ({"recipe": {"task": "seq2seq_lm"}}, "CAUSAL_LM", "seq2seq_lm", "AutoModelForSeq2SeqLM"),
    "with settings": ({"recipe": {"task": {"type": "causal_lm"}}}, None, "causal_lm", "AutoModelForCausalLM"),
    "of a later version": ({"recipe": {"task": "song"}}, "CAUSAL_LM", "causal_lm", "AutoModelForCausalLM"),
    "by task_type": ({}, "CAUSAL_LM", "causal_lm", "AutoModelForCausalLM"),
    "without a head": ({}, "FEATURE_EXTRACTION", "feature_extraction", "AutoModel"),
    "by architecture": ({}, None, None, "LlamaForCausalLM"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_the_task_is_the_recorded_one(name: str, base: Path, tmp_path: Path) -> None:
    record, task_type, task, auto_class = RECORDS[name]
    write(tmp_path, run=record, adapter_config={"task_type": task_type, "base_model_name_or_path": str(base)})
    source = find_adapter(str(tmp_path))
    with open_base(source.base) as opened:
        assert (source.task, source.auto_class(lambda: opened.config)) == (task, auto_class)
        if name == "by architecture":
            assert type(opened.empty_model(auto_class)).__name__ == auto_class


@pytest.mark.parametrize(
    "values",
    [
        {"type": ["reward"], "settings": {}},
        {"type": "reward"},
        {"type": "reward", "settings": {"other": 1}},
        {"type": "reward", "settings": {}, "config": [1]},
        {"type": "sequence_classification", "settings": {"labels": [1, [2]], "problem_type": "single_label"}},
        {"type": "question_answering", "settings": {"stride": -1}},
        {"type": "seq2seq_lm", "settings": {"metric_code": "adapter/code.py:run", "trust_metric_code": True}},
    ],
)
def test_a_damaged_task_file_is_an_error_of_the_adapter(values: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, task=values)
    with pytest.raises(AdapterError) as caught:
        _ = find_adapter(str(tmp_path)).recorded_options
    assert caught.value.file == str(tmp_path / "task.json")


def test_a_task_without_labels_needs_no_options(tmp_path: Path) -> None:
    write(tmp_path, task={"type": "causal_lm", "settings": {}})
    assert find_adapter(str(tmp_path)).recorded_options == {}


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification"])
def test_numbers_count_no_names_of_a_task_file_that_does_not_say_so(task: str, tmp_path: Path) -> None:
    for given, found in (({}, False), ({"labels_by_number": True}, True)):
        write(tmp_path, task={"type": task, "settings": {"labels": ["B", "A"], **given}})
        assert find_adapter(str(tmp_path)).recorded_settings.labels_by_number is found


def test_another_base_model_has_no_revision(base: Path, tmp_path: Path) -> None:
    write(tmp_path, adapter_config={"base_model_name_or_path": "org/model", "revision": "abc"})
    assert find_adapter(str(tmp_path)).base.revision == "abc"
    assert find_adapter(str(tmp_path), base=str(base)).base.name == str(base)
    assert find_adapter(str(tmp_path), "x").base.revision is None


def test_other_weights_than_those_whose_error_an_adapter_corrects_are_said(tmp_path: Path) -> None:
    run = {"makes_up_for_quantization": True, "recipe": {"base_model": {"quantization": {"type": "nf4"}}}}
    write(tmp_path, run=run)
    source = find_adapter(str(tmp_path))
    assert other_base(source, source.base) is None
    told = other_base(source, BaseModel(name="x"))
    assert told == f"{tmp_path} corrects the error of the nf4 weights of x, and fits no others"
