"""Put an adapter's layers into a model, switch them off, take them out."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from peftcli.core.config import AdapterConfig, BiasConfig, FanInConfig, LayeredConfig, TargetedConfig
from peftcli.core.heads import resolve_heads
from peftcli.core.layer import (
    AdapterLayer,
    EmptyLayer,
    TrainedBias,
    TrainedCopy,
    adapter_layers,
    base_module,
    base_modules,
    base_name,
    check_not_offloaded,
    modules_sharing,
    outer_modules,
    plain_dtype,
)
from peftcli.core.linear import linear_view
from peftcli.core.protocols import layers_of
from peftcli.core.quantised import check_gradients, is_quantised, keep_layout, num_weights
from peftcli.core.targets import find_modules, module_matches, shortest_names, targets, wrap
from peftcli.errors import AdapterError, PeftWarning


@dataclass(frozen=True)
class Injection:
    """The result of ``inject``."""

    layers: dict[str, AdapterLayer]
    """Path in the model -> adapter layer."""
    trainable: int
    """Parameters of the adapter."""
    total: int
    """Parameters of the model, the adapter's included."""


def inject(
    model: nn.Module, config: AdapterConfig, adapter: str = "default", *, initialised: Collection[str] = ()
) -> Injection:
    """Put the config's adapter layers into the model, in place, around those of its other adapters.

    The base model is frozen, with the running statistics of its norms; other adapters stay as they are.

    Nothing is changed when this raises, nor in the config.

    Args:
        model: the base model, maybe with other adapters in it.
        config: the adapter's.
        adapter: name of the adapter in the model.
        initialised: names of the parameters that the base model's checkpoint did not hold, as its loader reports them.
            The modules that hold them train in full and are saved with the adapter.

    Raises:
        AdapterError: the config names modules that the model lacks or that the method cannot adapt, or the model
            holds an adapter of this name already, or a new adapter cannot be trained on it.
    """
    config.normalise()  # fields may have been set since it was made
    config.check()
    _remove(model, lambda layer: False)  # what libraries that know PEFT have emptied
    before = set(adapter_layers(model).values())
    if any(layer.adapter == adapter for layer in before):
        raise AdapterError("the model already holds an adapter of this name; merge or unload that first")
    keep_layout(model)
    if not config.inference_mode:
        check_gradients(model, plain_dtype(model))
    trained_before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    changes_before = len(model.__dict__.get("_adapter_undo", ()))
    try:
        with unchanged_on_error(config):
            total_before = _insert(model, config, initialised)
            added = {path: layer for path, layer in adapter_layers(model).items() if layer not in before}
            _check_called(model, config, added)
    except AdapterError:
        _remove(model, lambda layer: layer not in before)
        _take_back(model, changes_before)
        for parameter in trained_before:
            parameter.requires_grad_(True)
        raise
    _call_layers(model)
    _freeze_statistics(model)
    for layer in added.values():
        layer.adapter, layer.active_adapters = adapter, [adapter]
    trained = {parameter for layer in added.values() for parameter in layer.own_tensors().values()}
    trainable = sum(parameter.numel() for parameter in trained)
    return Injection(added, trainable, total_before + trainable - num_replaced(added.values()))


@contextmanager
def unchanged_on_error(config: AdapterConfig) -> Iterator[None]:
    """Inside, an error gives the config the settings back that it had before."""
    before = dict(vars(config))
    try:
        yield
    except AdapterError:
        vars(config).update(before)
        raise


def num_replaced(layers: Iterable[AdapterLayer]) -> int:
    """Return how many weights of the base model are kept beside the trained biases that replace them."""
    return sum(bias.numel() for bias in {base_module(each).bias for each in layers if isinstance(each, TrainedBias)})


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside: the model computes what the base model computes."""
    layers = list(adapter_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode: without dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def set_active(model: nn.Module, adapters: Iterable[str]) -> None:
    """Enable these adapters, and disable the model's others.

    Where none is to be enabled, the layers keep the names of those that were active.

    Raises:
        AdapterError: one of them would override another. Nothing is changed then.
    """
    names = list(adapters)
    layers = adapter_layers(model)
    for path, layer in layers.items():
        if layer.adapter in names and len(names) > 1:
            layer.check_active(names, base_name(model, path))
    for layer in layers.values():
        layer.enabled = layer.adapter in names and not layer.merged_adapters
        layer.active_adapters = names or layer.active_adapters


def set_trainable(model: nn.Module, trainable: bool, adapter: str | None = None) -> None:
    """Switch the gradients of the weights of one adapter, or of all, on or off. The base model stays frozen."""
    for layer in adapter_layers(model, adapter).values():
        for parameter in layer.own_tensors().values():
            parameter.requires_grad_(trainable)


def unload(model: nn.Module, adapter: str | None = None) -> None:
    """Remove the layers of one adapter, or of all, and put the modules below them back in place.

    With what they have merged into the base weights, the base weights of their file stay too.
    """
    if any(layer.merged_adapters for layer in adapter_layers(model, adapter).values()):
        changes = model.__dict__.get("_adapter_undo", [])
        changes[:] = [undo for undo in changes if undo.func is not _fill_weight]
    _remove(model, lambda layer: adapter in (None, layer.adapter))
    if not adapter_layers(model):
        _take_back(model)
        free_statistics(model)


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model on the meta device, to inject into. It takes no memory; the model is not changed.

    It cannot compute. Weights of kinds that are not PyTorch's own stay those of the model.
    """
    done: dict[nn.Parameter, nn.Parameter] = {}

    def empty(parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            return parameter
        if parameter not in done:
            done[parameter] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        return done[parameter]

    copied = shallow_copy(model, empty)
    for module in copied.modules():
        if parametrize.is_parametrized(module):  # what a weight is computed from may be buffers too
            module.parametrizations.to("meta")
    return copied


def shallow_copy(
    model: nn.Module, replace: Callable[[nn.Parameter | None], nn.Parameter | None] = lambda parameter: parameter
) -> nn.Module:
    """Return a copy of the model's modules that holds the model's tensors, its parameters as ``replace`` returns them.

    The model is not changed by what is put into the copy.
    """
    done: dict[int, Any] = {}

    def twin(module: nn.Module) -> nn.Module:
        if id(module) not in done:
            done[id(module)] = new = object.__new__(type(module))  # parametrised and divided ones refuse to be copied
            new.__dict__.update(vars(module))
            for name, value in vars(new).items():
                if isinstance(value, (dict, list, set)):
                    new.__dict__[name] = copy.copy(value)
            new.__dict__.pop("_adapter_undo", None)
            new._parameters.update({name: replace(value) for name, value in module._parameters.items()})
            new._modules.update({name: child and twin(child) for name, child in module._modules.items()})
        return cast("nn.Module", done[id(module)])

    return twin(model)


def on_unload(model: nn.Module, undo: functools.partial[None]) -> None:
    """Register a call for when the model's adapters are unloaded. A partial over modules survives a deep copy."""
    model.__dict__.setdefault("_adapter_undo", []).append(undo)


def replace_weight(model: nn.Module, weight: nn.Parameter, value: torch.Tensor) -> None:
    """Give a weight of the base model, not on the meta device, the values of a file until the adapters are unloaded."""
    on_unload(model, functools.partial(_fill_weight, weight, weight.detach().clone()))
    _fill_weight(weight, value)


def _fill_weight(weight: nn.Parameter, value: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(value)


def is_reshaped(model: nn.Module) -> bool:
    """Return whether unloading has to undo changes of the model's structure."""
    return any(undo.func is not _fill_weight for undo in model.__dict__.get("_adapter_undo", ()))


def keep_shape(model: nn.Module) -> None:
    """Make the changes of the model's structure permanent, after a merge."""
    model.__dict__.pop("_adapter_undo", None)


def replace_modules(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> None:
    """Replace each module ``old`` by ``new[old]``, at every place that shares it."""
    for parent in list(model.modules()):
        for attribute, child in list(parent._modules.items()):
            if child is not None and child in new:
                setattr(parent, attribute, new[child])


def train_other_biases(model: nn.Module, config: Any, layers: Collection[str]) -> None:
    """Train every bias of the model outside of the modules ``layers`` that the adapter adapts (``bias: all``)."""
    inside = tuple(f"{name}." for name in find_modules(model, config.modules_to_save or (), "modules_to_save"))
    places = outer_modules(model)
    added = {base._parameters.get("bias") for base in map(base_module, places.values()) if not base._modules}
    new, trained = dict[nn.Module, nn.Module](), dict[torch.Tensor, nn.Parameter]()
    for name, module in places.items():
        base = base_module(module)
        bias = base._parameters.get("bias")
        if bias is None or name in layers or f"{name}.".startswith(inside):
            continue
        if base._modules and bias in added:
            continue  # it holds what a layer in it adds, as the heads of BERT do
        new[module] = layer = TrainedBias(module)
        layer.bias = trained.setdefault(bias, layer.own_tensors()["bias"])
    replace_modules(model, new)


def _remove(model: nn.Module, chosen: Callable[[AdapterLayer], bool]) -> None:
    """Put the modules below the chosen layers back in place."""
    while layers := [layer for layer in adapter_layers(model).values() if chosen(layer)]:
        replace_modules(model, {layer: layer.base_layer for layer in layers})
    while empty := [layer for layer in model.modules() if isinstance(layer, EmptyLayer) and not layer.stays]:
        replace_modules(model, {layer: layer.base_layer for layer in empty})


def _insert(model: nn.Module, config: AdapterConfig, initialised: Collection[str]) -> int:
    """Freeze the base model and put the config's layers in place; return the parameters that there were before.

    An error may leave the model half changed.
    """
    method, is_first = layers_of(config), not adapter_layers(model)
    method.reshape(model, config)
    layers, saved = _wrapped(model, config, initialised)
    total_before = num_weights(model)
    if is_first:
        model.requires_grad_(False)
    places = outer_modules(model)
    new = {places[name]: layer for name, layer in [*layers.items(), *saved.items()]}
    replace_modules(model, {module: layer.train(module.training) for module, layer in new.items()})
    _complete(model, config, layers)
    method.attach(model, config, layers)
    return total_before


def _wrapped(
    model: nn.Module, config: AdapterConfig, initialised: Collection[str]
) -> tuple[dict[str, AdapterLayer], dict[str, TrainedCopy]]:
    """Return the new layers over the config's targets, and those over its modules_to_save. None is in place yet."""
    resolve_heads(model, config, initialised)
    saved = find_modules(model, config.modules_to_save or (), "modules_to_save")
    inside = tuple(f"{name}." for name in saved)  # trained in full already
    saved = [name for name in saved if not name.startswith(inside)]
    places = outer_modules(model)
    if config.inference_mode:  # PEFT takes modules without weights too
        saved = [name for name in saved if num_weights(base_module(places[name]))]
    config.modules_to_save = _clear_names(model, config.modules_to_save, saved)
    names = [name for name in targets(model, config) if not f"{name}.".startswith(inside)]
    if not names:
        problem = "modules_to_save leaves no module to adapt" if saved else "names no module to adapt"
        raise AdapterError(problem, key="target_modules")
    for name in saved:
        if not num_weights(base_module(places[name])):
            raise AdapterError(f"{name} has nothing to train; leave it out", key="modules_to_save")
        if any(is_quantised(module) for module in places[name].modules()):
            raise AdapterError(
                f"{name} is quantised, and cannot be trained in full",
                key="modules_to_save",
                hint=f"leave it out, or load the base model with llm_int8_skip_modules={[name]} in its "
                "BitsAndBytesConfig, or with modules_to_not_convert in another quantization config",
            )
    layers = _wrap_each({name: places[name] for name in names}, config)
    copies = {name: TrainedCopy(places[name], config.file_prefix) for name in saved}
    for name, layer in [*layers.items(), *copies.items()]:
        if any(value.is_meta for value in layer.own_tensors().values()):
            check_not_offloaded(layer, name)
    return layers, copies


def _wrap_each(modules: Mapping[str, nn.Module], config: AdapterConfig) -> dict[str, AdapterLayer]:
    """Wrap the modules. Of those that no setting names, one is left out that has a single output and cannot be adapted.

    Gates of experts are such.
    """
    by_default = isinstance(config, TargetedConfig) and config.target_modules in (None, "all-linear")
    layers: dict[str, AdapterLayer] = {}
    errors = list[AdapterError]()
    for name, module in modules.items():
        try:
            layers[name] = wrap(module, name, config)
        except AdapterError as error:
            view = linear_view(module) if by_default else None
            if view is None or view.out_features > 1:
                raise
            errors.append(error)
    if not layers:
        raise errors[0]
    return layers


def _clear_names(model: nn.Module, entries: list[str] | None, saved: list[str]) -> list[str] | None:
    """Return ``modules_to_save`` with the full names of modules in place of an entry that PEFT finds others by.

    PEFT takes each name that ends in an entry, without regard to dots, and modules in saved modules too.
    """
    clear: list[str] = []
    for entry in entries or ():
        unclear = any(name.endswith(entry) and name not in saved for name in base_modules(model))
        clear += [name for name in saved if module_matches(name, entry)] if unclear else [entry]
    return list(dict.fromkeys(clear)) if entries else entries


def _complete(model: nn.Module, config: AdapterConfig, layers: dict[str, AdapterLayer]) -> None:
    """Write into the config what readers of the file need to know of the model, and train the biases it asks for."""
    if isinstance(config, TargetedConfig) and config.target_modules in (None, "all-linear"):
        config.target_modules = shortest_names(model, list(layers))
    if isinstance(config, LayeredConfig) and config.layers_to_transform is not None and not config.layers_pattern:
        lists = [found for name in layers if (found := re.match(r"(.+?\.)??([^.]+)\.\d+\.", name))]
        if not all(found[1] for found in lists):  # PEFT finds no list by itself that stands first in a name
            config.layers_pattern = sorted({found[2] for found in lists})
    if isinstance(config, FanInConfig):
        views = [linear_view(layer) for layer in layers.values()]
        config.fan_in_fan_out = any(view.transposed for view in views if view)
    if isinstance(config, BiasConfig) and config.bias == "all":
        train_other_biases(model, config, layers)
    config.normalise()


def _check_called(model: nn.Module, config: AdapterConfig, added: Mapping[str, AdapterLayer]) -> None:
    """Raise AdapterError for a new adapter on an embedding that the model never calls, or warn of it in a file.

    Encoder and decoder of T5, BART and their kin have embeddings of their own, which share the weight of ``shared``.
    """
    for path, layer in added.items():
        name, below = base_name(model, path), base_module(layer)
        if name.rpartition(".")[2] != "shared" or not isinstance(below, nn.Embedding):
            continue
        others = modules_sharing(model, below).items()
        called = [other for other, module in others if isinstance(base_module(module), nn.Embedding)]
        trained = {value for each in added.values() if each is not layer for value in each.own_tensors().values()}
        if not called or trained.intersection(layer.own_tensors().values()):
            continue
        text = f"{type(model).__name__} never calls {name}, so that an adapter there does nothing"
        if config.inference_mode:
            warnings.warn(text, PeftWarning, stacklevel=4)
            continue
        hint = f"name {' and '.join(called)}, which share its weight"
        raise AdapterError(
            text, key="modules_to_save" if isinstance(layer, TrainedCopy) else "target_modules", hint=hint
        )


def _call_layers(model: nn.Module) -> None:
    """Make PyTorch's encoders call their layers: in evaluation they read the weights, past any adapter."""
    switches = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
    for module in model.modules():
        switch = switches.get(type(module))
        if switch and getattr(module, switch) and adapter_layers(module):
            on_unload(model, functools.partial(setattr, module, switch, getattr(module, switch)))
            setattr(module, switch, False)


def _freeze_statistics(model: nn.Module) -> None:
    """Keep every norm with running statistics in evaluation mode unless it trains, or the head that it is in."""
    free_statistics(model)
    heads = {norm: one.copy for one in model.modules() if isinstance(one, TrainedCopy) for norm in one.copy.modules()}
    for module in model.modules():
        if module._buffers.get("running_mean") is not None:
            module.register_forward_pre_hook(functools.partial(_use_statistics, heads.get(module)))


def free_statistics(model: nn.Module) -> None:
    """Let norms with running statistics follow ``train()`` again."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "func", None) is _use_statistics:
                del module._forward_pre_hooks[key]


def _use_statistics(head: nn.Module | None, norm: nn.Module, args: Any) -> None:
    trained = [parameter.requires_grad for parameter in (head or norm).parameters()]
    if not trained or not all(trained):  # of a bias that trains beside it, the norm sees the bias only
        norm.training = False


def _take_back(model: nn.Module, earlier: int = 0) -> None:
    """Undo the changes of the model's structure, but for the first ``earlier`` of them, which other adapters made."""
    changes = model.__dict__.get("_adapter_undo", [])
    while len(changes) > earlier:
        changes.pop()()
    if not changes:
        model.__dict__.pop("_adapter_undo", None)
