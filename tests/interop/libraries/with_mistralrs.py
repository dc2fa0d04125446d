"""mistral.rs answers with an adapter's folder beside its base model, and with a merged folder, as peftcli does."""

import json
import os
import tempfile
from pathlib import Path

os.environ["MISTRALRS_CPU_KV_F32"] = "1"  # as transformers has it

import torch
from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peftcli import LoraConfig, get_peft_model
from peftcli.adapters.merge import merge_adapter

WORDS = 250
folder = Path(tempfile.mkdtemp())
base, adapter, merged = (str(folder / name) for name in ("base", "adapter", "merged"))
torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
config = LlamaConfig(vocab_size=WORDS + 6, intermediate_size=128, bos_token_id=1, eos_token_id=2, **sizes)
LlamaForCausalLM(config).save_pretrained(base)
written = json.loads(Path(base, "config.json").read_text())
written["rope_theta"] = written["rope_parameters"]["rope_theta"]  # mistral.rs knows no other key
Path(base, "config.json").write_text(json.dumps(written))
words = ["<unk>", "<s>", "</s>", "<user>", "<answer>", "<pad>", *(f"w{number}" for number in range(WORDS))]
raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
raw.decoder = decoders.ByteLevel()  # mistral.rs must know one
template = "{{ '<s> <user> ' + messages[0]['content'] + ' <answer>' }}"
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=raw,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
    pad_token="<pad>",
    chat_template=template,
)
tokenizer.save_pretrained(base)

settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
model = get_peft_model(LlamaForCausalLM.from_pretrained(base), settings).eval()
model.save_pretrained(adapter)
merge_adapter(adapter, Path(merged))
inputs = tokenizer("<s> <user> w3 w14 w15 <answer>", return_tensors="pt", add_special_tokens=False)
answer = {"max_new_tokens": 12, "do_sample": False}
ours = tokenizer.decode(model.generate(**inputs, **answer)[0, 6:], skip_special_tokens=True)
with model.disable_adapter():
    plain = tokenizer.decode(model.generate(**inputs, **answer)[0, 6:], skip_special_tokens=True)
assert ours != plain


def theirs(runner: Runner, adapter: str | None = None) -> str:
    messages = [{"role": "user", "content": "w3 w14 w15"}]
    request = ChatCompletionRequest(model="default", messages=messages, max_tokens=12, temperature=0.0, adapter=adapter)
    return runner.send_chat_completion_request(request).choices[0].message.content


both = Runner(which=Which.Lora(model_id=base, adapters=[LoraAdapter("mine", adapter)], dtype=ModelDType.F32))
assert theirs(both) == plain, (theirs(both), plain)
assert theirs(both, "mine") == ours, (theirs(both, "mine"), ours)
one = Runner(which=Which.Plain(model_id=merged, dtype=ModelDType.F32))
assert theirs(one) == ours, (theirs(one), ours)
