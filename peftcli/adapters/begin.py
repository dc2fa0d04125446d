"""Begin training from an adapter's weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import nn

from peftcli.core.config import AdapterConfig, TargetedConfig
from peftcli.core.files import check_header, convert_config, read_open_tensors, unmatched_targets
from peftcli.core.inject import Injection, inject, meta_copy, unload
from peftcli.core.weights import holds_its_file, load_state, named_tensors
from peftcli.errors import AdapterError
from peftcli.guard.adapter_folder import find_weights, open_weights
from peftcli.guard.safetensors_header import TensorEntry


def begin_from_adapter(
    model: nn.Module, config: AdapterConfig, folder: Path, *, initialised: Collection[str] = ()
) -> Injection:
    """Inject the config's layers as for a new adapter, and begin from the folder's weights; see ``inject``.

    The config has the settings of the folder's. Its modules_to_save become those that the model has.

    Raises:
        AdapterError: as ``check_begin``. Nothing is changed in the model then.
    """
    path = find_weights(folder)
    with open_weights(path) as (header, file):  # the tensors are those of the header that was checked
        check_begin(model, config, header, path, initialised)
        tensors = read_open_tensors(header, file, path)
    injection = inject(model, config, initialised=initialised)
    try:
        if not holds_its_file(model):
            raise _computed(config, path)
        load_state(model, tensors, str(path))
    except AdapterError:
        unload(model)
        raise
    return injection


def check_begin(
    model: nn.Module,
    config: AdapterConfig,
    header: Mapping[str, TensorEntry],
    path: Path,
    initialised: Collection[str],
) -> None:
    """Check that training can begin from the file at ``path``, over this model, without memory for its tensors.

    The config's modules_to_save become those that the model has: PEFT also writes names that other models use.

    Raises:
        AdapterError: the tensors do not fit the config and the model, or are not what the method trains.
    """
    convert_config(model, config, {name: name for name in header})
    as_read = copy.deepcopy(config)
    as_read.inference_mode = True
    config.modules_to_save = check_header(model, as_read, header, path, initialised=initialised).modules_to_save
    if isinstance(config, TargetedConfig) and (unmatched := unmatched_targets(model, config)):
        config.target_modules = [entry for entry in config.target_modules or () if entry not in unmatched]
    empty = meta_copy(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the adapter is injected
            inject(empty, copy.deepcopy(config), initialised=initialised)
        if not named_tensors(empty).keys() <= header.keys():
            raise _computed(config, path)
    finally:
        unload(empty)


def _computed(config: AdapterConfig, path: Path) -> AdapterError:
    message = f"holds what {config.peft_type} computes from the weights that it trains; training cannot begin from it"
    return AdapterError(message, file=str(path))
