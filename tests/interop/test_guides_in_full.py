"""PEFT's guides to tasks from their first block to their last, with another import, on tiny models and rows.

Where a guide shows what other libraries no longer have (``load_in_8bit=``, ``tokenizer=`` of Trainer), today's is used.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from classifierkit import classifier_base, write_scene
from guidekit import logged, trainer_of
from PIL import Image
from soundkit import RATE, tone_rows, whisper_base
from taskkit import CASES
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutomaticSpeechRecognitionPipeline,
    AutoModelForSemanticSegmentation,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForTokenClassification,
    Seq2SeqTrainer,
    TrainerCallback,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

# --- token classification ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_token_classification(lib: ModuleType, tmp_path: Path) -> None:
    model_checkpoint = str(classifier_base("bert"))
    label_list = ["O", "B-PER", "I-PER", "B-LOC"]
    id2label = dict(enumerate(label_list))
    label2id = {name: number for number, name in id2label.items()}
    tokenizer = AutoTokenizer.from_pretrained(model_checkpoint)

    def compute_metrics(given: Any) -> dict[str, float]:
        known = given[1] != -100
        return {"accuracy": float((given[0].argmax(-1) == given[1])[known].mean())}

    def tokenize_and_align_labels(example: dict[str, Any]) -> dict[str, Any]:
        tokenized = tokenizer(example["tokens"], truncation=True, is_split_into_words=True)
        words = tokenized.word_ids()
        firsts = [at is not None and at != before for at, before in zip(words, [None, *words], strict=False)]
        tags = [label2id[tag] for tag in example["ner_tags"]]
        tokenized["labels"] = [tags[at] if first else -100 for at, first in zip(words, firsts, strict=True)]
        return dict(tokenized)

    rows = [tokenize_and_align_labels(each) for each in CASES["token_classification"].rows()]
    labels: dict[str, Any] = {"num_labels": 4, "id2label": id2label, "label2id": label2id}
    torch.manual_seed(0)
    model = AutoModelForTokenClassification.from_pretrained(model_checkpoint, **labels)
    peft_config = lib.LoraConfig(
        task_type=lib.TaskType.TOKEN_CLS, inference_mode=False, r=16, lora_alpha=16, lora_dropout=0.1, bias="all"
    )
    model = lib.get_peft_model(model, peft_config)
    model.print_trainable_parameters()
    more = {"eval_dataset": rows, "processing_class": tokenizer, "compute_metrics": compute_metrics}
    trainer = trainer_of(
        model,
        tmp_path / "run",
        rows,
        {**more, "data_collator": DataCollatorForTokenClassification(tokenizer=tokenizer)},
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert logged(trainer, "eval_loss")[-1] < logged(trainer, "eval_loss")[0]
    assert logged(trainer, "eval_accuracy")[-1] > 0.5
    model.save_pretrained(tmp_path / "adapter")

    config = lib.PeftConfig.from_pretrained(tmp_path / "adapter")
    inference_model = AutoModelForTokenClassification.from_pretrained(config.base_model_name_or_path, **labels)
    tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)
    loaded = lib.PeftModel.from_pretrained(inference_model, tmp_path / "adapter")
    inputs = tokenizer("Ada Lovelace saw Turin", return_tensors="pt")
    with torch.no_grad():
        logits = loaded(**inputs).logits
        torch.testing.assert_close(logits, model.eval()(**inputs).logits, atol=1e-5, rtol=1e-4)
    predictions = torch.argmax(logits, dim=2)
    assert {loaded.config.id2label[int(each)] for each in predictions[0]} <= set(label_list)
    assert len(inputs.tokens()) == predictions.shape[1]


# --- semantic segmentation --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_semantic_segmentation(lib: ModuleType, tmp_path: Path) -> None:
    checkpoint = str(classifier_base("segformer"))
    id2label = {0: "red", 1: "blue"}
    label2id = {name: number for number, name in id2label.items()}
    image_processor = AutoImageProcessor.from_pretrained(checkpoint, do_reduce_labels=True, backend="pil")
    scenes = [write_scene(tmp_path / "scenes", number) for number in range(6)]

    def transform(row: dict[str, str]) -> dict[str, Any]:
        images, masks = [Image.open(row["image"]).convert("RGB")], [Image.open(row["annotation"])]
        inputs = image_processor(images, masks, return_tensors="pt")
        return {name: value[0] for name, value in inputs.items()}

    def compute_metrics(eval_pred: Any) -> dict[str, float]:
        logits, wanted = eval_pred
        resized = nn.functional.interpolate(torch.from_numpy(logits), size=wanted.shape[-2:], mode="bilinear")
        found, known = resized.argmax(dim=1).numpy(), wanted != 255  # the background, which the processor takes out
        hits = [((found == at) & (wanted == at)).sum() for at in (0, 1)]
        sizes = [(((found == at) & known) | (wanted == at)).sum() for at in (0, 1)]
        return {"mean_iou": float(np.mean(np.divide(hits, sizes)))}

    def new_model() -> Any:
        torch.manual_seed(0)
        return AutoModelForSemanticSegmentation.from_pretrained(
            checkpoint, id2label=id2label, label2id=label2id, ignore_mismatched_sizes=True
        )

    config = lib.LoraConfig(
        r=32,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],  # as transformers calls query and value now
        lora_dropout=0.1,
        bias="lora_only",
        modules_to_save=["decode_head"],
    )
    lora_model = lib.get_peft_model(new_model(), config)
    trained = [name for name, value in lora_model.named_parameters() if value.requires_grad]
    assert all("lora_" in name or "decode_head" in name or name.endswith("bias") for name in trained)
    assert any("decode_head" in name and "classifier" in name for name in trained)
    rows = [transform(each) for each in scenes]
    trainer = trainer_of(
        lora_model,
        tmp_path / "run",
        rows,
        {"eval_dataset": rows[:2], "compute_metrics": compute_metrics},
        learning_rate=1e-2,
        num_train_epochs=4,
        per_device_train_batch_size=3,
        save_total_limit=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_steps=5,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer.train()
    evaluations = logged(trainer, "eval_mean_iou")
    assert max(evaluations) > 0.3
    lora_model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").stat().st_size < 1_000_000

    inference_model = lib.PeftModel.from_pretrained(new_model(), tmp_path / "adapter").eval()
    image = Image.open(scenes[0]["image"])
    encoding = image_processor(image.convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        logits = inference_model(pixel_values=encoding.pixel_values).logits
        expected = lora_model.eval()(pixel_values=encoding.pixel_values).logits
    if lib.__name__ != "peft":  # which loses the statistics of the head's norm
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    upsampled = nn.functional.interpolate(logits, size=image.size[::-1], mode="bilinear", align_corners=False)
    assert upsampled.argmax(dim=1)[0].shape == (image.height, image.width)


# --- speech recognition in 8 bits -------------------------------------------------------------------------------------


@dataclass
class _SpeechCollator:
    """The guide's ``DataCollatorSpeechSeq2SeqWithPadding``."""

    processor: Any

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        sounds = [{"input_features": feature["input_features"]} for feature in features]
        batch = self.processor.feature_extractor.pad(sounds, return_tensors="pt")
        texts = self.processor.tokenizer.pad([{"input_ids": each["labels"]} for each in features], return_tensors="pt")
        labels = texts["input_ids"].masked_fill(texts.attention_mask.ne(1), -100)
        if (labels[:, 0] == self.processor.tokenizer.bos_token_id).all().item():
            labels = labels[:, 1:]
        batch["labels"] = labels
        return batch


@contextlib.contextmanager
def _autocast(eight_bits: bool) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=eight_bits):
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes on a CPU, and of generation settings
@pytest.mark.parametrize("eight_bits", [False, True], ids=["float32", "int8"])
def test_speech_recognition_in_8_bits(lib: ModuleType, eight_bits: bool, tmp_path: Path) -> None:
    if eight_bits:
        pytest.importorskip("bitsandbytes")
    model_name_or_path, language, task = str(whisper_base()), "English", "transcribe"
    quantised = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)} if eight_bits else {}
    feature_extractor = AutoFeatureExtractor.from_pretrained(model_name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(model_name_or_path, language=language, task=task)
    processor = AutoProcessor.from_pretrained(model_name_or_path, language=language, task=task)

    def prepare_dataset(row: dict[str, str]) -> dict[str, Any]:
        samples, rate = soundfile.read(row["audio"], dtype="float32")
        assert rate == RATE
        features = feature_extractor(samples, sampling_rate=rate).input_features[0]
        return {"input_features": features, "labels": tokenizer(row["text"]).input_ids}

    rows = [prepare_dataset(each) for each in tone_rows()[:6]]
    data_collator = _SpeechCollator(processor=processor)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(model_name_or_path, **quantised)
    model.config.forced_decoder_ids = None
    model.config.suppress_tokens = []
    model = lib.prepare_model_for_kbit_training(model)
    config = lib.LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none")
    model = lib.get_peft_model(model, config)
    model.print_trainable_parameters()
    # of 2 encoder layers with one attention, and 2 decoder layers with two
    assert model.get_nb_trainable_parameters()[0] == (2 + 2 * 2) * 2 * 2 * 32 * 32

    class SavePeftModelCallback(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            kwargs["model"].save_pretrained(folder / "adapter_model")
            return control

    model.config.use_cache = False
    trainer = trainer_of(
        model,
        tmp_path / "run",
        rows,
        {
            "eval_dataset": rows,
            "data_collator": data_collator,
            "processing_class": processor.feature_extractor,
            "callbacks": [SavePeftModelCallback],
        },
        Seq2SeqTrainer,
        per_device_train_batch_size=3,
        learning_rate=1e-2,
        warmup_steps=1,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        generation_max_length=12,
        logging_steps=1,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    trainer.train()
    assert logged(trainer, "eval_loss")[-1] < logged(trainer, "eval_loss")[0]
    assert (tmp_path / "run/checkpoint-6/adapter_model/adapter_model.safetensors").is_file()

    import jiwer

    def word_error_rate(model: Any) -> float:
        found, wanted = list[str](), list[str]()
        model.eval()
        for batch in DataLoader(rows, batch_size=3, collate_fn=data_collator):  # type: ignore[arg-type]
            with _autocast(eight_bits), torch.no_grad():
                generated_tokens = model.generate(
                    input_features=batch["input_features"],
                    decoder_input_ids=batch["labels"][:, :4],
                    max_new_tokens=12,
                )
            labels = np.where(batch["labels"] != -100, batch["labels"], tokenizer.pad_token_id)
            found += tokenizer.batch_decode(generated_tokens, skip_special_tokens=True)
            wanted += tokenizer.batch_decode(labels, skip_special_tokens=True)
            gc.collect()
        return 100 * jiwer.wer(wanted, found)

    expected = word_error_rate(model)
    model.save_pretrained(tmp_path / "adapter")
    peft_config = lib.PeftConfig.from_pretrained(tmp_path / "adapter")
    name = peft_config.base_model_name_or_path
    loaded = WhisperForConditionalGeneration.from_pretrained(name, **quantised)
    loaded = lib.PeftModel.from_pretrained(loaded, tmp_path / "adapter")
    assert word_error_rate(loaded) == pytest.approx(expected)
    tokenizer = WhisperTokenizer.from_pretrained(name, language=language, task=task)
    processor = WhisperProcessor.from_pretrained(name, language=language, task=task)
    pipe = AutomaticSpeechRecognitionPipeline(
        model=loaded, tokenizer=tokenizer, feature_extractor=processor.feature_extractor
    )
    samples, _ = soundfile.read(tone_rows()[0]["audio"], dtype="float32")
    text = pipe(samples, generate_kwargs={"task": task, "language": "en", "max_new_tokens": 12})["text"]
    assert isinstance(text, str)
