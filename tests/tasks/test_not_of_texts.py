"""Models that read no texts: soft prompts have no place in them, and their adapters load and count as in PEFT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from classifierkit import SIDE, classifier_base
from soundkit import speech_task, whisper_base
from taskkit import CASES
from trainkit import run_recipe

import peftcli
from peftcli.errors import AdapterError


@pytest.mark.parametrize(
    "config",
    [
        peftcli.PromptTuningConfig(num_virtual_tokens=4),
        peftcli.PrefixTuningConfig(num_virtual_tokens=4),
        peftcli.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_soft_prompts_have_no_place_in_an_encoder_of_sound(config: Any) -> None:
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(whisper_base())
    with pytest.raises(AdapterError, match="WhisperEncoder reads no token ids"):
        peftcli.get_peft_model(model, config)


def test_soft_prompts_have_no_place_beside_pictures(tmp_path: Path) -> None:
    recipe = CASES["semantic_segmentation"].write(tmp_path)
    method = "method: {type: prompt_tuning, num_virtual_tokens: 4}"
    recipe.write_text(re.sub("method: .*", method, recipe.read_text()))
    with pytest.raises(AdapterError, match="a model that reads pictures has no place for them") as caught:
        run_recipe(recipe)
    assert caught.value.key == "method.type"


@pytest.mark.parametrize(
    ("auto", "base", "options"),
    [
        ("AutoModelForSpeechSeq2Seq", whisper_base, {"target_modules": ["q_proj", "v_proj"]}),
        (
            "AutoModelForSemanticSegmentation",
            lambda: classifier_base("segformer"),
            {"target_modules": ["q_proj"], "modules_to_save": ["decode_head"]},
        ),
    ],
    ids=["sound", "pictures"],
)
def test_an_adapter_without_a_task_type_loads(auto: str, base: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """PEFT writes no task.json: the class that the adapter notes says what to load."""
    model = getattr(transformers, auto).from_pretrained(base())
    model.save_pretrained(tmp_path / "base")
    model = getattr(transformers, auto).from_pretrained(tmp_path / "base")
    adapted = peftcli.get_peft_model(model, peftcli.LoraConfig(r=4, init_lora_weights=False, **options)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    probe = speech_task().probe() if "Speech" in auto else {"pixel_values": torch.randn(1, 3, SIDE, SIDE)}
    with torch.no_grad():
        expected = adapted(**probe).logits
        for library in (peftcli, peft):
            loaded = library.AutoPeftModel.from_pretrained(str(tmp_path / "adapter")).eval()
            torch.testing.assert_close(loaded(**probe).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "config", "options", "count"),
    [
        (
            "WhisperForConditionalGeneration",
            {"vocab_size": 51865, "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32,
             "encoder_attention_heads": 20, "decoder_attention_heads": 20,
             "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120},
            {}, 15_728_640,
        ),
        (
            "SegformerForSemanticSegmentation", {"num_labels": 150},
            {"bias": "lora_only", "modules_to_save": ["decode_head"]}, 566_422,
        ),
    ],
    ids=["whisper-large-v2", "segformer"],
)  # fmt: skip
def test_the_counts_of_pefts_examples(kind: str, config: dict[str, Any], options: dict[str, Any], count: int) -> None:
    made = getattr(transformers, kind)
    with torch.device("meta"):
        model = made(made.config_class(**config))
    lora = peftcli.LoraConfig(r=32, lora_alpha=32, target_modules=["q_proj", "v_proj"], **options)
    assert peftcli.get_peft_model(model, lora).get_nb_trainable_parameters()[0] == count
