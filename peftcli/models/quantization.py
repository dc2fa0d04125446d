"""Quantised base models: the configs for transformers, and the packages that they need."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from peftcli.errors import AdapterError, ModelError
from peftcli.guard.adapter_folder import RUN_FILE
from peftcli.guard.files import short_name, short_repr
from peftcli.guard.typed_fields import fits, mapping_at
from peftcli.schema import Quantization

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_BITSANDBYTES = "pip install 'peftcli[bitsandbytes]'"
_TORCHAO = "pip install 'peftcli[torchao]'"
_NEEDS: dict[str, tuple[tuple[str, ...], str]] = {
    "nf4": (("bitsandbytes",), _BITSANDBYTES),
    "fp4": (("bitsandbytes",), _BITSANDBYTES),
    "int8": (("bitsandbytes",), _BITSANDBYTES),
    "int8_weight_only": (("torchao",), _TORCHAO),
    "int4_weight_only": (("torchao",), _TORCHAO),
    "torchao": (("torchao",), _TORCHAO),
    "gptq": (("gptqmodel", "optimum"), "pip install gptqmodel optimum"),
    "awq": (("gptqmodel",), "pip install gptqmodel"),
    "aqlm": (("aqlm",), "pip install 'aqlm[gpu,cpu]'"),
    "auto-round": (("auto_round",), "pip install auto-round"),
    "compressed-tensors": (("compressed_tensors",), "pip install compressed-tensors"),
    "eetq": (("kernels",), "pip install kernels"),
    "fouroversix": (("fouroversix",), "pip install fouroversix --no-build-isolation"),
    "fp_quant": (("fp_quant",), "pip install fp_quant"),
    "higgs": (("flute", "fast_hadamard_transform"), "pip install flute-kernel fast_hadamard_transform"),
    "hqq": (("hqq",), "pip install hqq"),
    "quanto": (("optimum", "optimum.quanto"), "pip install optimum-quanto"),
    "quark": (("quark",), "pip install amd-quark"),
    "sinq": (("sinq",), "pip install sinq"),
    "spqr": (("spqr_quant",), "pip install 'spqr_quant[gpu]'"),
    "vptq": (("vptq",), "pip install vptq"),
}
"""Of the recipe's words, and of transformers' names for what a model folder holds: packages and how to get them."""


def need_package(kind: str) -> None:
    """Raise ModelError if a package that reads or makes such weights is not installed."""
    packages, command = _NEEDS.get(kind, ((), ""))
    missing = next((name for name in packages if importlib.util.find_spec(name) is None), None)
    if missing:
        raise ModelError(f"{kind} weights need the package {missing}: {command}", key="base_model.quantization")


def bytes_of_weight(quantization: Quantization) -> float:
    """Return how many bytes a quantised weight takes, with its share of the scales."""
    if quantization.type in ("nf4", "fp4"):
        return 0.5 + ((1 + 4 / 256) / 64 if quantization.double_quant else 4 / 64)
    return 1.0 + (4 / _group_size(quantization) if quantization.type == "int4_weight_only" else 0)


def stored_kind(config: PreTrainedConfig) -> str | None:
    """Return how the weights of a model folder are quantised; None: not at all.

    Of bitsandbytes in the recipe's words, else in transformers'.

    Raises:
        ModelError: transformers does not know the method.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    values: Any = stored if isinstance(stored, dict) or not hasattr(stored, "to_dict") else stored.to_dict()
    kind = values.get("quant_method", "bitsandbytes") if isinstance(values, dict) else values  # older ones do not say
    if kind != "bitsandbytes" and not (isinstance(kind, str) and kind in AUTO_QUANTIZATION_CONFIG_MAPPING):
        message = f"{short_repr(kind)} is not a known quantisation method"
        raise ModelError(message, file=short_name(str(config.name_or_path)), key="quantization_config")
    if kind == "bitsandbytes" and isinstance(values, dict):
        return "int8" if values.get("load_in_8bit") else str(values.get("bnb_4bit_quant_type", "fp4"))
    return str(getattr(kind, "value", kind))


def to_transformers(
    quantization: Quantization, dtype: torch.dtype | None, model: PreTrainedModel, heads: Sequence[str]
) -> Any:
    """Return transformers' config for a recipe's ``base_model.quantization``, to compute in ``dtype``.

    What stays as it is: the heads, and what transformers leaves out of the model by itself, where none is named.
    """
    import torch
    import transformers

    left_out = [*heads, *_left_out(model)] if heads else None
    if quantization.type == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=left_out)
    if quantization.type in ("nf4", "fp4"):
        compute = dtype if quantization.compute_dtype == "auto" else getattr(torch, quantization.compute_dtype)
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=compute,
            llm_int8_skip_modules=left_out,
        )
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup

    if quantization.type == "int8_weight_only":
        return transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left_out)
    groups = PerGroup(_group_size(quantization))
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups)  # type: ignore[attr-defined]
    return transformers.TorchAoConfig(config, modules_to_not_convert=left_out)


def check_groups(quantization: Quantization, model: PreTrainedModel, heads: Sequence[str]) -> None:
    """Raise ModelError if the groups that share a scale do not divide the inputs of a layer that is to be quantised."""
    from torch import nn

    kept, size = (*heads, *_left_out(model), *(model._keep_in_fp32_modules or ())), _group_size(quantization)
    inputs = {
        name: layer.in_features
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and not any(name.endswith(each) or f"{name}.".startswith(f"{each}.") for each in kept)
    }
    if odd := next((name for name, count in inputs.items() if count % size), None):
        raise ModelError(
            f"{size} weights are to share a scale, which does not divide the {inputs[odd]} inputs of {odd}",
            key="base_model.quantization.group_size",
            hint=f"set it to {math.gcd(size, *inputs.values())}, which divides those of every layer",
        )


def _group_size(quantization: Quantization) -> int:
    return quantization.group_size or 32


def _left_out(model: PreTrainedModel) -> list[str]:
    """Return the names of what transformers does not quantise."""
    import transformers

    names: list[str] = transformers.quantizers.base.get_keys_to_not_convert(model)
    return names


def unpacked_gguf() -> Any:
    """Return transformers' config that dequantises a .gguf file; None for versions that always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return config and config(dequantize=True)


def hush() -> None:
    """Silence bitsandbytes' message, in every 8-bit layer of every forward pass, that it rounds the input."""
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def forget(model: PreTrainedModel) -> None:
    """Tell transformers that the model's weights are no longer quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(mark, None)


def trained_quantization(record: Mapping[str, Any], folder: Path) -> Quantization | None:
    """Return how the base model was quantised when a run trained its adapter; None: not at all.

    ``record`` is the content of the run's run.json.

    Raises:
        AdapterError: run.json is damaged.
    """
    values = mapping_at(record, "recipe", "base_model").get("quantization")
    if not values:
        return None
    known = get_type_hints(Quantization)
    given = {name: values[name] for name in known if name in values} if isinstance(values, dict) else {}
    choices = {name: get_args(hint) for name, hint in known.items() if get_origin(hint) is Literal}
    wrong = [
        name
        for name, value in given.items()
        if not (value in choices[name] if name in choices else fits(value, known[name]))
    ]
    if "type" not in given or wrong:
        raise AdapterError(
            f"{short_repr(values)} is not a known quantisation",
            file=str(folder / RUN_FILE),
            key="recipe.base_model.quantization",
        )
    return Quantization(**given)
