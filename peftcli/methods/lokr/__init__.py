"""LoKr: the Kronecker product of LyCORIS (https://arxiv.org/abs/2309.14859)."""
