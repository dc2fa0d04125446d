"""llama.cpp answers with an adapter beside its base model, both as GGUF files, as peftcli does.

llama.cpp's own converter is in no package, so the files are written here by its rules: its names, ``lora_alpha``, and
the two halves of each head that the rotary embedding turns together interleaved, in q_proj and k_proj and their lora_B.
"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
import xllamacpp
from safetensors.numpy import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli import LoraConfig, get_peft_model

PROMPT = [1, 9, 41, 30, 77, 5]
folder = Path(tempfile.mkdtemp())
torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
config = LlamaConfig(vocab_size=256, intermediate_size=128, bos_token_id=1, eos_token_id=2, **sizes)
base = LlamaForCausalLM(config)
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)


def interleaved(name: str, weight: np.ndarray) -> np.ndarray:
    """A weight (out, in) as llama.cpp has it."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-1])
    return (
        weight if heads is None else weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    )


def write(path: Path, tensors: Mapping[str, np.ndarray], describe: Callable[[gguf.GGUFWriter], None]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe_base(writer: gguf.GGUFWriter) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = [f"w{number}" for number in range(config.vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def there(path: str) -> str:
    """llama.cpp's name of a module."""
    name = names.get_name(path)
    assert name is not None, path
    return name


weights = {name.removesuffix(".weight"): tensor.detach().numpy() for name, tensor in base.named_parameters()}
found = {f"{there(name)}.weight": interleaved(name, tensor) for name, tensor in weights.items()}
write(folder / "base.gguf", found, describe_base)

settings = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
model = get_peft_model(base, settings).eval()
model.save_pretrained(folder / "adapter")
found = {}
for name, tensor in load_file(folder / "adapter" / "adapter_model.safetensors").items():
    path, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    of_output = side == "lora_B"
    found[f"{there(path)}.weight.{side.lower()}"] = interleaved(path, tensor) if of_output else tensor


def describe_adapter(writer: gguf.GGUFWriter) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, settings.lora_alpha)


write(folder / "adapter.gguf", found, describe_adapter)


def theirs(*adapters: Path) -> list[int]:
    """The 12 most probable tokens, one after another, after the prompt."""
    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "base.gguf")
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path)) for path in adapters]
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = 1
    asked = {"prompt": PROMPT, "n_predict": 12, "temperature": 0.0, "ignore_eos": True}
    said = xllamacpp.Server(params).handle_completions(asked)["choices"][0]["text"]
    return [int(word) for word in said.split("w")[1:]]


inputs = torch.tensor([PROMPT])
answer = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
ours = model.generate(input_ids=inputs, **answer)[0, len(PROMPT) :].tolist()
with model.disable_adapter():
    plain = model.generate(input_ids=inputs, **answer)[0, len(PROMPT) :].tolist()
assert ours != plain
assert theirs() == plain, (theirs(), plain)
assert theirs(folder / "adapter.gguf") == ours, (theirs(folder / "adapter.gguf"), ours)
