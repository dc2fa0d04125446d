"""Train some rows of an embedding, and of the layers that share its weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core.inject import replace_modules
from peftcli.core.layer import (
    AdapterLayer,
    adapter_dtype,
    base_module,
    check_not_offloaded,
    model_ends,
    modules_sharing,
    name_in,
)
from peftcli.core.linear import check_forward
from peftcli.errors import AdapterError
from peftcli.methods._delta import lookup_scale


class TrainedRows(AdapterLayer):
    """A layer with a weight (V, D) of which the rows ``tokens`` are the adapter's own: (n, D), not deltas."""

    peft_name = "TrainableTokensLayer"

    def __init__(self, base_layer: nn.Module, tokens: Sequence[int], rows: nn.Parameter):
        super().__init__(base_layer)
        self.tokens = list(tokens)
        self.trainable_tokens_delta = rows
        self.is_beside = False
        """Whether the rows are a part of another method's adapter."""
        self.written_at: str | None = None
        """Path of the layer that has the rows in the adapter file, if that is another one."""

    def file_name(self, path: str, tensor: str) -> str:
        if tensor != "trainable_tokens_delta":
            return super().file_name(path, tensor)
        return super().file_name(self.written_at or path, f"token_adapter.{tensor}" if self.is_beside else tensor)

    def overrides(self, below: AdapterLayer) -> bool:
        return isinstance(below, TrainedRows) and not set(self.tokens).isdisjoint(below.tokens)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight, rows = base["weight"], self.trainable_tokens_delta
        index = torch.tensor(self.tokens, device=weight.device)
        return {"weight": weight.to(rows.dtype).index_copy(0, index, rows.to(weight.device))}


class EmbeddingRows(TrainedRows):
    """``e(t)`` is the adapter's row where ``t`` is one of ``tokens``, the base layer's elsewhere."""

    place: torch.Tensor

    def __init__(self, base_layer: nn.Module, tokens: Sequence[int], rows: nn.Parameter):
        super().__init__(base_layer, tokens, rows)
        place = torch.full(base_module(base_layer).weight.shape[:1], -1)
        place[self.tokens] = torch.arange(len(self.tokens))
        self.register_buffer("place", place.to(rows.device), persistent=False)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        place = self.place[x]
        rows = lookup_scale(self) * F.embedding(place.clamp(min=0), self.trainable_tokens_delta)
        return torch.where((place >= 0)[..., None], rows.to(y.dtype), y)


class HeadRows(TrainedRows):
    """``y[t] = row . x (+ b[t])`` where ``t`` is one of ``tokens``, the base layer's ``y[t]`` elsewhere."""

    index: torch.Tensor

    def __init__(self, base_layer: nn.Module, tokens: Sequence[int], rows: nn.Parameter):
        super().__init__(base_layer, tokens, rows)
        self.register_buffer("index", torch.tensor(self.tokens, device=rows.device), persistent=False)

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        rows, bias = self.trainable_tokens_delta, self.base_layer.bias
        own = F.linear(x.to(rows.dtype), rows, None if bias is None else bias[self.index].to(rows.dtype))
        return y.index_copy(-1, self.index, own.to(y.dtype))


def wrap_rows(
    module: nn.Module, tokens: Sequence[int], *, start_from_base: bool = True, rows: nn.Parameter | None = None
) -> TrainedRows:
    """The layer that trains the rows ``tokens`` of an embedding or a linear layer.

    Args:
        module: the layer, maybe below other adapters' layers.
        tokens: row numbers, as ``check_tokens`` accepts them.
        start_from_base: whether the rows start as the base model's; otherwise they start random.
        rows: another layer's rows, to be trained as this one's too.
    """
    weight = base_module(module).weight
    if rows is None:
        start = weight.detach()[list(tokens)].to(adapter_dtype(weight))
        rows = nn.Parameter(start.clone() if start_from_base else torch.randn_like(start))
    kind = EmbeddingRows if isinstance(base_module(module), nn.Embedding) else HeadRows
    return kind(module, tokens, rows)


def share_rows(model: nn.Module, layer: TrainedRows) -> dict[str, TrainedRows]:
    """Let ``layer``, which is in the model already, speak for all modules that share its base layer's weight.

    Returns:
        The new layers over these, by the names of their modules.

    Raises:
        AdapterError: one of them computes otherwise than torch's layers.
    """
    shared = modules_sharing(model, base_module(layer))
    for name, module in shared.items():
        check_forward(module, name)
    new = {name: wrap_rows(module, layer.tokens, rows=layer.trainable_tokens_delta) for name, module in shared.items()}
    replace_modules(model, {shared[name]: other.train(layer.training) for name, other in new.items()})
    return new


def tied_group(model: nn.Module) -> list[str]:
    """Return the names of the input embedding and of the modules that share its weight, if there are any."""
    embedding = base_module(model_ends(model)[0])
    shared = modules_sharing(model, embedding) if isinstance(embedding, nn.Embedding) else {}
    return [name_in(model, embedding), *shared] if shared else []


def check_tokens(module: nn.Module, name: str, tokens: Iterable[int], key: str) -> None:
    """Raise AdapterError unless ``module`` has rows to train and ``tokens`` are numbers of such, none twice."""
    layer = base_module(module)
    if not isinstance(layer, (nn.Embedding, nn.Linear)):
        raise AdapterError(f"{name} is a {type(layer).__name__}; rows of Embedding and Linear can be trained", key=key)
    check_forward(layer, name, key)
    check_not_offloaded(layer, name)
    count, tokens = layer.weight.shape[0], list(tokens)
    if not tokens:
        raise AdapterError("names no token", key=key)
    wrong = [token for token in tokens if not 0 <= token < count]
    if wrong:
        raise AdapterError(f"{name} has the tokens 0 to {count - 1}, not {wrong[0]}", key=key)
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise AdapterError(f"names token {token} twice", key=key)
