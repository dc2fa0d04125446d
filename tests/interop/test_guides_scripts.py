"""Scripts as users write them, with another import: alpaca-lora's three, a Trainer's.

QLoRA's is in tests/models/test_models_qlora_script.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trainkit
from guidekit import QUIET as CPU
from guidekit import logged, trainer_of
from models_tiny import ids, randomise, tiny
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForTokenClassification,
    Blip2Config,
    Blip2ForConditionalGeneration,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    GenerationConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

INSTRUCTIONS = [
    {"instruction": "Name a colour.", "input": "", "output": "red"},
    {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    {"instruction": "Say hello.", "input": "", "output": "hello"},
    {"instruction": "Name the largest.", "input": "sun, moon", "output": "sun"},
]


@pytest.fixture(scope="session")
def llama() -> str:
    return str(trainkit.base_folder())


def _prompt(row: dict[str, str], output: str = "") -> str:
    given = f"### Input:\n{row['input']}\n" if row["input"] else ""
    return f"### Instruction:\n{row['instruction']}\n{given}### Response:\n{output}"


def _tokenized(tokenizer: Any, cutoff_len: int = 64) -> list[dict[str, list[int]]]:
    """Labels on the answers alone."""
    rows = []
    for row in INSTRUCTIONS * 2:
        full = tokenizer(_prompt(row, row["output"]), truncation=True, max_length=cutoff_len)["input_ids"]
        full = [*full, tokenizer.eos_token_id]
        asked = len(tokenizer(_prompt(row))["input_ids"])
        rows.append({"input_ids": full, "attention_mask": [1] * len(full), "labels": [-100] * asked + full[asked:]})
    return rows


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> torch.Tensor:
    return model.eval()(**tokenizer(_prompt(INSTRUCTIONS[1]), return_tensors="pt")).logits.float()


# --- alpaca-lora ------------------------------------------------------------------------------------------------------


def _finetune(lib: ModuleType, base_model: str, output_dir: str, resume_from: str | None = None) -> Any:
    """alpaca-lora's finetune.py: what the model saves is replaced by what get_peft_model_state_dict returns."""
    model = LlamaForCausalLM.from_pretrained(base_model, dtype=torch.float32, device_map={"": "cpu"})
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    tokenizer.pad_token_id = 0
    tokenizer.padding_side = "left"
    model = lib.prepare_model_for_kbit_training(model)
    config = lib.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = lib.get_peft_model(model, config)
    if resume_from is not None:
        adapters_weights = load_file(f"{resume_from}/adapter_model.safetensors")
        lib.set_peft_model_state_dict(model, adapters_weights)
    model.print_trainable_parameters()
    data = _tokenized(tokenizer)
    trainer = Trainer(
        model=model,
        train_dataset=data[:6],
        eval_dataset=data[6:],
        args=TrainingArguments(
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            warmup_steps=1,
            num_train_epochs=4,
            learning_rate=2e-2,
            logging_steps=1,
            optim="adamw_torch",
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=4,
            save_steps=4,
            output_dir=output_dir,
            save_total_limit=1,
            load_best_model_at_end=True,
            **CPU,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8, return_tensors="pt", padding=True),
    )
    model.config.use_cache = False
    old_state_dict = model.state_dict
    model.state_dict = (lambda self, *_, **__: lib.get_peft_model_state_dict(self, old_state_dict())).__get__(
        model, type(model)
    )
    trainer.train()
    model.save_pretrained(output_dir)
    return model, trainer


def _export(lib: ModuleType, base: str, lora: str, folder: str) -> None:
    """alpaca-lora's export_hf_checkpoint.py."""
    base_model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, device_map={"": "cpu"})
    first_weight = base_model.model.layers[0].self_attn.q_proj.weight
    first_weight_old = first_weight.clone()
    lora_model = lib.PeftModel.from_pretrained(base_model, lora, device_map={"": "cpu"}, torch_dtype=torch.float32)
    assert torch.allclose(first_weight_old, first_weight)
    lora_model = lora_model.merge_and_unload()
    lora_model.train(False)
    assert not torch.allclose(first_weight_old, first_weight)  # the weight that was there holds the update
    lora_model_sd = lora_model.state_dict()
    deloreanized_sd = {
        name.replace("base_model.model.", ""): value for name, value in lora_model_sd.items() if "lora" not in name
    }
    LlamaForCausalLM.save_pretrained(base_model, folder, state_dict=deloreanized_sd, max_shard_size="400MB")


def test_alpaca_lora(lib: ModuleType, llama: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    model, trainer = _finetune(lib, llama, str(tmp_path / "lora"))
    losses = logged(trainer)
    assert losses[-1] < losses[0]
    expected = _logits(model, tokenizer)
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert len(saved) == 2 * 2 * 2
    assert all(value.abs().max() > 0 for value in saved.values())

    # generate.py
    base = LlamaForCausalLM.from_pretrained(llama, device_map={"": "cpu"}, low_cpu_mem_usage=True)
    loaded = lib.PeftModel.from_pretrained(base, str(tmp_path / "lora"), device_map={"": "cpu"})
    loaded.config.pad_token_id = tokenizer.pad_token_id = 0
    loaded.eval()
    torch.testing.assert_close(_logits(loaded, tokenizer), expected, atol=1e-4, rtol=1e-4)
    inputs = tokenizer(_prompt(INSTRUCTIONS[0]), return_tensors="pt")
    with torch.no_grad():
        generation_output = loaded.generate(
            input_ids=inputs["input_ids"].to("cpu"),
            generation_config=GenerationConfig(num_beams=2, pad_token_id=0),
            return_dict_in_generate=True,
            output_scores=True,
            max_new_tokens=4,
        )
    assert tokenizer.decode(generation_output.sequences[0]).startswith("### Instruction")

    _export(lib, llama, str(tmp_path / "lora"), str(tmp_path / "hf_ckpt"))
    exported = LlamaForCausalLM.from_pretrained(tmp_path / "hf_ckpt")
    torch.testing.assert_close(_logits(exported, tokenizer), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_alpaca_lora_goes_on_from_a_checkpoints_weights(lib: ModuleType, llama: str, tmp_path: Path) -> None:
    _, first = _finetune(lib, llama, str(tmp_path / "first"))
    (checkpoint,) = (tmp_path / "first").glob("checkpoint-*")
    _, second = _finetune(lib, llama, str(tmp_path / "second"), resume_from=str(checkpoint))
    assert logged(second)[0] < logged(first)[0]


# --- Trainer ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_script_that_ends_in_save_model(lib: ModuleType, llama: str, tmp_path: Path) -> None:
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=2, **labels)
    model.config.pad_token_id = tokenizer.pad_token_id
    peft_config = lib.LoraConfig(task_type=lib.TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.1)
    model = lib.get_peft_model(model, peft_config)
    texts = [("red fox", 0), ("stone bridge", 1), ("winter", 0), ("the old mill", 1)] * 2
    rows = [{**tokenizer(text, truncation=True, max_length=16), "labels": label} for text, label in texts]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=3,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        **CPU,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows[:4],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
        compute_metrics=lambda given: {"accuracy": float((given[0].argmax(-1) == given[1]).mean())},
    )
    trainer.train()
    predicted = trainer.predict(rows[:4]).predictions
    trainer.save_model(str(tmp_path / "final"))
    names = {path.name for path in (tmp_path / "final").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"} <= names
    assert "model.safetensors" not in names

    loaded = lib.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "final", num_labels=2, **labels)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    loaded.config.pad_token_id = tokenizer.pad_token_id
    loaded.eval()
    inputs = tokenizer([text for text, _ in texts[:4]], return_tensors="pt", padding=True)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, torch.tensor(predicted), atol=1e-4, rtol=1e-4)
    merged = loaded.merge_and_unload()
    classify = pipeline("text-classification", model=merged, tokenizer=tokenizer, device="cpu")
    answers = [answer["label"] for answer in classify([text for text, _ in texts[:4]])]
    assert answers == [labels["id2label"][int(row.argmax())] for row in predicted]


class _Classifier(nn.Module):
    """A model of one's own around a transformers model, as in the notebook on DNA: no config, and no task_type."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.classifier = tiny("bert").bert, nn.Linear(32, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, labels: Any = None) -> Any:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = self.classifier(states.mean(1))
        return logits if labels is None else (nn.functional.cross_entropy(logits, labels), logits)


@pytest.mark.slow
def test_trainer_gets_the_model_inside(lib: ModuleType, tmp_path: Path) -> None:
    config = lib.LoraConfig(r=8, lora_alpha=32, target_modules=["query", "key", "value"], lora_dropout=0.01)
    model = lib.get_peft_model(_Classifier(), config)
    assert isinstance(model.model, _Classifier)  # it has a `model` too
    rows = [{"input_ids": row, "labels": torch.tensor(n % 2)} for n, row in enumerate(ids(4, 8))]
    trainer = trainer_of(model.model, tmp_path, rows, max_steps=4, learning_rate=1e-2, logging_steps=1)
    trainer.train()
    losses = logged(trainer)
    assert losses[-1] < losses[0]
    assert trainer.predict(rows).predictions.shape == (4, 2)


def test_a_pipeline_takes_the_model(lib: ModuleType, llama: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    names = {0: "O", 1: "B-PER", 2: "I-PER"}

    def base() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertForTokenClassification(
            BertConfig(
                vocab_size=len(tokenizer), **sizes, id2label=names, label2id={name: n for n, name in names.items()}
            )
        )

    model = lib.get_peft_model(
        base(), lib.LoraConfig(target_modules=["query", "key"], task_type=lib.TaskType.TOKEN_CLS)
    )
    randomise(model)
    model.save_pretrained(tmp_path)
    loaded = lib.PeftModel.from_pretrained(base(), tmp_path)
    classify = pipeline("token-classification", model=loaded, tokenizer=tokenizer, device="cpu")
    answers = classify("the old mill", ignore_labels=[])
    with torch.no_grad():
        expected = model.eval()(**tokenizer("the old mill", return_tensors="pt")).logits[0].argmax(-1)
    assert [answer["entity"] for answer in answers] == [names[int(label)] for label in expected[-len(answers) :]]


def test_a_vision_and_language_model_without_target_modules(lib: ModuleType) -> None:
    parts: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    others: dict[str, Any] = {**parts, "intermediate_size": 48}
    text = {**parts, "model_type": "opt", "vocab_size": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = Blip2Config(
        vision_config={**others, "image_size": 16, "patch_size": 8},
        qformer_config={**others, "vocab_size": 64, "encoder_hidden_size": 32},
        text_config=text,
        num_query_tokens=4,
        image_token_index=63,
    )
    model = Blip2ForConditionalGeneration(config)
    model = lib.get_peft_model(model, lib.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, bias="none"))
    adapted = [name for name in model.targeted_module_names if "language_model" in name]
    assert adapted == model.targeted_module_names
    assert [name.rpartition(".")[2] for name in adapted] == ["v_proj", "q_proj"]
    tokens = torch.cat([torch.full((2, 4), 63), ids(2, 6) % 60], 1)
    model(input_ids=tokens, pixel_values=torch.zeros(2, 3, 16, 16), labels=tokens).loss.backward()
