"""The adapter layer: a frozen base layer and the weights of one adapter beside it."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftcli.core.quantised import FLOATS
from peftcli.errors import AdapterError, AdapterTypeError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_SAME_SIZE = {
    "in_features": ("in_channels", "num_embeddings", "nx"),
    "out_features": ("out_channels", "embedding_dim", "nf"),
}
"""What layers that are not linear call their sizes."""


class AdapterLayer(nn.Module):
    """A base layer of the model with one adapter's weights beside it.

    A layer holds one adapter, so its parameters carry the names that the adapter file gives them. Attributes that
    the layer does not have itself (``weight``, ``in_features``) are the base layer's, since models read them. Of a
    convolution or an embedding, ``in_features`` and ``out_features`` are its channels, or its rows and columns.
    """

    adapter = "default"
    """Name of the layer's adapter."""
    base_layer: Any
    """The layer of the model, or another adapter layer over it."""
    active_adapters: list[str]
    """Names of the model's active adapters. While they are disabled they are active too."""
    merged_adapters: list[str]
    """The name of the layer's adapter while that is merged into the base weights."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.active_adapters, self.merged_adapters = [self.adapter], []
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet: a copy in the making
                raise
            base = base_module(self)
            name = next((each for each in _SAME_SIZE.get(name, ()) if hasattr(base, each)), name)
            return getattr(self.base_layer, name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._parameters.setdefault(name, None)  # else the same name in an adapter layer below would count as taken
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        self._buffers.setdefault(name, None)
        super().register_buffer(name, tensor, persistent)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        y = self.base_layer(x, *args, **kwargs)
        return self.adapt(x, y) if self.enabled else y

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for ``x``, of which the base layer has made ``y``."""
        raise NotImplementedError

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """Return the adapter's tensors that train: name below the layer -> parameter."""
        found = {name: value for name, value in own_parameters(self).items() if value is not None}
        for name, module in self._modules.items():
            if name != "base_layer" and module is not None:  # with many adapters, most of the model is below
                found |= {f"{name}.{inner}": value for inner, value in module.named_parameters()}
        return {name: value for name, value in found.items() if name not in self.fixed}

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the base layer's tensors that change when the adapter is folded in, in float32 or wider.

        Raises:
            AdapterError: this kind of layer cannot be merged.
        """
        raise AdapterError(f"{type(self).__name__} cannot be merged into the base model")

    # what the adapter file holds of the layer, where that is not what trains under its own name

    file_prefix = "base_model.model."
    fixed: tuple[str, ...] = ()
    """Names, below the layer, of the adapter's tensors that never train: projections drawn once, starting values."""
    saves_fixed = True
    """Whether the file holds the ``fixed`` tensors too."""
    copies: tuple[str, ...] = ()
    """Names of shared tensors that the file holds once more for each layer, without which PEFT warns."""
    optional: tuple[str, ...] = ()
    """Names of tensors that files of other writers lack. The layer then finds them by itself."""

    def fixed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors that never train, parameters or buffers: name below the layer -> tensor."""
        return {name: operator.attrgetter(name)(self) for name in self.fixed}

    def file_tensors(self) -> dict[str, torch.Tensor]:
        """Return what the adapter file holds of this layer: name below the layer -> tensor.

        A method that saves other tensors than it trains computes them here. With ``inference_mode`` in its config its
        layer holds them as they are, to be filled from a file.
        """
        return {**self.own_tensors(), **(self.fixed_tensors() if self.saves_fixed else {})}

    def parts(self, tensor: str, value: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of the layer whose rows are those of ``value``, which the file holds as ``tensor``."""
        return [value]

    def file_name(self, path: str, tensor: str) -> str:
        """Return the name of ``tensor`` in the adapter file, for a layer at ``path`` in the model."""
        return f"{self.file_prefix}{path}.{tensor}"

    def before_loading(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Prepare for the ``tensors`` of a file, name below the layer -> tensor: take sizes that only it says.

        They may be on the meta device, and may not fit.

        Raises:
            AdapterError: the layer cannot find what the file lacks.
        """

    def adapt_from_file(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        """Convert a file's ``value`` of ``tensor`` to the layer's shape, where other writers have another."""
        return value

    # several adapters, in one layer over another

    by_row = True
    """Whether rows of a batch can have different adapters: ``forward`` does all that the layer does."""
    serves: MixedRows | None = None
    """Which rows of the batch the layer serves, while they have different adapters."""

    def overrides(self, below: AdapterLayer) -> bool:
        """Return whether this layer overrides ``below``, another adapter's on the same module, if both are enabled."""
        return False

    def check_active(self, names: Collection[str], place: str = "") -> None:
        """Raise AdapterError if the layer, at ``place``, would override that of another of these adapters."""
        for below in adapter_layers(self.base_layer).values():
            both = {self.adapter, below.adapter}
            if len(both) == 2 and both <= set(names) and self.overrides(below):
                raise AdapterError(
                    f"{self.adapter} replaces {place or 'what'}{place and ', which'} {below.adapter} changes too; "
                    "only one of them can be active"
                )

    def folded(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the ``merged_tensors`` of this layer and of the adapter layers below it that are enabled."""
        below = self.base_layer.folded(base) if isinstance(self.base_layer, AdapterLayer) else {}
        return below | self.folded_over(base, below) if self.enabled else below

    def folded_over(self, base: dict[str, torch.Tensor], below: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return what this layer makes of the base layer's tensors and those that layers below have changed."""
        return self.merged_tensors(base | below)

    # settings of training that concern few layers

    larger_rate: tuple[str, ...] = ()
    """Names of the tensors that LoRA+ trains faster; see ``methods.learning_rates``."""
    embedding_rate: tuple[str, ...] = ()
    """Names of the tensors that LoRA+ trains at the rate of embeddings."""
    casts_input = True
    """Whether LoRA and trained copies convert their input to the adapter's dtype. Off where hooks convert the weights
    on their way."""


@dataclasses.dataclass
class MixedRows:
    """The rows of a batch that one layer serves, while rows have different adapters."""

    numbers: list[int] | None = None
    """None: all."""
    read: str = ""
    """Name of a trained parameter that the model has read by itself: it is one for all rows."""


class EmptyLayer(AdapterLayer):
    """What is left of a layer whose adapter was deleted there alone, until the next adapter comes."""

    adapter = ""
    stays = False
    """Whether the layer must not go: it knows what was merged into the base weights."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.enabled = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)


class TrainedCopy(AdapterLayer):
    """A module of modules_to_save: a copy is trained in full, the original stays for when the adapter is disabled."""

    def __init__(self, base_layer: nn.Module, file_prefix: str):
        super().__init__(base_layer)
        base, key = base_module(base_layer), "modules_to_save"
        if isinstance(base, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            kind = type(base).__name__
            raise AdapterTypeError(f"{key} cannot be applied to modules of type {kind}; name the modules in it")
        if adapter_layers(base):
            raise AdapterError("a module with layers of another adapter cannot be trained in full", key=key)
        self.file_prefix = file_prefix
        self.copy = copy.deepcopy(base)
        self.optional = tuple(self._shared())
        for value in (*self.copy.parameters(), *self.copy.buffers()):  # a batch norm wants statistics in float32, too
            if value.is_floating_point():
                value.data = value.data.to(adapter_dtype(value))
        self.copy.requires_grad_(True)

    def __getattr__(self, name: str) -> Any:
        """Return what the model reads of the module, the weight for one: the copy's, in the base model's dtype."""
        if name in ("copy", "base_layer", "enabled") or not self.enabled:
            return super().__getattr__(name)
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            value = getattr(self.copy, name)
            if self.serves and isinstance(value, nn.Parameter):
                self.serves.read = name
            return cast(value, getattr(base_module(self), name).dtype) if isinstance(value, nn.Parameter) else value

    def own_tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.copy.named_parameters())

    def _shared(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the copy holds under several names, by all names but the first."""
        own = self.own_tensors()
        return {name: value for name, value in self.copy.named_parameters(remove_duplicate=False) if name not in own}

    def file_tensors(self) -> dict[str, torch.Tensor]:
        return {**super().file_tensors(), **self._shared()}

    def fixed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the buffers of the copy that a checkpoint holds, such as the running statistics of a BatchNorm."""
        state = self.copy.state_dict(keep_vars=True).items()
        return {name: value for name, value in state if not isinstance(value, nn.Parameter)}

    def overrides(self, below: AdapterLayer) -> bool:
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        own, base = first_parameter(self.copy), first_parameter(base_module(self))
        if torch.is_autocast_enabled(own.device.type) or not self.casts_input:
            return self.copy(*args, **kwargs)
        given = {name: cast(value, own.dtype) for name, value in kwargs.items()}
        return cast(self.copy(*cast(args, own.dtype), **given), base.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        places = {name.replace("base_layer.", ""): name for name in base}  # of layers that other adapters adapt
        return {places.get(name, name): value for name, value in self.file_tensors().items()}


class TrainedBias(AdapterLayer):
    """A base layer whose bias is trained beside it (``bias: all`` and ``bias: lora_only``)."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        bias: torch.Tensor = base_module(base_layer).bias
        self.bias = nn.Parameter(bias.detach().to(adapter_dtype(bias)).clone())

    def __getattr__(self, name: str) -> Any:
        """Return what the model reads of the module: the trained bias in the base model's dtype, if it is enabled."""
        if name != "bias" or (own := self._parameters.get(name)) is None:
            return super().__getattr__(name)
        if not self.enabled:
            return self.base_layer.bias
        if self.serves:
            self.serves.read = name
        return own.to(base_module(self).bias.dtype)

    def overrides(self, below: AdapterLayer) -> bool:
        return isinstance(below, (TrainedBias, TrainedCopy))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        depth = len(layers_at(self.base_layer))
        # a tensor of its own: bitsandbytes casts the data of the bias that it is given
        value = self.own_tensors()["bias"].to(base_module(self).bias.dtype)
        bias = {"base_layer." * depth + "bias": value.view_as(value)}
        return torch.func.functional_call(self.base_layer, bias, args, kwargs)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"bias": self.own_tensors()["bias"]}

    def folded(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.enabled or not isinstance(self.base_layer, AdapterLayer):
            return super().folded(base)
        # as in forward: the layers below get this bias, and may change it
        return (own := self.merged_tensors(base)) | self.base_layer.folded(base | own)


def own_parameters(module: nn.Module) -> Mapping[str, nn.Parameter | None]:
    """Return a module's own parameters. In the replicas of ``nn.DataParallel`` they are attributes like others."""
    found: Mapping[str, nn.Parameter | None] = vars(module).get("_former_parameters", module._parameters)
    return found


def first_parameter(module: nn.Module) -> nn.Parameter:
    """Return the first of a module's parameters, those of the modules in it included; see ``own_parameters``."""
    values = (value for each in module.modules() for value in own_parameters(each).values())
    return next(value for value in values if value is not None)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return ``value`` with the floating-point tensors in it, or in a list, tuple or ModelOutput, in another dtype."""
    if isinstance(value, (list, tuple)):
        return type(value)(cast(each, dtype) for each in value) if type(value) in (list, tuple) else value
    if isinstance(value, dict) and dataclasses.is_dataclass(value):  # a ModelOutput; the module may fill another dict
        return dataclasses.replace(value, **{name: cast(each, dtype) for name, each in value.items()})
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def adapter_dtype(like: torch.Tensor) -> torch.dtype:
    """Return the dtype of adapter weights for a base weight: float32, or wider where the base model is wider."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32 or wider: some operations have no half precision, or too few digits in it."""
    return tensor.to(adapter_dtype(tensor))


def version_of(tensor: torch.Tensor) -> int | None:
    """Return a number that grows with each change in place; None for a tensor of inference mode, which counts none."""
    return None if tensor.is_inference() else tensor._version


def model_ends(model: Any) -> tuple[Any, Any]:
    """Return the input embedding and the output head of a model; None for one that it lacks."""
    ends = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            end = getattr(model, name)()
        except (AttributeError, NotImplementedError):  # as a model says that hears or sees
            end = None
        ends.append(end if isinstance(end, nn.Module) else None)  # Perceiver's embedding is a parameter
    return ends[0], ends[1]


def base_module(module: nn.Module) -> Any:
    """Return the base model's module below any adapter layers."""
    while isinstance(module, AdapterLayer):
        module = module.base_layer
    return module


def layers_at(module: nn.Module) -> list[AdapterLayer]:
    """Return the adapter layers that stand at ``module``, outermost first."""
    found = []
    while isinstance(module, AdapterLayer):
        found.append(module)
        module = module.base_layer
    return found


def offloaded_to_run_on(module: Any) -> torch.device | None:
    """Return the device that an offloaded module runs on, to which accelerate brings its weights; None: it is not one.

    Its weights are on the meta device between calls. A hook that only moves inputs, of a model on several devices, does
    not offload.
    """
    module = base_module(module)
    hook = module.__dict__.get("_hf_hook")
    device = getattr(hook, "execution_device", None) if getattr(hook, "offload", False) else None
    if device is None or not any(value is not None and value.is_meta for value in module._parameters.values()):
        return None
    return torch.device(device)


def check_not_offloaded(module: nn.Module, name: str) -> None:
    """Raise AdapterError if the weights of the module called ``name`` are not in memory."""
    if offloaded_to_run_on(module):
        raise AdapterError(
            f"{name} is offloaded, and its weights are needed",
            hint="load the base model without offloading, or leave this module out",
        )


def adapter_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterLayer]:
    """Return the adapter layers of the model, or of one of its adapters, by path, in the model's order."""
    return {
        path: module
        for path, module in _walk(model)
        if isinstance(module, AdapterLayer) and module.adapter and adapter in (None, module.adapter)
    }


def _walk(
    model: nn.Module, parent: Callable[[nn.Module], nn.Module] = lambda module: module
) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``named_modules`` does, whose nested generators are slow where adapter layers are nested too.

    The children of a module are those of ``parent(module)``.
    """
    left, seen = [("", model)], set[nn.Module]()
    while left:
        path, module = left.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            inner = [(name, child) for name, child in parent(module)._modules.items() if child is not None]
            left += [(f"{path}.{name}" if path else name, child) for name, child in reversed(inner)]


def without_wrappers(path: str) -> str:
    """Return the path of a module or tensor without the modules that PyTorch wraps others in: compiled, sharded."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def path_in_file(model: nn.Module, path: str) -> str:
    """Return the path that the adapter layer at ``path`` would have if its adapter were the only one."""
    adapter = model.get_submodule(path).adapter
    return _path_past(model, path, lambda layer: layer.adapter != adapter or isinstance(layer, TrainedBias))


def base_name(model: nn.Module, path: str) -> str:
    """Return the base model's name of the module below the adapter layer at ``path``."""
    return _path_past(model, path, lambda layer: True)


def _path_past(model: nn.Module, path: str, absent: Callable[[AdapterLayer], bool]) -> str:
    """Return the path as it would be without the adapter layers that are ``absent``."""
    module, kept = model, []
    for part in path.split(".") if path else ():
        if not (part == "base_layer" and isinstance(module, AdapterLayer) and absent(module)):
            kept.append(part)
        module = module.get_submodule(part)
    return without_wrappers(".".join(kept))


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return what stands at each name of the base model: the module, or the outermost adapter layer over it.

    A module with several names counts under its first, as in ``named_modules``.
    """
    return {without_wrappers(path): module for path, module in _walk(model, base_module)}


def base_modules(model: nn.Module) -> dict[str, Any]:
    """Return the base model's modules by name, as if it had no adapter."""
    return {name: base_module(module) for name, module in outer_modules(model).items()}


def modules_sharing(model: nn.Module, module: nn.Module) -> dict[str, nn.Module]:
    """Return the other modules that share ``module``'s weight: name in the base model -> module."""
    weight = module.weight
    return {
        name: other
        for name, other in outer_modules(model).items()
        if base_module(other) is not module and base_module(other)._parameters.get("weight") is weight
    }


def layers_below(layer: AdapterLayer) -> list[AdapterLayer]:
    """Return the enabled layers below ``layer`` on its module that see the rows of its adapter, the outermost first."""
    below = [each for each in layers_at(layer.base_layer) if each.enabled]
    return [each for each in below if each.adapter == layer.adapter or not layer.serves]


def plain_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of the base model's first weight that is not quantised; float32 if all are."""
    weights = (value for module in base_modules(model).values() for value in module.parameters(recurse=False))
    return next((value.dtype for value in weights if value.dtype in FLOATS), torch.float32)


def name_in(model: nn.Module, module: nn.Module) -> str:
    """Return the name that a module of ``model`` has without adapters."""
    wanted = base_module(module)
    return next(name for name, found in base_modules(model).items() if found is wanted)
