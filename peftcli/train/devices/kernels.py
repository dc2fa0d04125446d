"""Other ways to compute the same layers: compiled by torch, with liger-kernel's functions, or again backward."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from peftcli.errors import ModelError, UsageError
from peftcli.models.parts import stacks
from peftcli.tasks.base import require_extra
from peftcli.tasks.text.fast import segments

_COMPILE, _LIGER = "training.torch_compile", "training.use_liger_kernel"


def compile_layers(model: nn.Module) -> None:
    """Let torch compile each layer of a model's stacks, in place: names and tensors stay what they are.

    Attention example by example is left out: it would be compiled anew for each number of examples.

    Raises:
        UsageError: there is no compiler for it.
        ModelError: the model has no stack of layers.
    """
    compiler, layers = os.environ.get("CXX", "g++"), [layer for _, stack in stacks(model) for layer in stack]
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        hint = f"install {compiler}, or name another one in the environment variable CXX"
        raise UsageError("needs a C++ compiler on a CPU", key=_COMPILE, hint=hint)
    if not layers:
        raise ModelError("there is no stack of layers in the model", key=_COMPILE)
    AttentionInterface.register(segments.ATTENTION, torch.compiler.disable(segments.attend))
    for layer in layers:
        layer.compile(dynamic=True)


def check_liger_kernel() -> None:
    """Raise UsageError unless liger-kernel is installed, and a GPU is there for it."""
    require_extra("liger_kernel", "liger", _LIGER, UsageError)
    if not torch.cuda.is_available():
        raise UsageError("needs a GPU, and torch sees none", key=_LIGER)


def use_liger_kernel(model: Any) -> None:
    """Let liger-kernel replace the layers that it knows of a model, which is on a GPU then; head and loss stay ours.

    Raises:
        UsageError: the package is not installed, or there is no GPU.
        ModelError: it has nothing for this model.
    """
    check_liger_kernel()
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = getattr(model.config, "model_type", None)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"liger-kernel has nothing for models of the type {kind}", key=_LIGER)
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def checkpoint_activations(model: Any) -> None:
    """Let a model compute its activations again in the backward pass.

    Raises:
        ModelError: it cannot.
    """
    # under the name of transformers 5.24 and later, or the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(str(error), key="training.gradient_checkpointing") from None
