"""What PEFT calls the tuner: the model with adapters in it, which are switched, merged, combined and removed."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from peftcli.core.config import AdapterConfig
from peftcli.core.inject import inject, set_active, set_trainable, unload
from peftcli.core.layer import TrainedBias, TrainedCopy, adapter_layers, base_name
from peftcli.core.merge import MergedWeights, merge, merge_in_place
from peftcli.core.protocols import layers_of, penalty
from peftcli.core.weights import adapter_state, load_state
from peftcli.errors import AdapterError
from peftcli.methods.combinations import Adapter, Combination, combine
from peftcli.methods.lora.attach import find_parameters
from peftcli.models.quantization import forget
from peftcli.peft_api.conversion import can_be_lora
from peftcli.peft_api.mixed_batch import BASE, adapted_by_row, check_count

_NAME = re.compile(r"[\w-]+( [\w-]+)*")


class Tuner(nn.Module):
    """Holds the model and the state of its adapters: their configs, which are active, which are merged.

    It is ``PeftModel.base_model``. The model is ``base_model.model``, so that parameters have the names that the
    adapter file gives them.
    """

    uses_shared_state = False
    """PEFT's: whether an adapter needs a ``PeftModel`` for the tensors that its layers share. None does here."""

    def __init__(self, model: nn.Module, peft_config: dict[str, Any]):
        """Hold ``model``, whose adapters are those of ``peft_config``, all of them active."""
        super().__init__()
        self.model, self.peft_config = model, peft_config
        self.active_adapters = list(peft_config)
        """Names of the active adapters. While adapters are disabled or merged they are active too."""
        self.merged_adapters: list[str] = []
        """Names of the adapters that are merged."""
        self.folded: MergedWeights | None = None
        """What ``merge_adapter`` did, until ``unmerge_adapter``."""
        self.disabled = False
        """Whether the model computes what the base model computes."""
        self.frozen: list[nn.Parameter] = []
        """The weights to unfreeze when adapters are enabled again: those that were trainable before."""
        self.gradient_hook: RemovableHandle | None = None
        """What lets gradients into the model's blocks while it has adapters; none in a model of transformers."""

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        with self.by_row(adapter_names, args, kwargs):
            output = self.model(*args, **kwargs)
        if self.training and isinstance(getattr(output, "loss", None), torch.Tensor):
            configs = [config for config in self.peft_config.values() if config.penalty_in_loss]
            found = (penalty(self.model, config) for config in configs)
            if (added := next((each for each in found if each is not None), None)) is not None:
                output.loss = output.loss + added
        return output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            if not hasattr(self.model, name) and (found := self.attributes_of_methods(name)):
                return found[0]
            return getattr(self.model, name)

    @property
    def active_adapter(self) -> str | list[str]:
        """Name of the active adapter; a list, unless there is exactly one."""
        return self.active_adapters[0] if len(self.active_adapters) == 1 else list(self.active_adapters)

    @property
    def prefix(self) -> str:
        """What the names of an adapter's weights begin with, for example ``lora_``; empty if nothing is common."""
        layers = [
            layer for layer in adapter_layers(self.model).values() if type(layer) not in (TrainedBias, TrainedCopy)
        ]
        layers.sort(key=lambda layer: layer.peft_name is not None)  # trained rows stand beside another method's
        names = [name.removesuffix(".weight") for name in layers[0].own_tensors()] if layers else []
        depth = min((name.count(".") for name in names), default=0)
        names = [name for name in names if name.count(".") == depth]  # deeper ones are those of a layer in this one
        head, found, _ = os.path.commonprefix(names).rpartition("_")  # noqa: RUF071 - of characters, not of paths
        return head + found

    @property
    def targeted_module_names(self) -> list[str]:
        """Names of the modules that the adapters adapt, in the order of the adapters."""
        found = [
            base_name(self.model, path)
            for adapter in self.peft_config
            for path, layer in adapter_layers(self.model, adapter).items()
            if type(layer) not in (TrainedBias, TrainedCopy)
        ]
        owners = {name.rpartition(".")[0] for name in self.targeted_parameter_names}
        return [name for name in dict.fromkeys(found) if name not in owners]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Names of the parameters that ``target_parameters`` of the adapters adapt."""
        wanted = [getattr(config, "target_parameters", None) or () for config in self.peft_config.values()]
        found = [find_parameters(self.model, each) for each in wanted]
        return list(dict.fromkeys(f"{name}.{leaf}" for each in found for name in each for leaf in each[name]))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether ``convert_to_lora`` can turn the adapter into LoRA."""
        return can_be_lora(self.model, adapter_name)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The config of a model of any library as a dictionary; that of PEFT's custom models where it has none."""
        config: Any = getattr(model, "config", None) or {"model_type": "custom"}
        if hasattr(config, "to_dict"):
            return dict(config.to_dict())
        return asdict(config) if is_dataclass(config) else dict(config)  # type: ignore[arg-type]

    def by_row(
        self, names: Sequence[str] | None, args: Sequence[Any], kwargs: Mapping[str, Any], copies: int = 1
    ) -> AbstractContextManager[None]:
        """``adapted_by_row`` of the model for these inputs, or nothing to enter where no names are given."""
        if names is None or self.disabled:
            return nullcontext()
        if self.training:
            raise AdapterError("Cannot pass `adapter_names` when the model is in training mode. Call eval() first")
        if self.folded:
            raise AdapterError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        check_count(self.model, names, args, kwargs)
        return adapted_by_row(self.model, names, copies)

    def update_and_allocate(self, global_step: int) -> None:
        """Share out the budget of AdaLoRA or AdaMSS. Call it after each optimizer step, while the gradients are there.

        Raises:
            AdapterError: the gradients are gone.
        """
        for allocate in self.attributes_of_methods("update_and_allocate"):
            allocate(global_step)

    def attributes_of_methods(self, name: str) -> list[Any]:
        """Return the attributes of that name that the adapters' methods give the model."""
        found = []
        for kind in dict.fromkeys(config.peft_type for config in self.peft_config.values()):
            configs = {each: config for each, config in self.peft_config.items() if config.peft_type == kind}
            layers = layers_of(next(iter(configs.values())))
            if name in (more := layers.model_attributes(self.model, configs)):
                found.append(more[name])
        return found

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Do what the function ``set_adapter`` does. Merged adapters are unmerged."""
        names = self.check_known(adapter_name)
        self.unmerge_adapter()
        set_adapter(self.model, names, inference_mode)
        self.active_adapters, self.frozen = names, []
        self.switch()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Do what the function ``set_requires_grad`` does."""
        set_requires_grad(self.model, self.check_known(adapter_names), requires_grad)

    def disable_adapter_layers(self) -> None:
        """Make the model compute what the base model computes, until ``enable_adapter_layers``.

        Merged adapters are unmerged, and all adapters are frozen.
        """
        self.unmerge_adapter()
        layers = adapter_layers(self.model).values()
        self.frozen += [value for layer in layers for value in layer.own_tensors().values() if value.requires_grad]
        set_trainable(self.model, False)
        self.disabled = True
        self.switch()

    def enable_adapter_layers(self) -> None:
        """Let the active adapters adapt the model again, and train those that did."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen = []
        self.disabled = False
        if not self.folded:
            self.switch()

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter or several. If no active one is left, the first of those left becomes active.

        Raises:
            AdapterError: an unknown name, or one of them is merged. Nothing is changed then.
        """
        names = self.check_known(adapter_name)
        if merged := [name for name in names if name in self.merged_adapters]:
            raise AdapterError(f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first.")
        was_active = list(self.active_adapters)
        for name in names:
            unload(self.model, name)
            del self.peft_config[name]
        self.active_adapters = [name for name in was_active if name not in names]
        if not self.folded:
            self.switch()
        if was_active and not self.active_adapters and self.peft_config:
            first = next(iter(self.peft_config))
            warnings.warn(f"{', '.join(was_active)} was active; now {first} is", stacklevel=2)
            self.set_adapter(first)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Make a new adapter, not active, of a weighted sum of others. See ``peftcli.methods.combinations``.

        Where there is an adapter of that name already, nothing is done, with a warning. The adapters to combine are of
        one method: LoRA or (IA)^3, for which ``combination_type`` is cat or linear, the sum of the factors. The
        settings are those of ``Combination``; ``svd_full_matrices`` does not change the result.

        Raises:
            AdapterError: the adapters cannot be combined like that.
        """
        self.check_known(adapters)
        if adapter_name in self.peft_config:
            warnings.warn(f"there is an adapter called {adapter_name!r} already; nothing is done", stacklevel=2)
            return
        self.check_new(adapter_name)
        how = Combination(combination_type, svd_rank, density, majority_sign_method, clamp=svd_clamp, driver=svd_driver)
        given = [Adapter(name, self.peft_config[name], adapter_state(self.model, name)) for name in adapters]
        combined = combine(given, weights, how)
        combined.config.inference_mode = True
        inject(self.model, combined.config, adapter_name)
        load_state(self.model, combined.tensors, adapter=adapter_name)
        self.register_adapter(adapter_name, combined.config, trainable=False)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = True) -> None:
        """Put the updates of these adapters, or of the active ones, into the base weights until ``unmerge_adapter``.

        Until then the model computes with these adapters, as fast as the base model, and with those merged before.
        Merged weights are checked to be finite, whatever ``safe_merge`` is.

        Warns when they are merged already.

        Raises:
            AdapterError: adapters are disabled, an adapter cannot be merged, or a merged weight is not finite. The
                model is as it was then.
        """
        if self.disabled:
            raise AdapterError("adapters are disabled; call enable_adapter_layers() first")
        before = self.merged_adapters
        names = [*before, *(name for name in self._mergeable(adapter_names) if name not in before)]
        if before and names == before:
            warnings.warn("All adapters are already merged, nothing to do", stacklevel=2)
            return
        with self._enabled_alone(names):
            self.folded = merge_in_place(self.model)
        self.merged_adapters = names

    def unmerge_adapter(self) -> None:
        """Take back ``merge_adapter``, exactly: the base weights are the same objects as before."""
        if self.folded:
            self.folded.undo()
            self.folded, self.merged_adapters = None, []
            self.switch()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: Sequence[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> nn.Module:
        """The base model with these adapters, or the active ones, folded in, and no adapter layer left.

        ``dequantize`` makes a quantised base model's weights dense, so that they can be merged into. No progress bar is
        shown, and merged weights are checked to be finite, whatever ``safe_merge`` is.

        Raises:
            AdapterError: a method cannot be merged, the base model is quantised, or a merged weight is not finite. The
                model is as it was then.
        """
        names = self._mergeable(adapter_names)
        with self._enabled_alone(names):
            untied = merge(self.model, *(self.peft_config[name] for name in names), dequantise=dequantize)
        if dequantize:
            forget(self.model)  # type: ignore[arg-type]
        if untied:
            self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        self._remove_gradient_hook()
        return self.model

    def unload(self) -> nn.Module:
        """The base model without adapter layers. What ``merge_adapter`` has merged stays in its weights, as in PEFT."""
        self.folded, self.merged_adapters = None, []
        unload(self.model)
        self._remove_gradient_hook()
        return self.model

    def _remove_gradient_hook(self) -> None:
        if self.gradient_hook is not None:
            self.gradient_hook.remove()

    def register_adapter(self, name: str, config: AdapterConfig, trainable: bool) -> None:
        """Take note of an adapter that is in the model now, without being active."""
        self.peft_config[name] = config
        self.switch()
        set_trainable(self.model, trainable, name)

    def switch(self) -> None:
        """Enable the layers of the active adapters; while adapters are disabled, none."""
        set_active(self.model, [] if self.disabled else self.active_adapters)

    def single_active_adapter(self) -> str:
        """Return the name of the active adapter. Raise AdapterError unless there is exactly one."""
        if len(self.active_adapters) != 1:
            raise AdapterError(f"{len(self.active_adapters)} adapters are active; name one", key="adapter_name")
        return self.active_adapters[0]

    def check_known(self, names: str | Sequence[str], key: str = "adapter_name") -> list[str]:
        """Return the names as a list. Raise AdapterError for one that no adapter has."""
        return check_names(names, self.peft_config, key)

    def check_new(self, name: str) -> None:
        """Raise AdapterError for a name that is taken or not valid, and while adapters are merged."""
        check_name(name)
        self.check_unmerged()
        if name in self.peft_config:
            raise AdapterError(f"there is an adapter called {name!r} already", key="adapter_name")

    def check_unmerged(self) -> None:
        """Raise AdapterError while adapters are merged."""
        if self.folded:
            raise AdapterError("adapters are merged; call unmerge_adapter() first")

    @contextmanager
    def _enabled_alone(self, names: Sequence[str]) -> Iterator[None]:
        """Unmerge all adapters and enable these alone. After an AdapterError inside, all is as it was before."""
        before = self.merged_adapters
        self.unmerge_adapter()
        try:
            set_active(self.model, names)
            yield
        except AdapterError:
            self.switch()
            if before:
                self.merge_adapter(before)
            raise

    def _mergeable(self, names: Sequence[str] | None) -> list[str]:
        if names is None and not (self.folded or self.disabled):
            switched = {tuple(layer.active_adapters) for layer in adapter_layers(self.model).values()}
            if len(switched) == 1:  # all layers alike, maybe one by one, without the tuner
                self.active_adapters = [name for name in switched.pop() if name in self.peft_config]
        chosen = self.check_known(self.active_adapters if names is None else list(names))
        for name in chosen:
            if reason := self.peft_config[name].merge_problem():
                raise AdapterError(reason)
        return chosen


BaseTuner = Tuner


def find_tuner(model: Any) -> tuple[Tuner | None, nn.Module]:
    """Return the tuner of a model, also of a compiled one, or None, and the model that holds the adapter layers."""
    model = getattr(model, "_orig_mod", model)
    tuner = next((each for each in (model, getattr(model, "base_model", None)) if isinstance(each, Tuner)), None)
    return tuner, tuner.model if tuner else model


def check_name(name: str) -> None:
    """Raise AdapterError for a name that could not be a folder's, or that means something else."""
    if not _NAME.fullmatch(name) or name == BASE:
        raise AdapterError(
            f"{name!r} is not a valid name; use letters, digits, - and _, and single blanks between them",
            key="adapter_name",
        )


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make one adapter, or several together, the active ones. Their weights train, and those of no other.

    With ``inference_mode`` none do.

    Raises:
        AdapterError: an unknown name, or one adapter would hide what another does. Nothing is changed then.
    """
    names = check_names_in(model, adapter_name)
    set_active(model, names)
    set_trainable(model, False)
    for name in names:
        set_trainable(model, not inference_mode, name)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Let the weights of these adapters take gradients, or not, whether or not they are active."""
    for name in check_names_in(model, adapter_names):
        set_trainable(model, requires_grad, name)


def check_names_in(model: nn.Module, names: str | Sequence[str]) -> list[str]:
    """Return the names as a list. Raise AdapterError for one that no adapter of a plain model has."""
    return check_names(names, dict.fromkeys(layer.adapter for layer in adapter_layers(model).values()))


def check_names(names: str | Sequence[str], known: Collection[str], key: str = "adapter_name") -> list[str]:
    """Return the names as a list. Raise AdapterError for one that is not among the ``known``."""
    names = [names] if isinstance(names, str) else list(names)
    if unknown := [name for name in names if name not in known]:
        there = ", ".join(known) or "none"
        raise AdapterError(f"Adapter {unknown[0]} does not exist; there are: {there}", key=key)
    return names
