"""Fill A and B as ``init_lora_weights`` says."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peftcli.methods.lora.initialisations.config import FAST_PISSA, FROM_DATA
from peftcli.methods.lora.initialisations.gaussian import gaussian
from peftcli.methods.lora.initialisations.kaiming import kaiming, random
from peftcli.methods.lora.initialisations.mica import mica
from peftcli.methods.lora.initialisations.olora import olora
from peftcli.methods.lora.initialisations.orthogonal import orthogonal
from peftcli.methods.lora.initialisations.pissa import fast_pissa, pissa
from peftcli.methods.lora.initialisations.singular import Pair, check_directions

DRAWN: dict[bool | str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    True: kaiming,
    False: random,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    **dict.fromkeys((*FROM_DATA, "loftq"), kaiming),  # until the data or the weights are known
}
FROM_WEIGHT: dict[str, Callable[[torch.Tensor, int, float], Pair]] = {"pissa": pissa, "olora": olora, "mica": mica}


@torch.no_grad()
def initialise(
    a: torch.Tensor, b: torch.Tensor, init: bool | str, scaling: float, weight: Callable[[], torch.Tensor]
) -> None:
    """Fill ``a`` and ``b`` as ``init_lora_weights`` says. ``weight`` returns the base weight (out, in).

    Raises:
        AdapterError: the layer has fewer directions than r.
    """
    if a.is_meta:
        return
    if (draw := DRAWN.get(init)) is not None:
        draw(a, b)
    else:
        values = from_weight(init, weight(), len(a), scaling)
        a.copy_(values[0])
        b.copy_(values[1])


def from_weight(init: bool | str, weight: torch.Tensor, r: int, scaling: float) -> Pair:
    """Return A and B of an initialisation that needs the base weight (out, in) only."""
    check_directions(weight, r)
    if fast := FAST_PISSA.fullmatch(str(init)):
        return fast_pissa(weight, r, scaling, iterations=int(fast[1]))
    return FROM_WEIGHT[str(init)](weight, r, scaling)
