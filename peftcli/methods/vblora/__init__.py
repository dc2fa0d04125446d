"""VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks (https://arxiv.org/abs/2405.15179)."""
