"""Semantic segmentation: masks of every kind mean what they say, and a perfect model scores 1."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from classifierkit import (
    SIDE,
    classifier_base,
    encoded,
    image_processor,
    open_task,
    scanned,
    segformer_config,
    write_scene,
)
from PIL import Image
from safetensors.torch import load_file
from taskkit import CASES
from torch import nn
from trainkit import Child, ranks, read_run, run_recipe

from peftcli import AutoPeftModel, LoraConfig, get_peft_model
from peftcli.errors import AdapterError, DataError
from peftcli.tasks.found import find_task
from peftcli.tasks.semantic_segmentation import IGNORED

NAME = "semantic_segmentation"
LABELS = ["floor", "red", "blue"]


def task(kind: str = "segformer", **settings: Any) -> Any:
    return open_task(NAME, kind, **{"labels": LABELS, **settings})


def row(folder: Path, mask: Any, mode: str | None = None, **options: Any) -> dict[str, str]:
    """A grey picture, and a mask of these values."""
    values = (
        mask if isinstance(mask, Image.Image) else Image.fromarray(np.asarray(mask, options.pop("dtype", np.uint8)))
    )
    number = len(list(folder.iterdir()))
    paths = {"image": str(folder / f"{number}.png"), "annotation": str(folder / f"{number}.mask.png")}
    Image.new("RGB", options.pop("size", values.size)).save(paths["image"])
    (values.convert(mode) if mode else values).save(paths["annotation"])
    return paths


@pytest.mark.parametrize(
    ("processor", "settings"),
    [
        ("MobileViT", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
        ("DPT", {"size": {"height": 32, "width": 32}, "do_pad": True, "size_divisor": 48}),
    ],
)
@pytest.mark.parametrize("size", [(40, 100), (100, 40), (40, 40)])
def test_an_answer_lies_where_the_model_has_seen_the_picture(
    processor: str, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    opened = task()
    opened.processor = image_processor(processor)(**settings)
    mask = np.add.outer(np.arange(size[0]) // 20, np.arange(size[1]) // 20) % 3
    seen = opened._resized([mask])[0].clamp(min=0)
    found = opened._place_on_picture(nn.functional.one_hot(seen, 3).permute(2, 0, 1).float(), size)
    kept = found != IGNORED
    assert (found == mask)[kept].mean() > 0.9  # all but the pixels at borders
    assert kept.all() == (processor == "DPT")
    if not kept.all():
        assert kept[size[0] // 2 - 14 : size[0] // 2 + 14, size[1] // 2 - 14 : size[1] // 2 + 14].all()
        assert kept.sum() < 34 * 34


@pytest.mark.parametrize("ignored", [255, 65535])
def test_an_answer_marks_what_was_not_seen_as_masks_do(tmp_path: Path, ignored: int) -> None:
    path = tmp_path / "mask.png"
    task(ignore_index=ignored)._answer(np.array([[0, IGNORED]]), Image.new("RGB", (2, 1)), path)
    assert np.asarray(Image.open(path)).tolist() == [[0, ignored]]


class Known(nn.Module):
    """A model that predicts given classes, (B, H, W) of each batch."""

    def __init__(self, *batches: torch.Tensor):
        super().__init__()
        self.batches = list(batches)

    def forward(self, pixel_values: torch.Tensor) -> Any:
        classes = self.batches.pop(0)
        assert len(pixel_values) == len(classes)
        return SimpleNamespace(logits=100.0 * nn.functional.one_hot(classes, len(LABELS)).movedim(-1, 1))


def measured(task: Any, examples: list[Any], predicted: torch.Tensor, size: int) -> dict[str, float]:
    """The metrics of a model that predicts classes (N, H, W)."""
    sums: dict[str, Any] = {}
    for start in range(0, len(examples), size):
        batch = task.collate(examples[start : start + size], training=False)
        for name, value in task.loss(Known(predicted[start : start + size]).eval(), batch).sums.items():
            sums[name] = sums.get(name, 0) + value.double().numpy()
    found: dict[str, float] = task.metrics(sums, [], sum(example.num_targets for example in examples))
    return found


@pytest.mark.parametrize("reduced", [False, True])
def test_a_perfect_model_scores_one(tmp_path: Path, reduced: bool) -> None:
    opened = task(reduce_labels=reduced)
    draw = np.random.default_rng(0)
    masks = draw.choice([0, 1, 2, 255] if not reduced else [0, 1, 2, 3, 255], (5, SIDE, SIDE)).astype(np.uint8)
    examples = encoded(opened, [row(tmp_path, mask) for mask in masks])
    labels = opened.collate(examples, training=False)["_labels"]
    ignored = (masks == 255) | (masks < int(reduced))
    assert (labels.numpy() == np.where(ignored, IGNORED, masks.astype(int) - reduced)).all()
    assert [each.num_targets for each in examples] == (~ignored).sum(axis=(1, 2)).tolist()
    for size in (1, 5):
        found = measured(opened, examples, labels.clamp(min=0), size)
        assert (found["mean_iou"], found["mean_accuracy"], found["overall_accuracy"]) == (1.0, 1.0, 1.0)
        assert found["loss"] == pytest.approx(0.0)


def test_metrics_are_those_of_all_pixels(tmp_path: Path) -> None:
    opened, draw = task(), np.random.default_rng(1)
    masks = draw.choice([0, 1, 255], (5, SIDE, SIDE), p=[0.7, 0.2, 0.1]).astype(np.uint8)  # 2 is never there
    examples = encoded(opened, [row(tmp_path, mask) for mask in masks])
    predicted = draw.integers(0, 2, masks.shape)
    one, whole = (measured(opened, examples, torch.from_numpy(predicted), size) for size in (1, 5))
    assert one == pytest.approx(whole, rel=1e-6)
    counts = masks < 255
    iou = [
        ((masks == at) & (predicted == at)).sum() / (((masks == at) | (predicted == at)) & counts).sum()
        for at in (0, 1)
    ]
    assert whole["mean_iou"] == pytest.approx(np.mean(iou))
    assert whole["mean_accuracy"] == pytest.approx(np.mean([(predicted == at)[masks == at].mean() for at in (0, 1)]))
    assert "iou_blue" not in whole
    predicted[0, 0, 0] = 2  # predicted though it is nowhere: an IoU of 0, as the field has it
    assert measured(opened, examples, torch.from_numpy(predicted), 5)["iou_blue"] == 0.0


def test_splitting_a_batch_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    opened = task()
    model = transformers.SegformerForSemanticSegmentation(segformer_config(num_labels=3)).eval()
    examples = encoded(opened, [row(tmp_path, np.full((8, 8), at)) for at in range(3)] + [write_scene(tmp_path, 9)])
    whole = opened.loss(model, opened.collate(examples, training=False)).total
    parts = [opened.loss(model, opened.collate([each], training=False)).total for each in examples]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "options", "padded"),
    [
        ("Segformer", {"do_reduce_labels": True}, False),
        ("ViT", {"size": {"height": 48, "width": 40}}, False),
        ("MobileViT", {"size": {"shortest_edge": 40}, "crop_size": {"height": 48, "width": 48}}, True),
        ("DPT", {"do_resize": False, "do_pad": True, "size_divisor": 32}, True),
    ],
)
def test_a_mask_goes_where_its_picture_goes(tmp_path: Path, family: str, options: Any, padded: bool) -> None:
    """Left is class 1, right class 299; what an image processor pads does not count."""
    many = [str(number) for number in range(300)]
    with pytest.raises(DataError, match="255 is the number of a class"):
        task(labels=many).fit_model(torch.nn.Linear(1, 1), LoraConfig())
    opened = task(labels=many, ignore_index=65535)
    opened.processor = image_processor(family)(**options)
    mask = np.full((40, 60), 299, np.uint16)
    mask[:, :30] = 1
    paths = row(tmp_path, mask, dtype=np.uint16)
    Image.fromarray(((mask > 1) * 255).astype(np.uint8)).save(paths["image"])
    batch = opened.collate(encoded(opened, [paths]), training=False)
    labels, bright = batch["_labels"][0], batch["pixel_values"][0, 0] > batch["pixel_values"].mean()
    assert labels.shape == bright.shape
    assert set(labels.unique().tolist()) == {1, 299} | ({IGNORED} if padded else set())
    counts = labels != IGNORED
    assert ((labels == 299) == bright)[counts].float().mean() > 0.95  # but for the edge, which is blurred


def grey_png(values: np.ndarray, bits: int) -> bytes:
    """A PNG of the numbers (8, 8), of fewer bits than Pillow writes."""
    rows = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., -bits:].reshape(8, -1), axis=-1)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", 8, 8, bits, 0, 0, 0, 0),
        b"IDAT": zlib.compress(b"".join(b"\0" + each.tobytes() for each in rows)),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_grey_palette_bits_and_deep_masks_hold_numbers(tmp_path: Path) -> None:
    values = np.array([[0, 1], [1, 0]], np.uint8).repeat(4, 0).repeat(4, 1)
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.ravel().tolist())
    palette.putpalette([200, 10, 10, 10, 10, 200])
    masks = [
        values,
        values.astype(np.uint16),
        palette,
        Image.fromarray(values > 0),
        Image.merge("RGB", [Image.fromarray(values)] * 3),
    ]
    rows = [row(tmp_path, mask, dtype=None) for mask in masks]
    for bits in (2, 4):
        file = tmp_path / f"{bits}.png"
        file.write_bytes(grey_png(values, bits))
        rows.append({**rows[0], "annotation": str(file)})
    rows.append({**rows[0], "annotation": Path(rows[0]["annotation"]).read_bytes()})
    rows.append({**rows[0], "annotation": {"bytes": None, "path": rows[0]["annotation"]}})
    found = encoded(task(), rows)
    labels = task().collate(found, training=False)["_labels"]
    assert all(torch.equal(each, labels[0]) for each in labels)
    assert [each.arrays["pixels"] for each in found] == [[SIDE**2 // 2, SIDE**2 // 2, 0]] * len(rows)


def test_bad_masks_are_errors_with_row_and_path(tmp_path: Path) -> None:
    colours = Image.new("RGB", (8, 8), (200, 10, 10))
    rows = [
        row(tmp_path, np.ones((8, 8))),
        row(tmp_path, colours),
        row(tmp_path, np.ones((8, 8)), size=(9, 8)),
        row(tmp_path, np.full((8, 8), 3)),
        {**row(tmp_path, np.ones((8, 8))), "annotation": "missing.png"},
    ]
    Path(rows[3]["image"]).write_bytes(b"no picture")
    rows.append(row(tmp_path, np.full((8, 8), 7)))
    found = encoded(task(), rows)
    said = ["has colours (RGB)", "the mask has 8 x 8 pixels, its picture 9 x 8", "is not a picture", "no such file",
            "holds the values 7; those of the labels are 0 to 2, and 255 does not count"]  # fmt: skip
    assert not isinstance(found[0], DataError)
    for number, (error, words) in enumerate(zip(found[1:], said, strict=True), start=2):
        assert words in error.message
        column = "image" if number == 4 else "annotation"
        assert (error.file, error.line, error.key) == ("a.jsonl", number, column)
        assert rows[number - 1][column] in error.message


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_turns_with_its_picture(tmp_path: Path, orientation: int) -> None:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:10, :24] = 1
    exif = Image.Exif()
    exif[0x0112] = orientation
    paths = row(tmp_path, mask)
    Image.fromarray(mask * 255).convert("RGB").save(paths["image"], exif=exif)
    batch = task().collate(encoded(task(), [paths]), training=False)
    assert torch.equal(batch["_labels"][0] == 1, batch["pixel_values"][0, 0] > 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_a_mask_that_was_drawn_on_the_upright_picture_stays(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = row(tmp_path, np.arange(8 * 16).reshape(16, 8) < 64)  # upper half
    Image.new("RGB", (16, 8)).save(paths["image"], kind, exif=exif)
    labels = task().collate(encoded(task(), [paths]), training=False)["_labels"][0]
    assert labels[: SIDE // 2].all()
    assert not labels[SIDE // 2 :].any()


def test_classes_are_found(tmp_path: Path) -> None:
    rows = [row(tmp_path, [[0, 3], [255, 0]])]
    assert scanned(rows, NAME, kind="segformer").labels == ("0", "1", "2", "3")
    assert scanned(rows * 2 + [row(tmp_path, [[1]])], NAME, kind="segformer", reduce_labels=True).labels == (
        "1",
        "2",
        "3",
    )
    with pytest.raises(DataError, match="hold the values 0, 128, which hardly are the numbers of classes"):
        scanned([row(tmp_path, [[0, 128]])], NAME, kind="segformer")
    assert scanned([row(tmp_path, [[0, 255]])], NAME, kind="segformer", binary_masks=True).labels == ("0", "1")
    with pytest.raises(DataError, match="hold the values 0, 255, of which 1 count") as caught:
        scanned([row(tmp_path, [[0, 255]])], NAME, kind="segformer")
    assert "binary mask, in which 255 stands for 1" in str(caught.value.hint)


def test_the_task_is_found() -> None:
    config = segformer_config(architectures=["SegformerForSemanticSegmentation"])
    assert find_task(config, ["image", "label"])[0] == NAME


def test_binary_masks_stop_a_run(tmp_path: Path) -> None:
    recipe = CASES[NAME].write(tmp_path)
    (tmp_path / "pictures").mkdir()
    rows = [row(tmp_path / "pictures", 255 * np.eye(8)) for _ in range(3)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(DataError, match="binary_masks: 3 of 3 rows have a mask of 0 and 255 only"):
        run_recipe(recipe)
    [error] = encoded(task(ignore_index=7), rows[:1])
    assert "holds the values 255" in error.message
    assert "binary mask" in str(error.hint)


def test_odd_classes_are_found(tmp_path: Path, cli: Callable) -> None:
    recipe = CASES[NAME].write(tmp_path)
    (tmp_path / "pictures").mkdir()
    mask = np.zeros((SIDE, SIDE))
    mask[0, :2] = 1
    rows = [row(tmp_path / "pictures", mask) for _ in range(2)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    page = tmp_path / "page.html"
    ran = cli("inspect", recipe, "--rows", 1, "--html", page)
    assert "missing_classes: 2 of 2 rows are of other classes than blue, in no mask" in ran
    assert "unbalanced_masks: 2 of 2 rows have masks that together are nearly all of one class: 'floor', 99.8%" in ran
    assert "[[floor 100%, red 0%]]" in ran
    assert ", ..." not in ran  # no row is to blame
    assert '<img src="data:image/png;base64,' in page.read_text()


@pytest.fixture(scope="module")
def reduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of two labels, 1 and 2 in the masks."""
    recipe = CASES[NAME].write(tmp_path_factory.mktemp("reduced"))
    changes = ("task.labels=[red, blue]", "task.reduce_labels=true", "training.max_steps=40")
    return run_recipe(recipe, *changes).folder


def test_predict_writes_masks_and_overlays(
    reduced: Path, cli: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [write_scene(tmp_path / "in", number, size=50)["image"] for number in range(3)]
    ran = cli("predict", reduced, *paths, "--batch-size", 2)
    answers = [json.loads(line) for line in ran.splitlines()]
    assert [each["mask"] for each in answers] == [f"peftcli.masks/0000{number}.png" for number in (1, 2, 3)]
    for answer in answers:
        values = np.asarray(Image.open(answer["mask"]))
        assert values.shape == (50, 50)
        assert set(np.unique(values)) <= {1, 2}  # those of the training masks
        assert list(answer["shares"]) == ["red", "blue"]
        assert answer["shares"]["red"] == pytest.approx((values == 1).mean())
        assert np.asarray(Image.open(answer["mask"].replace(".png", ".overlay.png"))).shape == (50, 50, 3)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"image": path}) + "\n" for path in paths))
    cli("predict", reduced, "--input", "in.jsonl", "--output", "out/a.jsonl", "--batch-size", 1)
    found = [json.loads(line) for line in Path("out/a.jsonl").read_text().splitlines()]
    assert [each["mask"] for each in found] == [f"out/a.jsonl.masks/0000{number}.png" for number in (1, 2, 3)]
    assert Path(found[2]["mask"]).read_bytes() == Path(answers[2]["mask"]).read_bytes()


def test_the_whole_decode_head_is_saved(reduced: Path) -> None:
    tensors = load_file(reduced / "adapter_model.safetensors")
    model = transformers.SegformerForSemanticSegmentation(segformer_config(num_labels=2))
    wanted = {f"base_model.model.decode_head.{name}" for name in model.decode_head.state_dict()}
    assert wanted - {name for name in tensors if "lora_" not in name} <= {
        "base_model.model.decode_head.batch_norm.num_batches_tracked"
    }
    assert tensors["base_model.model.decode_head.batch_norm.running_mean"].abs().max() > 0
    assert json.loads((reduced / "preprocessor_config.json").read_text())["do_reduce_labels"] is True
    described = json.loads((reduced / "task.json").read_text())
    settings = {"labels": ["red", "blue"], "ignore_index": 255, "binary_masks": False, "reduce_labels": True}
    assert described["settings"] == settings


@pytest.mark.slow
def test_processes_evaluate_with_the_statistics_that_are_saved(cli: Callable, tmp_path: Path) -> None:
    recipe = CASES[NAME].write(tmp_path)
    settings = ("training.per_device_train_batch_size=1", "training.max_steps=4", "training.eval_strategy=epoch")
    words = ("train", recipe, *settings, "dataset.limit=3")  # in every other step, process 1 has no row
    children = [Child(tmp_path, *words, env=each) for each in ranks()]
    assert [child.wait() for child in children] == [0, 0], children[0].err
    measured = cli("evaluate", recipe, "--adapter", tmp_path / "out", "--json")
    assert read_run(tmp_path / "out")["eval"]["last"] == pytest.approx(measured["eval"]["last"], rel=1e-5)


def test_the_adapter_loads_without_the_number_of_labels(reduced: Path) -> None:
    own = AutoPeftModel.from_pretrained(reduced)
    assert own.config.id2label == {0: "red", 1: "blue"}
    assert own(pixel_values=torch.randn(1, 3, SIDE, SIDE)).logits.shape == (1, 2, SIDE // 4, SIDE // 4)


def test_the_other_spelling_of_the_targets_is_named() -> None:
    with torch.device("meta"):
        model = transformers.SegformerForSemanticSegmentation(segformer_config(num_labels=3))
    with pytest.raises(AdapterError, match="closest: q_proj"):
        get_peft_model(model, LoraConfig(target_modules=["query", "value"]))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "targets"), [("dpt", "all-linear"), ("upernet", "[pwconv1, pwconv2]")])
def test_other_models_train_and_load(tmp_path: Path, cli: Callable, kind: str, targets: str) -> None:
    recipe = CASES[NAME].write(tmp_path)
    changes = (f"base_model={classifier_base(kind)}", f"method.target_modules={targets}")
    run = run_recipe(recipe, *changes, "training.eval_strategy=steps", "training.eval_steps=6")
    assert run.losses[-1] < run.losses[0]
    assert not [name for name in load_file(run.folder / "adapter_model.safetensors") if "auxiliary" in name]
    measured = cli("evaluate", recipe, *changes, "--adapter", run.folder, "--json")["eval"]["last"]
    assert measured == pytest.approx(run.run["eval"]["last"], rel=1e-5)
