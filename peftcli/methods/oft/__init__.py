"""OFT: Orthogonal Finetuning (https://arxiv.org/abs/2306.07280)."""
