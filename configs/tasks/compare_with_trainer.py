"""Train a recipe of this folder for several seeds, here and with PEFT and transformers' Trainer, and compare.

    python configs/tasks/compare_with_trainer.py configs/tasks/spam.yaml 0 1 2

Both sides have the same base model, rows, method, batch size, learning rate, schedule and number of epochs; they start
their new heads and adapters, and order their rows, by random numbers of their own. Afterwards ``peft`` loads the folder
that peftcli wrote, and must predict the same rows. PEFT and scikit-learn must be installed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score

from peftcli.recipe import load_recipe
from peftcli.schema import Recipe
from peftcli.train.run import train
from peftcli.train.setup import uses_bf16


def main() -> None:
    """Compare, and print a line a seed and side."""
    if len(sys.argv) < 3:
        sys.exit("usage: compare_with_trainer.py RECIPE SEED...")
    for seed in map(int, sys.argv[2:]):
        folder = f"outputs/compare/{Path(sys.argv[1]).stem}-{seed}"
        recipe = load_recipe(Path(sys.argv[1]), [f"training.seed={seed}", f"training.output_dir={folder}", "gates={}"])
        ours = train(recipe)["eval"]["last"]
        print(f"seed {seed}: peftcli  {shown(ours['eval_accuracy'], ours['eval_macro_f1'])}", flush=True)
        sides = Sides(recipe)
        again, theirs = sides.peft_reads(Path(folder)), sides.trainer(Path(folder))
        print(f"seed {seed}: in peft  {again}", flush=True)
        print(f"seed {seed}: Trainer  {theirs}", flush=True)


class Sides:
    """The rows of a recipe as transformers takes them, and what PEFT does with them."""

    def __init__(self, recipe: Recipe):
        self.recipe, name = recipe, recipe.base_model.name
        self.is_text = (recipe.task or {})["type"] == "sequence_classification"
        train_rows, eval_rows = (self.read(str(part)) for part in (recipe.dataset.train, recipe.dataset.eval))
        self.labels = list(dict.fromkeys(label for _, label in train_rows))
        if self.is_text:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        else:
            self.processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
        self.train, self.eval = self.encode(train_rows), self.encode(eval_rows)
        self.auto: Any = getattr(transformers, f"AutoModelFor{'Sequence' if self.is_text else 'Image'}Classification")

    def load(self) -> Any:
        """Load the base model with a new head."""
        return self.auto.from_pretrained(self.recipe.base_model.name, num_labels=len(self.labels))

    def read(self, name: str) -> list[tuple[str, str]]:
        """Read text and label of each row, or file and folder of each picture."""
        if self.is_text:
            return [(row["text"], row["label"]) for row in map(json.loads, Path(name).open(encoding="utf-8"))]
        return [(str(path), path.parent.name) for path in sorted(Path(name).rglob("*.png"))]

    def encode(self, rows: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """Make the model's inputs of rows."""
        labels = [self.labels.index(label) for _, label in rows]
        if self.is_text:
            length = self.recipe.dataset.max_length
            encoded = self.tokenizer([text for text, _ in rows], truncation=True, max_length=length)
            ids = encoded["input_ids"]
            return [{"input_ids": each, "labels": label} for each, label in zip(ids, labels, strict=True)]
        images = [Image.open(path).convert("RGB") for path, _ in rows]
        pixels = [self.processor(image, return_tensors="pt")["pixel_values"][0] for image in images]
        return [{"pixel_values": each, "labels": label} for each, label in zip(pixels, labels, strict=True)]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Put rows into a batch."""
        if self.is_text:
            return dict(transformers.DataCollatorWithPadding(self.tokenizer)(rows))
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    def trainer(self, folder: Path) -> str:
        """Train with PEFT and Trainer."""
        settings, method = self.recipe.training, dict(self.recipe.method)
        transformers.set_seed(settings.seed)
        known = {field.name for field in dataclasses.fields(LoraConfig)}
        method = {key: value for key, value in method.items() if key in known and key != "modules_to_save"}
        config = LoraConfig(**method, modules_to_save=["classifier"], task_type="SEQ_CLS" if self.is_text else None)
        arguments = transformers.TrainingArguments(
            str(folder / "trainer"),
            num_train_epochs=settings.num_train_epochs,
            per_device_train_batch_size=settings.per_device_train_batch_size,
            per_device_eval_batch_size=settings.per_device_eval_batch_size,
            learning_rate=float(settings.learning_rate),
            lr_scheduler_type=settings.lr_scheduler_type,
            train_sampling_strategy=settings.train_sampling_strategy,
            seed=settings.seed,
            bf16=uses_bf16(self.recipe),
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        model = get_peft_model(self.load(), config)
        trainer: Any = transformers.Trainer
        trainer(model=model, args=arguments, train_dataset=self.train, data_collator=self.collate).train()
        return self.measure(model)

    def peft_reads(self, folder: Path) -> str:
        """Load the folder in PEFT."""
        return self.measure(PeftModel.from_pretrained(self.load(), str(folder)))

    @torch.no_grad()
    def measure(self, model: Any) -> str:
        """Predict the evaluation rows, in float32."""
        size, found = self.recipe.training.per_device_eval_batch_size, list[int]()
        model = model.float().eval()
        order = sorted(range(len(self.eval)), key=lambda at: len(self.eval[at].get("input_ids", ())))
        for start in range(0, len(order), size):
            batch = self.collate([self.eval[at] for at in order[start : start + size]])
            found += model(**batch).logits.argmax(-1).tolist()
        wanted = np.array([self.eval[at]["labels"] for at in order])
        return shown(accuracy_score(wanted, found), f1_score(wanted, found, average="macro"))


def shown(accuracy: float, macro_f1: float) -> str:
    """Two metrics as a line has them."""
    return f"accuracy {accuracy:.4f}, macro F1 {macro_f1:.4f}"


if __name__ == "__main__":
    main()
