"""Settings of LoRA, each with a tiny model that it fits: for comparison with PEFT and for every adapter's promises."""

from __future__ import annotations

from typing import Any

from models_tiny import KINDS

PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"default-{kind}": (kind, {}) for kind in KINDS},
    **{f"all-linear-{kind}": (kind, {"target_modules": "all-linear"}) for kind in KINDS if kind != "bert"},
    "all-linear-classifier": ("bert", {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-scaled": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-gpt2": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "embedding-t5": ("t5", {"target_modules": ["embed_tokens", "q"]}),
    "head": ("llama", {"target_modules": ["lm_head", "v_proj"]}),
    "head-tied": ("llama_tied", {"target_modules": ["lm_head", "v_proj"]}),
    "embedding-tied": ("llama_tied", {"target_modules": ["embed_tokens"]}),
    "both-ends-tied": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "bias-all-linear": ("opt", {"bias": "all"}),
    "bias-all-conv1d": ("gpt2", {"bias": "all"}),
    "bias-all-bert": ("bert", {"bias": "all", "modules_to_save": ["classifier"]}),
    "bias-own-linear": ("qwen2", {"bias": "lora_only"}),
    "bias-own-conv1d": ("gpt2", {"bias": "lora_only", "target_modules": ["c_attn", "c_fc"]}),
    "bias-own-none-there": ("llama", {"bias": "lora_only"}),
    "saved-classifier": ("bert", {"modules_to_save": ["classifier"]}),
    "saved-two": ("bert", {"modules_to_save": ["classifier", "pooler"]}),
    "saved-head": ("llama", {"modules_to_save": ["lm_head"]}),
    "saved-head-tied": ("llama_tied", {"modules_to_save": ["lm_head"]}),
    "saved-embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "saved-norm": ("llama", {"modules_to_save": ["model.norm"]}),
    "rslora": ("llama", {"use_rslora": True, "r": 4, "lora_alpha": 5}),
    "rank-pattern": ("llama", {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6}}),
    "alpha-pattern": ("llama", {"alpha_pattern": {"v_proj": 3, r".*\.1\..*q_proj": 20}}),
    "both-patterns": ("gpt2", {"rank_pattern": {"c_attn": 3}, "alpha_pattern": {"h.0.attn.c_attn": 30}}),
    "one-layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "layer-list": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]}),
    "layer-pattern": ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "layer-named": ("llama", {"target_modules": ["model.layers.0.mlp.up_proj", "v_proj"], "layers_to_transform": [1]}),
    "exclude": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "exclude-regex": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.mlp\..*"}),
    "regex": ("llama", {"target_modules": r".*\.(q|o)_proj"}),
    "regex-encoder": ("t5", {"target_modules": r"encoder.*\.(q|v|wi|wo)"}),
    "saved-wins-over-target": ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["pooler"]}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian", "lora_dropout": 0.25}),
    "float-alpha": ("llama", {"lora_alpha": 7.5, "r": 3}),
}
"""What concerns the choice of layers, r and alpha."""

FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"dora-{kind}": (kind, {"use_dora": True}) for kind in KINDS},
    "dora-bias": ("qwen2", {"use_dora": True, "bias": "lora_only"}),
    "dora-rslora": ("gpt2", {"use_dora": True, "use_rslora": True, "rank_pattern": {"h.0.attn.c_attn": 2}}),
    "dora-embedding": ("llama", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora-embedding-scaled": ("gemma3", {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora-convnet": ("convnet", {"use_dora": True, "target_modules": ["convolution"]}),
    "conv2d": ("convnet", {"target_modules": ["convolution"]}),
    "conv2d-all": (
        "convnet",
        {"target_modules": r".*convolution", "use_rslora": True, "init_lora_weights": "gaussian"},
    ),
    "conv2d-saved": ("convnet", {"target_modules": ["convolution"], "modules_to_save": ["classifier"]}),
    "lora-bias": ("qwen2", {"lora_bias": True}),
    "lora-bias-conv1d": ("gpt2", {"lora_bias": True}),
    **{f"tokens-{kind}": (kind, {"trainable_token_indices": [7, 3, 90]}) for kind in KINDS},
    "tokens-by-name": ("llama", {"trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [5]}}),
    "tokens-of-a-tied-head": ("llama_tied", {"trainable_token_indices": {"lm_head": [3, 9]}}),
    "tokens-tied-apart": ("llama_tied", {"trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [5]}}),
    "tokens-tied-alike": ("llama_tied", {"trainable_token_indices": {"lm_head": [3, 9], "embed_tokens": [3, 9]}}),
    "experts": ("mixtral", {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
    "experts-only": ("mixtral", {"target_parameters": ["down_proj"], "target_modules": []}),
    "experts-and-router": ("mixtral", {"target_parameters": ["mlp.gate.weight", "gate_up_proj"], "target_modules": []}),
    "parameter-of-a-layer": ("llama", {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}),
    "parameter-with-a-bias": (
        "qwen2",
        {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"], "bias": "lora_only"},
    ),
    "replicated": ("llama", {"layer_replication": [[0, 2], [1, 2]]}),
    "replicated-turned": ("llama", {"layer_replication": [[1, 2], [0, 2]], "target_modules": "all-linear"}),
    "replicated-bert": ("bert", {"layer_replication": [[0, 1], [0, 2]]}),
    "tied-embedding": ("llama_tied", {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied-head": ("llama_tied", {"target_modules": ["lm_head", "v_proj"], "ensure_weight_tying": True}),
    "tied-scaled": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}),
    "tied-saved": ("llama_tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tied-tokens": ("llama_tied", {"trainable_token_indices": [3, 4], "ensure_weight_tying": True}),
}
"""What makes other layers, or other models."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bdlora": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "use_bdlora": {
                "target_modules_bd_a": ["o_proj"],
                "target_modules_bd_b": ["q_proj"],
                "nblocks": 2,
                "match_strict": False,
            },
        },
    ),
    "kasa": ("llama", {"kasa_config": {"beta": 0.1, "gamma": 0.2}, "r": 4, "bias": "lora_only"}),
    "monteclora": ("llama", {"monteclora_config": {"num_samples": 3, "use_entropy": True}}),
    "monteclora-conv1d": ("gpt2", {"monteclora_config": {}}),
    "velora": ("llama", {"velora_config": {"num_groups": 5}}),
    "velora-random": ("gpt2", {"velora_config": {"init_type": "random", "scale": 2.0}}),
}
FURTHER |= VARIANTS
ALORA: tuple[str, dict[str, Any]] = ("llama", {"alora_invocation_tokens": [56, 81], "task_type": "CAUSAL_LM"})
"""The tokens are in the first row of the batch. It cannot be merged."""

CASES = PLAIN | FURTHER | {"alora": ALORA}
