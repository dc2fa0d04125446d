"""TRL's trainers with peftcli in the place of peft: a config, or for SFT and DPO also a model with an adapter."""

import tempfile
from pathlib import Path

import peftcli.peft_api

peftcli.peft_api.install(version="0.22.0")

import torch
from datasets import Dataset
from models_tiny import VOCABULARY, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.kto import KTOConfig, KTOTrainer

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

rated = Dataset.from_dict({"prompt": ["w5 w6"] * 8, "completion": [" w7 w8"] * 8, "label": [True, False] * 4})
prompts = Dataset.from_dict({"prompt": ["w5 w6"] * 8})
groups = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
rewards = {"reward_funcs": lambda completions, **_: [float(number) for number in range(len(completions))]}
for kind, settings, data, options, given in (
    (KTOTrainer, KTOConfig, rated, {}, {}),
    (GRPOTrainer, GRPOConfig, prompts, groups, rewards),
    (RewardTrainer, RewardConfig, pairs, {}, {}),
):
    out, judges = str(folder / kind.__name__), kind is RewardTrainer
    args = settings(out, max_steps=2, report_to=[], use_cpu=True, bf16=False, learning_rate=1e-2, **options)
    config = LoraConfig(task_type="SEQ_CLS" if judges else "CAUSAL_LM", r=2)
    auto = AutoModelForSequenceClassification if judges else AutoModelForCausalLM
    model = auto.from_pretrained(folder / "base", **({"num_labels": 1, "pad_token_id": 0} if judges else {}))
    trainer = kind(model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=config, **given)
    before = trainer.model.eval()(ids).logits
    trainer.train()
    assert not torch.allclose(before, trainer.model.eval()(ids).logits)
