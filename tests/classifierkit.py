"""What the tests of the classification tasks share: tiny base models on disk, rows, pictures, open tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from trainkit import base_folder, scratch, tokenizer, write_rows

from peftcli.core.inject import inject
from peftcli.data.rows import Place, Row, Table
from peftcli.errors import DataError
from peftcli.methods import config_from_dict
from peftcli.schema import BaseModel, Source
from peftcli.tasks import TASKS

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SIDE = 32
WORDS = {"good": "sun tea north seven", "bad": "winter stone moon mill"}
ROWS = [
    {"text": f"{words.split()[n % 4]} {words.split()[n % 3]} {n}", "label": label}
    for n in range(12)
    for label, words in WORDS.items()
]
"""Two classes that words tell apart, the first of which comes first."""
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}


@functools.cache
def classifier_base(kind: str) -> Path:
    """A base model without a head, with its processor, as a folder."""
    if kind in ("llama", "gpt2", "chat"):
        return base_folder("llama" if kind == "chat" else kind, chat=kind == "chat")
    folder = scratch() / f"classifier-{kind}"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        if kind == "bert":
            config = transformers.BertConfig(vocab_size=300, max_position_embeddings=64, **_SMALL)
            transformers.BertModel(config).save_pretrained(folder)
            tokenizer(chat=False).save_pretrained(folder)
            return folder
        if kind == "vit":
            model = transformers.ViTModel(transformers.ViTConfig(image_size=SIDE, patch_size=8, **_SMALL))
        elif kind == "siglip2":
            vision = {"num_patches": 16, "patch_size": 8, **_SMALL}
            text = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, **_SMALL}
            model = transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))
        elif kind == "resnet":
            sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
            model = transformers.ResNetModel(transformers.ResNetConfig(**sizes))
        elif kind == "segformer":
            model = transformers.SegformerModel(segformer_config())
        elif kind == "dpt":
            sizes = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}
            model = transformers.DPTModel(
                transformers.DPTConfig(image_size=SIDE, patch_size=8, **_SMALL | {"num_hidden_layers": 4}, **sizes)
            )
        elif kind == "upernet":
            backbone = transformers.ConvNextConfig(
                hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
            )
            config = transformers.UperNetConfig(
                backbone_config=backbone, hidden_size=8, auxiliary_in_channels=16, auxiliary_channels=8
            )
            model = transformers.UperNetForSemanticSegmentation(config)
        else:
            config = transformers.EfficientNetConfig(
                image_size=SIDE, width_coefficient=0.1, depth_coefficient=0.1, hidden_dim=128
            )
            model = transformers.EfficientNetModel(config)
    model.save_pretrained(folder)
    if kind == "siglip2":
        image_processor("Siglip2")(patch_size=8, max_num_patches=16).save_pretrained(folder)
        return folder
    size = {"height": SIDE, "width": SIDE}
    image_processor("Segformer" if "seg" in kind else "ViT")(size=size).save_pretrained(folder)
    return folder


def image_processor(family: str) -> Any:
    """The class of a family's image processor that needs no torchvision; its name is another since transformers 5.4."""
    newer = getattr(transformers, f"{family}ImageProcessorPil", None)
    return newer or getattr(transformers, f"{family}ImageProcessor")


def segformer_config(**options: Any) -> Any:
    """A tiny SegFormer whose training draws nothing."""
    return transformers.SegformerConfig(
        hidden_sizes=[16, 32], depths=[1, 1], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2],
        num_encoder_blocks=2, num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32,
        drop_path_rate=0.0, classifier_dropout_prob=0.0, **options,
    )  # fmt: skip


def write_scene(folder: Path, number: int, size: int = SIDE) -> dict[str, Any]:
    """A picture of two coloured squares on grey, and its mask: 0 grey, 1 red, 2 blue; a row of them."""
    folder.mkdir(parents=True, exist_ok=True)
    draw, half = np.random.default_rng(number), size // 2
    pixels, mask = draw.integers(90, 130, (size, size, 3)).astype(np.uint8), np.zeros((size, size), np.uint8)
    for value, (colour, left) in enumerate(zip(COLOURS.values(), (0, half), strict=True), start=1):
        top, edge = draw.integers(0, half), draw.integers(half // 2, half)
        pixels[top : top + edge, left : left + edge], mask[top : top + edge, left : left + edge] = colour, value
    row = {name: str(folder / f"{number}{ending}") for name, ending in (("image", ".png"), ("annotation", ".mask.png"))}
    for path, values in zip(row.values(), (pixels, mask), strict=True):
        Image.fromarray(values).save(path)
    return row


def base_of(kind: str | Path) -> Any:
    """A base model as far as tasks need it, of a kind or in a folder."""
    folder = kind if isinstance(kind, Path) else classifier_base(kind)

    def processor(wanted: str) -> Any:
        if wanted == "tokenizer":
            return transformers.AutoTokenizer.from_pretrained(folder)
        return transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")

    config = transformers.AutoConfig.from_pretrained(folder)

    def file(name: str) -> Path | None:
        return folder / name if (folder / name).exists() else None

    spec = BaseModel(name=str(folder))
    return SimpleNamespace(spec=spec, name=str(folder), config=config, processor=processor, file=file)


def open_task(name: str = "sequence_classification", kind: str | Path = "bert", **settings: Any) -> Any:
    """The task over a tiny base model."""
    row = TASKS[name]
    return row.open(row.settings(**settings), base_of(kind))


def head_model(task: Any, method: Mapping[str, Any] | None = None) -> Any:
    """The task's model of transformers with a new head, and with a method's weights that are drawn."""
    row = TASKS[task.name]
    torch.manual_seed(0)
    model = getattr(transformers, row.auto_class).from_pretrained(task.base.name, **task.model_options())
    task.fit_model(model, None)
    if method is not None:
        inject(model, config_from_dict({"task_type": row.task_type, **method}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
    return model.eval()


def table_of(
    values: Sequence[Mapping[str, Any]],
    columns: dict[str, str] | None = None,
    classes: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[Table, list[Row]]:
    """Rows of a file ``a.jsonl`` that was never written."""
    rows = [Row(dict(each), Place("a.jsonl", number, number)) for number, each in enumerate(values, start=1)]
    names = tuple(dict.fromkeys(name for each in values for name in each))
    source = Source(train="a.jsonl", columns=columns or {})
    return Table(source, "a.jsonl", names, lambda: classes or {}, rows[0].values), rows


def scanned(values: Sequence[Mapping[str, Any]], name: str = "sequence_classification", **options: Any) -> Any:
    """The task with the settings that the rows complete."""
    classes, kind = options.pop("classes", None), options.pop("kind", "bert")
    task = open_task(name, kind, **options)
    assert task.needs_scan
    table, rows = table_of(values, classes=classes)
    return TASKS[name].open(task.scan([(table, iter(rows))]), task.base)


def encoded(task: Any, values: Sequence[Mapping[str, Any]], **options: Any) -> list[Any]:
    """The examples of rows, an error for a row that has none."""
    table, rows = table_of(values, **options)
    outcomes = task.encode(rows, task.read(table))
    return [each if isinstance(each, DataError) else each.examples[0] for each in outcomes]


def write_pictures(folder: Path, count: int = 8) -> Path:
    """Pictures of two colours, a folder for each."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            noise = random.integers(-30, 30, (20, 24, 3))
            Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


def write_classifier_recipe(folder: Path, kind: str = "bert", **settings: Any) -> Path:
    """A recipe beside its data: LoRA, float32, 8 steps."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind in ("bert", "llama", "gpt2"):
        task, targets = "sequence_classification", "all-linear"
        train, held_out = write_rows(folder / "train.jsonl", ROWS[:18]), write_rows(folder / "eval.jsonl", ROWS[18:])
    else:
        task, targets = "image_classification", "[convolution]" if kind == "resnet" else "all-linear"
        train, held_out = write_pictures(folder / "pictures"), write_pictures(folder / "held_out", 3)
    path = folder / "recipe.yaml"
    extra = "".join(f", {name}: {value}" for name, value in settings.items())
    path.write_text(
        f"""\
base_model: {classifier_base(kind)}
task: {{type: {task}{extra}}}
method: {{type: lora, r: 4, lora_alpha: 8, target_modules: {targets}}}
dataset: {{train: {train}, eval: {held_out}}}
training:
  output_dir: {folder}/out
  max_steps: 8
  learning_rate: 1e-2
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 3
  bf16: false
  eval_strategy: "no"
  save_strategy: "no"
  logging_steps: 1
  verify: false
"""
    )
    return path
