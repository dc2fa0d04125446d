"""Super-Tuning (https://arxiv.org/abs/2607.09287)."""
