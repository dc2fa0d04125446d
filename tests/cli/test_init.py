"""``peftcli init``: from rows as people have them to a recipe of the right task and columns, or a question."""

from __future__ import annotations

import csv
import json
import os
import pty
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.recipe import load_recipe

WORDS = ("camera", "phone", "battery", "great", "bad", "service", "hotel", "food", "taste", "really", "very", "staff")
CONFIGS = {
    "encoder": {"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 100, "hidden_size": 32},
    "decoder": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 100, "hidden_size": 32},
    "seq2seq": {
        **{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 100, "d_model": 32},
        "is_encoder_decoder": True,
    },
    "vision": {"model_type": "vit", "architectures": ["ViTForImageClassification"], "num_channels": 3},
    "audio": {"model_type": "whisper", "is_encoder_decoder": True, "num_mel_bins": 80, "vocab_size": 51865},
}
DRAW = random.Random(1)


def text(words: int = 12) -> str:
    return " ".join(DRAW.choices(WORDS, k=words)) + f" the {DRAW.randrange(10**6)}"


def rows(**columns: Callable[[int], Any]) -> list[dict[str, Any]]:
    return [{name: make(at) for name, make in columns.items()} for at in range(120)]


def turns(at: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]


def start(at: int) -> str:
    return f"\n\nHuman: question {at} of many words\n\nAssistant: "


def tagged(at: int) -> list[str]:
    return ["B-PER", "O", "O", "B-LOC"]


def word(*names: Any) -> Callable[[int], Any]:
    return lambda at: names[at % len(names)]


CASES: dict[str, tuple[str | None, list[dict[str, Any]], str, dict[str, Any]]] = {
    "names of others": (
        None,
        rows(id=lambda at: at, review=lambda at: text(), sentiment=word("good", "bad")),
        "sequence_classification",
        {"text": "review", "label": "sentiment"},
    ),
    "names of nobody": (
        "encoder",
        rows(wert=lambda at: text(), stufe=word("hoch", "tief", "mittel")),
        "sequence_classification",
        {"text": "wert", "label": "stufe"},
    ),
    "title and body": (
        "encoder",
        rows(title=lambda at: text(2), body=lambda at: text(60), category=word("a", "b", "c")),
        "sequence_classification",
        {"text": "body", "label": "category"},
    ),
    "joined labels": (
        "encoder",
        rows(plot=lambda at: text(), genres=word("drama|war", "war", "drama", "comedy|war", "comedy")),
        "sequence_classification",
        {"text": "plot", "label": "genres"},
    ),
    "columns of 0 and 1": (
        "encoder",
        rows(id=lambda at: f"a{at}", comment_text=lambda at: text(), toxic=word(0, 1), insult=word(0, 0, 1)),
        "sequence_classification",
        {"text": "comment_text", "labels": ["toxic", "insult"]},
    ),
    "a number": (
        "encoder",
        rows(essay=lambda at: text(), grade=lambda at: round(DRAW.uniform(0, 5), 2)),
        "sequence_classification",
        {"text": "essay", "label": "grade"},
    ),
    "a pair of sentences": (
        "encoder",
        rows(premise=lambda at: text(), hypothesis=lambda at: text(), label=word(0, 1, 2)),
        "sequence_classification",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
    ),
    "tokens and tags": (
        "encoder",
        rows(words=lambda at: text(2).split(), ner=tagged),
        "token_classification",
        {"tokens": "words", "tags": "ner"},
    ),
    "spans": (
        "encoder",
        rows(text=lambda at: text(), label=lambda at: [[0, 3, word("A", "B")(at)]]),
        "token_classification",
        {"text": "text", "entities": "entities"},
    ),
    "answers without places": (
        "encoder",
        rows(
            question=lambda at: text(),
            context=lambda at: f"{at} lives in Turin, the city",
            answer=word("in Turin", "the city"),
        ),
        "question_answering",
        {"question": "question", "context": "context", "answers": "answer"},
    ),
    "embeddings": (
        "encoder",
        rows(query=lambda at: text(), positive=lambda at: text(), negative=lambda at: text()),
        "feature_extraction",
        {"anchor": "query", "positive": "positive", "negative": "negative"},
    ),
    "chats": ("decoder", rows(messages=turns, source=word("a", "b")), "causal_lm", {"messages": "messages"}),
    "questions and answers": (
        "decoder",
        rows(question=lambda at: text(), answer=lambda at: text()),
        "causal_lm",
        {"prompt": "question", "completion": "answer"},
    ),
    "dolly": (
        "decoder",
        rows(
            instruction=lambda at: text(),
            context=lambda at: text() if at % 3 else "",
            response=lambda at: text(),
            category=word("qa", "summary", "chat"),
        ),
        "causal_lm",
        {"instruction": "instruction", "input": "context", "output": "response"},
    ),
    "transcripts": (
        "decoder",
        rows(chosen=lambda at: start(at) + text(), rejected=lambda at: start(at) + text()),
        "preference",
        {"chosen": "chosen", "rejected": "rejected"},
    ),
    "kto": (
        "decoder",
        rows(prompt=lambda at: text(), completion=lambda at: text(), label=word(True, False)),
        "preference",
        {"prompt": "prompt", "completion": "completion", "label": "label"},
    ),
    "a translation": (
        "seq2seq",
        rows(id=lambda at: at, translation=lambda at: {"en": text(), "fr": text()}),
        "seq2seq_lm",
        {"prompt": "translation.en", "completion": "translation.fr"},
    ),
    "a summary": (
        "seq2seq",
        rows(article=lambda at: text(80), highlights=lambda at: text(), id=lambda at: f"x{at}"),
        "seq2seq_lm",
        {"prompt": "article", "completion": "highlights"},
    ),
}


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Path]:
    """The folder of a base model of a family: nothing but its config, which is all that is read."""

    def make(family: str) -> Path:
        folder = tmp_path / family
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIGS[family]))
        return folder

    return make


def write_rows(path: Path, found: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


@pytest.mark.parametrize("name", CASES)
def test_the_rows_decide_task_and_columns(name: str, tmp_path: Path, base: Callable, cli: Callable) -> None:
    family, found, task, columns = CASES[name]
    data, output = write_rows(tmp_path / "rows.jsonl", found), tmp_path / "recipe.yaml"
    ran = cli("init", data, "--output", output, "--json", *(["--base", base(family)] if family else []))
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert (made["task"], made["columns"]) == (task, columns)
    recipe = load_recipe(output)
    assert (recipe.task or {})["type"] == task
    assert output.read_text().startswith("# yaml-language-server: $schema=")


def test_two_readings_end_with_both_command_lines_one_of_which_decides(
    tmp_path: Path, base: Callable, cli: Callable
) -> None:
    found = rows(text=lambda at: text(), topic=word("a", "b"), sentiment=word("good", "good", "bad"))
    data, output = write_rows(tmp_path / "rows.jsonl", found), tmp_path / "recipe.yaml"
    ran = cli("init", data, "--output", output, "--json", "--base", base("encoder"))
    assert ran.code == 2
    lines = json.loads(ran.out)["error"]["hint"].splitlines()
    assert len(lines) == 2
    assert not output.exists()
    ran = cli(*lines[1].split()[1:], "--json")
    assert json.loads(ran.out)["columns"]["label"] in ("topic", "sentiment")


def test_on_a_terminal_it_asks_which_reading_is_right(tmp_path: Path, base: Callable) -> None:
    found = rows(text=lambda at: text(), topic=word("a", "b"), sentiment=word("good", "good", "bad"))
    data, output = write_rows(tmp_path / "rows.jsonl", found), tmp_path / "recipe.yaml"
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "peftcli", "init", str(data), "--output", str(output), "--base", base("encoder")]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.write(ours, b"2\n")
        answer = process.communicate(timeout=120)[0].decode()
        asked = os.read(ours, 10_000).decode()
    os.close(theirs)
    os.close(ours)
    second = next(line for line in asked.splitlines() if line.strip().startswith("2 "))
    assert "Which one" in asked
    assert process.returncode == 0
    label = load_recipe(output).dataset.columns["label"]
    assert label in second
    assert f"label: {label}" in answer


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (rows(id=lambda at: at), "no task that is known"),
        (rows(text=lambda at: text(), label=word("spam")), "two classes are needed"),
        (rows(text=lambda at: text(), label=lambda at: f"l{at}"), "is there once"),
    ],
)
def test_data_that_are_for_nothing_are_one_error(
    found: list[dict[str, Any]], message: str, tmp_path: Path, base: Callable, cli: Callable
) -> None:
    data, output = write_rows(tmp_path / "rows.jsonl", found), tmp_path / "recipe.yaml"
    ran = cli("init", data, "--output", output, "--base", base("encoder"))
    assert ran.code == 3
    assert message in ran.err
    assert len(ran.err.splitlines()) <= 6
    assert not output.exists()


def test_a_recipe_is_not_overwritten(tmp_path: Path, cli: Callable) -> None:
    data, output = write_rows(tmp_path / "rows.jsonl", CASES["kto"][1]), tmp_path / "recipe.yaml"
    output.write_text("mine")
    ran = cli("init", data, "--output", output)
    assert ran.code == 2
    assert "--overwrite" in ran.err
    assert output.read_text() == "mine"
    assert cli("init", data, "--output", output, "--overwrite").code == 0


def test_splits_groups_and_lengths_are_found(tmp_path: Path, cli: Callable) -> None:
    with (tmp_path / "all.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars", "user_id"])
        writer.writerows([text(), at % 5 + 1, f"u{at % 40}"] for at in range(400))
    output = tmp_path / "recipe.yaml"
    assert cli("init", tmp_path / "all.csv", "--output", output).code == 0
    found = yaml.safe_load(output.read_text())
    assert found["dataset"]["group_by"] == "user_id"
    assert found["dataset"]["eval_fraction"] == 0.1
    assert found["dataset"]["max_length"] == 64
    (tmp_path / "splits").mkdir()
    for name in ("train", "dev", "test"):
        write_rows(tmp_path / "splits" / f"{name}.jsonl", CASES["kto"][1])
    ran = cli("init", tmp_path / "splits", "--output", output, "--overwrite", "--json")
    made = json.loads(ran.out)
    assert [Path(each).name for each in (*made["train"], made["eval"])] == ["train.jsonl", "dev.jsonl"]


def test_torch_is_not_imported(tmp_path: Path, base: Callable) -> None:
    data = write_rows(tmp_path / "rows.jsonl", CASES["chats"][1])
    code = "import sys; from peftcli.cli.app import main; sys.exit(main(sys.argv[1:]) + ('torch' in sys.modules))"
    command = [
        sys.executable,
        "-c",
        code,
        "init",
        data,
        "--output",
        tmp_path / "recipe.yaml",
        "--base",
        base("decoder"),
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert (tmp_path / "recipe.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet", "efficientnet"])
def test_a_model_of_convolutions_trains_from_the_recipe(kind: str, tmp_path: Path, cli: Callable) -> None:
    from classifierkit import classifier_base
    from PIL import Image

    for name, level in (("dark", 30), ("light", 200)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for at in range(20):
            Image.new("RGB", (32, 32), (level + at,) * 3).save(tmp_path / "pictures" / name / f"{at}.png")
    recipe = tmp_path / "recipe.yaml"
    ran = cli("init", tmp_path / "pictures", "--output", recipe, "--base", classifier_base(kind))
    assert ran.code == 0, ran.err
    assert "conv" in str(yaml.safe_load(recipe.read_text())["method"]["target_modules"])
    ran = cli("train", recipe, "training.max_steps=2", "training.bf16=false", f"training.output_dir={tmp_path / 'out'}")
    assert ran.code == 0, ran.err


def a_word_a_row() -> list[dict[str, Any]]:
    words, tags = ("Ada", "lives", "in", "Turin"), ("B-PER", "O", "O", "B-LOC")
    return [
        {"Sentence #": "" if at else f"Sentence: {number}", "Word": words[at], "Tag": tags[at]}
        for number in range(30)
        for at in range(4)
    ]


CONVERTED: dict[str, tuple[str, list[dict[str, Any]], str, dict[str, Any]]] = {
    "a word a row": ("encoder", a_word_a_row(), "token_classification", {"tokens": "tokens", "tags": "tags"}),
    "lists as text": (
        "encoder",
        rows(tokens=lambda at: str(text(2).split()), tags=lambda at: str(["B-PER", "O", "O", f"B-{at % 3}"])),
        "token_classification",
        {"tokens": "tokens", "tags": "tags"},
    ),
    "segments": (
        "decoder",
        rows(segments=lambda at: [{"label": False, "text": text()}, {"label": True, "text": text()}]),
        "causal_lm",
        {"prompt": "prompt", "completion": "completion"},
    ),
    "two answers, a third of them equal": (
        "decoder",
        rows(
            prompt=lambda at: text(),
            response_a=lambda at: text(),
            response_b=lambda at: text(),
            winner=word("a", "b", "tie"),
        ),
        "preference",
        {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    ),
}
LEFT_OUT = {"two answers, a third of them equal": "40 rows left out"}


@pytest.mark.parametrize("name", CONVERTED)
def test_rows_of_other_forms_are_converted_beside_the_recipe(
    name: str, tmp_path: Path, base: Callable, cli: Callable
) -> None:
    family, found, task, columns = CONVERTED[name]
    data, output = write_rows(tmp_path / "rows.jsonl", found), tmp_path / "out" / "recipe.yaml"
    ran = cli("init", data, "--output", output, "--json", "--base", base(family))
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert (made["task"], made["columns"]) == (task, columns)
    assert made["train"] == [str(tmp_path / "out" / "recipe.rows.jsonl")]
    [note] = [note for note in made["notes"] if "was converted" in note]
    assert note.partition("; ")[2] == LEFT_OUT.get(name, "")
    first = json.loads(Path(made["train"][0]).read_text().splitlines()[0])
    assert set(columns) <= {*first}


@pytest.mark.parametrize("suffix", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_damaged_archive_is_one_error(suffix: str, tmp_path: Path, cli: Callable) -> None:
    write_rows(tmp_path / "rows.jsonl", CASES["kto"][1])
    kinds = {"zip": "zip", "tar.gz": "gztar", "tar.bz2": "bztar", "tar.xz": "xztar"}
    made = Path(shutil.make_archive(str(tmp_path / "rows"), kinds[suffix], tmp_path, "rows.jsonl"))
    content = bytearray(made.read_bytes())
    content[len(content) // 2] ^= 255
    made.write_bytes(content)
    ran = cli("init", made, "--output", tmp_path / "recipe.yaml")
    assert (ran.code, len(ran.err.splitlines())) == (3, 1)
    assert "cannot be unpacked" in ran.err


def test_pictures_and_masks_of_two_folders_are_paired(tmp_path: Path, base: Callable, cli: Callable) -> None:
    from PIL import Image

    folders = tmp_path / "train", tmp_path / "train_masks"
    for folder, suffix, count in zip(folders, (".jpg", "_mask.gif"), (6, 5), strict=True):
        folder.mkdir()
        for at in range(count):
            Image.new("L", (8, 8)).save(folder / f"{at}{suffix}")
    ran = cli("init", *folders, "--output", tmp_path / "recipe.yaml", "--json", "--base", base("vision"))
    made = json.loads(ran.out)
    assert (made["task"], made["rows"]) == ("semantic_segmentation", 5)
    assert made["notes"][0].endswith("5 pictures with a mask of the same name; 1 file without its other left out")


def test_files_of_one_name_are_converted_into_two(tmp_path: Path, base: Callable, cli: Callable) -> None:
    files = [write_rows(tmp_path / f"rows.{at}.jsonl", a_word_a_row()) for at in range(2)]
    ran = cli("init", *files, "--output", tmp_path / "recipe.yaml", "--json", "--base", base("encoder"))
    made = json.loads(ran.out)
    assert [Path(each).name for each in made["train"]] == ["recipe.rows.jsonl", "recipe.rows-2.jsonl"]
    assert made["rows"] == 60


def test_columns_without_a_name_are_left_out(tmp_path: Path, base: Callable, cli: Callable) -> None:
    lines = [f"{text()},{'ham' if at % 3 else 'spam'},{'more' * (at < 2)},\n" for at in range(60)]
    (tmp_path / "spam.csv").write_text("v2,v1,,\n" + "".join(lines) + "one\n", encoding="cp1252")
    ran = cli("init", tmp_path / "spam.csv", "--output", tmp_path / "recipe.yaml", "--json", "--base", base("encoder"))
    made = json.loads(ran.out)
    assert (made["rows"], made["columns"]) == (60, {"text": "v2", "label": "v1"})
    assert made["notes"][0].endswith("left out, in which 2 rows had a value; 1 bad row left out")


@pytest.mark.parametrize("name", ["photos", "colour"])
def test_an_archive_is_unpacked_and_masks_are_paired(name: str, tmp_path: Path, base: Callable, cli: Callable) -> None:
    from PIL import Image

    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as archive:
        for at in range(6):
            Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
            Image.new("L", (8, 8)).save(tmp_path / "a.png")
            archive.write(tmp_path / "a.jpg", f"scenes/{name}/{at}.jpg")
            archive.write(tmp_path / "a.png", f"scenes/masks/{at}_mask.png")
    output = tmp_path / "out" / "recipe.yaml"
    ran = cli("init", tmp_path / "scenes.zip", "--output", output, "--json", "--base", base("vision"))
    made = json.loads(ran.out)
    assert (made["task"], made["rows"]) == ("semantic_segmentation", 6)
    assert len(made["notes"]) == 2


def test_masks_of_coco_are_drawn_and_binary_ones_known(tmp_path: Path, base: Callable, cli: Callable) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    images, marks = [], []
    for at in range(12):
        Image.new("RGB", (20, 10)).save(tmp_path / "images" / f"{at}.png")
        images.append({"id": at, "file_name": f"{at}.png", "width": 20, "height": 10})
        outline = {"category_id": 7, "image_id": at, "area": 50, "segmentation": [[0, 0, 9, 0, 9, 4, 0, 4]]}
        runs = {"category_id": 3, "image_id": at, "area": 20, "segmentation": {"counts": [100, 20, 80]}}
        marks += [outline, runs, {"category_id": 3, "image_id": at, "bbox": [0, 0, 2, 2 + at % 3]}]
    names = [{"id": 3, "name": "car"}, {"id": 7, "name": "cat"}, {"id": 9, "name": "none"}]
    coco = tmp_path / "instances.json"
    coco.write_text(json.dumps({"images": images, "annotations": marks, "categories": names}))
    recipe, vision = tmp_path / "recipe.yaml", base("vision")
    ran = cli("init", coco, "--output", recipe, "--json", "--base", vision)
    assert ran.code == 0, ran.err
    assert "12 annotations without an outline left out" in json.loads(ran.out)["notes"][0]
    assert load_recipe(recipe).task == {"type": "semantic_segmentation", "labels": ["background", "car", "cat"]}
    mask = Image.open(tmp_path / "recipe.masks" / "0-0.png")
    assert [mask.getpixel(place) for place in ((5, 2), (10, 9), (19, 9))] == [2, 1, 0]

    ran = cli("init", coco, "--output", recipe, "--json", "--base", vision, "--overwrite", "--task", "object_detection")
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert load_recipe(recipe).task == {"type": "object_detection", "labels": ["car"]}
    assert made["notes"][0].endswith("boxes of 12 pictures of COCO")
    row = json.loads(Path(made["train"][0]).read_text().splitlines()[0])
    assert row == {"image": "images/0.png", "objects": {"bbox": [[0, 0, 2, 2]], "category": ["car"]}}
    boxes = [each for each in marks if "bbox" in each]
    boxes[0] = {**boxes[0], "bbox": [0, 0, 0, 2]}
    coco.write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    made = json.loads(cli("init", coco, "--output", recipe, "--json", "--base", vision, "--overwrite").out)
    assert (made["task"], made["rows"]) == ("object_detection", 12)
    assert "1 without area left out" in made["notes"][0]

    (tmp_path / "masks").mkdir()
    for at in range(12):
        Image.new("L", (20, 10), 255 * (at % 2)).save(tmp_path / "masks" / f"{at}.png")
    cli("init", tmp_path / "images", tmp_path / "masks", "--output", recipe, "--overwrite", "--base", vision)
    assert load_recipe(recipe).task == {"type": "semantic_segmentation", "binary_masks": True}
