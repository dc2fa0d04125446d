"""VeRA: Vector-based Random Matrix Adaptation (https://arxiv.org/abs/2310.11454)."""
