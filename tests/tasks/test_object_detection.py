"""Object detection: what boxes mean, how they move with pixels, the loss of any split, mAP by COCO's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from classifierkit import encoded, open_task, table_of
from detectionkit import KINDS, SIDE, boxed_scenes, detector_base, open_detection
from PIL import Image
from safetensors.torch import load_file
from taskkit import CASES, coco_map
from trainkit import run_recipe, write_rows

from peftcli.errors import DataError, ModelError
from peftcli.tasks.average_precision import average_precision, match_boxes
from peftcli.tasks.base import PredictOptions
from peftcli.tasks.boxes import Cut, draw_boxes, objects_of
from peftcli.tasks.object_detection import ObjectDetection
from peftcli.tasks.pictures import open_image

_NAMES = ("red", "blue")


def _measured(rows: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Our figures of rows and answers, in the form that predict gives."""
    pictures = []
    for row, answer in zip(rows, answers, strict=True):
        objects, found = row["objects"], answer["objects"]
        crowd = np.array(objects.get("iscrowd", [0] * len(objects["bbox"])), bool)
        wanted, boxes = (np.array(each, float).reshape(-1, 4) for each in (objects["bbox"], [e["box"] for e in found]))
        kinds, theirs = (np.array(each) for each in (objects["category"], [each["label"] for each in found]))
        scores = np.array([each["score"] for each in found])
        pictures.append(
            {
                at: match_boxes(boxes[mine], scores[mine], wanted[own], crowd[own])
                for at, name in enumerate(_NAMES)
                if (mine := theirs == name).any() | (own := kinds == name).any()
            }
        )
    return average_precision(pictures)


def _drawn(seed: int, *, rounded: bool, crowds: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and answers near them, with equal scores and equal overlaps if ``rounded``."""
    draw = np.random.default_rng(seed)
    rows, answers = [], []
    for _ in range(12):
        count = int(draw.integers(0, 6))
        boxes = np.concatenate([draw.integers(0, 60, (count, 2)), draw.integers(4, 40, (count, 2))], axis=1)
        kinds = draw.choice(_NAMES, count).tolist()
        objects: dict[str, Any] = {"bbox": boxes.tolist(), "category": kinds}
        if crowds:
            objects["iscrowd"] = draw.integers(0, 2, count).tolist()
        found = []
        for box, name in int(draw.integers(0, 3)) * list(zip(boxes, kinds, strict=True)):
            moved = box + draw.normal(0, 3, 4)
            moved = np.abs(np.rint(moved) if rounded else moved) + np.array([0, 0, 1, 1])
            label = name if draw.random() < 0.8 else str(draw.choice(_NAMES))
            score = float(draw.integers(1, 4) / 4 if rounded else draw.random())
            found.append({"label": label, "score": score, "box": moved.tolist()})
        rows.append({"objects": objects})
        answers.append({"objects": found})
    return rows, answers


@pytest.mark.parametrize("crowds", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_map_is_that_of_pycocotools(seed: int, rounded: bool, crowds: bool) -> None:
    rows, answers = _drawn(seed, rounded=rounded, crowds=crowds)
    found = _measured(rows, answers)
    assert 0 < found["map"] < 1
    assert found == pytest.approx(coco_map(rows, answers), abs=1e-6)


_ONE = {"objects": {"bbox": [[10, 10, 20, 20]], "category": ["red"]}}
_EDGES = {
    "nothing is found": ([_ONE], [[]]),
    "all is right": ([_ONE], [[("red", 0.3, [10, 10, 20, 20])]]),
    "found twice": ([_ONE], [[("red", 0.9, [10, 10, 20, 20]), ("red", 0.9, [10, 10, 20, 20])]]),
    "a class without objects": ([_ONE], [[("blue", 0.9, [10, 10, 20, 20]), ("red", 0.5, [10, 10, 20, 20])]]),
    "more than a hundred": ([_ONE], [[*[("red", 0.9, [40, 40, 5, 5])] * 100, ("red", 0.1, [10, 10, 20, 20])]]),
    "exactly half": ([_ONE], [[("red", 0.9, [10, 10, 20, 10])]]),
    "on a picture without objects": (
        [_ONE, {"objects": {"bbox": [], "category": []}}],
        [[("red", 0.5, [10, 10, 20, 20])], [("red", 0.9, [10, 10, 20, 20])]],
    ),
}


@pytest.mark.parametrize("edge", _EDGES)
def test_map_of_edges(edge: str) -> None:
    rows, found = _EDGES[edge]
    answers = [
        {"objects": [dict(zip(("label", "score", "box"), each, strict=True)) for each in some]} for some in found
    ]
    assert _measured(rows, answers) == pytest.approx(coco_map(rows, answers), abs=1e-6)


def test_nothing_to_find_has_no_map() -> None:
    assert _measured([{"objects": {"bbox": [], "category": []}}], [{"objects": []}]) == {}


# --- rows ---------------------------------------------------------------------------------------------------------


def _row(tmp_path: Path, *boxes: Any, size: tuple[int, int] = (40, 20), **objects: Any) -> dict[str, Any]:
    Image.new("RGB", size).save(tmp_path / "a.png")
    return {
        "image": str(tmp_path / "a.png"),
        "objects": {"bbox": list(boxes), "category": ["red"] * len(boxes), **objects},
    }


@pytest.mark.parametrize(
    ("box", "form", "says"),
    [
        ([30, 5, 11, 5], "xywh", "leaves the picture of 40 x 20 pixels"),
        ([-1, 5, 9, 5], "xywh", "leaves the picture"),
        ([30, 5, 25, 9], "xyxy", "has its corners swapped"),
        ([30, 5, -2, 9], "xywh", "has a width or height below 0"),
        ([30, 5, 0, 9], "xywh", "has no area"),
        ([30, 5, 30, 9], "xyxy", "has no area"),
        ([30, 5, 9], "xywh", "not four numbers"),
        ([30, 5, None, 9], "xywh", "not four numbers"),
        ([30, 5, "nan", 9], "xywh", "not four numbers"),
    ],
)
def test_a_box_that_cannot_be_is_an_error_of_its_row(tmp_path: Path, box: Any, form: str, says: str) -> None:
    (found,) = encoded(open_detection(box_format=form), [_row(tmp_path, [1, 1, 4, 4], box)])
    assert isinstance(found, DataError)
    assert "box 2" in str(found)
    assert says in str(found)


def test_forms_of_rows(tmp_path: Path) -> None:
    plain = _row(tmp_path, [1, 2, 3, 4], [5, 6, 35.4, 14], iscrowd=[0, 1])
    objects = [{"bbox": [1, 2, 3, 4], "label": "red"}, {"bbox": [5, 6, 35.4, 14], "label": "red", "iscrowd": 1}]
    found = encoded(open_detection(), [plain, {**plain, "objects": objects}, {**plain, "objects": None}])
    for each in found[:2]:
        assert each.arrays["boxes"].tolist() == [[1, 2, 3, 4], [5, 6, 35, 14]], "half a pixel outside is cut off"
        assert each.arrays["crowd"].tolist() == [False, True]
    assert len(found[2].arrays["boxes"]) == 0, "a picture without objects"
    (corners,) = encoded(open_detection(box_format="xyxy"), [_row(tmp_path, [1, 2, 3, 4])])
    assert corners.arrays["boxes"].tolist() == [[1, 2, 2, 2]]
    for wrong in ("no JSON", [1], {"bbox": [[1, 2, 3, 4]], "category": []}, {"bbox": 3, "category": 4}):
        (error,) = encoded(open_detection(), [{**plain, "objects": wrong}])
        assert isinstance(error, DataError)
    with pytest.raises(ValueError, match="marks of a crowd"):
        objects_of({"bbox": [[1, 2, 3, 4]], "category": ["a"], "iscrowd": []})


def test_labels_are_found_in_the_rows(tmp_path: Path) -> None:
    task = open_detection(labels=[])
    assert task.needs_scan
    rows = [
        {**_row(tmp_path), "objects": {"bbox": [[0, 0, 2, 2]] * 2, "category": names}}
        for names in (["b", "a"], ["c", "b"])
    ]
    table, read = table_of(rows)
    assert task.scan([(table, iter(read))]).labels == ["b", "a", "c"]
    numbers = [{**each, "objects": {"bbox": [[0, 0, 2, 2]], "category": [3]}} for each in rows]
    table, read = table_of(numbers)
    assert task.scan([(table, iter(read))]).labels == ["0", "1", "2", "3"]
    (error,) = encoded(open_detection(), rows[:1])
    assert "'b' is not one of the classes: red, blue" in str(error)


def test_boxes_are_of_the_picture_as_it_is_shown(tmp_path: Path) -> None:
    upright, turned = Image.new("RGB", (40, 20)), Image.Exif()
    upright.paste((255, 0, 0), (4, 2, 14, 8))
    turned[0x0112] = 6  # stored lying; shown after a quarter turn
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned)
    row = {"image": str(tmp_path / "turned.png"), "objects": {"bbox": [[4, 2, 10, 6]], "category": ["red"]}}
    task = open_detection()
    (example,) = encoded(task, [row])
    assert tuple(example.arrays["picture"]) == (40, 20)
    batch = task.collate([example], training=True)
    assert batch["_boxes"].tolist() == [pytest.approx([9 / 40, 5 / 20, 10 / 40, 6 / 20])]
    red = (batch["pixel_values"][0, 0] > 0).nonzero().float()
    assert red.min(0).values / SIDE == pytest.approx(torch.tensor([2 / 20, 4 / 40]), abs=1.5 / SIDE)


def test_corners_given_as_widths_are_found_by_counts(tmp_path: Path) -> None:
    task, outcomes = open_detection(), []
    corners = [[2, 2, 12, 10], [20, 10, 30, 18], [1, 1, 9, 9], [25, 5, 39, 19]]
    table, rows = table_of([{**_row(tmp_path, box)} for box in corners])
    outcomes = task.encode(rows, task.read(table))
    assert isinstance(outcomes[1], DataError)
    assert "As xyxy, all boxes of the row lie in the picture: see task.box_format." in str(outcomes[1].hint)
    assert [getattr(each, "flags", None) for each in outcomes] == [3, None, 3, None]


def test_corners_given_as_widths_stop_a_run(tmp_path: Path) -> None:
    recipe = CASES["object_detection"].write(tmp_path)
    rows = []
    for each in boxed_scenes():
        boxes = [[left, top, left + wide, top + high] for left, top, wide, high in each["objects"]["bbox"]]
        rows.append({**each, "objects": {"bbox": boxes[:1], "category": each["objects"]["category"][:1]}})
    write_rows(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=r"leaves the picture(.|\n)*As xyxy, all boxes of the row lie in the picture"):
        run_recipe(recipe)
    with pytest.raises(DataError, match="boxes_are_corners"):
        run_recipe(recipe, "dataset.on_bad_row=skip", "task.labels=[red, blue]")


# --- augmentation -------------------------------------------------------------------------------------------------


def _colour_box(image: Image.Image) -> list[int]:
    found = np.argwhere(np.asarray(image)[..., 0] > 200)
    (top, left), (bottom, right) = found.min(0), found.max(0) + 1
    return [left, top, right - left, bottom - top]


def test_boxes_follow_the_pixels() -> None:
    image, box = Image.new("RGB", (60, 40)), np.array([[12.0, 9.0, 20.0, 14.0]])
    image.paste((255, 0, 0), (12, 9, 32, 23))
    seen = set()
    for draw in range(40):
        cut = Cut.drawn(("flip", "crop"), draw, image.size, box)
        assert cut == Cut.drawn(("flip", "crop"), draw, image.size, box)
        moved, kept = cut.moved(box)
        assert kept.all(), "of a picture with objects at least one stays"
        assert moved[0].tolist() == _colour_box(cut.of(image))
        seen.add((cut.flipped, cut.size != image.size))
    assert len(seen) == 4
    assert Cut.drawn((), 3, image.size, box) == Cut(0, 0, 60, 40)


def test_augmentation_is_for_training_alone() -> None:
    task = open_detection(augment=["flip", "crop"])
    (example,) = encoded(task, boxed_scenes()[:1])
    boxes = [task.collate([replace(example, draw=draw)], training=True)["_boxes"] for draw in range(6)]
    assert len({str(each.tolist()) for each in boxes}) > 1
    for draw in range(6):
        same = task.collate([replace(example, draw=draw)], training=False)["_boxes"]
        assert same.tolist() == open_detection().collate([example], training=True)["_boxes"].tolist()
    counted = task.step_inputs([replace(example, draw=3)])["_counts_of_step"]
    assert counted.tolist() == task.collate([replace(example, draw=3)], training=True)["_counts"].tolist()


# --- models -------------------------------------------------------------------------------------------------------


def _model(task: ObjectDetection, kind: str) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForObjectDetection.from_pretrained(
        detector_base(kind), ignore_mismatched_sizes=True, **task.model_options()
    )
    task.fit_model(model, None)
    task.check_model(model)
    for each in model.train().modules():
        if isinstance(each, torch.nn.BatchNorm2d):  # as training does where their weights do not train
            each.eval()
    return model


def _wide(tmp_path: Path) -> list[dict[str, Any]]:
    """Pictures of several shapes, with 0 to 3 objects."""
    rows = []
    for at, size in enumerate([(40, 20), (20, 40), (32, 32), (36, 30)]):
        Image.fromarray(np.random.default_rng(at).integers(0, 255, (*size[::-1], 3), np.uint8)).save(
            tmp_path / f"{at}.png"
        )
        boxes = [[2 + 3 * each, 3, 9, 8 + each] for each in range(3 - at)]
        objects = {"bbox": boxes, "category": ["red", "blue", "red"][: len(boxes)]}
        rows.append({"image": str(tmp_path / f"{at}.png"), "objects": objects})
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_models_own_however_a_step_is_split(tmp_path: Path, kind: str) -> None:
    task = open_detection(kind)
    examples, model = encoded(task, _wide(tmp_path)), _model(open_detection(kind), kind)
    batch, step = task.collate(examples, training=True), task.step_inputs(examples)
    counts = batch["_counts"].tolist()
    labels = [
        {"boxes": boxes, "class_labels": classes}
        for boxes, classes in zip(batch["_boxes"].split(counts), batch["_classes"].split(counts), strict=True)
    ]
    inputs = {name: value for name, value in batch.items() if not name.startswith("_")}
    own = model(**inputs, labels=labels).loss
    whole = task.loss(model, batch | step).total / len(examples)
    torch.testing.assert_close(whole, own)
    parts = [task.loss(model, task.collate(examples[at], training=True) | step).total for at in (slice(1), slice(1, 4))]
    torch.testing.assert_close(sum(parts) / len(examples), own)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_in_pixels_of_the_picture(tmp_path: Path, kind: str) -> None:
    """What the model says of shares of the picture, whatever was padded or stretched for it."""
    task, rows = open_detection(kind, threshold=0.0), _wide(tmp_path)
    model = _model(task, kind).eval()
    _, read = table_of([{"image": each["image"]} for each in rows])
    answers = list(task.predict(model, read, PredictOptions(batch_size=3, beside=tmp_path / "out.jsonl")))
    for row, answer in zip(rows, answers, strict=True):
        image = open_image(Path(row["image"]).read_bytes())
        with torch.no_grad():
            outputs = model(**task._pixels([image]))
        found = task.processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[image.size[::-1]])[0]
        assert sorted(each["score"] for each in answer["objects"]) == pytest.approx(
            sorted(found["scores"].tolist()), abs=1e-5
        )
        widths = sorted(each["box"][2] for each in answer["objects"])
        assert widths == pytest.approx(sorted((found["boxes"][:, 2] - found["boxes"][:, 0]).tolist()), abs=1e-3)
    assert open_image((tmp_path / "out.jsonl.boxes/00001.png").read_bytes()).size == (480, 240)


@pytest.mark.parametrize("kind", ["deformable_detr", "rt_detr"])
def test_heads_inside_the_body_and_shared_ones_train(tmp_path: Path, kind: str) -> None:
    recipe = replace(CASES["object_detection"], base=lambda: detector_base(kind)).write(tmp_path)
    run = run_recipe(recipe, "training.verify=true", "training.max_steps=2")
    heads = {name for name in load_file(run.folder / "adapter_model.safetensors") if "lora_" not in name}
    layers = [f"{'class_embed' if kind == 'deformable_detr' else 'model.decoder.class_embed'}.{at}" for at in range(2)]
    named = [*layers, *(["model.enc_score_head"] if kind == "rt_detr" else [])]
    assert heads == {f"base_model.model.{name}.{leaf}" for name in named for leaf in ("weight", "bias")}


def test_the_saved_processor_prepares_pictures_as_training_did(tmp_path: Path) -> None:
    for kind in ("detr", "yolos", "rt_detr"):
        task = open_detection(kind, resolution=48)
        task.save(tmp_path)
        image = open_image(Path(boxed_scenes()[0]["image"]).read_bytes()).resize((30, 50))
        again = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
        found = again(image, return_tensors="pt")
        for name, value in task._pixels([image]).items():
            torch.testing.assert_close(found[name], value)


def test_a_base_that_gives_no_boxes_is_refused() -> None:
    with pytest.raises(ModelError, match="gives no boxes"):
        open_task("object_detection", "vit", labels=["red", "blue"])


def test_boxes_are_drawn() -> None:
    image = Image.new("RGB", (64, 48))
    drawn = np.asarray(draw_boxes(image, np.array([[10.0, 8.0, 30.0, 20.0]]), [0]))
    assert not np.asarray(image).any(), "the picture stays as it is"
    assert [bool(drawn[place].any()) for place in ((8, 30), (28, 30), (20, 10), (40, 50))] == [True, True, True, False]
