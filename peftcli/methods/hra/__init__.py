"""HRA: Householder Reflection Adaptation (https://arxiv.org/abs/2405.17484)."""
