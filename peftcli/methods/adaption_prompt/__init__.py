"""LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention (https://arxiv.org/abs/2303.16199)."""
