"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (https://arxiv.org/abs/2303.10512)."""
