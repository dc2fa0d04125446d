"""WaveFT: Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets (https://arxiv.org/abs/2505.12532)."""
