"""LoRA: Low-Rank Adaptation of Large Language Models (https://arxiv.org/abs/2106.09685)."""
