"""PEFT's functions that prepare a model or its inputs for training, and make its optimizer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peftcli.core.layer import adapter_dtype, adapter_layers, model_ends
from peftcli.core.quantised import is_quantised
from peftcli.core.weights import named_tensors
from peftcli.errors import AdapterError
from peftcli.methods.learning_rates import rate_groups
from peftcli.methods.lora.lora import LoraLayer
from peftcli.peft_api.tuner import find_tuner

_HALVES = ("gptq", "aqlm", "eetq", "hqq", "torchao")
"""Of transformers' quantisation methods those whose layers want inputs in half precision."""
_SMALL = 1e-8


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a model, quantised or not, and hold what is not quantised of it in float32.

    With ``use_gradient_checkpointing`` a quantised one computes its activations again in the backward pass;
    ``use_reentrant`` is False where not given.
    ``auto_clear_cache`` gives the GPU the memory back that the weights took in half precision.
    """
    quantised = [module for module in model.modules() if is_quantised(module)]
    kept = {id(value) for module in quantised for value in module.parameters(recurse=False)}
    model.requires_grad_(False)
    if getattr(model, "quantization_method", None) not in _HALVES:
        for value in model.parameters():
            if value.dtype in (torch.float16, torch.bfloat16) and id(value) not in kept:
                value.data = value.data.float()
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if quantised and use_gradient_checkpointing:
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            prepare_model_for_gradient_checkpointing(model)
        # under the name of transformers 5.24 and later, or the one before
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
    return model


def prepare_model_for_gradient_checkpointing(model: Any) -> Any:
    """Make the input embeddings' outputs require gradients, so that checkpointed blocks over frozen ones pass them."""
    require_input_gradients(model)
    return model


def require_input_gradients(model: Any) -> RemovableHandle | None:
    """Do the same, and return what undoes it, of a model that is not one of transformers and has input embeddings."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return None

    def require(module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if module.training:
            output.requires_grad_(True)

    embeddings, _ = model_ends(model)
    return None if embeddings is None else embeddings.register_forward_hook(require)


def is_checkpointing(model: nn.Module, *, default: bool) -> bool:
    """Return whether the model computes activations again in the backward pass; ``default`` where it does not say."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")  # the latter before transformers 5.24
    return bool(next((getattr(model, name) for name in names if hasattr(model, name)), default))


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen weights in ``dtype`` and those that train in float32, for training with autocast."""
    for value in model.parameters():
        value.data = value.data.to(torch.float32 if value.requires_grad else dtype)


def infer_device() -> str:
    """Return the kind of device that this machine computes on: cuda, mps, xpu, npu or cpu."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def shift_tokens_right(input_ids: torch.Tensor, pad_token_id: int | None, decoder_start_token_id: int) -> torch.Tensor:
    """Return the inputs of a decoder for these labels: (B, T), each one place later, -100 as padding.

    Raises:
        AdapterError: there is no ``pad_token_id``.
    """
    if pad_token_id is None:
        raise AdapterError("has to be defined in the model's config", key="pad_token_id")
    first = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([first, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_lr_embedding: float = 1e-6,
    loraplus_weight_decay: float = 0.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """An optimizer that trains LoRA's B ``loraplus_lr_ratio`` times as fast as A: LoRA+.

    It has PEFT's four groups, some maybe empty: A, which learns at ``lr``, LoRA on embeddings, B, and vectors, which
    learn as fast as B. The weight decay is that of all but vectors.

    Raises:
        AdapterError: the adapter has no B.
    """
    plain, larger, embedding = rate_groups(
        named_tensors(find_tuner(model)[1]), lr, loraplus_lr_ratio, loraplus_lr_embedding
    )
    matrices = larger | {"params": [value for value in larger["params"] if value.ndim > 1]}
    vectors = larger | {"params": [value for value in larger["params"] if value.ndim == 1], "weight_decay": 0.0}
    groups = [group | {"weight_decay": loraplus_weight_decay} for group in (plain, embedding, matrices)]
    groups.append(vectors)
    return optimizer_cls(groups, lr=lr, **options)  # type: ignore[call-arg]


@dataclass(frozen=True)
class _MatrixPair:
    """A and B of one LoRA layer, which train and are matrices: not those of convolutions and embeddings."""

    a: nn.Parameter
    """(r, in)"""
    b: nn.Parameter
    """(out, r)"""
    scaling: float


class LoraFAOptimizer(torch.optim.Optimizer):
    """LoRA-FA (https://arxiv.org/abs/2308.03303): AdamW for B, with A as it is, so that its inputs need not be kept.

    B's gradient becomes the one whose update is nearest to that of full fine-tuning: ``g_B (A A^T)^-1 / scaling^2``.
    ``eps`` is added before the second moment's bias is corrected, and the decay comes last.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        pairs: Iterable[_MatrixPair],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        """Train ``parameters``, of which those that are B of ``pairs`` in LoRA-FA's way. Their A does not train."""
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.pairs: Mapping[nn.Parameter, _MatrixPair] = {pair.b: pair for pair in pairs}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change the parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._change(parameter, group)
        return loss

    def _change(self, parameter: nn.Parameter, group: Mapping[str, Any]) -> None:
        state, (first, second), rate = self.state[parameter], group["betas"], group["lr"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        assert parameter.grad is not None
        gradient = parameter.grad
        if (pair := self.pairs.get(parameter)) is not None:
            dtype = adapter_dtype(pair.a)
            gradient = gradient.to(dtype) @ _inverse(pair.a.to(dtype), _SMALL) / pair.scaling**2
            gradient = gradient.to(parameter.dtype)
        state["exp_avg"].mul_(first).add_(gradient, alpha=1 - first)
        state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = rate * math.sqrt(1 - second ** state["step"]) / (1 - first ** state["step"])
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        parameter.mul_(1 - rate * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """An AdamW that trains LoRA's B alone: LoRA-FA. A takes no gradients any more.

    On convolutions and embeddings, LoRA is trained as by AdamW. PEFT's ``r`` and ``lora_alpha`` are not needed, and
    ``use_rslora`` is what the adapters' configs say.

    Raises:
        AdapterError: the model has no LoRA on linear layers that trains, or ``use_rslora`` is not what a config says.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        if use_rslora not in (None, getattr(config, "use_rslora", False)):
            raise AdapterError(
                f"use_rslora={use_rslora} was passed to create_lorafa_optimizer; it is {not use_rslora} in the config "
                f"of {name}"
            )
    pairs = _pairs(model, "LoRA-FA")
    for pair in pairs:
        pair.a.requires_grad_(False)
    trained = [value for value in model.parameters() if value.requires_grad]
    return LoraFAOptimizer(trained, pairs, lr=lr, weight_decay=weight_decay)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], *, lr: float, reg: float = 1e-2, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer that multiplies the gradients of LoRA's A and B by small matrices before each step.

    Riemannian preconditioning (https://arxiv.org/abs/2402.02347) makes the update depend less on how the product B A is
    split: ``(B^T B + c I)^-1 g_A`` and ``g_B (A A^T + c I)^-1``.

    ``reg`` is added to the diagonal of what these are the inverses of, which keeps them from being too large.

    Raises:
        AdapterError: the model has no LoRA on linear layers that trains, or the optimizer computes the loss itself,
            with gradients that would be left as they are.
        TypeError: ``optimizer_cls`` is no class of optimizers.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, torch.optim.Optimizer)):
        raise TypeError(f"optimizer_cls must be a subclass of torch.optim.Optimizer, not {optimizer_cls!r}")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise AdapterError(
            f"{optimizer_cls.__name__} requires a closure, which computes gradients anew", key="optimizer_cls"
        )
    pairs = _pairs(model, "Riemannian preconditioning")

    def prepare(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):  # the first is the optimizer
            raise AdapterError("step() does not support closures, which compute gradients anew")
        with torch.no_grad():
            for pair in pairs:
                dtype = adapter_dtype(pair.a)
                a, b = pair.a.to(dtype), pair.b.to(dtype)
                if pair.a.grad is not None:
                    pair.a.grad.copy_(_inverse(b.T, reg) @ pair.a.grad.to(dtype))
                if pair.b.grad is not None:
                    pair.b.grad.copy_(pair.b.grad.to(dtype) @ _inverse(a, reg))

    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = optimizer_cls(trained, lr=lr, **options)  # type: ignore[call-arg]
    optimizer.register_step_pre_hook(prepare)
    return optimizer


def _pairs(model: nn.Module, what: str) -> list[_MatrixPair]:
    found = []
    for layer in adapter_layers(model).values():
        own = layer.own_tensors() if isinstance(layer, LoraLayer) else {}
        a, b = own.get("lora_A.weight"), own.get("lora_B.weight")
        if a is None or b is None or not (a.requires_grad and b.requires_grad):
            continue
        if a.ndim == b.ndim == 2 and len(a) == b.shape[1]:
            found.append(_MatrixPair(a, b, layer.scaling))
    if not found:
        raise AdapterError(f"{what} needs lora_A/lora_B parameter pairs that train, on linear layers")
    return found


def _inverse(rows: torch.Tensor, damping: float) -> torch.Tensor:
    """Return the inverse of ``rows rows^T`` with ``damping`` on its diagonal: (r, r)."""
    square = rows @ rows.T
    return torch.linalg.pinv(square + damping * torch.eye(len(square), device=rows.device, dtype=rows.dtype))
