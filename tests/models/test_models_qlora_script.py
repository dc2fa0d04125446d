"""QLoRA's script and PEFT's guide to quantisation, as users write them with another import, on bitsandbytes itself."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import trainkit
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)

from peftcli import peft_api

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Some matrices hidden dimension:UserWarning"),
]


@pytest.fixture(params=["peftcli.peft_api", pytest.param("peft", marks=pytest.mark.filterwarnings("ignore"))])
def lib(request: pytest.FixtureRequest) -> ModuleType:
    pytest.importorskip("bitsandbytes")
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model with its tokenizer, its layers wide enough for every kernel of bitsandbytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    trainkit.tokenizer().save_pretrained(folder)
    return str(folder)


def _quantised(folder: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def _data(tokenizer: Any) -> list[dict[str, Any]]:
    rows = []
    for question, answer in trainkit.PAIRS[:8]:
        asked, said = tokenizer(question)["input_ids"], tokenizer(f" {answer}")["input_ids"]
        full = [*asked, *said, tokenizer.eos_token_id]
        labels = [-100] * len(asked) + full[len(asked) :]
        rows.append({"input_ids": full, "attention_mask": [1] * len(full), "labels": labels})
    return rows


@torch.no_grad()
def _logits(model: Any, tokenizer: Any) -> torch.Tensor:
    return model.eval()(**tokenizer("What follows sun 1?", return_tensors="pt")).logits.float()


def _accelerate_model(lib: ModuleType, model: Any, checkpoint: str | None) -> Any:
    import bitsandbytes as bnb

    lora_layer = importlib.import_module(f"{lib.__name__}.tuners.lora").LoraLayer
    model = lib.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    if checkpoint is not None:
        model = lib.PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    else:
        found = {name.split(".")[-1] for name, each in model.named_modules() if isinstance(each, bnb.nn.Linear4bit)}
        config = lib.LoraConfig(
            r=8, lora_alpha=16, target_modules=sorted(found), lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
        )
        model = lib.get_peft_model(model, config)
    for name, module in model.named_modules():
        if isinstance(module, lora_layer):
            module.to(torch.bfloat16)
        if "norm" in name:
            module.to(torch.float32)
        if ("lm_head" in name or "embed_tokens" in name) and hasattr(module, "weight"):
            module.to(torch.bfloat16)
    return model


def test_qlora(lib: ModuleType, base: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses: list[float] = []
    for name, checkpoint in (("first", None), ("second", str(tmp_path / "first" / "checkpoint-6"))):
        model = _accelerate_model(lib, _quantised(base), checkpoint)
        model.config.use_cache = False
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            bf16=True,
            gradient_checkpointing=True,
            max_grad_norm=0.3,
            lr_scheduler_type="constant",
            save_steps=3,
            logging_steps=1,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Seq2SeqTrainer(
            model=model,
            processing_class=tokenizer,
            args=arguments,
            train_dataset=_data(tokenizer),
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        )
        trainer.train()
        losses += [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[5] < losses[0]
    assert losses[6] < losses[1]  # the second went on
    trainer.save_model(str(tmp_path / "adapter"))
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * 7 * 2

    expected = _logits(model, tokenizer)
    loaded = lib.AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter",
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    )
    near = 0.3 * expected.std()  # the base is quantised a second time in another way
    assert (_logits(loaded, tokenizer) - expected).abs().mean() < near
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = lib.PeftModel.from_pretrained(full, str(tmp_path / "adapter")).merge_and_unload()
    assert (_logits(merged, tokenizer) - expected).abs().mean() < near
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(_logits(plain, tokenizer), _logits(merged, tokenizer))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_guide_to_quantisation(lib: ModuleType, bits: int, base: str) -> None:
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model = lib.prepare_model_for_kbit_training(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing
    model = lib.get_peft_model(
        model,
        lib.LoraConfig(
            r=16,
            lora_alpha=8,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    status = model.get_model_status()
    assert status.num_adapter_layers == 8
    inputs = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=inputs, labels=inputs).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_weights_start_from_loftq(lib: ModuleType, base: str) -> None:
    if lib.__name__ == "peft" and not torch.cuda.is_available():
        pytest.skip("PEFT's needs a GPU")
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    peft_model = lib.get_peft_model(model, lib.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=16))
    expected = _logits(dense, tokenizer)
    before = (_logits(peft_model, tokenizer) - expected).abs().mean()
    lib.replace_lora_weights_loftq(peft_model, model_path=f"{base}/model.safetensors")
    assert (_logits(peft_model, tokenizer) - expected).abs().mean() < before


@pytest.mark.parametrize(("bits", "iterations"), [(4, 1), (4, 3), (8, 2)])
def test_loftq_over_a_base_in_full_precision_is_pefts(
    bits: int, iterations: int, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    from peft.tuners.lora import layer
    from peft.utils import loftq_utils

    named = dict(vars(loftq_utils))
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')  # PEFT's runs on GPUs only
    exec(source, named)
    monkeypatch.setattr(layer, "loftq_init", named["loftq_init"])
    models = []
    for lib in (importlib.import_module("peft"), peft_api):
        settings = lib.LoftQConfig(loftq_bits=bits, loftq_iter=iterations)
        config = lib.LoraConfig(
            init_lora_weights="loftq", loftq_config=settings, r=8, lora_alpha=8, target_modules="all-linear"
        )
        models.append(lib.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval())
    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.testing.assert_close(_logits(models[1], tokenizer), _logits(models[0], tokenizer), atol=1e-4, rtol=1e-4)
