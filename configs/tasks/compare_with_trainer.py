"""Train a recipe of this folder for several seeds, here and with PEFT and transformers' Trainer (or TRL), and compare.

    python configs/tasks/compare_with_trainer.py configs/tasks/spam.yaml 0 1 2

Both sides have the same base model, rows, method, batch size, learning rate, schedule and number of epochs; they start
their new heads and adapters, and order their rows, by random numbers of their own. What either side wrote is measured
by ``peftcli evaluate``. peft must be installed, and for preferences and rewards trl.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image

from peftcli.recipe import load_recipe
from peftcli.schema import Recipe
from peftcli.train.setup import uses_bf16

Rows = list[dict[str, Any]]


def main() -> None:
    """Compare, and print a line a seed and side."""
    if len(sys.argv) < 3:
        sys.exit("usage: compare_with_trainer.py RECIPE SEED...")
    path = Path(sys.argv[1])
    kind = (load_recipe(path).task or {})["type"]
    if kind not in SIDES:
        sys.exit(f"{path}: {kind} is not compared; these tasks are: {', '.join(SIDES)}")
    for seed in map(int, sys.argv[2:]):
        folder = Path(f"outputs/compare/{path.stem}-{seed}")
        settings = [f"training.seed={seed}", f"training.output_dir={folder}", "gates={}"]
        ours = answer("train", str(path), *settings, "--overwrite", "--json")["eval"]["kept"]
        print(f"seed {seed}: peftcli  {shown(ours)}", flush=True)
        recipe = load_recipe(path, settings)
        theirs = folder.with_name(f"{folder.name}-trainer")
        SIDES[kind](recipe).train(theirs)
        if (folder / "task.json").exists():  # the names of labels, which Trainer does not write
            (theirs / "task.json").write_bytes((folder / "task.json").read_bytes())
        found = answer("evaluate", str(path), *settings, "--adapter", str(theirs), "--json")["eval"]["last"]
        print(f"seed {seed}: Trainer  {shown(found)}", flush=True)


def answer(*arguments: str) -> dict[str, Any]:
    """Run a command of peftcli, and return what it prints."""
    command = [sys.executable, "-m", "peftcli", *arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def shown(metrics: dict[str, float]) -> str:
    """Metrics as a line has them."""
    return ", ".join(
        f"{name.removeprefix('eval_')} {value:.4f}" for name, value in metrics.items() if "iou_" not in name
    )


class Side:
    """A recipe's rows as transformers takes them, and the training of PEFT and Trainer."""

    auto = ""
    """The class that loads the base model."""
    head: str | None = "classifier"
    """The module that trains in full."""
    task_type: str | None = None
    trainer: Any = transformers.Trainer
    arguments: Any = transformers.TrainingArguments

    def __init__(self, recipe: Recipe):
        self.recipe, self.name = recipe, recipe.base_model.name
        self.task: dict[str, Any] = recipe.task or {}
        self.length = self.task.get("max_length", recipe.dataset.max_length)
        self.place = Path(str(recipe.dataset.train)).parent
        self.prepare()

    def prepare(self) -> None:
        """Load the tokenizer or processor."""
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.name)

    def rows(self) -> Rows:
        """Read the training rows."""
        return [json.loads(line) for line in Path(str(self.recipe.dataset.train)).open(encoding="utf-8")]

    def load(self) -> Any:
        """Load the base model, with a new head where the task has one."""
        labels = {"num_labels": len(self.labels)} if hasattr(self, "labels") else {}
        return getattr(transformers, self.auto).from_pretrained(self.name, dtype=torch.float32, **labels)

    labels: list[str]

    def encode(self, rows: Rows) -> Rows:
        """Make the model's inputs."""
        raise NotImplementedError

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        """Put rows into a batch."""
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    def lora(self) -> LoraConfig:
        """The recipe's method as PEFT's config."""
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        method = {key: value for key, value in self.recipe.method.items() if key in known and value is not None}
        return LoraConfig(**{**method, "modules_to_save": self.head and [self.head], "task_type": self.task_type})

    def common(self, folder: Path) -> dict[str, Any]:
        """The training arguments that all have."""
        settings = self.recipe.training
        return {
            "output_dir": str(folder.with_name(folder.name + "-run")),
            "num_train_epochs": settings.num_train_epochs,
            "per_device_train_batch_size": settings.per_device_train_batch_size,
            "learning_rate": float(settings.learning_rate),
            "lr_scheduler_type": settings.lr_scheduler_type,
            "warmup_steps": settings.warmup_ratio or 0,
            "train_sampling_strategy": settings.train_sampling_strategy,
            "seed": settings.seed,
            "bf16": uses_bf16(self.recipe),
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1000,
        }

    def train(self, folder: Path) -> None:
        """Train with PEFT and Trainer, and write the adapter into ``folder``."""
        transformers.set_seed(self.recipe.training.seed)
        data = self.encode(self.rows())
        model = get_peft_model(self.load(), self.lora())
        arguments = self.arguments(**self.common(folder), remove_unused_columns=False, label_names=["labels"])
        self.trainer(model=model, args=arguments, train_dataset=data, data_collator=self.collate).train()
        model.save_pretrained(str(folder))


class Texts(Side):
    """Classes of texts."""

    auto, task_type = "AutoModelForSequenceClassification", "SEQ_CLS"

    def encode(self, rows: Rows) -> Rows:
        self.labels = list(dict.fromkeys(row["label"] for row in rows))
        ids = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=self.length)["input_ids"]
        return [
            {"input_ids": each, "labels": self.labels.index(row["label"])} for each, row in zip(ids, rows, strict=True)
        ]

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        return dict(transformers.DataCollatorWithPadding(self.tokenizer)(rows))


class Entities(Side):
    """Types of words, from texts with entities as IOB2 tags of the words' first tokens."""

    auto, task_type = "AutoModelForTokenClassification", "TOKEN_CLS"

    def encode(self, rows: Rows) -> Rows:
        kinds = list(dict.fromkeys(entity["label"] for row in rows for entity in row["entities"]))
        self.labels = ["O", *(f"{start}-{kind}" for kind in kinds for start in "BI")]
        encoded = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=self.length)
        return [
            {"input_ids": encoded["input_ids"][at], "labels": self.tags(row, encoded.encodings[at])}
            for at, row in enumerate(rows)
        ]

    def tags(self, row: dict[str, Any], encoding: Any) -> list[int]:
        """A label for each token; -100 but for the first of a word."""
        labels, before = list[int](), None
        for (start, end), word in zip(encoding.offsets, encoding.word_ids, strict=True):
            if word is None or word == before:
                labels.append(-100)
                continue
            before = word
            inside = next((each for each in row["entities"] if each["start"] < end and start < each["end"]), None)
            tag = "O" if inside is None else f"{'B' if start <= inside['start'] else 'I'}-{inside['label']}"
            labels.append(self.labels.index(tag))
        return labels

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        return dict(transformers.DataCollatorForTokenClassification(self.tokenizer)(rows))


class Answers(Side):
    """Places of answers in contexts, in windows."""

    auto, task_type, head = "AutoModelForQuestionAnswering", "QUESTION_ANS", "qa_outputs"

    def encode(self, rows: Rows) -> Rows:
        encoded = self.tokenizer(
            [row["question"] for row in rows],
            [row["context"] for row in rows],
            truncation="only_second",
            max_length=self.length,
            stride=self.task["stride"],
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = []
        for at, source in enumerate(encoded["overflow_to_sample_mapping"]):
            start, end = self.place_of(rows[source]["answers"], encoded.encodings[at])
            given = {name: encoded[name][at] for name in ("input_ids", "token_type_ids", "attention_mask")}
            windows.append({**given, "start_positions": start, "end_positions": end})
        return windows

    def place_of(self, answers: dict[str, Any], encoding: Any) -> tuple[int, int]:
        """First and last token of the first answer; those of [CLS] where the window lacks it."""
        if not answers["text"]:
            return 0, 0
        first = answers["answer_start"][0]
        last = first + len(answers["text"][0])
        parts = [at for at, part in enumerate(encoding.sequence_ids) if part == 1]
        if not parts or encoding.offsets[parts[0]][0] > first or encoding.offsets[parts[-1]][1] < last:
            return 0, 0
        inside = [at for at in parts if encoding.offsets[at][1] > first and encoding.offsets[at][0] < last]
        return inside[0], inside[-1]

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        return dict(transformers.DataCollatorWithPadding(self.tokenizer)(rows))


class Pictures(Side):
    """Classes of pictures in folders."""

    auto = "AutoModelForImageClassification"

    def prepare(self) -> None:
        self.processor = transformers.AutoImageProcessor.from_pretrained(self.name, backend="pil")

    def rows(self) -> Rows:
        return [
            {"image": path, "label": path.parent.name}
            for path in sorted(Path(str(self.recipe.dataset.train)).rglob("*.png"))
        ]

    def encode(self, rows: Rows) -> Rows:
        self.labels = list(dict.fromkeys(row["label"] for row in rows))
        return [
            {
                "pixel_values": self.processor(Image.open(row["image"]).convert("RGB"), return_tensors="pt")[
                    "pixel_values"
                ][0],
                "labels": self.labels.index(row["label"]),
            }
            for row in rows
        ]


class Masks(Pictures):
    """Pictures with masks."""

    auto, head = "AutoModelForSemanticSegmentation", "decode_head"
    rows = Side.rows

    def encode(self, rows: Rows) -> Rows:
        self.labels = self.task["labels"]
        encoded = []
        for row in rows:
            image = Image.open(self.place / row["image"]).convert("RGB")
            mask = Image.open(self.place / row["annotation"])
            found = self.processor(image, segmentation_maps=mask, return_tensors="pt")
            encoded.append({name: found[name][0] for name in ("pixel_values", "labels")})
        return encoded


class Clips(Side):
    """Clips with transcripts, for Whisper."""

    auto, head = "AutoModelForSpeechSeq2Seq", None

    def prepare(self) -> None:
        self.processor = transformers.AutoProcessor.from_pretrained(self.name)

    def encode(self, rows: Rows) -> Rows:
        import soundfile
        import soxr

        encoded = []
        for row in rows:
            sound, rate = soundfile.read(self.place / row["audio"], dtype="float32", always_2d=True)
            wave = soxr.resample(sound.mean(axis=1), rate, 16000)
            features = self.processor.feature_extractor(wave, sampling_rate=16000).input_features[0]
            encoded.append({"input_features": features, "labels": self.processor.tokenizer(row["text"]).input_ids})
        return encoded

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        # the model puts the token that starts a transcript in front by itself
        labels = [row["labels"][1:] for row in rows]
        length = max(map(len, labels))
        return {
            "input_features": torch.tensor(np.stack([row["input_features"] for row in rows])),
            "labels": torch.tensor([each + [-100] * (length - len(each)) for each in labels]),
        }


class Pairs(Side):
    """Preferred and rejected answers, with TRL's DPO."""

    auto, head, task_type = "AutoModelForCausalLM", None, "CAUSAL_LM"

    def train(self, folder: Path) -> None:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        arguments = DPOConfig(**self.common(folder), beta=self.task["beta"], max_length=self.length)
        trainer: Any = DPOTrainer(
            self.load(),
            args=arguments,
            train_dataset=Dataset.from_list(self.rows()),
            processing_class=self.tokenizer,
            peft_config=self.lora(),
        )
        trainer.train()
        trainer.model.save_pretrained(str(folder))


class Rewards(Side):
    """Preferred and rejected answers, with TRL's reward model."""

    auto, head, task_type = "AutoModelForSequenceClassification", "score", "SEQ_CLS"

    def load(self) -> Any:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            self.name, num_labels=1, dtype=torch.float32
        )
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def train(self, folder: Path) -> None:
        from datasets import Dataset
        from trl import RewardConfig, RewardTrainer

        arguments = RewardConfig(**self.common(folder), max_length=self.length)
        trainer: Any = RewardTrainer(
            self.load(),
            args=arguments,
            train_dataset=Dataset.from_list(self.rows()),
            processing_class=self.tokenizer,
            peft_config=self.lora(),
        )
        trainer.train()
        trainer.model.save_pretrained(str(folder))


SIDES: dict[str, Callable[[Recipe], Side]] = {
    "sequence_classification": Texts,
    "token_classification": Entities,
    "question_answering": Answers,
    "image_classification": Pictures,
    "semantic_segmentation": Masks,
    "speech_recognition": Clips,
    "preference": Pairs,
    "reward": Rewards,
}


if __name__ == "__main__":
    main()
