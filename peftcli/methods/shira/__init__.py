"""SHiRA: Sparse High Rank Adapters (https://arxiv.org/abs/2406.13175)."""
