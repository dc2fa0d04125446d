"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning (https://arxiv.org/abs/2205.05638)."""
