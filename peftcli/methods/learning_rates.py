"""Learning rates that differ between an adapter's tensors: LoRA+ (https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from peftcli.core.layer import AdapterLayer
from peftcli.errors import AdapterError


def rate_groups(
    tensors: Mapping[str, tuple[AdapterLayer, str, nn.Parameter]], rate: float, ratio: float, embedding_rate: float
) -> list[dict[str, Any]]:
    """An optimizer's parameter groups, some maybe empty: at ``rate``, the faster ones of LoRA+, and its embeddings.

    Args:
        tensors: ``core.weights.named_tensors`` of the model.
        rate: the learning rate.
        ratio: how many times as fast the tensors learn that their layers name in ``larger_rate``. Vectors do, too.
        embedding_rate: learning rate of the tensors that their layers name in ``embedding_rate``.

    Raises:
        AdapterError: no layer names any.
    """
    plain: list[nn.Parameter] = []
    larger: list[nn.Parameter] = []
    embedding: list[nn.Parameter] = []
    for layer, name, parameter in tensors.values():
        if name in layer.embedding_rate:
            embedding.append(parameter)
        elif name in layer.larger_rate or parameter.ndim == 1:
            larger.append(parameter)
        else:
            plain.append(parameter)
    if not any(layer.larger_rate for layer, _, _ in tensors.values()):
        raise AdapterError("LoRA+ needs layers with A and B, which this adapter has not", key="loraplus_lr_ratio")
    groups = [(plain, rate), (larger, rate * ratio), (embedding, embedding_rate)]
    return [{"params": parameters, "lr": each} for parameters, each in groups]
