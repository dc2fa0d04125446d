"""``init_lora_weights: orthogonal``."""

from __future__ import annotations

import torch


def orthogonal(a: torch.Tensor, b: torch.Tensor) -> None:
    """Draw A and B over two halves of an orthogonal basis of r directions, so that ``B A`` is zero."""
    r, (out, inputs) = len(a), (len(b), a.shape[1])
    basis, _ = torch.linalg.qr(a.new_empty(r, r).normal_())
    a.copy_((a.new_empty(inputs, r // 2).normal_() @ basis[0::2]).T / 10)
    b.copy_(b.new_empty(out, r // 2).normal_() @ basis[1::2] / 10)
