"""What the training data says of a model's layers: their inputs, and the gradients of their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftcli.errors import AdapterError

Batches = Iterable[Mapping[str, torch.Tensor]]
_PADDED = -100
"""The label of a position that a decoder does not read."""
_KEY = "init_lora_weights"


def covariances(model: nn.Module, modules: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """The mean over examples of ``X^T X: (in, in)`` of each module's inputs while ``run`` uses the model.

    Padding does not count. As in CorDA's paper, an example's inputs are divided by the largest of them.

    Raises:
        AdapterError: a module has no inputs, or they are not finite.
    """
    sums: dict[str, torch.Tensor] = {}
    examples = dict.fromkeys(modules, 0)

    def note(name: str, rows: list[torch.Tensor]) -> None:
        for x in rows:
            x = x.float() / x.max().abs()
            product = x.T @ x
            sums[name] = sums[name] + product if name in sums else product
            examples[name] += 1

    with inputs_noted(model, modules, note, label=None), torch.no_grad():
        run()
    need_all(modules, sums)
    if bad := next((name for name, value in sums.items() if not torch.isfinite(value).all()), None):
        raise AdapterError(f"the inputs of {bad} are not finite", key=_KEY)
    return {name: value / examples[name] for name, value in sums.items()}


def gradients(model: nn.Module, modules: dict[str, nn.Module], run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """The sum of the gradients (out, in) of each linear module's weight while ``run`` calls ``backward``.

    They are computed from inputs and gradients of outputs, so the weights may be quantised, and nothing else of the
    model gets a gradient.

    Raises:
        AdapterError: a module gets no gradient.
    """
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]:
        def watch(_module: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
            x = args[0].detach().flatten(end_dim=-2)
            y = y if y.requires_grad else y.detach().requires_grad_()

            def add(gradient: torch.Tensor) -> None:
                product = gradient.flatten(end_dim=-2).float().T @ x.float()
                sums[name] = sums[name] + product if name in sums else product

            y.register_hook(add)
            return y

        return watch

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        with _in_eval_mode(model), _frozen(model), torch.enable_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    need_all(modules, sums)
    return sums


@contextmanager
def inputs_noted(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    note: Callable[[str, list[torch.Tensor]], None],
    label: int | None,
) -> Iterator[None]:
    """Inside, ``note`` is told each module's name and inputs (n, in), example by example, without padding.

    Nor are they told where the label is ``label``, unless it is None.
    """
    masks: list[torch.Tensor] = []

    def look(_model: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        masks[:] = _masks(model, kwargs, label)

    def hook(name: str) -> Callable[[nn.Module, Any], None]:
        def watch(_module: nn.Module, args: Any) -> None:
            rows = _rows(args[0].detach(), reversed(masks) if "decoder" in name.split(".") else masks)
            if rows:
                note(name, rows)

        return watch

    handles = [model.register_forward_pre_hook(look, with_kwargs=True)]
    handles += [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        with _in_eval_mode(model):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _masks(model: Any, inputs: Mapping[str, Any], label: int | None) -> list[torch.Tensor]:
    """Which positions (B, T) count, of what the model reads; and of what its decoder reads, if it has one."""
    padding, labels = inputs.get("attention_mask"), inputs.get("labels")
    labels = labels if labels is not None and labels.ndim == 2 else None
    found = [padding.bool()] if padding is not None and padding.ndim == 2 else []
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return found if labels is None else [*found, labels != (_PADDED if label is None else label)]
    if label is None or labels is None:
        return found
    return [mask & (labels != label) if mask.shape == labels.shape else mask for mask in found] or [labels != label]


def _rows(x: torch.Tensor, masks: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs (B, T, in) -> (n, in) for each example, where there are any; (n, in) as they are."""
    if x.ndim == 2:
        return [x] if len(x) else []
    mask = next((mask for mask in masks if mask.shape == x.shape[:-1]), None)
    rows = x.flatten(1, -2) if mask is None else [example[keep] for example, keep in zip(x, mask, strict=True)]
    return [row for row in rows if len(row)]


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def need_all(modules: Iterable[str], found: Mapping[str, Any]) -> None:
    """Raises AdapterError for a module of which nothing was found."""
    if missing := next((name for name in modules if name not in found), None):
        raise AdapterError(f"the data do not reach {missing}; leave it out of target_modules", key=_KEY)
