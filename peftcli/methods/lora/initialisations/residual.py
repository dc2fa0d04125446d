"""Linear layers with an A and B that start from the base weight or the training data, over a base weight that stays.

Where PEFT takes ``scaling B0 A0`` away from the base weight, the layer keeps ``A0`` and ``B0`` and subtracts what they
give. So the disabled layer is the base layer exactly, a quantised base needs no second rounding, and the file is that
of a plain LoRA of 2r, which every reader knows: ``[B, -B0] [A; A0]``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftcli.core.inject import disabled
from peftcli.core.layer import base_module, widened
from peftcli.core.linear import dense_weight, linear_view
from peftcli.core.quantised import is_quantised
from peftcli.errors import AdapterError
from peftcli.methods._delta import stored_weight
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.initialisations import FROM_DATA, is_residual
from peftcli.methods.lora.initialisations.corda import corda, covariances_of
from peftcli.methods.lora.initialisations.eva import eva_directions, start_eva
from peftcli.methods.lora.initialisations.loftq import check_loftq
from peftcli.methods.lora.initialisations.lora_ga import gradients_of, lora_ga
from peftcli.methods.lora.initialisations.start import FROM_WEIGHT, Batches, from_weight
from peftcli.methods.lora.lora import LoraLinear, lora_layers

STATISTIC = "_lora_statistic"
"""Attribute of a base layer: what the training data says of it, left there before the adapter is made."""
_FROM_STATISTIC = {"corda": corda, "lora_ga": lora_ga}
_KEY = "init_lora_weights"


class ResidualLinear(LoraLinear):
    """``y = W x + scaling (B A - B0 A0) x``, with ``A0`` and ``B0`` the values of A and B at the start.

    Dropout falls on both products alike, so that the layer starts as the base layer whatever it drops.
    """

    fixed = ("start_A", "start_B")

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        # parameters, since training on several devices sends buffers around at each step
        self.start_A = nn.Parameter(self.lora_A.weight.detach().clone(), requires_grad=False)
        self.start_B = nn.Parameter(self.lora_B.weight.detach().clone(), requires_grad=False)
        self.waits = config.init_lora_weights in FROM_DATA
        """Whether ``start_from`` is still to be called."""
        if self.waits and (statistic := base_module(base_layer).__dict__.pop(STATISTIC, None)) is not None:
            self.start_from(statistic, config)

    @torch.no_grad()
    def start_from(self, statistic: torch.Tensor, config: LoraConfig) -> None:
        """Start from what the training data says of the layer: CorDA's covariance, LoRA-GA's gradient."""
        weight = dense_weight(self.base_layer)
        compute = _FROM_STATISTIC[str(config.init_lora_weights)]
        a, b = compute(weight, statistic.to(weight.device), self.r, self.scaling, config)
        for own, start, value in ((self.lora_A.weight, self.start_A, a), (self.lora_B.weight, self.start_B, b)):
            own.copy_(value)
            start.copy_(value)
        self.waits = False

    def update(self, x: torch.Tensor) -> torch.Tensor:
        if self.waits:
            raise AdapterError("the adapter starts from training data that it has not seen", key=_KEY)
        return super().update(x) - self.scaling * F.linear(F.linear(x, self.start_A), self.start_B)

    def delta(self) -> torch.Tensor:
        product = self.lora_B.weight @ self.lora_A.weight - self.start_B @ self.start_A
        return self.view.as_stored(self.scaling * product)

    def file_tensors(self) -> dict[str, torch.Tensor]:
        return {
            **self.own_tensors(),
            "lora_A.weight": torch.cat([self.lora_A.weight, self.start_A]),
            "lora_B.weight": torch.cat([self.lora_B.weight, -self.start_B], dim=1),
        }


class ResidualFromFile(LoraLinear):
    """A layer of a file of PEFT's: the plain LoRA of 2r, whose second half is computed from the base weight again.

    Until the file has filled the first half, it is the same, so that the layer is the base layer.
    """

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config.plain())
        a, b = from_weight(config.init_lora_weights, dense_weight(base_layer), self.r // 2, self.scaling)
        with torch.no_grad():
            self.lora_A.weight.copy_(torch.cat([a, a]))
            self.lora_B.weight.copy_(torch.cat([b, -b], dim=1))

    def adapt_from_file(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        along = int(tensor == "lora_B.weight")
        if value.ndim != 2 or value.shape[along] != self.r // 2:
            return value
        start = self.file_tensors()[tensor].detach().narrow(along, self.r // 2, self.r // 2)
        return torch.cat([value, start.to(value.device)], dim=along)


class ResidualMerge(LoraLinear):
    """The same over a base model whose weights come one by one: it can only be merged, into ``W - scaling B0 A0``."""

    def __init__(self, base_layer: nn.Module, name: str, config: LoraConfig):
        super().__init__(base_layer, name, config)
        self.init = config.init_lora_weights

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = widened(base["weight"])
        a, b = from_weight(self.init, self.view.as_stored(weight), self.r, self.scaling)
        return {"weight": weight + self.delta() - self.view.as_stored(self.scaling * (b @ a))}


def check_initialisation(module: nn.Module, name: str, config: LoraConfig) -> None:
    """Refuse an initialisation that does not fit the module.

    Raises:
        AdapterError: the module is no linear layer, nor an embedding for mica; or the config is of a file that means
            nothing without what its writer started from, or over a quantised layer.
    """
    init, view, layer = config.init_lora_weights, linear_view(module), base_module(module)
    never_called = isinstance(layer, NonDynamicallyQuantizableLinear)  # its attention reads the weight
    needs_linear = is_residual(init) or init in ("orthogonal", "mica", "loftq")
    on_embedding = init == "mica" and isinstance(layer, nn.Embedding)
    if needs_linear and (view is None or never_called) and not on_embedding:
        raise AdapterError(f"{init} starts Linear and Conv1D; {name} is a {type(layer).__name__}", key=_KEY)
    if init == "loftq":
        check_loftq(layer, name, config)
    if not config.inference_mode or not is_residual(init):
        return
    if init not in FROM_WEIGHT:
        raise AdapterError(
            f"the file does not hold what {init} started from",
            key=_KEY,
            hint="PEFT's save_pretrained with path_initial_model_for_weight_conversion writes it as plain LoRA",
        )
    if is_quantised(layer):
        raise AdapterError(
            f"PEFT's {init} changes the base weight, and that of {name} is quantised; such a file is not read",
            key=_KEY,
            hint="load the base model in full precision, if the adapter was trained on that",
        )
    if init == "olora" and view is not None and view.transposed:
        raise AdapterError(f"PEFT starts {name}, a Conv1D, from its transpose; such a file is not read", key=_KEY)


def residual_kind(base_layer: nn.Module, config: LoraConfig) -> type[LoraLinear]:
    """Return the class of a layer that subtracts what it starts from, or that a file of such a layer fills."""
    if not config.inference_mode:
        return ResidualLinear
    return ResidualMerge if stored_weight(base_layer).is_meta else ResidualFromFile


def calibrate(model: nn.Module, config: LoraConfig, batches: Batches) -> None:
    """Start the model's LoRA layers from data, with the adapter disabled: see ``core.protocols.Layers``.

    Raises:
        AdapterError: the data do not suffice, or do not reach a layer.
    """
    layers = lora_layers(model)
    if config.init_lora_weights == "eva":
        start_eva(model, config, layers, eva_directions(model, config, layers, batches))
        return
    started = {name: layer for name, layer in layers.items() if isinstance(layer, ResidualLinear)}
    statistics_of = covariances_of if config.init_lora_weights == "corda" else gradients_of
    with disabled(model):
        found = statistics_of(model, started, batches)
    for name, layer in started.items():
        layer.start_from(found[name], config)
