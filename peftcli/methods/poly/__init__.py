"""Poly and MHR: Combining Modular Skills in Multitask Learning (https://arxiv.org/abs/2202.13914)."""
