"""Uni-LoRA: One Vector is All You Need (https://arxiv.org/abs/2506.00799)."""
