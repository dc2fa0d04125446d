"""TRL's SFTTrainer and DPOTrainer with peftcli in the place of peft: a config, or a model with an adapter."""

import tempfile
from pathlib import Path

import peftcli.peft_api

peftcli.peft_api.install(version="0.22.0")

import torch
from datasets import Dataset
from models_tiny import VOCABULARY, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
tiny("llama").save_pretrained(folder / "base")
words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCABULARY - 1)}, "</s>": VOCABULARY - 1}
raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>", eos_token="</s>")
texts = Dataset.from_dict({"text": ["w5 w6 w7 w8"] * 8})
pairs = Dataset.from_dict({"prompt": ["w5 w6"] * 8, "chosen": [" w7 w8"] * 8, "rejected": [" w9 w3"] * 8})
ids = torch.tensor([[5, 6, 7, 8]])


def base() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder / "base")


for number, (kind, settings, data) in enumerate([(SFTTrainer, SFTConfig, texts), (DPOTrainer, DPOConfig, pairs)] * 2):
    out = str(folder / str(number))
    args = settings(out, max_steps=3, report_to=[], use_cpu=True, bf16=False, learning_rate=1e-2)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, modules_to_save=["lm_head"] if number == 0 else None)
    given = {"model": base(), "peft_config": config} if number < 2 else {"model": get_peft_model(base(), config)}
    if number >= 2:
        torch.nn.init.normal_(given["model"].base_model.model.model.layers[0].self_attn.q_proj.lora_B.weight)
    trainer = kind(args=args, train_dataset=data, processing_class=tokenizer, **given)
    if number == 3:  # its reference is the adapter that it was given
        reference = trainer.model.eval()(ids).logits
        trainer.model.set_adapter("ref")
        torch.testing.assert_close(trainer.model(ids).logits, reference)
        trainer.model.set_adapter("default")
    before = trainer.model.eval()(ids).logits
    trainer.train()
    trainer.save_model(f"{out}/final")
    after = trainer.model.eval()(ids).logits
    assert not torch.allclose(before, after)
    loaded = PeftModel.from_pretrained(base(), f"{out}/final").eval()
    torch.testing.assert_close(loaded(ids).logits, after)
