"""LN tuning: Tuning LayerNorm in Attention (https://arxiv.org/abs/2312.11420)."""
