"""Prefix tuning (https://arxiv.org/abs/2101.00190)."""
