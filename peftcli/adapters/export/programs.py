"""What other programs do with an adapter folder, by their code: a table of facts, and what it says of one adapter.

No torch here: ``peftcli info ADAPTER --readers`` answers from the config and the header of the weights.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peftcli.core.config import AdapterConfig
from peftcli.methods.lora import LoraConfig

FORMS = {
    "lora": "a LoRA with one r and lora_alpha = r, in a folder of adapter_config.json and adapter_model.safetensors",
    "merged": "the merged model, as `peftcli merge` writes it",
    "gguf": "a LoRA in a .gguf file, to be used with the base model in another",
    "merged-gguf": "the merged model in a .gguf file",
    "modelfile": "the merged model in a .gguf file, and a Modelfile with template, stop words and limits",
    "mlx": "a LoRA in adapters.safetensors and adapter_config.json, as mlx-lm has them",
}
"""Form of an export -> what it is."""
Form = Literal["lora", "merged", "gguf", "merged-gguf", "modelfile", "mlx"]


@dataclass(frozen=True)
class Program:
    """What one program does with PEFT's adapter folder."""

    version: str
    """The one whose code was read, or which was run."""
    form: Form
    """What it reads rightly, and ``export --for`` writes."""
    sources: tuple[str, ...]
    """Where the facts are from."""
    package: str | None = None
    """What pip installs for `peftcli verify --with`; None: it is not run by peftcli."""
    module: str | None = None
    """The package's name in Python."""
    misreads: Mapping[str, str] = field(default_factory=dict)
    """Trait of an adapter (see ``traits``) -> what it does then, without an error."""
    refuses: Collection[str] = ()
    """Traits at which it stops with an error."""
    takes_folder: bool = True
    """Whether it loads PEFT's folder at all."""
    needs: str = ""
    """What else must be given on its command line, or it serves another model without an error."""


_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "velora_config", "arrow_config")
_PLACES = ("target_parameters", "layer_replication", "trainable_token_indices")
_NOT_PLAIN = ("method", "use_dora", "modules_to_save", "lora_bias", "bias", "base weights", *_PLACES, *_VARIANTS)
_ALORA = "alora_invocation_tokens"
_SETTINGS = ("use_dora", "modules_to_save", "lora_bias", *_PLACES, "kasa_config", "alpha_pattern", "rank_pattern")
_EVERYWHERE = "applies the update to all tokens, not only from the invocation on"

PROGRAMS: dict[str, Program] = {
    "vllm": Program(
        version="0.11 to main of 2026",
        form="lora",
        sources=(
            "vllm/lora/peft_helper.py, read",
            "https://github.com/vllm-project/vllm/issues/55193",
        ),
        misreads={
            "alpha_pattern": "scales every module by lora_alpha / r: those of the pattern have another strength",
            "rank_pattern": "scales every module by lora_alpha / r: those of the pattern have another strength",
            _ALORA: _EVERYWHERE,
        },
        refuses=_NOT_PLAIN,
        needs="--enable-lora --max-lora-rank R, and the adapter's name as `model` in each request: with the base "
        "model's name it answers without the adapter",
    ),
    "sglang": Program(
        version="main, 2026",
        form="lora",
        sources=("python/sglang/srt/lora/lora_config.py of commit 0ceb81fe and lora.py of 002c60aa, read",),
        misreads={
            _ALORA: _EVERYWHERE,
            "use_rslora": "scales by lora_alpha / r, which is weaker",
        },
        refuses=(*_NOT_PLAIN, "alpha_pattern", "rank_pattern"),
        needs="--enable-lora --lora-paths NAME=DIR, and lora_path in each request",
    ),
    "llama.cpp": Program(
        version="11549 (xllamacpp 2026.10)",
        form="merged-gguf",
        sources=("convert_lora_to_gguf.py, read", "the wheel, run"),
        package="xllamacpp",
        module="xllamacpp",
        misreads={
            "use_rslora": "its converter notes lora_alpha alone: the update is sqrt(r) times weaker",
            "alpha_pattern": "its converter notes lora_alpha alone: those of the pattern have another strength",
        },
        refuses=[name for name in _NOT_PLAIN if name != "base weights"],  # which it passes over, rightly
        needs="the .gguf file that its converter, or peftcli export --form gguf, makes of the folder",
    ),
    "ollama": Program(
        version="main, 2026",
        form="modelfile",
        sources=("convert/convert.go, read",),
        misreads={
            "use_rslora": "notes lora_alpha alone: the update is sqrt(r) times weaker",
            "alpha_pattern": "notes lora_alpha alone: those of the pattern have another strength",
            "chat template": "takes the template and the stop words of the base's tag, not those of training",
            _ALORA: _EVERYWHERE,
        },
        refuses=(*_NOT_PLAIN, "fractional lora_alpha"),
        needs="a base model of the architectures llama or gemma2 for ADAPTER in a Modelfile",
    ),
    "mlx": Program(
        version="mlx-lm 0.32.2",
        form="mlx",
        sources=(
            "mlx_lm/tuner/utils.py, read; the wheel, run",
            "https://github.com/ml-explore/mlx-lm/issues/1119",
            "https://github.com/ml-explore/mlx-lm/issues/1120",
        ),
        package="mlx-lm mlx-cpu",
        module="mlx_lm",
        takes_folder=False,
    ),
    "mistralrs": Program(
        version="0.9.5",
        form="lora",
        sources=("mistralrs-quant/src/lora/mod.rs, read", "the wheel, run"),
        package="mistralrs",
        module="mistralrs",
        refuses=(*_NOT_PLAIN, _ALORA),
    ),
    "transformers": Program(
        version="5.24",
        form="merged",
        sources=("src/transformers/integrations/peft.py, read",),
        refuses=("peft 0.22",),
        needs="the package peft in version 0.22 or newer for an adapter folder",
    ),
}
"""Programs that serve language models. Of each the newest version that was looked at."""

MENDED_BY_LORA = frozenset(
    {"alpha_pattern", "rank_pattern", "use_rslora", "fractional lora_alpha", "use_dora", "method"}
)
"""Traits that the form ``lora``, and what is made of it, has no more; of the last two only where an update is of low
rank. All others need the merged model."""


def traits(config: AdapterConfig, tensors: Collection[str]) -> list[str]:
    """Return what sets an adapter apart from a LoRA with one r and lora_alpha, as PROGRAMS calls it.

    ``tensors`` are the names in its file.
    """
    if not isinstance(config, LoraConfig):
        return ["method", *(["modules_to_save"] if config.modules_to_save else [])]
    found = [name for name in (*_SETTINGS, "use_rslora", *_VARIANTS, _ALORA) if getattr(config, name)]
    found += ["bias"] if config.bias != "none" else []
    found += ["fractional lora_alpha"] if config.lora_alpha != int(config.lora_alpha) else []
    found += ["base weights"] if any(".base_layer." in name for name in tensors) else []
    return list(dict.fromkeys(found))


def readings(adapter: str, config: AdapterConfig, tensors: Collection[str], *, chat: bool) -> list[dict[str, Any]]:
    """Return what each program does with an adapter folder, and the command that mends it.

    ``chat`` says whether the adapter was trained on a chat template.

    Returns:
        Of each program: ``program``, ``version``, ``reads`` (``yes``, ``wrongly`` or ``no``), ``why`` (a sentence for
        each reason), ``needs``, ``mend`` (a command, or None) and ``sources``.
    """
    own = traits(config, tensors)
    rows = []
    for name, program in PROGRAMS.items():
        seen = [*own, *(["chat template"] if chat else [])]
        refused = [f"refuses {_called(trait, config)}" for trait in seen if trait in program.refuses]
        if not program.takes_folder:
            refused = ["reads no adapter folder of PEFT"]
        if "peft 0.22" in program.refuses:
            refused = ["its load_adapter wants peft 0.22, which does not exist yet"]
        wrong = [f"{_called(trait, config)}: {program.misreads[trait]}" for trait in seen if trait in program.misreads]
        reads = "no" if refused else "wrongly" if wrong else "yes"
        rows.append(
            {
                "program": name,
                "version": program.version,
                "reads": reads,
                "why": refused or wrong,
                "needs": program.needs,
                "mend": None if reads == "yes" else _mend(adapter, name, config, own),
                "sources": list(program.sources),
            }
        )
    return rows


def _called(trait: str, config: AdapterConfig) -> str:
    return config.peft_type if trait == "method" else trait


def _mend(adapter: str, name: str, config: AdapterConfig, own: Collection[str]) -> str | None:
    """Return the command that writes what a program reads; None where nothing does."""
    if config.merge_problem():
        return None
    form = PROGRAMS[name].form
    merged = not set(own) <= MENDED_BY_LORA and form in ("lora", "mlx")
    return f"peftcli export {shlex.quote(adapter)} --for {name} --output DIR" + " --form merged" * merged
