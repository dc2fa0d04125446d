"""Rows of all processes, where a loss compares them."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def process() -> tuple[int, int]:
    """The number of this process, from 0, and how many there are."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gathered(rows: torch.Tensor) -> list[torch.Tensor]:
    """The rows (R, D) of each process, in the processes' order, without gradients. All processes call this.

    R may differ between processes, and D where R is 0.
    """
    count = process()[1]
    if count == 1:
        return [rows]
    shape = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.zeros_like(shape) for _ in range(count)]
    torch.distributed.all_gather(shapes, shape)
    most, width = torch.stack(shapes).amax(0).tolist()
    padded = F.pad(rows.detach(), (0, width - rows.shape[1], 0, most - rows.shape[0]))
    found = [torch.empty_like(padded) for _ in range(count)]
    torch.distributed.all_gather(found, padded.contiguous())
    return [each[: int(size[0])] for each, size in zip(found, shapes, strict=True)]
