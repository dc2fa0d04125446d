"""P-tuning: GPT Understands, Too (https://arxiv.org/abs/2103.10385)."""
