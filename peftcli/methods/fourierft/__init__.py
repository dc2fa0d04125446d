"""FourierFT: Parameter-Efficient Fine-Tuning with Discrete Fourier Transform (https://arxiv.org/abs/2405.03003)."""
