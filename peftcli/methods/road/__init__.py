"""RoAd: 3-in-1: 2D Rotary Adaptation (https://arxiv.org/abs/2409.00119)."""
