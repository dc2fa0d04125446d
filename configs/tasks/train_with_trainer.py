"""Train a recipe of this folder with PEFT and transformers' Trainer, or what TRL or sentence-transformers make of it.

    python configs/tasks/train_with_trainer.py configs/tasks/spam.yaml outputs/spam-trainer training.seed=1

The base model, rows, method, batches, learning rate, schedule and number formats are the recipe's. The order of the
rows and what dropout leaves out are Trainer's own. ``docs/tasks.py`` compares the adapter with that of ``peftcli
train``. peft must be installed, for preferences, rewards and pictures in conversations trl, and for embeddings and
rerankers sentence-transformers.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image

from peftcli.adapters.other_model import open_other
from peftcli.recipe import load_recipe
from peftcli.recipe.rates import with_rate
from peftcli.schema import Recipe
from peftcli.tasks import mining
from peftcli.tasks.settings import RerankerSettings
from peftcli.train.devices.accelerator import base_dtype, uses_bf16

Rows = list[dict[str, Any]]


def main() -> None:
    """Train, and print the number of steps and of trained parameters as JSON."""
    if len(sys.argv) < 3:
        sys.exit("usage: train_with_trainer.py RECIPE FOLDER [KEY=VALUE]...")
    path, folder = map(Path, sys.argv[1:3])
    recipe = with_rate(load_recipe(path, sys.argv[3:]))
    print(json.dumps(SIDES[(recipe.task or {})["type"]](recipe).train(folder)))


class Side:
    """A recipe's rows as transformers takes them, and the training of PEFT and Trainer."""

    auto = ""
    """The class that loads the base model."""
    head: str | None = "classifier"
    """The module that trains in full."""
    task_type: str | None = None

    def __init__(self, recipe: Recipe):
        self.recipe, self.name = recipe, recipe.base_model.name
        self.task: dict[str, Any] = recipe.task or {}
        self.length = self.task.get("max_length", recipe.dataset.max_length)
        self.place = Path(str(recipe.dataset.train)).parent
        self.prepare()

    def prepare(self) -> None:
        """Load the tokenizer or processor."""
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(self.name)

    def rows(self) -> Rows:
        """Read the training rows."""
        with Path(str(self.recipe.dataset.train)).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file][: self.recipe.dataset.limit]

    def load(self) -> Any:
        """Load the base model, with a new head where the task has one."""
        labels = {"num_labels": len(self.labels)} if hasattr(self, "labels") else {}
        return getattr(transformers, self.auto).from_pretrained(self.name, dtype=base_dtype(self.recipe), **labels)

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
        heads = [self.head] if self.head else None
        return LoraConfig(**{**method, "modules_to_save": heads, "task_type": self.task_type})

    def common(self, folder: Path) -> dict[str, Any]:
        """The training arguments that all have."""
        settings = self.recipe.training
        same = (
            "num_train_epochs",
            "max_steps",
            "per_device_train_batch_size",
            "learning_rate",
            "lr_scheduler_type",
            "train_sampling_strategy",
            "weight_decay",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "max_grad_norm",
            "seed",
        )
        return {
            **{name: getattr(settings, name) for name in same},
            "output_dir": str(folder.with_name(folder.name + "-run")),
            "warmup_steps": settings.warmup_steps or settings.warmup_ratio,  # below 1: a share of the steps
            "bf16": uses_bf16(self.recipe),
            "use_cpu": not torch.cuda.is_available(),
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": settings.logging_steps,
        }

    def trainer(self, folder: Path) -> Any:
        """Return a trainer with everything that it needs."""
        data = self.encode(self.rows())
        return transformers.Trainer(
            get_peft_model(self.load(), self.lora()),
            transformers.TrainingArguments(**self.common(folder), remove_unused_columns=False, label_names=["labels"]),
            self.collate,
            data,
        )

    def train(self, folder: Path) -> dict[str, int]:
        """Write the adapter into ``folder``, and return the number of steps and of trained parameters."""
        transformers.set_seed(self.recipe.training.seed)
        trainer = self.trainer(folder)
        trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
        for weight in trained:  # PEFT leaves a head in the base model's number format
            weight.data = weight.data.float()
        trainer.train()
        self.save(trainer.model, folder)
        return {"steps": trainer.state.global_step, "trainable": sum(weight.numel() for weight in trained)}

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter of a trained model."""
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

    # without a task_type: PEFT's own model for answers takes no token_type_ids
    auto, head = "AutoModelForQuestionAnswering", "qa_outputs"

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


class MaskedTexts(Side):
    """Texts, in which the collator of transformers masks tokens."""

    auto, head = "AutoModelForMaskedLM", None

    def encode(self, rows: Rows) -> Rows:
        ids = self.tokenizer([row["text"] for row in rows], truncation=True, max_length=self.length)["input_ids"]
        return [{"input_ids": each} for each in ids]

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        share = self.task["mlm_probability"]
        return dict(transformers.DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=share)(rows))


class Choices(Side):
    """Questions with choices, as many in each row of a batch: shorter rows get choices of padding."""

    auto = "AutoModelForMultipleChoice"

    def encode(self, rows: Rows) -> Rows:
        encoded = []
        for row in rows:
            pairs = [row["question"]] * len(row["choices"]), row["choices"]
            given = self.tokenizer(*pairs, truncation=True, max_length=self.length)
            encoded.append({**given, "labels": row["label"]})
        return encoded

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        most, labels = max(len(row["input_ids"]) for row in rows), [row["labels"] for row in rows]
        flat = []
        for row in rows:
            each = [{name: row[name][at] for name in row if name != "labels"} for at in range(len(row["input_ids"]))]
            flat += [*each, *each[:1] * (most - len(each))]
        batch = self.tokenizer.pad(flat, return_tensors="pt")
        counts = torch.tensor([len(row["input_ids"]) for row in rows])
        shaped = {name: value.reshape(len(rows), most, -1) for name, value in batch.items()}
        return {**shaped, "labels": torch.tensor(labels), "there": torch.arange(most) < counts[:, None]}

    def trainer(self, folder: Path) -> Any:
        trainer = super().trainer(folder)
        trainer.compute_loss = self.loss  # the model's own takes padding for a choice
        return trainer

    def loss(self, model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
        """The cross-entropy over the choices that are there."""
        labels, there = inputs.pop("labels"), inputs.pop("there")
        scores = model(**inputs).logits.float().masked_fill(~there, -torch.inf)
        return torch.nn.functional.cross_entropy(scores, labels)


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


class Boxes(Pictures):
    """Pictures with boxes."""

    auto = "AutoModelForObjectDetection"
    rows = Side.rows

    def load(self) -> Any:
        model = transformers.AutoModelForObjectDetection.from_pretrained(
            self.name,
            dtype=base_dtype(self.recipe),
            num_labels=len(self.labels),
            num_denoising=0,
            ignore_mismatched_sizes=True,
        )
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # whose statistics PEFT does not save
                module.eval()
                vars(module)["train"] = lambda mode, module=module: module
        return model

    def lora(self) -> LoraConfig:
        config = super().lora()
        layers = range(transformers.AutoConfig.from_pretrained(self.name).decoder_layers)
        config.modules_to_save = [*(f"model.decoder.class_embed.{at}" for at in layers), "model.enc_score_head"]
        return config

    def encode(self, rows: Rows) -> Rows:
        self.labels = list(dict.fromkeys(name for row in rows for name in row["objects"]["category"]))
        encoded = []
        for row in rows:
            objects = zip(row["objects"]["bbox"], row["objects"]["category"], strict=True)
            marks = [
                {"bbox": box, "category_id": self.labels.index(name), "area": box[2] * box[3], "iscrowd": 0}
                for box, name in objects
            ]
            image = Image.open(self.place / row["image"]).convert("RGB")
            found = self.processor(image, annotations={"image_id": 0, "annotations": marks}, return_tensors="pt")
            encoded.append({"pixel_values": found["pixel_values"][0], "labels": found["labels"][0]})
        return encoded

    def collate(self, rows: Rows) -> dict[str, Any]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": [row["labels"] for row in rows]}


class Sounds(Side):
    """Classes of sounds."""

    auto = "AutoModelForAudioClassification"

    def prepare(self) -> None:
        self.extractor = transformers.AutoFeatureExtractor.from_pretrained(self.name)

    def wave(self, row: dict[str, Any]) -> np.ndarray:
        """The sound of a row as 16,000 samples a second."""
        import soundfile
        import soxr

        sound, rate = soundfile.read(self.place / row["audio"], dtype="float32", always_2d=True)
        resampled: np.ndarray = soxr.resample(sound.mean(axis=1), rate, 16000)
        return resampled

    def lora(self) -> LoraConfig:
        config = super().lora()
        config.modules_to_save = ["projector", "classifier"]
        return config

    def encode(self, rows: Rows) -> Rows:
        self.labels = list(dict.fromkeys(row["label"] for row in rows))
        return [{**self.features(row), "labels": self.labels.index(row["label"])} for row in rows]

    def features(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the model hears of a row."""
        return {"input_features": self.extractor(self.wave(row), sampling_rate=16000).input_features[0]}

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        heard = [{"input_features": row["input_features"]} for row in rows]
        batch = self.extractor.pad(heard, return_tensors="pt")
        batch["input_features"] = batch["input_features"].to(base_dtype(self.recipe))
        labels = [torch.tensor(row["labels"]) for row in rows]
        pads = torch.nn.utils.rnn.pad_sequence([each.reshape(-1) for each in labels], True, -100)
        return {**batch, "labels": pads if labels[0].ndim else pads[:, 0]}

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(str(folder), save_embedding_layers=False)  # PEFT would look for those of tokens


class Clips(Sounds):
    """Clips with transcripts, for Whisper."""

    auto, head = "AutoModelForSpeechSeq2Seq", None
    lora = Side.lora

    def prepare(self) -> None:
        self.processor = transformers.AutoProcessor.from_pretrained(self.name)

    def encode(self, rows: Rows) -> Rows:
        encoded = []
        for row in rows:
            wave = self.wave(row)
            if len(wave) > self.processor.feature_extractor.n_samples:
                continue  # longer than the model hears at once
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


class SpelledClips(Sounds):
    """Clips with transcripts, for models that label each frame with a letter."""

    auto = "AutoModelForCTC"

    def prepare(self) -> None:
        super().prepare()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(self.name)

    def load(self) -> Any:
        model = super().load()
        model.config.ctc_loss_reduction = "mean"  # as in the script of transformers
        return model

    def lora(self) -> LoraConfig:
        config = super().lora()
        config.modules_to_save, config.exclude_modules = None, ["lm_head"]
        return config

    def encode(self, rows: Rows) -> Rows:
        return [{**self.features(row), "labels": self.tokenizer(row["text"]).input_ids} for row in rows]


class Chats(Side):
    """Conversations of a question and an answer, whose tokens alone count."""

    auto, head, task_type = "AutoModelForCausalLM", None, "CAUSAL_LM"

    def encode(self, rows: Rows) -> Rows:
        encoded = []
        for row in rows:
            whole, asked = (
                self.tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=False)
                for messages, ask in ((row["messages"], False), (row["messages"][:-1], True))
            )
            while whole[-1] != self.tokenizer.eos_token_id:  # the template's line break after the end of the turn
                whole.pop()
            labels = [-100] * len(asked) + whole[len(asked) :]
            encoded.append({"input_ids": whole[: self.length], "labels": labels[: self.length]})
        return encoded

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        return dict(transformers.DataCollatorForSeq2Seq(self.tokenizer)(rows))


class Taught(Chats):
    """The same, with TRL's GKD: from the base model after a context."""

    def prepare(self) -> None:
        super().prepare()
        self.tokenizer.padding_side = "right"

    def rows(self) -> Rows:
        column = str(self.recipe.dataset.columns["completion"])
        return [{"messages": [*row["prompt"], *row[column]]} for row in super().rows()]

    def trainer(self, folder: Path) -> Any:
        from datasets import Dataset
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        betas = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
        own, read = self.openings()
        return GKDTrainer(
            self.load(),
            AfterContext(self.load(), own, read),
            args=GKDConfig(
                **self.common(folder),
                gradient_checkpointing=False,
                max_length=self.length,
                beta=betas[self.task["loss"]],
                temperature=self.task.get("temperature", 1.0),
                lmbda=0.0,
            ),
            data_collator=self.collate,
            train_dataset=Dataset.from_list(self.encode(self.rows())),
            processing_class=self.tokenizer,
            peft_config=self.lora(),
        )

    def openings(self) -> tuple[list[int], list[int]]:
        """Return the tokens before the first question, without the context and with it."""
        asked, context = [{"role": "user", "content": "?"}], [{"role": "system", "content": self.task["context"]}]
        found = [self.tokenizer.apply_chat_template(each, return_dict=False) for each in (asked, context + asked)]
        while found[0][-1] == found[1][-1] and self.tokenizer.bos_token_id != found[0][-1]:
            found = [each[:-1] for each in found]
        return found[0], found[1]


class AfterContext(torch.nn.Module):
    """A model that reads a context in the place of what its template writes before the first question."""

    def __init__(self, model: Any, own: list[int], read: list[int]):
        super().__init__()
        self.model, self.config, self.own, self.read = model.requires_grad_(False), model.config, len(own), read

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        """Return logits for the positions of ``input_ids`` (B, T), of which those before the question mean nothing."""
        context = torch.tensor([self.read], device=input_ids.device).expand(len(input_ids), -1)
        ids = torch.cat([context, input_ids[:, self.own :]], dim=1)
        mask = torch.cat([torch.ones_like(context), attention_mask[:, self.own :]], dim=1)
        outputs = self.model(input_ids=ids, attention_mask=mask)
        outputs.logits = outputs.logits[:, len(self.read) - self.own :]
        return outputs


class Descriptions(Side):
    """Conversations about pictures, with TRL's SFT: LoRA in the language model, and the connector."""

    auto, head, task_type = "AutoModelForImageTextToText", "multi_modal_projector", "CAUSAL_LM"

    def prepare(self) -> None:
        self.tokenizer = transformers.AutoProcessor.from_pretrained(self.name, backend="pil")

    def lora(self) -> LoraConfig:
        linear = "|".join(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
        config = super().lora()
        config.target_modules = rf".*language_model.*\.({linear})"
        return config

    def trainer(self, folder: Path) -> Any:
        from datasets import Dataset, Image, List
        from trl import SFTConfig, SFTTrainer

        rows = []
        for *asked, answer in (row["messages"] for row in self.rows()):
            parts = [part for turn in asked for part in turn["content"]]
            files = [str(self.place / part.pop("image")) for part in parts if part["type"] == "image"]
            rows.append({"prompt": asked, "completion": [answer], "images": files})
        return SFTTrainer(
            self.load(),
            args=SFTConfig(**self.common(folder), gradient_checkpointing=False, max_length=self.length),
            train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
            processing_class=self.tokenizer,
            peft_config=self.lora(),
        )


class Rewritten(Side):
    """Texts and what is to be made of them, for an encoder-decoder."""

    auto, head, task_type = "AutoModelForSeq2SeqLM", None, "SEQ_2_SEQ_LM"

    def encode(self, rows: Rows) -> Rows:
        given = self.tokenizer([row["prompt"] for row in rows], truncation=True, max_length=self.length)
        wanted = self.tokenizer(
            text_target=[row["completion"] for row in rows], truncation=True, max_length=self.length
        )
        pairs = zip(given["input_ids"], wanted["input_ids"], strict=True)
        return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]

    def collate(self, rows: Rows) -> dict[str, torch.Tensor]:
        return dict(transformers.DataCollatorForSeq2Seq(self.tokenizer)(rows))


class Pairs(Side):
    """Preferred and rejected answers, with TRL's DPO."""

    auto, task_type = "AutoModelForCausalLM", "CAUSAL_LM"
    head: str | None = None

    def trainer(self, folder: Path) -> Any:
        from trl import DPOConfig, DPOTrainer

        return self.of_trl(DPOTrainer, DPOConfig, folder, beta=self.task["beta"])

    def of_trl(self, trainer: Any, arguments: Any, folder: Path, **more: Any) -> Any:
        """Return one of TRL's trainers of pairs."""
        from datasets import Dataset

        rows = self.rows()
        for row in rows:
            answers = [row["prompt"] + row[name] for name in ("chosen", "rejected")]
            row["length"] = sum(map(len, self.tokenizer.apply_chat_template(answers, return_dict=False)))
        common = self.common(folder)
        return trainer(
            self.load(),
            args=arguments(
                **common, remove_unused_columns=False, gradient_checkpointing=False, max_length=self.length, **more
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            peft_config=self.lora(),
        )


class Rewards(Pairs):
    """Preferred and rejected answers, with TRL's reward model."""

    auto, head, task_type, labels = "AutoModelForSequenceClassification", "score", "SEQ_CLS", ["reward"]

    def load(self) -> Any:
        model = super().load()
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    def trainer(self, folder: Path) -> Any:
        from trl import RewardConfig, RewardTrainer

        return self.of_trl(RewardTrainer, RewardConfig, folder)


class Searches(Side):
    """Texts and what belongs to them, with sentence-transformers' loss over the other rows of a batch."""

    head, task_type = None, "FEATURE_EXTRACTION"

    def trainer(self, folder: Path) -> Any:
        import sentence_transformers as library
        from datasets import Dataset
        from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

        rows = self.rows()
        model = library.SentenceTransformer(self.name, device="cpu", model_kwargs={"dtype": base_dtype(self.recipe)})
        model.max_seq_length = self.length
        model[0].model = get_peft_model(model[0].model, self.lora())
        return library.SentenceTransformerTrainer(
            model,
            library.SentenceTransformerTrainingArguments(**self.common(folder)),
            Dataset.from_list(rows),
            loss=CachedMultipleNegativesRankingLoss(model, mini_batch_size=self.task["mini_batch_size"]),
        )

    def save(self, model: Any, folder: Path) -> None:
        model[0].model.save_pretrained(str(folder))


class Rankings(Side):
    """Queries, each with its document and mined negatives, with sentence-transformers' CrossEncoderTrainer."""

    task_type = "SEQ_CLS"

    def mined(self) -> Rows:
        """Return the rows with the negatives that peftcli mines: both sides learn from the same ones."""
        rows, asked = self.rows(), RerankerSettings(**{k: v for k, v in self.task.items() if k != "type"})

        def embed(texts: Sequence[str]) -> np.ndarray:
            miner = open_other(asked.miner or self.name, "feature_extraction")
            answers = miner.answers([{"text": text} for text in texts])
            return np.array([each["embedding"] for each in answers], np.float32)

        pairs = mining.Pairs([row["anchor"] for row in rows], [row["positive"] for row in rows], set())
        count, spread = asked.num_negatives, asked.mining == "spread"
        found = mining.nearest_negatives(pairs, embed, count, asked.mining_margin, spread=spread)
        for row in rows:
            texts = found[row["anchor"], row["positive"]]
            row |= {f"negative_{number}": text for number, text in enumerate(texts, start=1)}
        return rows

    def trainer(self, folder: Path) -> Any:
        from datasets import Dataset
        from sentence_transformers.cross_encoder import (
            CrossEncoder,
            CrossEncoderTrainer,
            CrossEncoderTrainingArguments,
            losses,
        )

        options = {"dtype": base_dtype(self.recipe)}
        model = CrossEncoder(self.name, num_labels=1, max_length=self.length, device="cpu", model_kwargs=options)
        model[0].model = get_peft_model(model[0].model, self.lora())
        loss = losses.MultipleNegativesRankingLoss(model, scale=1.0, activation_fn=torch.nn.Identity())
        loss.get_in_batch_negatives = lambda *_: iter(())  # a row's positive is compared with its own negatives alone
        arguments = CrossEncoderTrainingArguments(**self.common(folder))
        return CrossEncoderTrainer(model, arguments, Dataset.from_list(self.mined()), loss=loss)

    def save(self, model: Any, folder: Path) -> None:
        model[0].model.save_pretrained(str(folder))


class Denoiser(torch.nn.Module):
    """The loss of diffusers' scripts: how far a UNet is from the noise that was added to latents."""

    def __init__(self, pipeline: Any):
        super().__init__()
        self.unet, self.scheduler = pipeline.unet, pipeline.scheduler

    def forward(self, moments: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Add noise to latents and predict it.

        Args:
            moments: Means and deviations of latents (B, P, 2, C, h, w), P pictures a row.
            states: Embeddings of their prompts (B, P, T, D).
        """
        means, deviations = moments.flatten(0, 1).unbind(1)
        clean = means + deviations * torch.randn_like(means)
        noise = torch.randn_like(clean)
        times = torch.randint(self.scheduler.config.num_train_timesteps, clean.shape[:1], device=clean.device)
        found = self.unet(self.scheduler.add_noise(clean, noise, times), times, states.flatten(0, 1)).sample
        return {"loss": torch.nn.functional.mse_loss(found, noise) * moments.shape[1]}


class Bags(Side):
    """DreamBooth, as in diffusers' script: each picture beside one of what the base model knows."""

    head = None

    def prepare(self) -> None:
        from diffusers import StableDiffusionPipeline

        self.pipeline: Any = StableDiffusionPipeline.from_pretrained(self.name)
        self.pipeline.set_progress_bar_config(disable=True)

    def rows(self) -> Rows:
        paths = sorted(Path(str(self.recipe.dataset.train)).glob("*.png"))
        return [{"image": Image.open(path)} for path in paths[: self.recipe.dataset.limit]]

    def encode(self, rows: Rows) -> Rows:
        draw = torch.Generator().manual_seed(0)
        options = {name: self.task[name] for name in ("num_inference_steps", "guidance_scale")}
        prompts = [self.task["instance_prompt"], self.task["class_prompt"]]
        made = self.pipeline(prompts[1:] * self.task["num_class_images"], generator=draw, **options).images
        known = [self.moments(image) for image in made]
        states = self.pipeline.encode_prompt(prompts, self.pipeline.device, 1, False)[0].detach()
        return [
            {"moments": torch.stack([self.moments(row["image"]), known[at % len(known)]]), "states": states}
            for at, row in enumerate(rows)
        ]

    @torch.no_grad()
    def moments(self, image: Image.Image) -> torch.Tensor:
        """Return means and deviations of a picture's latents (2, C, h, w)."""
        side = self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor
        pixels = np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), np.float32)
        found = self.pipeline.vae.encode(torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]).latent_dist
        return torch.cat([found.mean, found.std]) * self.pipeline.vae.config.scaling_factor

    def load(self) -> Any:
        return Denoiser(self.pipeline)

    def lora(self) -> LoraConfig:
        linear = [name for name, part in self.pipeline.unet.named_modules() if isinstance(part, torch.nn.Linear)]
        config = super().lora()
        config.target_modules = [f"unet.{name}" for name in linear]
        return config


def spoken(recipe: Recipe) -> Side:
    """The side of clips with transcripts, by the base model's architecture."""
    (architecture,) = transformers.AutoConfig.from_pretrained(recipe.base_model.name).architectures
    return SpelledClips(recipe) if architecture.endswith("ForCTC") else Clips(recipe)


SIDES: dict[str, Callable[[Recipe], Side]] = {
    "masked_lm": MaskedTexts,
    "multiple_choice": Choices,
    "sequence_classification": Texts,
    "token_classification": Entities,
    "question_answering": Answers,
    "image_classification": Pictures,
    "semantic_segmentation": Masks,
    "object_detection": Boxes,
    "audio_classification": Sounds,
    "speech_recognition": spoken,
    "causal_lm": Chats,
    "distillation": Taught,
    "image_text_to_text": Descriptions,
    "seq2seq_lm": Rewritten,
    "preference": Pairs,
    "reward": Rewards,
    "feature_extraction": Searches,
    "reranker": Rankings,
    "text_to_image": Bags,
}


if __name__ == "__main__":
    main()
