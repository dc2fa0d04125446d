"""Multitask prompt tuning (https://arxiv.org/abs/2303.02861)."""
