"""Any adapter as a plain LoRA: one r, lora_alpha = r, and nothing else that a program could misread.

What an adapter adds to a weight is known from its file where it is a LoRA, and is computed with the base weight
otherwise: ``merged - base``, in float64, a layer at a time. Where that has more directions than r, the nearest update
of r directions is taken (Eckart and Young), and what is lost is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.adapters.load import AdapterSource, apply_adapter
from peftcli.core.files import read_tensors, write_adapter
from peftcli.core.layer import AdapterLayer, base_module, base_modules, base_name
from peftcli.core.linear import Linear, linear_view
from peftcli.core.merge import outermost, ready_to_merge
from peftcli.core.targets import shortest_names
from peftcli.errors import AdapterError, UsageError
from peftcli.methods.lora import LoraConfig
from peftcli.methods.updates import Update, UpdateUnknown, distance, find_updates
from peftcli.models.open import OpenBase

SIZES = (8, 16, 32, 64, 128, 256)
"""Values of r for which servers reserve memory."""
_EXACT = 1e-5
"""Share of an update that float32 explains."""


@dataclass(frozen=True)
class PlainLora:
    """A LoRA with one r, and lora_alpha = r."""

    r: int
    updates: Mapping[str, Update]
    """Path of the module -> left (out, r) and right (r, in), in float32; the scaling is 1."""
    stored_transposed: bool
    """Whether the base model stores an adapted weight (in, out)."""
    targets: list[str]
    """target_modules that match the adapted modules and no others."""
    error: float
    """Norm of what is lost of all updates, as a share of theirs."""
    worst: tuple[str, float]
    """The module that loses most, and how much."""

    def write(self, source: AdapterSource, folder: Path) -> None:
        """Write it as an adapter folder."""
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.r,
            target_modules=self.targets,
            fan_in_fan_out=self.stored_transposed,
            task_type=source.config.task_type,
            base_model_name_or_path=source.base_name or source.config.base_model_name_or_path,
            revision=None if source.base_name else source.config.revision,
        )
        tensors = dict[str, torch.Tensor]()
        for path, update in self.updates.items():
            name = f"{LoraConfig.file_prefix}{path}"
            tensors |= {f"{name}.lora_A.weight": update.right, f"{name}.lora_B.weight": update.left}
        write_adapter(tensors, config, folder)


def plain_lora(source: AdapterSource, opened: OpenBase, r: int | None = None, max_error: float = 0.01) -> PlainLora:
    """Turn an adapter into a plain LoRA.

    Args:
        source: the adapter.
        opened: its base model, in full precision; read only where the adapter's file does not say the updates.
        r: that of the result; None: the smallest of SIZES with which nothing is lost, else with which little is.
        max_error: the largest share of the updates that may be lost.

    Raises:
        AdapterError: the adapter changes something that a LoRA cannot, or more would be lost.
        UsageError: ``r`` is below 1.
    """
    if r is not None and r < 1:
        raise UsageError("must be at least 1", key="--r")
    if reason := source.config.merge_problem():
        raise AdapterError(reason, file=str(source.folder))
    empty = opened.empty_model(source.auto_class(lambda: opened.config), **source.model_options(opened))
    modules = base_modules(empty)
    found = _from_file(source, modules)
    if found is None:
        found = dict(_from_weights(source, opened, r or SIZES[-1]))
    if not found:
        raise AdapterError("adapts no module", file=str(source.folder))
    chosen, updates, lost = _at_one_r(found, r, max_error, source)
    views = [view for path in updates if (view := linear_view(modules[path]))]
    return PlainLora(
        r=chosen,
        updates=updates,
        stored_transposed=any(view.transposed for view in views),
        targets=shortest_names(empty, sorted(updates)),
        error=_together(lost.values()) / (_together(whole.norm for whole in found.values()) or 1.0),
        worst=max(
            ((path, lost[path] / (whole.norm or 1.0)) for path, whole in found.items()), key=lambda each: each[1]
        ),
    )


@dataclass(frozen=True)
class _Whole:
    """What an adapter adds to one weight, as far as it is kept."""

    update: Update
    """Of few directions, the strongest first where ``sorted`` says so."""
    norm: float
    """Of the whole update."""
    values: torch.Tensor | None
    """The singular values of the whole update, from the largest; None: ``update`` is all of it."""

    def lost_at(self, r: int) -> float:
        """Return the norm of what is lost with bottleneck r."""
        values = self.update.singular_values() if self.values is None and self.update.r > r else self.values
        return 0.0 if values is None else float(values[r:].norm())

    def needed(self) -> int:
        """Return the r with which nothing is lost."""
        if self.values is None:
            return self.update.r
        tails = self.values.square().flip(0).cumsum(0).flip(0).sqrt()
        return int((tails > _EXACT * (self.norm or 1.0)).sum())

    def at(self, r: int) -> tuple[Update, float]:
        """Return the nearest update of bottleneck r, padded with zeros, and the norm of what it lacks."""
        cut = self.update.truncated(r) if self.update.r > r else self.update
        missing = distance(self.update, cut) if cut is not self.update and self.values is None else self.lost_at(r)
        left, right = (cut.scaling * cut.left).float(), cut.right.float()
        more = r - cut.r
        padded = Update(
            torch.cat([left, left.new_zeros(len(left), more)], 1).contiguous(),
            torch.cat([right, right.new_zeros(more, right.shape[1])]).contiguous(),
        )
        return padded, missing


def _together(norms: Any) -> float:
    return math.hypot(*norms)


def _at_one_r(
    found: Mapping[str, _Whole], r: int | None, max_error: float, source: AdapterSource
) -> tuple[int, dict[str, Update], dict[str, float]]:
    """Return the r, the updates with it, and the norm of what each lacks."""
    norm = _together(whole.norm for whole in found.values()) or 1.0
    needed = max(whole.needed() for whole in found.values())
    exact = [needed] if all(whole.values is None for whole in found.values()) else []
    sizes = [r] if r else [size for size in SIZES if size >= needed] or [*SIZES, *exact]

    def error(size: int) -> float:
        return _together(whole.lost_at(size) for whole in found.values()) / norm

    errors = {}
    for size in sizes:
        errors[size] = error(size)
        if errors[size] <= max_error:
            made = {path: whole.at(size) for path, whole in found.items()}
            return (
                size,
                {path: update for path, (update, _) in made.items()},
                {p: lost for p, (_, lost) in made.items()},
            )
    raise AdapterError(
        f"{source.config.peft_type} changes more than a LoRA of r {sizes[-1]} can: {errors[sizes[-1]]:.1%} of it would "
        "be lost",
        file=str(source.folder),
        key="--max-error",
        hint="export the merged model instead: --form merged, merged-gguf or modelfile",
    )


def _from_file(source: AdapterSource, modules: Mapping[str, Any]) -> dict[str, _Whole] | None:
    """Return the updates that the adapter's file says; None where it does not say them."""
    tensors = read_tensors(source.folder)
    wide = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in tensors.items()}
    try:
        updates = find_updates(source.config, wide)
    except UpdateUnknown:
        return None
    known = {name for update in updates.values() for name in update.tensors}
    prefix = source.config.file_prefix
    for name in tensors:
        if name not in known and not name.endswith(".base_layer.weight"):
            raise _refusal(source, name.removeprefix(prefix), "is no part of a LoRA's update")
    for path in updates:
        _require_linear(source, path, modules.get(path))
    if getattr(source.config, "layer_replication", None):
        raise _refusal(source, "layer_replication", "makes another model of the base model")
    return {path: _Whole(update, update.norm(), None) for path, update in updates.items()}


def _from_weights(source: AdapterSource, opened: OpenBase, r: int) -> Iterator[tuple[str, _Whole]]:
    """Yield what the adapter adds to each weight, as the strongest ``r`` directions of it."""
    loaded = opened.model(source.auto_class(lambda: opened.config), torch.float32, **source.model_options(opened))
    apply_adapter(loaded, source)
    model = loaded.model
    for path, layer in outermost(model).items():
        name = base_name(model, path)
        view = _require_linear(source, name, base_module(layer))
        yield name, _strongest(_added(source, name, layer, view), r)


def _added(source: AdapterSource, name: str, layer: AdapterLayer, view: Linear) -> torch.Tensor:
    """Return what a layer adds to its weight: (out, in), in float64."""
    base = base_module(layer)
    layer.double()
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    with ready_to_merge(layer), torch.no_grad():
        values = layer.folded(dict(tensors))
        for other, value in values.items():
            if other != "weight" and not torch.equal(value, tensors[other]):
                raise _refusal(source, f"{name}.{other}", "is changed, and a LoRA changes weights only")
        delta = values["weight"].double() - tensors["weight"] if "weight" in values else 0 * tensors["weight"]
    layer.float()
    return view.as_stored(delta.detach())


def _strongest(delta: torch.Tensor, r: int) -> _Whole:
    """Return the ``r`` strongest directions of an update, found from its smaller Gram matrix."""
    tall = delta.shape[0] > delta.shape[1]
    thin = delta.T if tall else delta
    squares, vectors = torch.linalg.eigh(thin @ thin.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)[:, :r]
    rest = vectors.T @ thin
    update = Update(rest.T, vectors.T) if tall else Update(vectors, rest)
    values = squares.sqrt()
    floor = 1e-7 * values[:1]  # the square root of what float64 resolves of the squares
    return _Whole(update, float(delta.norm()), torch.where(values > floor, values, torch.zeros_like(values)))


def _require_linear(source: AdapterSource, path: str, module: nn.Module | None) -> Linear:
    """Return the view of a module that a program's LoRA can be for; refuse another."""
    if module is None:
        raise _refusal(source, path, "is no module of its own, as the weights of experts are not")
    if (view := linear_view(module)) is None:
        why = f"is no linear layer but {type(module).__name__}: programs read LoRA on linear layers"
        raise _refusal(source, path, why)
    return view


def _refusal(source: AdapterSource, what: str, why: str) -> AdapterError:
    hint = "export the merged model instead, which holds it: --form merged, merged-gguf or modelfile"
    return AdapterError(f"{what} {why}", file=str(source.folder), key="--form lora", hint=hint)
