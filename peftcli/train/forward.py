"""How the model of a run computes: without padding, with noise, compiled, with liger-kernel, or again backward."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AttentionInterface

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import base_module, model_ends
from peftcli.core.prompts.inputs import SoftPrompt
from peftcli.errors import ModelError, UsageError
from peftcli.models.parts import stacks
from peftcli.models.probe import deviation, probing
from peftcli.schema import Recipe
from peftcli.tasks.base import Batch, Packs, Task, model_inputs, on_device, require_extra
from peftcli.tasks.text.fast import segments
from peftcli.tasks.text.fast.unpadded import example_lengths, unpad
from peftcli.train.data import RunData
from peftcli.train.devices.sharding import is_dividing
from peftcli.train.pieces import compute_in_pieces

_COMPILE, _LIGER = "training.torch_compile", "training.use_liger_kernel"
_CHECKPOINTING = "training.gradient_checkpointing"


def compile_layers(model: nn.Module) -> None:
    """Let torch compile each layer of a model's stacks, in place: names and tensors stay what they are.

    Attention example by example is left out: it would be compiled anew for each number of examples.
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
    """Let liger-kernel replace the layers that it knows of a model, which is on a GPU then; head and loss stay ours."""
    check_liger_kernel()
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = getattr(model.config, "model_type", None)
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ModelError(f"liger-kernel has nothing for models of the type {kind}", key=_LIGER)
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def checkpoint_activations(model: Any, recipe: Recipe) -> None:
    """Let a model compute its activations again in the backward pass, from the inputs of its layers.

    With ``offload`` these wait in the CPU's memory, and MLPs compute long rows in pieces.

    Raises:
        ModelError: it cannot.
    """
    # under the name of transformers 5.24 and later, or the one before
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ModelError(str(error), key=_CHECKPOINTING) from None
    if not recipe.training.offloads:
        return
    layers = [each for each in model.modules() if "_gradient_checkpointing_func" in vars(each)]
    if not layers:
        raise ModelError(
            "offload is not for this model, whose code computes activations again by itself", key=_CHECKPOINTING
        )
    # zero3 gathers a module at each call, so that all processes must make as many
    in_pieces = not recipe.training.torch_compile and recipe.launch.strategy != "zero3"
    for layer in layers:
        if in_pieces:
            compute_in_pieces(layer)
        if torch.cuda.is_available():
            layer._gradient_checkpointing_func = partial(_with_inputs_on_cpu, layer._gradient_checkpointing_func)


def _with_inputs_on_cpu(compute: Callable[..., Any], *given: Any, **more: Any) -> Any:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):  # what the layer itself saves, checkpoints drop
        return compute(*given, **more)


def add_embedding_noise(model: nn.Module, alpha: float) -> None:
    """Let training add noise to the embeddings of tokens (NEFTune, https://arxiv.org/abs/2310.05914).

    To each number it adds one drawn evenly from ± alpha / sqrt(T * D). T is the length of the token's
    example where the model computes no padding, otherwise of the longest example of the batch; D is the size of an
    embedding. Virtual tokens get no noise.

    Raises:
        ModelError: the model has no embedding of tokens.
    """
    embedding = model_ends(model)[0]
    if not isinstance(base_module(embedding), nn.Embedding):
        raise ModelError("there is no embedding of tokens in the model", key="training.neftune_noise_alpha")
    while isinstance(embedding, SoftPrompt):
        embedding = embedding.base_layer

    def add_noise(module: nn.Module, args: object, embedded: torch.Tensor) -> torch.Tensor | None:
        if not module.training:
            return None
        length: Any = example_lengths(embedded.device)
        length = embedded.shape[1] if length is None else length[None, :, None]
        return embedded + torch.empty_like(embedded).uniform_(-1, 1).mul_(alpha * (length * embedded.shape[2]) ** -0.5)

    embedding.register_forward_hook(add_noise)


_EXACT, _ROUNDED = 1e-3, 0.3
"""How far a token's logits may be off by rounding, in float32 and in less, relative to the logits' spread. Seen over 30
layers were 1e-5 and 0.1; where examples of a trained model saw each other, 0.15 and more."""
_LEAKED = 0.02
"""How far they may be off in less than float32 beside another example, in a row of the same shape: seen was 0."""


def refuse_contamination(model: Any, task: Task[Any], accelerator: Accelerator) -> None:
    """Compare logits of two examples in packed rows, in both orders, with those of each alone and beside another."""
    parameters = inspect.signature(model.forward).parameters
    takes = "position_ids" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if model.config.is_encoder_decoder or not takes:
        raise _refusal(model)
    assert isinstance(task, Packs)
    one, other = task.samples()
    examples = [one, other, other, one, other, other]
    rows = [task.join(examples[at : at + 2]) for at in (0, 2, 4)]
    alone = _logits(model, task.collate(examples, training=True), accelerator)
    packed = _logits(model, task.collate(rows, training=True), accelerator).view_as(alone)
    exact = packed.dtype == torch.float32 and accelerator.mixed_precision == "no"
    after_one, after_other = packed[1], packed[5]
    off, leaked = deviation(packed, alone), deviation(after_one, after_other, alone)
    if not (off <= (_EXACT if exact else _ROUNDED) and leaked <= (_EXACT if exact else _LEAKED)):
        raise _refusal(model)


def _logits(model: Any, batch: Batch, accelerator: Accelerator) -> torch.Tensor:
    """Logits (B, T, V) in evaluation mode. Leaves the modules' modes and the random state as they were."""
    inputs = model_inputs(on_device(batch, accelerator.device))
    with probing(model, accelerator.device), accelerator.autocast():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits


def _refusal(model: Any) -> ModelError:
    return ModelError(
        f"{type(model).__name__} with {model.config._attn_implementation} attention does not keep the examples of a "
        "packed row apart: they would be trained on one another",
        key="dataset.packing",
        hint="set dataset.packing: false",
    )


def change_forward(
    model: Any, config: AdapterConfig, recipe: Recipe, data: RunData, accelerator: Accelerator
) -> str | None:
    """Let the model leave out padding where it can, add noise and be compiled where the recipe says so.

    Returns whether rows are padded, and why, for a task whose model reads more than texts.
    """
    # of a module that DeepSpeed divides, each call is one of all processes, whatever their rows
    may_unpad = not (recipe.launch.strategy == "zero3" and is_dividing(recipe))
    # what a GPU computes in half precision is tried out in it
    with accelerator.autocast() if accelerator.device.type == "cuda" else nullcontext():
        probe = data.task.padded_probe(model) if may_unpad else None
        unpadded = may_unpad and unpad(model, config, probe=probe)
    if data.plan.packs and not unpadded:
        refuse_contamination(model, data.task, accelerator)
    if recipe.training.neftune_noise_alpha is not None:
        add_embedding_noise(model, recipe.training.neftune_noise_alpha)
    if recipe.training.torch_compile:
        compile_layers(model)
    if probe is None:
        return None
    name = f"{type(model).__name__} with {model.config._attn_implementation} attention"
    return (
        "rows are computed without padding"
        if unpadded
        else f"rows are padded: {name} does not answer the same without padding"
    )
