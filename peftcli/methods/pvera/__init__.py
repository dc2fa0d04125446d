"""PVeRA: Probabilistic Vector-based Random Matrix Adaptation (https://arxiv.org/abs/2512.07703)."""
