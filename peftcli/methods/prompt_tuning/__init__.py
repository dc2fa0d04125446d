"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (https://arxiv.org/abs/2104.08691)."""
