"""BEFT: Bias-Efficient Fine-Tuning (https://arxiv.org/abs/2509.15974)."""
