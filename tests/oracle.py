"""PEFT as oracle: build, save and load with it, and hear what it says."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models_tiny import batch, logits, randomise, tiny
from safetensors.torch import load_file
from torch import nn

from peftcli.core.files import load_adapter, read_config, save_adapter
from peftcli.core.inject import inject, set_trainable
from peftcli.core.weights import adapter_state
from peftcli.methods import METHODS, config_from_dict

Case = tuple[str, str, dict[str, Any]]
"""Method, kind of model, settings."""

PEFTS_METHODS = [name for name, row in METHODS.items() if row.peft_type in peft.PeftType.__members__]
"""Those of our methods that PEFT has."""

_NOT_OF_THE_FILE = (
    "is_gradient_checkpointing",  # PEFT reads transformers' old name of the property, whatever it loads
    "ensure_weight_tying",  # PEFT warns of any adapter on a tied embedding or head, its own too
    "no implementation exists to tie",  # the same of trainable tokens
    "Unsupported layer type",  # PEFT says this of any norm that it tunes
    "Detected that the base layer has no bias term",  # PEFT's BEFT says what that means for merging
    "Setting boft_n_butterfly_factor to 1",  # PEFT's BOFT says what its setting means
    "Failed to load the CUDA extension",  # of PEFT's BOFT, on a machine without a compiler for it
)


def ours(kind: str, method: str, seed: int = 1, **settings: Any) -> tuple[nn.Module, Any]:
    """A tiny model with our adapter, its weights random, and the config."""
    model, config = tiny(kind), METHODS[method].config_class()(**settings)
    inject(model, config)
    set_trainable(model, True)
    randomise(model, seed)
    return model.eval(), config


def theirs(kind: str, method: str, seed: int = 1, **settings: Any) -> Any:
    """A tiny model with PEFT's adapter, its weights random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = _base(kind, METHODS[method].peft_type)
        model = peft.get_peft_model(base, peft_config_class(method)(**settings))
    randomise(model, seed)
    return model.eval()


def _base(kind: str, peft_type: str) -> Any:
    """A tiny model as PEFT wants it."""
    base: Any = tiny(kind)
    if peft_type == "XLORA":
        base.config.use_cache = False
    return base


def peft_config_class(method: str) -> Any:
    """PEFT's config class of one of our methods."""
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(METHODS[method].peft_type)]


def saved_by_peft(model: Any, folder: Path) -> Path:
    """The folder, with PEFT's adapter in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def loaded_by_peft(kind: str, folder: Path) -> Any:
    """What PEFT makes of an adapter folder. Fails when PEFT says anything about it."""
    base = _base(kind, read_config(folder)["peft_type"])
    with silence():
        return peft.PeftModel.from_pretrained(base, folder).eval()


def written_by_us(case: Case, folder: Path) -> tuple[nn.Module, Path]:
    """Our adapter, and the folder that it was written to."""
    method, kind, settings = case
    model, config = ours(kind, method, **settings)
    save_adapter(model, config, folder)
    return model, folder


def loaded_here(kind: str, folder: Path) -> nn.Module:
    """What we make of an adapter folder."""
    model = tiny(kind)
    load_adapter(model, config_from_dict(read_config(folder)), folder)
    return model


def read_by_peft(kind: str, folder: Path) -> Any:
    """As ``loaded_by_peft``, whatever PEFT says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(_base(kind, read_config(folder)["peft_type"]), folder).eval()


def same_logits(kind: str, found: Any, expected: Any, **more: Any) -> None:
    """Fails when logits for a batch, and ``more`` inputs, differ by more than 1e-5 of the largest."""
    inputs = {**batch(kind), **more}
    right = logits(expected, inputs)
    scale = right.abs().max().item()
    torch.testing.assert_close(logits(found, inputs), right, atol=1e-5 * max(scale, 1.0), rtol=1e-5)


@contextmanager
def silence() -> Iterator[None]:
    """Fails on any warning, and on any warning that transformers, peft or accelerate log."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(f"{record.name}: {record.getMessage()}")  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("transformers", "peft", "accelerate", "")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    heard += [str(one.message) for one in caught]
    heard = [text for text in heard if not any(part in text for part in _NOT_OF_THE_FILE)]
    if heard:
        pytest.fail("\n".join(heard))


def file_of(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The config object and the tensors of an adapter folder."""
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def adapter_size(model: nn.Module) -> int:
    return sum(value.numel() for value in adapter_state(model).values())
