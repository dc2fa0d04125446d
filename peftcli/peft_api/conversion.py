"""PEFT's functions that make a LoRA adapter of another adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli.core.files import write_adapter
from peftcli.core.weights import load_state
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods.lora.config import LoraConfig
from peftcli.methods.lora.conversion import as_lora
from peftcli.methods.lora.intruders import Intruders, without_intruders
from peftcli.methods.lora.variant_settings import variant_of
from peftcli.peft_api.model import PeftModel
from peftcli.system.outputs import expand_user


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return a LoRA adapter that does what another adapter does, as nearly as its r allows: config and tensors.

    ``rank`` is the r of all layers; or, as a float, the share of each update to keep (see ``methods.lora.conversion``).
    No progress bar is shown, and nothing is compiled.

    Raises:
        AdapterTypeError: there is no such adapter, or it does more than add to weights of linear layers.
        AdapterError: the rank does not fit.
    """
    config = None
    if isinstance(model, PeftModel):
        model.base_model.check_unmerged()
        config, model = model.peft_config.get(adapter_name), model.get_base_model()
        made, tensors = as_lora(model, adapter_name, config, rank)
    else:
        made, tensors = as_lora(model, adapter_name, None, rank)
        tensors = {name.removeprefix(LoraConfig.file_prefix): value for name, value in tensors.items()}
    if isinstance(config, LoraConfig):
        warnings.warn(f"{adapter_name} is LoRA already", PeftWarning, stacklevel=2)
    return made, tensors


def save_as_lora(
    path: str | Path,
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Write what ``convert_to_lora`` returns into a folder.

    Raises:
        AdapterError: as in ``convert_to_lora``.
        StorageError: the folder cannot be written.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name)
    prefix = LoraConfig.file_prefix
    named = {prefix + name.removeprefix(prefix): value for name, value in tensors.items()}
    write_adapter(named, config, expand_user(Path(path)))


def reduce_intruder_dimension(
    peft_model: PeftModel,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[[str], Any] | None = print,
) -> None:
    """Make an adapter that forgets less of what the base model knew, for some of what was learnt, the active one.

    Args:
        peft_model: a model with a LoRA adapter.
        old_adapter_name: the adapter, which stays.
        new_adapter_name: name of the new one.
        top_k: how many directions of each weight are looked at.
        threshold_epsilon: the likeness to the base weight's directions below which one is an intruder.
        mitigation_lambda: the factor of the intruders' strength that stays. 1: nothing is taken back.
        logging_sink: is given a line for each layer. None: nothing is said.

    Raises:
        AdapterError: the adapter is not a plain LoRA, or the name is taken. Nothing is changed then.
    """
    tuner, model = peft_model.base_model, peft_model.get_base_model()
    tuner.check_known([old_adapter_name])
    tuner.check_new(new_adapter_name)
    old = peft_model.peft_config[old_adapter_name]
    if not isinstance(old, LoraConfig):
        raise AdapterError(f"works for LORA, not {old.peft_type}", key="peft_type")
    if (variant := variant_of(old)) in ("kasa_config", "use_bdlora", "use_qalora"):
        raise AdapterError("works for plain LoRA only", key=variant)
    how = Intruders(top_k, threshold_epsilon, mitigation_lambda)
    tensors = without_intruders(model, old_adapter_name, how, logging_sink or (lambda line: None))
    config = copy.deepcopy(old.plain())
    peft_model.add_adapter(new_adapter_name, config)
    load_state(model, tensors, adapter=new_adapter_name)
    peft_model.set_adapter(new_adapter_name)
