"""MiSS: Matrix Shard Sharing, once called Bone (https://arxiv.org/abs/2409.15371)."""
