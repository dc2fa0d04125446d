"""The adapter layer: a frozen base layer and the weights of one adapter beside it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftcli.core.quantised import is_quantised
from peftcli.errors import AdapterError, AdapterTypeError

_SAME_SIZE = {
    "in_features": ("in_channels", "num_embeddings", "nx"),
    "out_features": ("out_channels", "embedding_dim", "nf"),
}
"""What layers that are not linear call their sizes."""
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


class AdapterLayer(nn.Module):
    """A base layer of the model with one adapter's weights beside it.

    A layer holds one adapter, so its parameters carry the names that the adapter file gives them. Attributes that
    the layer does not have itself (``weight``, ``in_features``) are the base layer's, since models read them. Of a
    convolution or an embedding, ``in_features`` and ``out_features`` are its channels, or its rows and columns.
    """

    file_prefix = "base_model.model."
    adapter = "default"
    """Name of the layer's adapter."""
    fixed: tuple[str, ...] = ()
    """Names, below the layer, of the adapter's tensors that never train: projections drawn once, starting values."""
    larger_rate: tuple[str, ...] = ()
    """Names of the tensors that LoRA+ trains faster; see ``methods.learning_rates``."""
    embedding_rate: tuple[str, ...] = ()
    """Names of the tensors that LoRA+ trains at the rate of embeddings."""
    copies: tuple[str, ...] = ()
    """Names of tensors that other writers put into the file a second time. They are not read."""
    optional: tuple[str, ...] = ()
    """Names of tensors that files of other writers lack. The layer then finds them by itself."""
    by_row = True
    """Whether rows of a batch can have different adapters: ``forward`` does all that the layer does."""
    casts_input = True
    """Whether LoRA and trained copies convert their input to the adapter's dtype. Off where hooks convert the weights
    on their way."""
    rows: list[int] | None = None
    """The rows of the batch that ``forward`` gets, while rows have different adapters; None: all."""
    base_layer: Any
    """The layer of the model, or another adapter layer over it."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.active_adapters = [self.adapter]
        """Names of the model's active adapters. While they are disabled they are active too."""
        self.merged_adapters: list[str] = []
        """The name of the layer's adapter while that is merged into the base weights."""
        self.train(base_layer.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet: a copy in the making
                raise
            known = (each for each in _SAME_SIZE.get(name, ()) if hasattr(base_module(self), each))
            return getattr(self.base_layer, next(known, name))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        self._parameters.setdefault(name, None)  # else the same name in an adapter layer below would count as taken
        super().register_parameter(name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        self._buffers.setdefault(name, None)
        super().register_buffer(name, tensor, persistent)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the model's active adapter; a list, unless there is exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer's adapter is active and switched off."""
        return self.adapter in self.active_adapters and not self.enabled and not self.merged_adapters

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Enable the layer if its adapter is one of these, and let its weights train; else the reverse.

        Libraries that know PEFT call it on each layer of a model.

        Args:
            adapter_names: the active adapters of the model: one name or several.
            inference_mode: freeze the weights in any case.

        Raises:
            AdapterError: the layer would override that of another of these adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_active(names)
        self.active_adapters = names
        self.enabled = self.adapter in names
        for parameter in self.own_tensors().values():
            parameter.requires_grad_(self.enabled and not inference_mode)

    def check_active(self, names: Collection[str], place: str = "") -> None:
        """Raise AdapterError if the layer, at ``place``, would override that of another of these adapters."""
        for below in (module for module in self.base_layer.modules() if isinstance(module, AdapterLayer)):
            both = {self.adapter, below.adapter}
            if len(both) == 2 and both <= set(names) and self.overrides(below):
                raise AdapterError(
                    f"{self.adapter} replaces {place or 'what'}{place and ', which'} {below.adapter} changes too; "
                    "only one of them can be active"
                )

    def enable_adapters(self, enabled: bool) -> None:
        """Disable the layer, or enable it again if its adapter is an active one."""
        self.enabled = enabled and self.adapter in self.active_adapters

    def own_tensors(self) -> dict[str, nn.Parameter]:
        """Return the adapter's tensors that train: name below the layer -> parameter."""
        return {
            name: value
            for name, value in self.named_parameters()
            if not name.startswith("base_layer.") and name not in self.fixed
        }

    def fixed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors that never train, parameters or buffers: name below the layer -> tensor."""
        return {name: operator.attrgetter(name)(self) for name in self.fixed}

    def file_tensors(self) -> dict[str, torch.Tensor]:
        """Return what the adapter file holds of this layer: name below the layer -> tensor.

        A method that saves other tensors than it trains computes them here. With ``inference_mode`` in its config its
        layer holds them as they are, to be filled from a file.
        """
        return {**self.own_tensors(), **self.fixed_tensors()}

    def file_name(self, path: str, tensor: str) -> str:
        """Return the name of ``tensor`` in the adapter file, for a layer at ``path`` in the model."""
        return f"{self.file_prefix}{path}.{tensor}"

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return where transformers' ``load_adapter`` puts tensors: name below the layer, in the file -> in the model.

        Raises:
            AdapterError: a tensor of the file belongs to several layers, or the layer does not hold it as it is.
        """
        if adapter_name != self.adapter:
            return {}
        held = {id(value): name for name, value in [*self.named_parameters(), *self.named_buffers()]}
        start, places = f"{self.file_prefix}layer.", {}
        for tensor, value in self.file_tensors().items():
            name, place = self.file_name("layer", tensor), held.get(id(value))
            if not name.startswith(start) or place is None:
                told = f"load_adapter of transformers cannot read {tensor}"
                raise AdapterError(told, hint="use PeftModel.from_pretrained")
            places[name.removeprefix(start)] = place
        return {name: place for name, place in places.items() if name != place}

    def before_loading(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Prepare for the ``tensors`` of a file, name below the layer -> tensor: take sizes that only it says.

        They may be on the meta device, and may not fit.

        Raises:
            AdapterError: the layer cannot find what the file lacks.
        """

    def adapt_from_file(self, tensor: str, value: torch.Tensor) -> torch.Tensor:
        """Convert a file's ``value`` of ``tensor`` to the layer's shape, where other writers have another."""
        return value

    def overrides(self, below: AdapterLayer) -> bool:
        """Return whether this layer overrides ``below``, another adapter's on the same module, if both are enabled."""
        return False

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the base layer's tensors that change when the adapter is folded in, in float32 or wider.

        Raises:
            AdapterError: this kind of layer cannot be merged.
        """
        raise AdapterError(f"{type(self).__name__} cannot be merged into the base model")

    def folded(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the ``merged_tensors`` of this layer and of the adapter layers below it that are enabled."""
        below = self.base_layer.folded(base) if isinstance(self.base_layer, AdapterLayer) else {}
        return below | self.merged_tensors(base | below) if self.enabled else below


class TrainedCopy(AdapterLayer):
    """A module of modules_to_save: a copy is trained in full, the original stays for when the adapter is disabled."""

    def __init__(self, base_layer: nn.Module, file_prefix: str):
        super().__init__(base_layer)
        base, key = base_module(base_layer), "modules_to_save"
        if isinstance(base, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            whole = f"a {type(base).__name__} cannot be trained as a whole; name the modules in it"
            raise AdapterTypeError(whole, key=key)
        if any(is_quantised(module) for module in base.modules()):
            raise AdapterError("a quantised layer cannot be trained in full", key=key)
        if adapter_layers(base):
            raise AdapterError("a module with layers of another adapter cannot be trained in full", key=key)
        self.file_prefix = file_prefix
        self.copy = copy.deepcopy(base)
        for parameter in self.copy.parameters():
            parameter.data = parameter.data.to(adapter_dtype(parameter))
            parameter.requires_grad_(True)

    def __getattr__(self, name: str) -> Any:
        """Return what the model reads of the module, the weight for one: the copy's, in the base model's dtype."""
        if name in ("copy", "base_layer", "enabled") or not self.enabled:
            return super().__getattr__(name)
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            value = getattr(self.copy, name)
            return _cast(value, getattr(base_module(self), name).dtype) if isinstance(value, nn.Parameter) else value

    def own_tensors(self) -> dict[str, nn.Parameter]:
        return dict(self.copy.named_parameters())

    def fixed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the buffers of the copy that a checkpoint holds, such as the running statistics of a BatchNorm."""
        state = self.copy.state_dict(keep_vars=True).items()
        return {name: value for name, value in state if not isinstance(value, nn.Parameter)}

    def overrides(self, below: AdapterLayer) -> bool:
        return True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        own, base = (next(module.parameters()) for module in (self.copy, base_module(self)))
        if torch.is_autocast_enabled(own.device.type) or not self.casts_input:
            return self.copy(*args, **kwargs)
        given = {name: _cast(value, own.dtype) for name, value in kwargs.items()}
        return _cast(self.copy(*_cast(args, own.dtype), **given), base.dtype)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**self.own_tensors(), **self.fixed_tensors()}


class TrainedBias(AdapterLayer):
    """A base layer whose bias is trained beside it (``bias: all`` and ``bias: lora_only``)."""

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        bias: torch.Tensor = base_module(base_layer).bias
        self.bias = nn.Parameter(bias.detach().to(adapter_dtype(bias)).clone())

    def overrides(self, below: AdapterLayer) -> bool:
        return isinstance(below, (TrainedBias, TrainedCopy))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        depth = len(layers_below(self))
        # a tensor of its own: bitsandbytes casts the data of the bias that it is given
        value = self.bias.to(base_module(self).bias.dtype).view_as(self.bias)
        bias = {"base_layer." * depth + "bias": value}
        return torch.func.functional_call(self.base_layer, bias, args, kwargs)

    def merged_tensors(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"bias": self.bias}

    def folded(self, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self.enabled or not isinstance(self.base_layer, AdapterLayer):
            return super().folded(base)
        # as in forward: the layers below get this bias, and may change it
        return {"bias": self.bias} | self.base_layer.folded(base | {"bias": self.bias})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Return ``value`` with the floating-point tensors in it, or in a list or tuple, in another dtype."""
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(each, dtype) for each in value) if type(value) in (list, tuple) else value
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def adapter_dtype(like: torch.Tensor) -> torch.dtype:
    """Return the dtype of adapter weights for a base weight: float32, or wider where the base model is wider."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in float32 or wider: some operations have no half precision, or too few digits in it."""
    return tensor.to(adapter_dtype(tensor))


def model_ends(model: Any) -> tuple[Any, Any]:
    """Return the input embedding and the output head of a model; None for one that it lacks."""
    ends = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            ends.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # as a model says that hears or sees
            ends.append(None)
    return ends[0], ends[1]


def base_module(module: nn.Module) -> Any:
    """Return the base model's module below any adapter layers."""
    while isinstance(module, AdapterLayer):
        module = module.base_layer
    return module


def offloaded_to_run_on(module: Any) -> torch.device | None:
    """Return the device that an offloaded module runs on, to which accelerate brings its weights; None: it is not one.

    Its weights are on the meta device between calls.
    """
    module = base_module(module)
    device = getattr(module.__dict__.get("_hf_hook"), "execution_device", None)
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


def layers_below(layer: AdapterLayer) -> list[AdapterLayer]:
    """Return the adapter layers between ``layer`` and the base model's module, outermost first."""
    found, module = [], layer.base_layer
    while isinstance(module, AdapterLayer):
        found.append(module)
        module = module.base_layer
    return found


def adapter_layers(model: nn.Module, adapter: str | None = None) -> dict[str, AdapterLayer]:
    """Return the adapter layers of the model, or of one of its adapters, by path, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and adapter in (None, module.adapter)
    }


def without_wrappers(path: str) -> str:
    """Return the path of a module or tensor without the modules that PyTorch wraps others in: compiled, sharded."""
    return ".".join(part for part in path.split(".") if part not in _WRAPPERS)


def path_in_file(model: nn.Module, path: str) -> str:
    """Return the path that the adapter layer at ``path`` would have if its adapter were the only one."""
    adapter = model.get_submodule(path).adapter
    return _path_past(model, path, lambda layer: layer.adapter != adapter)


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


def base_paths(model: nn.Module) -> dict[str, str]:
    """Map the names of the base model's modules to their paths now, or to those of the adapter layers over them."""
    found: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str, path: str) -> None:
        if module in seen:  # a module with several names counts under its first, as in named_modules
            return
        seen.add(module)
        found[name] = path
        while isinstance(module, AdapterLayer):
            module, path = module.base_layer, f"{path}.base_layer"
        for child, inner in module.named_children():
            walk(inner, without_wrappers(f"{name}.{child}".lstrip(".")), f"{path}.{child}".lstrip("."))

    walk(model, "", "")
    return found


def base_modules(model: nn.Module) -> dict[str, Any]:
    """Return the base model's modules by name, as if it had no adapter."""
    return {name: base_module(model.get_submodule(path)) for name, path in base_paths(model).items()}


def name_in(model: nn.Module, module: nn.Module) -> str:
    """Return the name of a module of ``model`` as if it had no adapter. It leads to whatever stands there later."""
    wanted = base_module(module)
    return next(name for name, found in base_modules(model).items() if found is wanted)
