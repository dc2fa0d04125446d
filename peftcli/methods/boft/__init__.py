"""BOFT: Orthogonal Finetuning via Butterfly Factorization (https://arxiv.org/abs/2311.06243)."""
