"""PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers (https://arxiv.org/abs/2410.01870)."""
