"""Image classification: pictures of every kind come out right, broken ones are named."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from classifierkit import SIDE, classifier_base, encoded, image_processor, open_task, scanned, table_of, write_pictures
from PIL import Image

from peftcli.data.rows import Place, Reader, Row
from peftcli.data.sources import open_source
from peftcli.errors import DataError
from peftcli.schema import Source
from peftcli.tasks import files
from peftcli.tasks.pictures import check_image, open_image

LABELS: dict[str, Any] = {"labels": ["red", "blue"], "problem_type": "single_label"}
RED = (200, 30, 30)


def task(kind: str = "vit") -> Any:
    return open_task("image_classification", kind, **LABELS)


def picture(mode: str = "RGB", **options: Any) -> Image.Image:
    """Red on the left, blue on the right."""
    pixels = np.zeros((12, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = RED, (30, 30, 200)
    return Image.fromarray(pixels).convert(mode, **options)


def saved(image: Image.Image, path: Path, **options: Any) -> str:
    image.save(path, **options)
    return str(path)


def pixels(path: str) -> np.ndarray:
    return np.asarray(open_image(Path(path).read_bytes(), path).convert("RGB"))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tif", "a.gif", "a.webp", "a.jpg"])
def test_formats(tmp_path: Path, name: str) -> None:
    found = pixels(saved(picture(), tmp_path / name)).astype(int)
    assert np.abs(found[6, 2] - RED).max() < 25


def test_grey_palette_and_transparency_become_rgb(tmp_path: Path) -> None:
    grey = pixels(saved(picture("L"), tmp_path / "grey.png"))
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (pixels(saved(picture("RGBA"), tmp_path / "rgba.png")) == np.asarray(picture())).all()
    palette = pixels(saved(picture("P", palette=Image.Palette.ADAPTIVE), tmp_path / "p.png")).astype(int)
    assert np.abs(palette[6, 2] - RED).max() < 5
    assert pixels(saved(picture("1"), tmp_path / "bits.png")).max() == 255
    assert pixels(saved(picture("CMYK"), tmp_path / "cmyk.jpg")).shape == (12, 16, 3)


def test_a_model_of_one_channel_reads_grey(tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(classifier_base("vit"), num_channels=1)
    config.save_pretrained(tmp_path)
    image_processor("ViT")(size={"height": SIDE, "width": SIDE}, image_mean=[0.5], image_std=[0.5]).save_pretrained(
        tmp_path
    )
    one = open_task("image_classification", tmp_path, **LABELS)
    examples = encoded(one, [{"image": saved(picture(), tmp_path / "a.png"), "label": "red"}])
    for batch in (one.collate(examples, training=False), one.probe()):
        assert batch["pixel_values"].shape[1:] == (1, SIDE, SIDE)


def test_16_bits_of_grey_keep_their_shades(tmp_path: Path) -> None:
    shades = np.linspace(0, 65535, 16 * 12).reshape(12, 16).astype(np.uint16)
    found = pixels(saved(Image.fromarray(shades), tmp_path / "deep.png"))
    assert (found[..., 0] == shades // 256).all()


@pytest.mark.parametrize(
    ("name", "kind"),
    [("turned.jpg", b"\5"), ("turned.jpg", b"\2"), ("turned.tif", b"\5")],
    ids=["right", "odd", "tiff"],
)
def test_a_turned_picture_stands_upright(tmp_path: Path, name: str, kind: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    exif[0x011A] = 72.0  # dots of an inch: a fraction, or in odd files a text
    content = exif.tobytes().replace(b"\x01\x1a\0\5", b"\x01\x1a\0" + kind)
    turned = pixels(saved(picture(), tmp_path / name, exif=content, quality=100))
    assert turned.shape == (16, 12, 3)
    assert np.abs(turned[2, 6].astype(int) - RED).max() < 10  # the left of the file is on top


def test_broken_pictures_are_errors_with_row_and_path(tmp_path: Path) -> None:
    good = saved(picture(), tmp_path / "good.jpg")
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(Path(good).read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    names = ["good.jpg", "cut.jpg", "text.png", "empty.png", "missing.png"]
    found = encoded(task(), [{"image": str(tmp_path / name), "label": "red"} for name in names])
    assert not isinstance(found[0], DataError)
    for number, (name, error) in enumerate(zip(names[1:], found[1:], strict=True), start=2):
        assert (error.file, error.line, error.key) == ("a.jsonl", number, "image")
        assert str(tmp_path / name) in error.message
    [bad] = encoded(task(), [{"image": str(tmp_path), "label": "red"}])
    assert f"{tmp_path}: is a folder" in bad.message
    [bad] = encoded(task(), [{"image": b"no picture", "label": "red"}])
    assert "is not a picture" in bad.message
    [bad] = encoded(task(), [{"image": None, "label": "red"}])
    assert "expected a file or the bytes" in bad.message


def test_a_folder_of_pictures_is_labelled_by_its_folders(tmp_path: Path) -> None:
    write_pictures(tmp_path, 3)
    rows = list(open_source(Source(train=str(tmp_path))).rows())
    found = scanned([row.values for row in rows], "image_classification", kind="vit")
    assert found.labels == ("blue", "red")  # the folders' sorted names
    table, _ = table_of([rows[0].values])
    assert [outcome.examples[0].arrays["label"] for outcome in found.encode(rows, found.read(table))] == [[0.0]] * 3 + [
        [1.0]
    ] * 3


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    content = io.BytesIO()
    picture().save(content, "PNG")
    with pytest.raises(DataError, match=re.escape("the picture cannot be read")):
        open_image(content.getvalue())


@pytest.mark.parametrize("kind", ["vit", "resnet", "efficientnet", "siglip2"])
def test_the_model_reads_pictures(tmp_path: Path, kind: str) -> None:
    import transformers

    path = saved(picture(), tmp_path / "a.png")
    opened = task(kind)
    model = transformers.AutoModelForImageClassification.from_pretrained(opened.base.name, **opened.model_options())
    batch = opened.collate(encoded(opened, [{"image": path, "label": "blue"}] * 2), training=True)
    assert batch["labels"].tolist() == [1, 1]
    assert opened.loss(model.train(), batch).total.requires_grad
    assert model.eval()(**opened.probe()).logits.shape == (2, 2)


def test_the_processor_is_saved(tmp_path: Path) -> None:
    assert task().save(tmp_path) == ["task.json", "preprocessor_config.json"]
    assert (tmp_path / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("mode", ["int32", "float32", "deep", "wide"])
def test_grey_of_other_numbers_is_not_black(mode: str) -> None:
    grey = np.array([[0, 40], [128, 255]])
    values = {
        "int32": grey.astype(np.int32),
        "float32": (grey / 255).astype(np.float32),
        "deep": (grey * 257).astype(np.int32),
        "wide": grey.astype(np.float32),
    }[mode]
    stored = io.BytesIO()
    Image.fromarray(values).save(stored, "TIFF")
    check_image(stored.getvalue())
    assert np.array_equal(np.asarray(open_image(stored.getvalue()).convert("L")), grey)


def test_numbers_that_are_no_grey_are_an_error() -> None:
    stored = io.BytesIO()
    Image.fromarray(np.array([[-1.0, 3.0]], np.float32)).save(stored, "TIFF")
    for read in (check_image, open_image):
        with pytest.raises(DataError, match=r"its grey is from -1\.0 to 3\.0"):
            read(stored.getvalue())


def test_the_folders_without_a_file_are_named(tmp_path: Path) -> None:
    row = Row({"image": "pictures/a.png"}, Place("rows.jsonl", 1, 1), tmp_path)
    with pytest.raises(DataError) as caught:
        files.file_of(row, Reader("pictures", {"image": "image"}), "image")
    assert caught.value.message == f"pictures/a.png: no such file in {tmp_path} or {Path.cwd()}"


def test_what_is_too_long_for_a_path_is_an_error_of_its_row() -> None:
    with pytest.raises(DataError, match=r"x{255}\.\.\.: no such file|no such file") as caught:
        files.read_file("x" * 3000)
    assert len(str(caught.value.file)) < 300
