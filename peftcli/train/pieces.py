"""The MLPs of long rows in pieces: what one piece keeps for its gradients is dropped before the next.

As in Arctic Long Sequence Training, which calls it tiled MLP (https://arxiv.org/abs/2506.13996).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftcli.core.layer import AdapterLayer, base_modules, first_parameter
from peftcli.core.linear import linear_view
from peftcli.models.probe import agrees, probing

PIECE = 2048
"""Tokens of a piece. A batch with no more of them is computed at once."""
_TOLERANCE = 0.02
"""How far a token's outputs may be off by rounding, relative to their spread."""


def compute_in_pieces(layer: nn.Module) -> None:
    """Let the MLPs in a layer compute at most ``PIECE`` tokens of a batch (B, T, H) at once, and again backward.

    Outputs and gradients stay what they are, but for rounding. The layer may have no values yet, and may hold adapters.
    """
    for child in layer.children():
        if _is_mlp(child):
            child.forward = partial(_in_pieces, child.forward)
        elif not isinstance(child, AdapterLayer):
            compute_in_pieces(child)


def _in_pieces(forward: Callable[[torch.Tensor], torch.Tensor], *given: Any, **named: Any) -> torch.Tensor:
    (x,) = (*given, *named.values())
    if x.shape[:-1].numel() <= PIECE:
        return forward(x)
    compute: Callable[..., Any] = (
        partial(checkpoint, forward, use_reentrant=False) if torch.is_grad_enabled() else forward
    )
    made = [compute(piece) for piece in x.reshape(1, -1, x.shape[-1]).split(PIECE, dim=1)]
    return torch.cat(made, dim=1).view(*x.shape[:-1], -1)


def _is_mlp(module: nn.Module) -> bool:
    """Return whether a module is two linear layers or more without experts, and takes tokens each by itself."""
    parts = base_modules(module)
    linear = [view for view in map(linear_view, parts.values()) if view]
    arguments = [
        each for each in inspect.signature(module.forward).parameters.values() if each.kind is not each.VAR_KEYWORD
    ]
    whole = (
        len(linear) > 1 and len(arguments) == 1 and not any(isinstance(each, nn.ModuleList) for each in parts.values())
    )
    if not whole or any(each.ndim > 2 for each in module.parameters()):
        return False
    weight = first_parameter(module)
    if weight.is_meta or not weight.any():  # without values yet, which another process may send
        return True
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    with probing(module, weight.device):
        x = torch.randn(1, 8, linear[0].in_features, dtype=dtype, device=weight.device)
        found, alone = module(x), module(x[:, 4:])
    return torch.is_tensor(found) and agrees(found[:, 4:], alone, _TOLERANCE)
