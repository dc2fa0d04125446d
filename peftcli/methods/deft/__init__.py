"""DEFT: Decompositional Efficient Fine-Tuning (https://arxiv.org/abs/2509.22793)."""
