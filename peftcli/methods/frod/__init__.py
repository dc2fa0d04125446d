"""FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees (https://arxiv.org/abs/2512.23485)."""
