"""A model that computes in float32 while its weights stay as they are stored: a mapped file takes little memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.layer import AdapterLayer

_HALF = (torch.bfloat16, torch.float16)
_PIECE = 32 << 20
"""Bytes of a weight, as it is stored, that are in float32 at once."""


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, each module has its own weights in float32 while it is called, and an adapter layer those of its base.

    Large embeddings and linear layers without an adapter, as an output head, are read in pieces: they would be most of
    what it takes.
    A module that reads the weights of another one without calling it finds them as they are stored, which usually ends
    with a RuntimeError of PyTorch. Weights in mapped files are read again each time; none may be changed inside.
    """
    mapped = _mapped_weights()
    stored: dict[nn.Module, list[tuple[dict[str, Any], dict[str, Any]]]] = {}

    def widen(module: nn.Module, args: Any) -> None:
        stored[module] = []
        for each in _parts(module):
            parameters, buffers = dict(each._parameters), dict(each._buffers)
            stored[module].append((parameters, buffers))
            for name, value in _half(parameters).items():
                each._parameters[name] = nn.Parameter(value.float(), requires_grad=False)
            each._buffers.update({name: value.float() for name, value in _half(buffers).items()})

    def put_back(module: nn.Module, args: Any, output: Any) -> None:
        for each, (parameters, buffers) in zip(_parts(module), stored.pop(module), strict=True):
            each._parameters.update(parameters)
            each._buffers.update(buffers)
            for value in _half(parameters).values():
                _drop_pages(value, mapped)

    large: list[Any] = [module for module in model.modules() if _is_large(module)]
    modules = [
        module
        for module in model.modules()
        if module not in large and any(_half(each._parameters) or _half(each._buffers) for each in _parts(module))
    ]
    hooks = [module.register_forward_pre_hook(widen, prepend=True) for module in modules]
    hooks += [module.register_forward_hook(put_back, always_call=True) for module in modules]
    for each in large:
        each.forward = partial(_in_pieces, each, mapped)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for each in large:
            del each.forward


def _is_large(module: nn.Module) -> bool:
    weight = module._parameters.get("weight") if type(module) in (nn.Linear, nn.Embedding) else None
    # accelerate puts a forward there, to bring an offloaded weight
    return weight is not None and weight.dtype in _HALF and weight.nbytes > _PIECE and "forward" not in vars(module)


def _in_pieces(module: Any, mapped: list[tuple[int, int]], x: torch.Tensor) -> torch.Tensor:
    """Compute what a linear layer or an embedding does with its weight in float32."""
    weight: torch.Tensor = module.weight
    if isinstance(module, nn.Embedding):
        found = F.embedding(x, weight).float()
        _drop_pages(weight, mapped)
        return found
    outputs = list[torch.Tensor]()
    for part in weight.split(max(1, _PIECE // weight[0].nbytes)):
        outputs.append(F.linear(x, part.float()))
        _drop_pages(part, mapped)
    found = torch.cat(outputs, dim=-1)
    return found if module.bias is None else found + module.bias.float()


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return the modules whose weights are widened while a module is called."""
    return list(module.modules()) if isinstance(module, AdapterLayer) else [module]


def _half(tensors: Mapping[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """Return those of the tensors that are in half precision."""
    return {name: value for name, value in tensors.items() if value is not None and value.dtype in _HALF}


def _mapped_weights() -> list[tuple[int, int]]:
    """Return where files are mapped for this process alone: first address and end of each. None but on Linux."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text(errors="replace").splitlines() if maps.exists() else []
    entries = [line.split(maxsplit=5) for line in lines if "/" in line and not line.endswith("(deleted)")]
    spans = [entry[0].split("-") for entry in entries if entry[1][3] == "p" and entry[5].startswith("/")]
    return [(int(start, 16), int(end, 16)) for start, end in spans]


def _drop_pages(value: torch.Tensor, mapped: list[tuple[int, int]]) -> None:
    """Take the pages of a tensor in a mapped file out of memory; they are read again when they are wanted."""
    first, last = value.data_ptr(), value.data_ptr() + value.nbytes
    start, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, last // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end and any(low <= first and last <= high for low, high in mapped):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
