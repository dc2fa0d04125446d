"""Trainable tokens: some rows of an embedding are trained, and nothing else."""
