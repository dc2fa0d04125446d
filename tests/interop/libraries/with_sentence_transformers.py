"""sentence-transformers with peftcli in the place of peft: a new adapter, its training, and a folder of one."""

import tempfile
from pathlib import Path

import peftcli.peft_api

peftcli.peft_api.install(version="0.22.0")

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer import losses
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

folder = Path(tempfile.mkdtemp())
base = str(folder / "base")
torch.manual_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
BertModel(BertConfig(vocab_size=96, **sizes)).save_pretrained(base)
raw = Tokenizer(models.WordLevel({"<unk>": 0, **{f"w{number}": number for number in range(1, 96)}}, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", pad_token="<unk>").save_pretrained(base)


def encode(model: SentenceTransformer) -> torch.Tensor:
    return model.encode(["w5 w6 w7", "w8 w9"], convert_to_tensor=True)


model = SentenceTransformer(base, device="cpu")
before = encode(model)
model.add_adapter(LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=2, target_modules=["query", "value"]))
rows = Dataset.from_dict({"anchor": ["w5 w6", "w7 w8"] * 4, "positive": ["w5 w1", "w7 w2"] * 4})
args = SentenceTransformerTrainingArguments(
    str(folder / "run"), max_steps=3, report_to=[], use_cpu=True, learning_rate=1e-2
)
loss = losses.MultipleNegativesRankingLoss(model)
SentenceTransformerTrainer(model, args, train_dataset=rows, loss=loss).train()
after = encode(model)
assert not torch.allclose(before, after)
model.save_pretrained(str(folder / "saved"))
assert (folder / "saved" / "adapter_model.safetensors").is_file()
torch.testing.assert_close(encode(SentenceTransformer(str(folder / "saved"), device="cpu")), after)

loaded = SentenceTransformer(base, device="cpu")
loaded.load_adapter(str(folder / "saved"))
torch.testing.assert_close(encode(loaded), after)
loaded.disable_adapters()
torch.testing.assert_close(encode(loaded), before)
loaded.enable_adapters()
torch.testing.assert_close(encode(loaded), after)
