"""Sketches of tensors."""

from __future__ import annotations

import torch

from peftcli.adapters.proof.sketches import sketch


def test_a_tensor_whose_last_place_is_no_float32() -> None:
    """Logits of a large vocabulary have more than 2**24 numbers."""
    value = torch.zeros(2**24 + 4, dtype=torch.bfloat16)
    value[-1] = 1
    assert sketch(value)["values"][-1] == 1
