"""The gradient of each row's loss with respect to what an adapter trains, as a short sketch.

A sketch keeps dot products: numbers are added up in a few places each, with signs drawn at random (a count sketch,
blocked, so that each part of the model keeps its own). Where all that trains are linear layers, one backward pass gives
the gradients of all rows of a batch, since the gradient of a row is the product of what a layer read and what came back
to it. That is tried out on rows alone; where it does not hold, each row gets a pass of its own.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import nn

_MAX_WIDTH = 2046
"""Numbers of a sketch: with its scale, 4 KiB in float16."""
_MAX_BLOCKS = 32
_EXACT, _ROUNDED = 0.01, 0.2
"""Difference of a row's sketch in a batch from that of the row alone, relative to its length, that rounding explains,
in float32 and in less: in bfloat16 0.05 was seen."""


class Sketcher:
    """Turns gradients of named tensors into sketches of at most ``_MAX_WIDTH`` numbers."""

    def __init__(self, sizes: Mapping[str, int]):
        """``sizes`` has the number of elements of each tensor, in the order of the model."""
        names, count = list(sizes), min(len(sizes), _MAX_BLOCKS)
        edges = [len(names) * at // count for at in range(count + 1)]
        groups = [names[start:end] for start, end in pairwise(edges)]
        self.parameters = [sum(sizes[name] for name in group) for group in groups]
        """The number of parameters of each block."""
        widths = _widths(self.parameters)
        starts = list(accumulate(widths, initial=0))
        self.width = starts[-1]
        self.blocks = [slice(start, start + width) for start, width in zip(starts, widths, strict=False)]
        """The place of each block in a sketch."""
        self._places: dict[str, tuple[int, int]] = {}
        for at, group in enumerate(groups):
            offsets = accumulate((sizes[name] for name in group), initial=0)
            self._places |= {name: (at, offset) for name, offset in zip(group, offsets, strict=False)}
        self._signs: dict[str, torch.Tensor] = {}

    def add(self, sketches: torch.Tensor, name: str, gradients: torch.Tensor) -> None:
        """Add the gradients (B, ...) of one tensor to the sketches (B, width)."""
        at, offset = self._places[name]
        block, values = self.blocks[at], gradients.flatten(1).float()
        width = block.stop - block.start
        if width == self.parameters[at]:  # every number has a place of its own
            sketches[:, block.start + offset : block.start + offset + values.shape[1]] += values
            return
        if name not in self._signs:
            draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = torch.randint(0, 2, (values.shape[1],), generator=draw, dtype=torch.int8)
            self._signs[name] = (drawn * 2 - 1).to(values.device)
        first = offset % width
        padded = F.pad(values * self._signs[name], (first, -(first + values.shape[1]) % width))
        sketches[:, block] += padded.view(len(values), -1, width).sum(1)


def _widths(parameters: Sequence[int]) -> list[int]:
    """Share a sketch's numbers among the blocks: small blocks are kept whole, the others get a prime number each.

    Sides of models are multiples of small numbers; with a prime, a channel of a layer does not fall on one place.
    """
    left, widths = _MAX_WIDTH, dict[int, int]()
    order = sorted(range(len(parameters)), key=lambda at: parameters[at])
    for done, at in enumerate(order):
        share = left // (len(order) - done)
        widths[at] = parameters[at] if parameters[at] <= share else _largest_prime(share)
        left -= widths[at]
    return [widths[at] for at in range(len(parameters))]


def _largest_prime(most: int) -> int:
    return next(n for n in range(most, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1)))


class RowGradients:
    """Computes the sketches of the gradients of rows, many rows at once where the model allows it."""

    def __init__(self, tensors: Mapping[str, nn.Parameter], modules: Sequence[nn.Module], *, rounded: bool = False):
        """``tensors`` are those that train, by name; ``modules`` all of the model's; ``rounded``: not in float32."""
        self.tensors, self._tolerance = dict(tensors), _ROUNDED if rounded else _EXACT
        self.sketcher = Sketcher({name: value.numel() for name, value in tensors.items()})
        names = {value: name for name, value in tensors.items()}
        self._linears = {
            module: {own: names[value] for own, value in module._parameters.items() if value in names}
            for module in modules
            if isinstance(module, nn.Linear) and any(value in names for value in module._parameters.values())
        }
        covered = [name for owned in self._linears.values() for name in owned.values()]
        self.at_once: bool | None = None if sorted(covered) == sorted(names.values()) else False
        """Whether a batch gives the gradients of its rows; None: not tried yet."""

    def of_rows(
        self, losses: Sequence[Callable[[], torch.Tensor]], together: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return the sketches (B, width) of B rows, on the CPU.

        Args:
            losses: Compute the loss of each row alone.
            together: Computes the sum of all of them, rows first in what the model reads.
        """
        if self.at_once is False or len(losses) < 2:
            return torch.cat([self._of_one(loss) for loss in losses])
        found = self._of_batch(together, len(losses))
        if self.at_once is None:
            tried = (0, len(losses) - 1)
            self.at_once = found is not None and all(
                self._is_like(found[at], self._of_one(losses[at])[0]) for at in tried
            )
        if found is None or not self.at_once:
            return torch.cat([self._of_one(loss) for loss in losses])
        return found

    def _of_one(self, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return the sketch (1, width) of one loss."""
        parameters = list(self.tensors.values())
        gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
        sketch = parameters[0].new_zeros(1, self.sketcher.width, dtype=torch.float32)
        for name, gradient in zip(self.tensors, gradients, strict=True):
            if gradient is not None:
                self.sketcher.add(sketch, name, gradient[None])
        return sketch.cpu()

    def _of_batch(self, loss: Callable[[], torch.Tensor], count: int) -> torch.Tensor | None:
        """Return the sketches (B, width) of the rows of a batch; None if a layer does not see the rows first."""
        calls: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []

        def note(module: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if torch.is_grad_enabled() and output.requires_grad:
                calls.append((module, args[0].detach(), output))

        handles = [module.register_forward_hook(note) for module in self._linears]
        try:
            total = loss()
        finally:
            for handle in handles:
                handle.remove()
        if not calls or any(len(read) != count for _, read, _ in calls):
            return None
        returned = torch.autograd.grad(total, [output for *_, output in calls], allow_unused=True)
        sketches = torch.zeros(count, self.sketcher.width, device=total.device)
        for (module, read, _), back in zip(calls, returned, strict=True):
            if back is None:
                continue
            back = back.float().reshape(count, -1, back.shape[-1])
            for own, name in self._linears[module].items():
                read_rows = read.float().reshape(count, -1, read.shape[-1])
                gradients = back.sum(1) if own == "bias" else back.transpose(1, 2) @ read_rows
                self.sketcher.add(sketches, name, gradients)
        return sketches.cpu()

    def _is_like(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Return whether two sketches are the same but for rounding."""
        return bool((one - other).norm() <= self._tolerance * other.norm())
