"""What the loader draws at random: new heads are reported, damage is an error."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_tiny import tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from peftcli.errors import ModelError
from peftcli.models.open import LoadedModel, open_base
from peftcli.schema import BaseModel

BERT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "bert": lambda: transformers.BertConfig(**BERT),
    "roberta": lambda: transformers.RobertaConfig(**BERT),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=96, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
    ),
    "nomic_bert": lambda: transformers.NomicBertConfig(**BERT),  # whose pooler is followed by the layers
    "data2vec-vision": lambda: transformers.Data2VecVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        out_indices=[0, 1],
    ),
    "segformer": lambda: transformers.SegformerConfig(
        hidden_sizes=[8, 16], depths=[1, 1], sr_ratios=[2, 1], patch_sizes=[3, 3], strides=[2, 2],
        num_encoder_blocks=2, num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
    ),
    "resnet": lambda: tiny("convnet").config,
    "llama": lambda: tiny("llama").config,
    "t5": lambda: tiny("t5").config,
    "wav2vec2": lambda: transformers.Wav2Vec2Config(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        conv_dim=[8], conv_stride=[4], conv_kernel=[4], num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=1,
    ),
}  # fmt: skip
SEQUENCES, TOKENS, IMAGES = (
    f"AutoModelFor{name}" for name in ("SequenceClassification", "TokenClassification", "ImageClassification")
)
SEGMENTATION, MASKED = "AutoModelForSemanticSegmentation", "AutoModelForMaskedLM"


def saved(folder: Path, kind: str, auto_class: str, **options: Any) -> dict[str, torch.Tensor]:
    """Save a tiny model, and return its tensors by the checkpoint's names."""
    config = CONFIGS[kind]()
    for key, value in options.items():
        setattr(config, key, value)
    getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def load(folder: Path, auto_class: str, **options: Any) -> LoadedModel:
    with open_base(BaseModel(name=str(folder))) as base:
        return base.model(auto_class, torch.float32, **options)


def modules(loaded: LoadedModel) -> set[str]:
    """The first names of what was initialised, below the model's body."""
    prefix = f"{loaded.model.base_model_prefix}."
    return {name.removeprefix(prefix).partition(".")[0] for name in loaded.initialised}


@pytest.mark.grid(keep=6)
@pytest.mark.parametrize(
    ("kind", "stored", "loaded", "heads"),
    [
        ("bert", "AutoModel", SEQUENCES, {"classifier"}),
        ("bert", MASKED, SEQUENCES, {"classifier", "pooler"}),
        ("bert", MASKED, TOKENS, {"classifier"}),
        ("bert", MASKED, "AutoModel", set()),
        ("nomic_bert", "AutoModel", SEQUENCES, {"classifier", "pooler"}),
        ("data2vec-vision", "AutoModel", IMAGES, {"classifier", "pooler"}),
        ("roberta", TOKENS, SEQUENCES, {"classifier"}),
        ("distilbert", "AutoModel", SEQUENCES, {"classifier", "pre_classifier"}),
        ("vit", "AutoModel", IMAGES, {"classifier"}),
        ("segformer", IMAGES, SEGMENTATION, {"decode_head"}),
        ("resnet", "AutoModel", IMAGES, {"classifier"}),
        ("llama", "AutoModelForCausalLM", SEQUENCES, {"score"}),
        ("llama", "AutoModelForCausalLM", "AutoModel", set()),
        ("t5", "AutoModelForSeq2SeqLM", SEQUENCES, {"classification_head"}),
        ("t5", "AutoModelForSeq2SeqLM", "AutoModelForSeq2SeqLM", set()),
        ("wav2vec2", "AutoModel", "AutoModelForCTC", {"lm_head"}),
    ],
)
def test_a_head_that_the_checkpoint_lacks_is_reported(
    kind: str, stored: str, loaded: str, heads: set[str], tmp_path: Path
) -> None:
    saved(tmp_path, kind, stored)
    found = load(tmp_path, loaded)
    assert modules(found) == heads
    assert set(found.initialised) <= {name for name, _ in found.model.named_parameters()}
    assert found.note is None


def without(words: Iterable[str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    left = {name: value for name, value in tensors.items() if not any(word in name for word in words)}
    assert len(left) < len(tensors)
    return left


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(
    ("kind", "stored", "loaded", "lost"),
    [
        ("bert", SEQUENCES, SEQUENCES, "classifier.bias"),
        ("bert", SEQUENCES, SEQUENCES, "pooler.dense.bias"),
        ("nomic_bert", SEQUENCES, SEQUENCES, "pooler.dense.bias"),
        ("bert", SEQUENCES, SEQUENCES, "embeddings"),
        ("bert", "AutoModel", "AutoModel", "encoder"),
        ("bert", SEQUENCES, SEQUENCES, "layer.1."),
        ("bert", MASKED, MASKED, "cls.predictions.transform"),
        ("roberta", SEQUENCES, SEQUENCES, "classifier.out_proj"),
        ("vit", IMAGES, IMAGES, "cls_token"),
        ("vit", IMAGES, IMAGES, "layernorm.weight"),
        ("segformer", SEGMENTATION, SEGMENTATION, "decode_head.linear_c.0."),
        ("segformer", SEGMENTATION, SEGMENTATION, "decode_head.batch_norm.running_mean"),
        ("resnet", IMAGES, IMAGES, "embedder"),
        ("llama", SEQUENCES, SEQUENCES, "model.norm"),
        ("llama", SEQUENCES, SEQUENCES, "embed_tokens"),
        ("t5", SEQUENCES, SEQUENCES, "classification_head.dense"),
        ("t5", "AutoModelForSeq2SeqLM", "AutoModelForSeq2SeqLM", "encoder.final_layer_norm"),
    ],
)
def test_a_part_that_the_checkpoint_lacks_is_damage(
    kind: str, stored: str, loaded: str, lost: str, tmp_path: Path
) -> None:
    tensors = saved(tmp_path, kind, stored)
    save_file(without([lost], tensors), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"are not those of its config\.json: .* is missing|its checkpoint lacks"):
        load(tmp_path, loaded)


@pytest.mark.grid(keep=3)
@pytest.mark.parametrize(
    ("kind", "auto_class", "head"),
    [
        ("bert", SEQUENCES, "classifier"),
        ("roberta", SEQUENCES, "classifier"),
        ("llama", SEQUENCES, "score"),
        ("t5", SEQUENCES, "classification_head"),
        ("vit", IMAGES, "classifier"),
        ("resnet", IMAGES, "classifier"),
        ("segformer", SEGMENTATION, "decode_head"),
    ],
)
def test_a_head_for_other_labels_is_replaced_and_said(kind: str, auto_class: str, head: str, tmp_path: Path) -> None:
    saved(tmp_path, kind, auto_class, num_labels=5)
    kept = load(tmp_path, auto_class, num_labels=5)
    assert (kept.initialised, kept.note) == ((), None)
    found = load(tmp_path, auto_class, num_labels=3)
    assert modules(found) == {head}
    assert found.note is not None
    assert f"{head}" in found.note
    assert "was made for other labels" in found.note
    assert found.model.config.num_labels == 3
    with open_base(BaseModel(name=str(tmp_path))) as base:
        shapes = {name: value.shape for name, value in base.empty_model(auto_class, num_labels=3).named_parameters()}
    assert shapes == {name: value.shape for name, value in found.model.named_parameters()}


def test_labels_excuse_no_damage(tmp_path: Path) -> None:
    tensors = saved(tmp_path, "bert", SEQUENCES)
    tensors["bert.pooler.dense.weight"] = torch.zeros(7, 7)
    tensors["bert.encoder.layer.0.output.dense.bias"] = torch.zeros(7)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layer\.0\.output\.dense\.bias is \(7,\), not \(32,\)"):
        load(tmp_path, SEQUENCES, num_labels=3)
    tensors = saved(tmp_path, "bert", SEQUENCES) | {"classifier.weight": torch.zeros(5, 32)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"classifier\.weight is \(5, 32\), not \(2, 32\)"):
        load(tmp_path, SEQUENCES)


def test_a_new_head_is_drawn_from_the_seed(tmp_path: Path) -> None:
    saved(tmp_path, "vit", "AutoModel")

    def head() -> torch.Tensor:
        torch.manual_seed(1)
        model: PreTrainedModel = load(tmp_path, IMAGES).model
        return model.get_submodule("classifier").weight

    assert torch.equal(head(), head())
