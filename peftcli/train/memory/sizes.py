"""Tensors that have shapes and no values, and how many bytes of them live at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftcli.core.linear import PLAIN_WEIGHTS

_DEVICE = torch.ops.prim.device.default
_INDEX = torch.ops.aten.index.Tensor


class MemoryCounter(TorchDispatchMode):
    """Inside, floating-point numbers are not computed; whole numbers, as token ids and masks, are.

    Torch's fake tensors stand for the former. What a model does with the latter may depend on their values: which
    tokens are no padding, and where targets are.
    """

    def __init__(self, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives it no types
        self.device, self.live, self.most = device, 0, 0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._known = set[int]()

    def place(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Put a model of the meta device on the device: what is frozen in a dtype, what trains as it is."""
        placed = dict[torch.Tensor, torch.Tensor]()
        for module in model.modules():
            held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in held:
                for name, tensor in tensors.items():
                    if tensor is not None:
                        if tensor not in placed:
                            placed[tensor] = self._placed(tensor, dtype)
                        tensors[name] = placed[tensor]

    def _placed(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        own = dtype if frozen and tensor.is_floating_point() else tensor.dtype
        if not own.is_floating_point:
            return torch.zeros(tensor.shape, dtype=own, device=self.device)
        with self._fake:
            made = torch.empty(tensor.shape, dtype=own, device=self.device)
            self._count(made)
            return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return another tensor like one, which is counted too."""
        return self._placed(tensor.detach(), tensor.dtype)

    def peak_of(self, compute: Callable[[], object]) -> int:
        """Call a function without values; return how many bytes lived at most beyond those from before.

        Raises:
            Exception: what it computes depends on values. ``most`` is as far as it came.
        """
        before = self.most = self.live
        PLAIN_WEIGHTS.add(FakeTensor)
        try:
            with self:
                compute()
        finally:
            PLAIN_WEIGHTS.discard(FakeTensor)
        return self.most - before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # most calls are this one
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is _INDEX:  # where a mask is true is known
            places = [
                each.nonzero().unbind(1) if each is not None and each.dtype == torch.bool else [each]
                for each in args[1]
            ]
            args = (args[0], [place for each in places for place in each])
        if not any(isinstance(each, FakeTensor) for each in tree_leaves((args, kwargs))):
            made = func(*args, **kwargs)
            if not any(isinstance(each, torch.Tensor) and each.is_floating_point() for each in tree_leaves(made)):
                return made
        with self._fake:
            made = func(*args, **kwargs)
        for each in tree_leaves(made):
            if isinstance(each, FakeTensor):
                self._count(each)
        return made

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
