"""RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models (https://arxiv.org/abs/2502.00987)."""
