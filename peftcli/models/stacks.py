"""The layers of a model that stand in a stack: most of its weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def stacks(module: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Yield each module that holds a stack of layers, and the layers. A stack inside a layer is a part of the layer."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) > 1]
    if lists:
        yield module, [layer for each in lists for layer in _layers(each)]
    for child in module.children():
        if child not in lists:
            yield from stacks(child)


def _layers(found: nn.Module) -> Iterator[nn.Module]:
    for layer in found.children():  # a list of lists has nothing to call but what these hold
        yield from _layers(layer) if isinstance(layer, (nn.ModuleList, nn.ModuleDict)) else [layer]
