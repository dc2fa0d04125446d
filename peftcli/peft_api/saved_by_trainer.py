"""What lets ``transformers.Trainer`` save an adapted model by the model's own ``save_pretrained``."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.files import write_tensor_file
from peftcli.guard.adapter_folder import CONFIG_FILE
from peftcli.peft_api.shown_arguments import forward_inside
from peftcli.system.outputs import expand_user

_CHECKPOINT = re.compile(r"checkpoint-\d+")


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
        return kind if known is None else _disguise(kind, known, forward_inside(self))

    @__class__.setter
    def __class__(self, new: type) -> None:
        """Become ``new``, which FSDP and ``parametrize`` derive from the class that they read."""
        object.__dict__["__class__"].__set__(self, _without_disguise(new))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (type(self),), self.__getstate__()  # type: ignore[no-untyped-call]

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass; Trainer asks every model that it knows."""
        return _flag_of_base(self, "is_activation_checkpointing")

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The same under transformers' old name."""
        return _flag_of_base(self, "is_gradient_checkpointing")

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether Trainer may train it, which it refuses for a quantised model without adapters."""
        model: Any = self
        quantizer = getattr(model.get_base_model(), "hf_quantizer", None)
        return quantizer is None or bool(quantizer.is_trainable)


def write_for_trainer(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write what Trainer itself reads when it resumes from one of its checkpoints, or loads the best of them."""
    if _CHECKPOINT.fullmatch(folder.name):
        write_tensor_file(folder / "model.safetensors", tensors)


def place_in_checkpoint(folder: str | Path, name: str) -> str | Path:
    """Return where the adapter ``name`` is. Of its own checkpoints Trainer names the folder, whatever the adapter."""
    own = expand_user(Path(folder, name))
    return own if _CHECKPOINT.fullmatch(Path(folder).name) and (own / CONFIG_FILE).is_file() else folder


def _flag_of_base(model: Any, name: str) -> bool:
    return bool(getattr(model.get_base_model(), name, False))


@functools.cache
def _disguise(kind: Any, known: type, shown: Callable[..., Any] | None) -> type:
    """A class for ``isinstance`` alone: ``kind`` and ``known``, the ``PreTrainedModel`` of transformers.

    Its ``forward`` has the arguments of ``shown``: by them Trainer finds the labels.
    """
    described = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    if shown is not None:
        described["forward"] = functools.wraps(shown)(lambda *args, **kwargs: kind.forward(*args, **kwargs))
    return type(kind.__name__, (kind, known), {**described, "worn_by": kind})


@functools.cache
def _without_disguise(kind: type) -> type:
    """``kind``, derived from the classes that the modules have in truth."""
    if "worn_by" in kind.__dict__:
        return kind.__dict__["worn_by"]
    bases = tuple(base.__dict__.get("worn_by", base) for base in kind.__bases__)
    return kind if bases == kind.__bases__ else type(kind)(kind.__name__, bases, dict(kind.__dict__))
