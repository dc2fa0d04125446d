"""Every fact about families of models that methods and the core need, by ``model_type``. No torch here.

A table is written by its values, so that families of one kind stand in one line: ``_by_family`` turns it around.
"""

from __future__ import annotations


def _by_family(rows: dict[str, str]) -> dict[str, list[str]]:
    """Turn ``{"q v": "mt5 t5"}`` into ``{"mt5": ["q", "v"], "t5": ["q", "v"]}``."""
    return {family: names.split() for names, families in rows.items() for family in families.split()}


_ALL_MATRICES = {
    "q_proj k_proj v_proj out_proj fc1 fc2": "bart opt",
    "query_proj key_proj value_proj dense": "deberta-v2",
    "q k v o wi_0 wi_1 wo": "mt5",
    "q k v o wi wo": "t5",
}
_MLP_OUTPUTS = {"mlp.c_proj": "gpt2 gpt_bigcode"}
_IA3_OUTPUTS = {
    "q_proj v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama4 phi qwen2 qwen3",
    "k_proj v_proj": "llama mistral mixtral",  # the experts' w2, which PEFT names too, is no module of its own any more
    "key value": "bert roberta",
    "query_key_value": "bloom falcon gpt_neox",
    "c_attn": "gpt2 gpt_bigcode",
    "in_proj": "deberta",
    "key_proj value_proj": "deberta-v2",
    "k v wi_1": "mt5",
    "q_proj k_proj": "opt",
    "k v": "t5",
}
_IA3_INPUTS = {
    "fc2": "bart opt phi",
    "output.dense": "bert deberta deberta-v2 roberta",
    "mlp.dense_4h_to_h": "bloom",
    "dense_4h_to_h": "falcon gpt_neox",
    "down_proj": "gemma gemma2 gemma3_text llama llama4 mistral qwen2 qwen3",
    "mlp.c_proj": "gpt2 gpt_bigcode",
    "c_proj": "gpt_neo",
    "fc_out": "gptj",
    "wo": "t5",
}
IA3_INPUTS = _by_family(_IA3_INPUTS)
"""Those of (IA)^3's usual modules that are scaled at their inputs."""
_AROUND = "input_layernorm post_attention_layernorm"
_BY_METHOD: dict[str, dict[str, str]] = {
    "lora": {
        "q_proj v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt qwen2 qwen3 "
        "stablelm",
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
    },
    "adalora": {**_ALL_MATRICES, "query key value dense": "roberta"},
    "vblora": _ALL_MATRICES,
    "beft": {
        "v_proj": "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral opt phi qwen2 qwen3",
        "value": "bert roberta",
        "value_proj": "deberta-v2",
        "v": "mt5 t5",
    },
    "c3a": _MLP_OUTPUTS,
    "fourierft": _MLP_OUTPUTS,
    "waveft": _MLP_OUTPUTS,
    "frod": {"q_proj v_proj": "phi", "query value": "vit"},
    "pvera": {"q_proj v_proj": "phi", "query value": "dinov2"},
    "shira": {"q_proj v_proj": "phi"},
    "vera": {"q_proj v_proj": "phi"},
    "ln_tuning": {
        "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm": "bart",
        f"{_AROUND} ln_f": "bloom falcon",
        f"{_AROUND} norm": "gemma llama mistral",
        f"{_AROUND} pre_feedforward_layernorm post_feedforward_layernorm norm": "gemma2 gemma3_text",
        "ln_1 ln_2 ln_f": "gpt2",
        "ln_1 ln_f": "gptj",
        "layer_norm final_layer_norm": "mt5 t5",
        "input_layernorm final_layernorm": "phi",
        "post_attention_layernorm": "qwen2 qwen3",
    },
    "osf": {
        "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj": "gemma gemma2 gemma3_text llama llama4 mistral "
        "qwen2 qwen3",
        "query_key_value dense_4h_to_h": "bloom falcon gpt_neox",
        "c_attn c_proj": "gpt2 gpt_bigcode",
        "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
        "q_proj k_proj v_proj o_proj": "mixtral",  # the other names that PEFT has for it and phi are of no module there
        "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
        "q_proj k_proj v_proj": "phi",
    },
}
TARGETS: dict[str, dict[str, list[str] | str]] = {
    **{method: {**_by_family(rows)} for method, rows in _BY_METHOD.items()},
    "ia3": {name: [*names, *IA3_INPUTS.get(name, ())] for name, names in _by_family(_IA3_OUTPUTS).items()},
}
"""Method -> family -> the modules that PEFT adapts by default, so that a config without target_modules means the same
here; of a list what the model has. Methods and families without a row have LoRA's, or else every linear layer."""
TARGETS["lora"]["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"
TARGETS["ia3"]["*"] = TARGETS["osf"]["*"] = "all-linear"  # other families do not get LoRA's

READ_PAST_CALLS = _by_family({
    "conv1d": "bailing_hybrid glm5_next_text inkling2_loop_text inkling2_text inkling_text kimi_linear lara_mini "
    "olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp_text zamba",
    "conv1d out_proj": "bamba falcon_h1 granitemoehybrid mamba2 nemotron_h zamba2",
    "conv1d dt_proj out_proj": "falcon_mamba mamba",
    "conv1d dt_proj": "jamba",
    "conv": "lfm2 lfm2_moe lfm3",
    "conv_1d": "recurrent_gemma",
    "kernel": "data2vec-audio unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer",
    "k_proj kernel out_proj q_proj v_proj": "wavlm",
    "bbox_attention.k_proj": "conditional_detr detr",
    "rel_pos_bias rel_pos_x_bias rel_pos_y_bias": "layoutlmv2 layoutlmv3",
    "correction_coefs": "gemma3n_text",
    "classifier": "longcat_flash",
    "predictions.decoder predictions.dense": "mobilebert",
    "unembedding_projection": "neomme",
})  # fmt: skip
"""The modules whose weights a family reads without calling them, in its kernels, in steps of generation or always: what
an adapter adds to the output of such a module would be lost. Some are read so on GPUs only: docs/decisions/0039."""
COUNT_AFTER_PADDING = frozenset((
    "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
))  # fmt: skip
"""The families that count positions from the one after the pad token's id."""
TIME_FIRST = frozenset(("fsmt", "led", "longformer", "transfo-xl", "xlnet"))
"""The families whose layers see (T, B, D), so that rows of a batch cannot have different adapters."""
