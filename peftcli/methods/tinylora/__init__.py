"""TinyLoRA: Learning to Reason in 13 Parameters (https://arxiv.org/abs/2602.04118)."""
