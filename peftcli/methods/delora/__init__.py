"""DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation (https://arxiv.org/abs/2503.18225)."""
