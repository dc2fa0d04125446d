"""GraLoRA: Granular Low-Rank Adaptation (https://arxiv.org/abs/2505.20355)."""
