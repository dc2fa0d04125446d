"""C3A: Parameter-Efficient Fine-Tuning via Circular Convolution (https://arxiv.org/abs/2407.19342)."""
