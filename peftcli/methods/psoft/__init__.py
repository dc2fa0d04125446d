"""PSOFT: Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation (https://arxiv.org/abs/2505.11235)."""
