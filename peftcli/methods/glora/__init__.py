"""GLoRA: One-for-All: Generalized LoRA (https://arxiv.org/abs/2306.07967)."""
