"""What the tests of object_detection share: tiny base models on disk, pictures with boxes, an open task."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from classifierkit import base_of, image_processor, write_scene
from PIL import Image
from trainkit import scratch

from peftcli.tasks import TASKS

SIDE = 32
_LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
_HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "num_queries": 6}
_DETR: dict[str, Any] = {**_LAYERS, **_HEADS, "dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}


def _backbone(**options: Any) -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return transformers.ResNetConfig(**sizes, **options)


def _rt_detr_sizes() -> dict[str, Any]:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    return {
        "backbone_config": transformers.RTDetrResNetConfig(**sizes, out_features=["stage2", "stage3", "stage4"]),
        "encoder_hidden_dim": 16, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [16, 16, 16],
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16, "num_queries": 6, "decoder_layers": 2,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encode_proj_layers": [2], "dropout": 0.0,
        "activation_dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip


def _config(kind: str) -> Any:
    if kind == "yolos":
        return transformers.YolosConfig(
            image_size=[SIDE, SIDE], patch_size=8, num_detection_tokens=6, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    if kind == "detr":
        return transformers.DetrConfig(backbone_config=_backbone(out_features=["stage4"]), **_DETR)
    if kind == "conditional_detr":
        return transformers.ConditionalDetrConfig(backbone_config=_backbone(out_features=["stage4"]), **_DETR)
    if kind == "deformable_detr":
        stages = ["stage2", "stage3", "stage4"]
        return transformers.DeformableDetrConfig(
            backbone_config=_backbone(out_features=stages), **_DETR | {"d_model": 32, "num_feature_levels": 3}
        )
    config = {"rt_detr": transformers.RTDetrConfig, "rt_detr_v2": transformers.RTDetrV2Config}[kind]
    return config(**_rt_detr_sizes())


_PROCESSORS = {
    "detr": "Detr",
    "yolos": "Yolos",
    "conditional_detr": "ConditionalDetr",
    "deformable_detr": "DeformableDetr",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetr",
}
KINDS = tuple(_PROCESSORS)


def _learn(model: Any) -> None:
    """Let a model find the squares, as two of its many classes."""
    rows, kinds = boxed_scenes(), {"red": 5, "blue": 9}
    images = np.stack([np.asarray(Image.open(each["image"])) for each in rows])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, spread = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    labels = []
    for each in rows:
        boxes = torch.tensor(each["objects"]["bbox"]).reshape(-1, 4) / SIDE
        middles = torch.cat([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]], dim=1)
        classes = torch.tensor([kinds[name] for name in each["objects"]["category"]], dtype=torch.long)
        labels.append({"boxes": middles, "class_labels": classes})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model(pixel_values=(pixels - mean) / spread, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@functools.cache
def detector_base(kind: str) -> Path:
    """A detector of the 91 classes of COCO, with its image processor, as a folder."""
    folder = scratch() / f"detector-{kind}"
    config = _config(kind)
    config.id2label = {at: f"LABEL_{at}" for at in range(91)}
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = transformers.AutoModelForObjectDetection.from_config(config)
        if kind == "yolos":  # which is quick to learn
            _learn(model)
    model.save_pretrained(folder)
    side = 64 if kind == "deformable_detr" else SIDE  # whose last map has a norm of more than one value
    size = {"height": side, "width": side} if kind.startswith("rt") else {"shortest_edge": side, "longest_edge": 80}
    image_processor(_PROCESSORS[kind])(size=size).save_pretrained(folder)
    return folder


@functools.cache
def boxed_scenes(count: int = 12) -> Sequence[dict[str, Any]]:
    """Pictures of a red and a blue square, with their boxes; the last one shows nothing."""
    rows = []
    for number in range(count):
        files = write_scene(scratch() / "boxed", number)
        mask = Image.open(files["annotation"])
        boxes = []
        for value in (1, 2):
            left, top, right, bottom = mask.point([255 * (each == value) for each in range(256)]).getbbox()
            boxes.append([left, top, right - left, bottom - top])
        objects: dict[str, Any] = {"bbox": boxes, "category": ["red", "blue"]}
        if number == count - 1:
            Image.new("RGB", (SIDE, SIDE), (110, 110, 110)).save(files["image"])
            objects = {"bbox": [], "category": []}
        rows.append({"image": files["image"], "objects": objects})
    return rows


def open_detection(kind: str = "yolos", **settings: Any) -> Any:
    """The task over a tiny base model."""
    row = TASKS["object_detection"]
    return row.open(row.settings(**{"labels": ["red", "blue"], **settings}), base_of(detector_base(kind)))
