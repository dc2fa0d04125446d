"""OSF: Orthogonal Subspace Fine-Tuning, sculpting subspaces (https://arxiv.org/abs/2504.07097)."""
