"""Facts about families of models: for one, what a config without ``target_modules`` adapts. No torch here."""

from __future__ import annotations

_NAMES = {
    "q_proj v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 stablelm",
    "query value": "bert electra layoutlm roberta xlm-roberta",
    "query_key_value": "bloom falcon gpt_neox",
    "c_attn": "gpt2 gpt_bigcode",
    "q v": "mt5 t5",
    "qkv_proj": "codegen",
    "in_proj": "deberta",
    "query_proj value_proj": "deberta-v2",
    "Wqkv": "mpt",
    "q_proj v_proj fc1 fc2": "phi",
    "q v q_proj v_proj": "blip-2",
    "q_proj k_proj v_proj o_proj": "nemotron_h",
    "key value receptance output": "rwkv",
}
FAMILIES: dict[str, list[str] | str] = {
    **{family: names.split() for names, families in _NAMES.items() for family in families.split()},
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
}
"""The modules that PEFT adapts by default, per model_type, so that a config without target_modules means the same
here; of a list what the model has."""

ALL_MATRICES: dict[str, list[str]] = {
    "bart": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", "dense"],
    "mt5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
"""The families of which some methods adapt attention and feed-forward layers in full."""
MLP_OUTPUTS: dict[str, list[str]] = {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}
"""The families of which some methods adapt the second layer of each MLP, and not the attention."""
TIME_FIRST = {"fsmt", "led", "longformer", "transfo-xl", "xlnet"}
"""The families whose layers see (T, B, D), so that rows of a batch cannot have different adapters."""
AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""The families that count positions from the one after the pad token's id."""
