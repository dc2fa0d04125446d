"""LoRA files of pictures' models: diffusers' own, and those of kohya's scripts, which A1111 and ComfyUI read too.

kohya joins the parts of a module's name by ``_``, and stores ``alpha`` beside ``lora_down`` and ``lora_up``. Where it
names modules as the model's first authors did, diffusers knows their names in its own models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peftcli.adapters.foreign.base import EmptyBase
from peftcli.adapters.foreign.pairs import Pair, lora
from peftcli.adapters.foreign.source import Converted, Request, Source, Step, carried
from peftcli.core.layer import base_modules
from peftcli.guard.files import first_of, one_line, parse_json_object, short_name
from peftcli.methods import config_from_dict
from peftcli.methods.lora import LoraConfig
from peftcli.methods.lora.lora import size_of
from peftcli.models.diffusion import quiet_diffusers
from peftcli.models.pipeline import OpenPipeline

_ENDS = {
    **dict.fromkeys(("lora_A.weight", "lora.down.weight", "lora_down.weight"), "a"),
    **dict.fromkeys(("lora_B.weight", "lora.up.weight", "lora_up.weight"), "b"),
    "alpha": "alpha",
    "lora_magnitude_vector": "magnitude",
}
_END = re.compile(rf"(.+)\.({'|'.join(map(re.escape, _ENDS))})")
_KOHYAS = {"lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
"""Prefix -> part; ``lora_unet_`` is the denoiser, of any kind."""
_PREFIXES = ("lora_unet_", *_KOHYAS, "unet.", "transformer.", "text_encoder.", "text_encoder_2.", "diffusion_model.")
_OURS = {"peft_type": "LORA", "target_modules": ["all"]}
_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<at>\d{1,3})_(?P<part>\d)_")
_INSIDE = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
"""Layers of a residual block, as the first authors of Stable Diffusion called them."""


def recognises(source: Source) -> bool:
    """Return whether the names begin and end as those of pictures' models."""
    return bool(source.header) and all(name.startswith(_PREFIXES) for name in source.header)


def read(request: Request) -> Converted:
    """Find the modules, and fold no strength: each pair keeps its own."""
    source = request.source
    texts = any(name.startswith((*_KOHYAS, "text_encoder")) for name in source.header)
    base = request.open_base(source.config.get("base_model_name_or_path"), train_text_encoder=texts)
    opened = base.opened
    if not isinstance(opened, OpenPipeline):
        raise source.refuse(f"is of a model of pictures, and {base.name} is no pipeline of diffusers")
    tensors, steps = source.tensors, list[Step]()
    names = _finder(base, opened)
    if opened.family.denoiser != "unet" and any(
        not _END.fullmatch(name) or names(_END.sub(r"\1", name)) is None for name in tensors
    ):
        tensors = _translated(source, opened)
        steps.append(Step("translated", "the modules' names", f"by {opened.family.name}.lora_state_dict of diffusers"))
    found = _modules(source, tensors)
    unknown = [path for path in found if names(path) is None]
    if unknown:
        listed = ", ".join(first_of(list(map(short_name, unknown))))
        raise source.refuse(f"{len(unknown)} of its {len(found)} modules are not in {base.name}: {listed}")
    strength = _strength(source)
    pairs, alphas = dict[str, Pair](), 0
    for path, own in found.items():
        name = names(path)
        assert name is not None
        pairs[name] = _pair(source, path, own, base.module(name), strength(path))
        alphas += "alpha" in own
    parts = [part for part in base.model.trained if any(name.startswith(f"{part}.") for name in pairs)]
    config, stored = lora(base, pairs)
    said = f"of {alphas} modules" if alphas else "of lora_adapter_metadata" if strength("") != 1 else "none: equal to r"
    return Converted(
        base,
        config,
        stored,
        [
            *steps,
            carried(len(pairs), f"of {', '.join(parts)}"),
            Step("translated", f"alpha, {said}", f"lora_alpha {config.lora_alpha:g}, alpha_pattern where it differs"),
        ],
    )


def _modules(source: Source, tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors by module and by what they are.

    Raises:
        AdapterError: there are others than A, B, alpha and DoRA's length.
    """
    found, others = dict[str, dict[str, torch.Tensor]](), list[str]()
    for name, value in tensors.items():
        if parts := _END.fullmatch(name):
            found.setdefault(parts[1], {})[_ENDS[parts[2]]] = value
        else:
            others.append(short_name(name))
    if others:
        what = "LoHa, LoKr and DoRA of kohya's files, and weights trained in full, are not read"
        raise source.refuse(f"holds tensors that are no pair of a LoRA: {', '.join(first_of(others))}", what)
    return found


def _pair(source: Source, path: str, own: Mapping[str, torch.Tensor], module: nn.Module, strength: float) -> Pair:
    if not {"a", "b"} <= own.keys():
        raise source.refuse("lacks one of A and B", key=short_name(path))
    a, b = own["a"], own["b"]
    if (places := getattr(module, "weight", a).ndim - a.ndim) and set(a.shape[2:]) | set(b.shape[2:]) <= {1}:
        a, b = (each.flatten(1)[(..., *[None] * max(places, 0))] for each in (a, b))  # a linear layer as a convolution
    alpha = own.get("alpha")
    if alpha is not None and alpha.numel() != 1:
        raise source.refuse("is no number", key=short_name(f"{path}.alpha"))
    return Pair(a, b, strength if alpha is None else float(alpha) / len(a), own.get("magnitude"))


def _strength(source: Source) -> Callable[[str], float]:
    """Return what says how strong the pair of a module is without ``alpha``: diffusers' notes, or 1.

    Raises:
        AdapterError: the notes are no settings of a LoRA.
    """
    if (text := source.notes.get("lora_adapter_metadata")) is None:
        return lambda path: 1.0
    of_part: dict[str, dict[str, Any]] = {}
    try:
        for key, value in parse_json_object(text).items():
            part, _, name = key.partition(".")
            of_part.setdefault(part, {})[name] = value
        given = {part: config_from_dict({**values, **_OURS}) for part, values in of_part.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise source.refuse(f"its notes are no settings of a LoRA: {error}", key="lora_adapter_metadata") from None

    def strength(path: str) -> float:
        config = given.get(path.partition(".")[0])
        return size_of(config, path.partition(".")[2])[1] if isinstance(config, LoraConfig) else 1.0

    return strength


def _finder(base: EmptyBase, opened: OpenPipeline) -> Callable[[str], str | None]:
    """Return what finds the base model's name of a module that the file names; None where there is no such module."""
    known = dict[str, str]()
    for name in base_modules(base.model):
        part, _, path = name.partition(".")
        prefixes = [each for each, of in _KOHYAS.items() if of == part] or ["lora_unet_"]
        for spelling in {path, path.removeprefix("text_model."), f"text_model.{path}"}:
            known |= {f"{part}.{spelling}": name}
            known |= {prefix + spelling.replace(".", "_"): name for prefix in prefixes}
    config = getattr(base.model.get_submodule(opened.family.denoiser), "config", {})
    layers = config.get("layers_per_block")
    return lambda path: known.get(path) or known.get(_of_first_authors(path, layers))


def _of_first_authors(path: str, layers: object) -> str:
    """Return diffusers' name of a block of Stable Diffusion's UNet with so many layers."""
    if not isinstance(layers, int):
        return path
    rest = path.removeprefix("lora_unet_")
    if found := _BLOCK.match(rest):
        side = "down" if found["side"] == "input" else "up"
        block, layer = divmod(int(found["at"]) - (side == "down"), layers + 1)
        inner = rest[found.end() :]
        if side == "down" and layer == layers:
            rest = f"down_blocks_{block}_downsamplers_0_conv"
        elif inner == "conv":
            rest = f"up_blocks_{block}_upsamplers_0_conv"
        else:
            rest = f"{side}_blocks_{block}_{'attentions' if int(found['part']) else 'resnets'}_{layer}_{inner}"
    elif found := re.match(r"middle_block_([012])_", rest):
        kind = "attentions_0" if found[1] == "1" else f"resnets_{int(found[1]) // 2}"
        rest = f"mid_block_{kind}_{rest[found.end() :]}"
    for old, new in _INSIDE.items():
        rest = rest.replace(old, new)
    return f"lora_unet_{rest}"


def _translated(source: Source, opened: OpenPipeline) -> Mapping[str, torch.Tensor]:
    """Let diffusers translate the names of the file's modules.

    Raises:
        AdapterError: it does not know them.
    """
    import diffusers

    kind: Any = getattr(diffusers, opened.family.name)
    try:
        with quiet_diffusers():
            made = kind.lora_state_dict(dict(source.tensors), return_alphas=True, return_lora_metadata=True)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        message = f"diffusers cannot read its names: {' '.join(str(error).split())}"
        raise source.refuse(one_line(message), "name the model that it was made for with --base") from None
    found, *others = made if isinstance(made, tuple) else (made,)
    alphas = {name: value for each in others if each for name, value in each.items() if isinstance(value, torch.Tensor)}
    return {**found, **alphas}
