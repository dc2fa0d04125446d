"""Lily: Low-Rank Interconnected Adaptation across Layers (https://arxiv.org/abs/2407.09946)."""
