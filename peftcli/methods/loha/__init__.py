"""LoHa: FedPara: Low-Rank Hadamard Product (https://arxiv.org/abs/2108.06098)."""
