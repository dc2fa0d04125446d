"""HiRA: Parameter-Efficient Hadamard High-Rank Adaptation (https://openreview.net/forum?id=TwJrTz9cRS)."""
