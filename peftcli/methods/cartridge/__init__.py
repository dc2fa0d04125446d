"""Cartridges (https://arxiv.org/abs/2506.06266)."""
