"""Layouts of sounds and pictures."""

from __future__ import annotations

import io
import random
from pathlib import Path

import contents as made
from files import write_csv, write_jsonl, write_parquet, write_text
from kinds import REFUSES, layout

HEARS, SEES, PARTS, PAINTS = "speech_recognition", "image_classification", "semantic_segmentation", "text_to_image"
CLIPS = 40

# Sounds


@layout(
    "Common Voice: TSV beside clips",
    HEARS,
    "whisper",
    {"audio": "path", "transcript": "sentence"},
    data="cv-corpus/en/train.tsv",
)
def common_voice_tsv(folder: Path, draw: random.Random) -> None:
    english = folder / "cv-corpus" / "en"
    for part, count in (("train", CLIPS), ("dev", 10), ("test", 10)):
        rows = []
        for at in range(count):
            samples, said = made.sound(draw)
            name = f"common_voice_en_{part}{at}.mp3"
            made.save_sound(english / "clips" / name, samples)
            votes = {"up_votes": 2, "down_votes": 0, "age": "", "gender": "", "accents": "", "locale": "en"}
            rows.append({"client_id": f"{draw.getrandbits(256):x}", "path": name, "sentence": said, **votes})
        write_csv(english / f"{part}.tsv", rows, delimiter="\t")


@layout("LJ Speech", HEARS, "whisper", data="LJSpeech-1.1")
def ljspeech(folder: Path, draw: random.Random) -> None:
    lines = []
    for at in range(CLIPS):
        samples, said = made.sound(draw)
        made.save_sound(folder / "LJSpeech-1.1" / "wavs" / f"LJ001-{at:04}.wav", samples)
        lines.append(f"LJ001-{at:04}|{said.upper()}|{said}")
    write_text(folder / "LJSpeech-1.1" / "metadata.csv", "\n".join(lines) + "\n")
    write_text(folder / "LJSpeech-1.1" / "README", "The LJ Speech Dataset\n")


@layout("LibriSpeech", HEARS, "whisper", data="LibriSpeech/train-clean-100")
def librispeech(folder: Path, draw: random.Random) -> None:
    for speaker, chapter in ((84, 121123), (251, 136532)):
        place, lines = folder / "LibriSpeech" / "train-clean-100" / str(speaker) / str(chapter), []
        for at in range(CLIPS // 2):
            samples, said = made.sound(draw)
            name = f"{speaker}-{chapter}-{at:04}"
            made.save_sound(place / f"{name}.flac", samples)
            lines.append(f"{name} {said.upper()}")
        write_text(place / f"{speaker}-{chapter}.trans.txt", "\n".join(lines) + "\n")


@layout(
    "datasets' audiofolder with metadata.csv",
    HEARS,
    "whisper",
    {"audio": "file_name", "transcript": "transcription"},
    data="train",
)
def audiofolder(folder: Path, draw: random.Random) -> None:
    rows = []
    for at in range(CLIPS):
        samples, said = made.sound(draw)
        made.save_sound(folder / "train" / f"{at:03}.wav", samples)
        rows.append({"file_name": f"{at:03}.wav", "transcription": said})
    write_csv(folder / "train" / "metadata.csv", rows)


# Pictures


def shapes(draw: random.Random, count: int) -> list[str]:
    """Names of shapes, each about as often."""
    return [made.SHAPES[at % 3] for at in draw.sample(range(count), count)]


@layout("A folder a class", SEES, "pictures", {"image": "image", "label": "label"}, data="flowers")
def class_folders(folder: Path, draw: random.Random) -> None:
    for at, shape in enumerate(shapes(draw, 90)):
        path = folder / "flowers" / shape / f"{at}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        made.picture(draw, shape)[0].save(path)


@layout(
    "Folders train and val of a folder a class",
    SEES,
    "pictures",
    {"image": "image", "label": "label"},
    data="hymenoptera",
)
def split_folders(folder: Path, draw: random.Random) -> None:
    for part, count in (("train", 90), ("val", 30)):
        for at, shape in enumerate(shapes(draw, count)):
            path = folder / "hymenoptera" / part / shape / f"{at}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            made.picture(draw, shape)[0].save(path)


@layout(
    "Dog Breed of Kaggle: ids without a suffix",
    SEES,
    "pictures",
    {"image": "id", "label": "breed"},
    {"image": "image", "label": "breed"},
    data="labels.csv",
)
def kaggle_labels_csv(folder: Path, draw: random.Random) -> None:
    rows = []
    (folder / "train").mkdir(parents=True)
    for shape in shapes(draw, 90):
        name = f"{draw.getrandbits(128):032x}"
        made.picture(draw, shape)[0].save(folder / "train" / f"{name}.jpg")
        rows.append({"id": name, "breed": shape})
    write_csv(folder / "labels.csv", rows)


@layout("Fashion-MNIST as parquet", SEES, "pictures", {"image": "image", "label": "label"}, data="fashion.parquet")
def fashion_mnist_parquet(folder: Path, draw: random.Random) -> None:
    from datasets import ClassLabel, Features, Image

    rows = []
    for at, shape in enumerate(shapes(draw, 90)):
        file = io.BytesIO()
        made.picture(draw, shape, 28)[0].convert("L").save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": f"{at}.png"}, "label": made.SHAPES.index(shape)})
    features = Features({"image": Image(), "label": ClassLabel(names=list(made.SHAPES))})
    write_parquet(folder / "fashion.parquet", rows, features)


@layout(
    "datasets' imagefolder with metadata.jsonl",
    SEES,
    "pictures",
    {"image": "file_name", "label": "label"},
    data="photos",
)
def imagefolder_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    (folder / "photos").mkdir(parents=True)
    for at, shape in enumerate(shapes(draw, 90)):
        made.picture(draw, shape)[0].save(folder / "photos" / f"{at:04}.png")
        rows.append({"file_name": f"{at:04}.png", "label": shape})
    write_jsonl(folder / "photos" / "metadata.jsonl", rows)


def scenes(folder: Path, draw: random.Random, image: str, mask: str, factor: int, count: int = 60) -> None:
    """Write pictures and masks by these patterns of names."""
    for at in range(count):
        pictures = made.picture(draw, made.SHAPES[at % 3])
        for pattern, each in ((image, pictures[0]), (mask, pictures[1].point(lambda value: value * factor))):
            path = folder / pattern.format(at)
            path.parent.mkdir(parents=True, exist_ok=True)
            each.save(path)


@layout("Folders images and masks", PARTS, "masks", data="seg")
def images_and_masks(folder: Path, draw: random.Random) -> None:
    scenes(folder, draw, "seg/images/{:03}.png", "seg/masks/{:03}.png", 1)


@layout("Oxford-IIIT Pets: trimaps", PARTS, "masks", data="oxford-pets")
def oxford_pets(folder: Path, draw: random.Random) -> None:
    scenes(folder, draw, "oxford-pets/images/pet_{}.jpg", "oxford-pets/annotations/trimaps/pet_{}.png", 1)
    for path in sorted(folder.rglob("trimaps/*.png")):  # 1 is the pet, 2 the background, 3 the edge
        from PIL import Image, ImageFilter

        mask = Image.open(path)
        wide = mask.filter(ImageFilter.MaxFilter(3))
        inner = [3 if b and not a else 1 if a else 2 for a, b in zip(mask.tobytes(), wide.tobytes(), strict=True)]
        mask.putdata(inner)
        mask.save(path)
    lines = [f"pet_{at} 1 1 1" for at in range(60)]
    write_text(folder / "oxford-pets" / "annotations" / "trainval.txt", "\n".join(lines) + "\n")


@layout("Carvana of Kaggle: masks of 0 and 255", PARTS, "masks", data="carvana/train carvana/train_masks")
def carvana(folder: Path, draw: random.Random) -> None:
    scenes(folder, draw, "carvana/train/{:03}.jpg", "carvana/train_masks/{:03}_mask.gif", 255)


@layout("Masks of 0 and 255 beside the pictures", PARTS, "masks", data="nuclei")
def black_and_white_masks(folder: Path, draw: random.Random) -> None:
    scenes(folder, draw, "nuclei/images/{:03}.png", "nuclei/masks/{:03}.png", 255)


# Pictures to paint


@layout("A caption in a .txt beside each picture (kohya)", PAINTS, "pipeline", data="10_shapes")
def captions_txt(folder: Path, draw: random.Random) -> None:
    for at, shape in enumerate(shapes(draw, 12)):
        write_text(folder / "10_shapes" / f"{at:03}.txt", f"a {shape} on noise, {draw.choice(made.PLACES)}")
        made.picture(draw, shape)[0].save(folder / "10_shapes" / f"{at:03}.png")


@layout(
    "Pokemon captions: metadata.jsonl",
    PAINTS,
    "pipeline",
    {"image": "file_name", "caption": "text"},
    data="pokemon/train",
)
def captions_jsonl(folder: Path, draw: random.Random) -> None:
    rows = []
    (folder / "pokemon" / "train").mkdir(parents=True)
    for at, shape in enumerate(shapes(draw, 12)):
        made.picture(draw, shape)[0].save(folder / "pokemon" / "train" / f"{at:04}.png")
        rows.append({"file_name": f"{at:04}.png", "text": f"a drawing of a {shape} in {draw.choice(made.PLACES)}"})
    write_jsonl(folder / "pokemon" / "train" / "metadata.jsonl", rows)


@layout("DreamBooth: five pictures of a thing", PAINTS, "pipeline", data="dog")
def dreambooth(folder: Path, draw: random.Random) -> None:
    (folder / "dog").mkdir(parents=True)
    for at in range(5):
        made.picture(draw, "circle")[0].save(folder / "dog" / f"alvan-{at}.jpeg")


@layout("Pictures without a label, for a classifier", REFUSES, "pictures", data="unsorted")
def pictures_without_labels(folder: Path, draw: random.Random) -> None:
    (folder / "unsorted").mkdir(parents=True)
    for at in range(20):
        made.picture(draw, "cross")[0].save(folder / "unsorted" / f"IMG_{at:04}.jpg")
