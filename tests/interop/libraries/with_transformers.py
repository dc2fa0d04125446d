"""transformers' own adapter methods, from_pretrained, pipeline and Trainer, with peftcli in the place of peft."""

import sys
import tempfile
from pathlib import Path

import peftcli.peft_api

peftcli.peft_api.install(version="0.22.0")

import torch
from models_tiny import VOCABULARY, tiny
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
tiny("llama").save_pretrained(folder / "base")
words = {"<unk>": 0, **{f"w{number}": number for number in range(1, VOCABULARY)}}
raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>")


def base() -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder / "base")


# the head is trained in full, so that the folder holds both kinds of tensors
model = get_peft_model(
    base(), LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, modules_to_save=["lm_head"])
)
with torch.no_grad():
    model.base_model.model.lm_head.copy.weight.add_(0.1 * torch.randn(VOCABULARY, 32))
model.eval().save_pretrained(folder / "adapter")
tokenizer.save_pretrained(folder / "adapter")
ids = torch.randint(3, 90, (2, 9))
wanted = model(ids).logits

for name in (folder / "adapter", str(folder / "adapter")):
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(name)(ids).logits, wanted)
answers = [
    pipeline("text-generation", model=each, tokenizer=tokenizer)("w5 w6 w7", max_new_tokens=5, do_sample=False)
    for each in (str(folder / "adapter"), model)
]
assert answers[0] == answers[1], answers

rows = [{"input_ids": ids[0], "labels": ids[0]}] * 8
args = TrainingArguments(str(folder / "run"), max_steps=4, save_steps=2, report_to=[], use_cpu=True, learning_rate=1e-2)
model = base()
model.add_adapter(LoraConfig(r=2))
trainer = Trainer(model, args, train_dataset=rows)
trainer.train()
trainer.save_model(str(folder / "trained"))
wanted = model.eval()(ids).logits
torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(folder / "trained")(ids).logits, wanted)
torch.testing.assert_close(PeftModel.from_pretrained(base(), folder / "trained").eval()(ids).logits, wanted)


def peft_model() -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", r=2))


args.output_dir = str(folder / "of-peft-model")
whole, resumed = Trainer(peft_model(), args, train_dataset=rows), Trainer(peft_model(), args, train_dataset=rows)
whole.train()
resumed.train(resume_from_checkpoint=str(folder / "of-peft-model" / "checkpoint-2"))
for name, value in whole.model.state_dict().items():
    assert torch.equal(resumed.model.state_dict()[name], value), name
assert "peftcli" in sys.modules["peft"].__file__
