"""X-LoRA: Mixture of Low-Rank Adapter Experts (https://arxiv.org/abs/2402.07148)."""
