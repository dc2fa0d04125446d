"""Adapters of other programs become adapter folders: one format a module here, and one row in ``FORMATS``.

source     what is at a path: files, tensors, settings
pairs      A and B of modules become a LoRA, under this base model's names
convert    ``peftcli convert``: recognise, read, write, and load the result into the empty base model

The module of a format has two functions: ``recognises(source)``, which looks at names alone, and ``read(request)``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One row of the table."""

    program: str
    """Who writes such files."""
    module: str
    """Module of this package that reads them."""
    is_recognised: bool = True
    """Whether a file shows it; else ``--from`` must name the format."""


FORMATS = {
    "peft": Format("PEFT", "peft"),
    "peft-0.18": Format("PEFT 0.17 or 0.18", "peft", is_recognised=False),
    "peft-0.19.0": Format("PEFT 0.19.0", "peft", is_recognised=False),
    "peft-0.19.1": Format("PEFT since 0.19.1", "peft", is_recognised=False),
    "unsloth": Format("Unsloth before September 2026", "peft", is_recognised=False),
    "mlx": Format("mlx-lm", "mlx"),
    "gguf": Format("llama.cpp", "gguf"),
    "adapters": Format("the library adapters", "adapterhub"),
    "loralib": Format("loralib", "loralib"),
    "diffusers": Format("diffusers, or kohya's scripts", "diffusers"),
}
"""What ``--from`` names, in the order in which a file is tried."""
