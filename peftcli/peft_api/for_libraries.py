"""What libraries look for in an adapted model: a section for each of them.

``transformers.Trainer`` comes first, then TRL, Accelerate, transformers' own ``load_adapter``, and diffusers.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.dataclasses import get_module_class_from_name
from torch import nn
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
from transformers.core_model_loading import WeightRenaming

from peftcli.core.config import AdapterConfig
from peftcli.core.files import write_tensor_file
from peftcli.core.layer import AdapterLayer, TrainedCopy, adapter_layers
from peftcli.core.weights import load_training_state, training_state
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import CONFIG_FILE
from peftcli.methods.lokr.layers import factors
from peftcli.peft_api.training import is_checkpointing
from peftcli.peft_api.tuner import Tuner
from peftcli.system.outputs import expand_user

# ---- Trainer: it reads the arguments of forward, and saves what is a PreTrainedModel

_CHECKPOINT = re.compile(r"checkpoint-\d+")
"""Names of the folders of Trainer's checkpoints."""


class ShowsArguments:
    """Decorator of a method: a model's has the arguments of the model inside, so that the same columns are kept.

    ``forward`` of the class has those in ``arguments``. All are in the order of ``arguments``, which is PEFT's.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, model: Any, kind: Any) -> Callable[..., Any]:
        if model is None:
            names = kind.arguments if self.function.__name__ == "forward" else ()
            return _with_arguments(self.function, names) if names else self.function
        if torch.compiler.is_compiling():  # nobody asks then, and a graph knows no subclass of partial
            return functools.partial(self.function, model)
        return _Bound(self.function, model)


class _Bound(functools.partial[Any]):
    """A method of a model."""

    @property
    def __func__(self) -> Callable[..., Any]:
        """The function, which Accelerate asks of a method."""
        return self.func

    @property
    def __signature__(self) -> inspect.Signature:
        (model,) = self.args
        shown, own = inspect.signature(getattr(model.get_base_model(), self.func.__name__)), model.arguments

        def place(argument: inspect.Parameter) -> tuple[Any, ...]:
            order = own.index(argument.name) if argument.name in own else len(own)
            return argument.kind, argument.default is not argument.empty, order

        return shown.replace(parameters=sorted(shown.parameters.values(), key=place))


def _with_arguments(function: Callable[..., Any], names: Iterable[str]) -> Callable[..., Any]:
    def shown(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    kind = inspect.Parameter
    parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    parameters.append(kind("kwargs", kind.VAR_KEYWORD))
    functools.update_wrapper(shown, function).__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return shown


class SavedByTrainer(nn.Module):
    """A module that ``isinstance`` takes for a ``PreTrainedModel`` of transformers too.

    Trainer calls ``save_pretrained`` of a ``PreTrainedModel`` only, and otherwise writes the plain state_dict. Nothing
    is inherited from that class: ``__class__`` is a property, as in a proxy, and ``type`` is still the real class.
    """

    @property
    def __class__(self) -> Any:
        kind: Any = type(self)
        if torch._guards.TracingContext.try_get() is not None:  # the compiler finds no attributes in a disguise
            return kind
        known = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
        return kind if known is None else _disguise(kind, known, _forward_inside(self))

    @__class__.setter
    def __class__(self, new: type) -> None:
        """Become ``new``, which FSDP and ``parametrize`` derive from the class that they read."""
        object.__dict__["__class__"].__set__(self, _without_disguise(new))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (type(self),), self.__getstate__()  # type: ignore[no-untyped-call]

    @property
    def is_activation_checkpointing(self: Any) -> bool:
        """Whether activations are computed again in the backward pass; Trainer asks every model that it knows."""
        return is_checkpointing(self.get_base_model(), default=False)

    is_gradient_checkpointing = is_activation_checkpointing
    """The same under the name that transformers has before 5.24."""

    @property
    def _hf_peft_config_loaded(self: Any) -> bool:
        """Whether Trainer may train it, which it refuses for a quantised model without adapters."""
        quantizer = getattr(self.get_base_model(), "hf_quantizer", None)
        return quantizer is None or bool(quantizer.is_trainable)

    @property
    def accepts_loss_kwargs(self: Any) -> bool:
        """Whether the model takes the number of targets of the global batch."""
        model = self.get_base_model()
        if hasattr(model, "accepts_loss_kwargs"):
            return bool(model.accepts_loss_kwargs)
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def _get_name(self: Any) -> str:
        """The base model's: by it Trainer knows, for label smoothing, whether a model shifts its labels."""
        return self.get_base_model()._get_name()

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)


def _forward_inside(model: Any) -> Callable[..., Any] | None:
    """Return the ``forward`` of the class of the model inside, of a model that shows its arguments; else None."""
    if not isinstance(inspect.getattr_static(type(model), "forward"), ShowsArguments):
        return None
    tuner = model.__dict__.get("_modules", {}).get("base_model")  # None in a model in the making
    return None if tuner is None else type(tuner.model).forward


@functools.cache
def _disguise(kind: Any, known: type, shown: Callable[..., Any] | None) -> type:
    """Return a class for ``isinstance`` alone: ``kind`` and ``known``, the ``PreTrainedModel`` of transformers.

    Its ``forward`` has the arguments of ``shown``: by them Trainer finds the labels.
    """
    described = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    if shown is not None:
        described["forward"] = functools.wraps(shown)(lambda *args, **kwargs: kind.forward(*args, **kwargs))
    return type(kind.__name__, (kind, known), {**described, "worn_by": kind})


@functools.cache
def _without_disguise(kind: type) -> type:
    """Return ``kind``, derived from the classes that the modules have in truth."""
    if "worn_by" in kind.__dict__:
        return kind.__dict__["worn_by"]
    bases = tuple(base.__dict__.get("worn_by", base) for base in kind.__bases__)
    return kind if bases == kind.__bases__ else type(kind)(kind.__name__, bases, dict(kind.__dict__))


def write_for_trainer(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what Trainer itself reads when it resumes from one of its checkpoints, or loads the best of them."""
    if _CHECKPOINT.fullmatch(folder.name):
        write_tensor_file(folder / "model.safetensors", tensors)


def find_in_checkpoint(folder: str | Path, name: str) -> str | Path:
    """Return where the adapter ``name`` is. Of its own checkpoints Trainer names the folder, whatever the adapter."""
    own = expand_user(Path(folder, name))
    return own if _CHECKPOINT.fullmatch(Path(folder).name) and (own / CONFIG_FILE).is_file() else folder


def __getattr__(name: str) -> Any:
    if name != "AdamssAsaCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _asa_callback()


@functools.cache
def _asa_callback() -> type:
    from transformers import TrainerCallback  # all of Trainer comes with it

    class AdamssAsaCallback(TrainerCallback):
        """Lets AdaMSS choose its subspaces after each optimizer step; the config says the schedule."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **others: Any) -> None:
            for module in () if model is None else model.modules():
                if isinstance(module, Tuner):
                    module.update_and_allocate(state.global_step)

    return AdamssAsaCallback


# ---- TRL: it refuses a head that is an adapter layer, and copies an adapter by names that only PEFT has


class HeadForTrl(nn.Module):
    """A module of ``modules_to_save`` that is no adapter layer to who looks at its class."""

    def __init__(self, layer: TrainedCopy):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def start_reference(model: nn.Module, name: str, config: AdapterConfig, configs: Mapping[str, AdapterConfig]) -> None:
    """Give a new adapter ``ref`` of the config of ``default`` the weights of that: TRL makes its reference so."""
    if name == "ref" and configs.get("default") is config:
        load_training_state(model, training_state(model, "default"), name)


# ---- Accelerate: it saves and loads state_dict, which holds the adapters alone, and asks FSDP which modules to wrap


def limit_state_to_adapters(model: nn.Module) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of the model be about what trains, and what adapters' files hold."""
    model.register_state_dict_post_hook(_drop_base)
    model.register_load_state_dict_pre_hook(_note_prefix)
    model.register_load_state_dict_post_hook(_expect_adapters)


def find_trained_outside(model: nn.Module) -> set[str]:
    """Return the names of what trains and is no adapter's: somebody has unfrozen it. With the statistics of norms."""
    seen = {id(value) for layer in adapter_layers(model).values() for value in layer.own_tensors().values()}
    found = set[str]()
    for path, module in model.named_modules():
        own = {name: each for name, each in module.named_parameters(path, recurse=False) if each.requires_grad}
        if new := [name for name, each in own.items() if id(each) not in seen]:
            seen |= {id(own[name]) for name in new}
            found |= {*new, *(name for name, _ in module.named_buffers(path, recurse=False))}
    return found


def _names_in_state(model: nn.Module, *, fixed: bool) -> set[str]:
    """Return the names of what trains; with ``fixed`` also of what files hold besides, as the statistics of a norm."""
    found = set[int]()
    for layer in adapter_layers(model).values():
        found |= {id(value) for value in layer.own_tensors().values()}
        if fixed and layer.saves_fixed:
            found |= {id(value) for value in layer.fixed_tensors().values()}
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name for name, value in tensors if id(value) in found} | find_trained_outside(model)


def _drop_base(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    names = {prefix + name for name in _names_in_state(model, fixed=True)}
    for name in [name for name in state if name.startswith(prefix) and name not in names]:
        del state[name]


def _note_prefix(model: Any, _state: Any, prefix: str, *_arguments: Any) -> None:
    model.prefix_in_state = prefix


def _expect_adapters(model: Any, keys: Any) -> None:
    """Drop what is missing of the base model; ``keys`` also has what modules beside this one, around it, miss."""
    names, prefix = _names_in_state(model, fixed=False), model.prefix_in_state
    keys.missing_keys[:] = [
        name for name in keys.missing_keys if not name.startswith(prefix) or name.removeprefix(prefix) in names
    ]


def fsdp_auto_wrap_policy(model: Any) -> Callable[..., bool]:
    """Return FSDP's ``auto_wrap_policy`` for a model with adapters: each block by itself, each trained layer by itself.

    The classes of the blocks are those that transformers never splits between devices, or those that
    ``FSDP_TRANSFORMER_CLS_TO_WRAP`` names.

    Raises:
        AdapterError: the model has no module of such a class.
    """
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    kept = [name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()]
    blocks = set()
    for name in dict.fromkeys(named.split(",") if named else kept):
        block = get_module_class_from_name(model, name)
        if block is None and named:
            raise AdapterError(f"{type(model).__name__} has no {name}", key="FSDP_TRANSFORMER_CLS_TO_WRAP")
        blocks.add(block)

    def is_trained_leaf(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return not any(True for _ in module.children()) and weight is not None and weight.requires_grad

    policies = [
        functools.partial(lambda_auto_wrap_policy, lambda_fn=is_trained_leaf),
        functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=blocks - {None}),
    ]
    return functools.partial(_or_policy, policies=policies)


# ---- load_adapter of transformers: it asks how names in an adapter file become names in the model


def build_peft_weight_mapping(
    weight_conversions: Iterable[Any] | None, adapter_name: str, peft_config: AdapterConfig | None = None
) -> list[Any]:
    """Return what transformers does to the names of an adapter file, in this order.

    Of what it does to a checkpoint of the base model, renamings hold for adapters too. An adapter's name is no part of
    its tensors' names here.
    """
    prefix = "base_model.model." if peft_config is None else peft_config.file_prefix
    renamings = [each for each in weight_conversions or () if isinstance(each, WeightRenaming)]
    return [WeightRenaming(f"^{prefix}", ""), *renamings]


class _Renaming(type):
    def __instancecheck__(cls, module: Any) -> bool:
        if not isinstance(module, AdapterLayer):
            return False
        try:
            return bool(module.adapter_state_dict_load_map(module.adapter))
        except AdapterError:  # it is raised again to whoever asks for the map
            return True


class AuxiliaryTrainingWrapper(metaclass=_Renaming):
    """The layers whose tensors have other names in the file: transformers asks them how to read it."""


# ---- diffusers: it takes layers out, and divides sizes as LoKr does

factorization = factors


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Return the parent of the module called ``key``, the module, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name
