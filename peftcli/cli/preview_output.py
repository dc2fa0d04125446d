"""The output of ``peftcli train --dry-run``: a screenful of what would train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftcli.cli import console
from peftcli.data.rows import count_of
from peftcli.guard.files import command_word
from peftcli.schema import Recipe

_MEMORY = ("weights", "adapter", "step", "evaluation", "saving", "file", "packages")
_LEAST = 0.005
"""GiB of a part of the memory from which on it is named."""
MEMORY_UNKNOWN = "memory: not known for this model"


def print_preview(recipe: Recipe, would: dict[str, Any], words: Sequence[str]) -> None:
    """Print what would train, and the command line that does it, which has these words."""
    data, parameters, training = would["data"], would["parameters"], recipe.training
    share = 100 * parameters["trainable"] / parameters["all"]
    rows = training.per_device_train_batch_size
    batch = f" of {count_of(rows, 'row')}" if isinstance(rows, int) else ""
    batch += f" x {training.gradient_accumulation_steps}" if training.gradient_accumulation_steps > 1 else ""
    task = f"{(recipe.task or {}).get('type', 'found from the data')}, {count_of(would['steps'], 'step')}{batch}"
    lines = [
        ("task", task),
        ("base model", recipe.base_model.name),
        (
            "method",
            f"{recipe.method['type']}, {parameters['trainable']:,} of {parameters['all']:,} parameters ({share:.3g} %)",
        ),
        ("in full", ", ".join(would["training_in_full"])),
        ("data", _counts(data, data["unit"])),
        ("left out", _left_out(data)),
        ("evaluation", _counts(data["eval"], data["unit"]) if data.get("eval") else "none"),
        ("memory", memory_in_words(would["memory"]) if would["memory"] else ""),
        ("disk", f"{console.format_size(would['disk']['peak'])} in {training.output_dir}"),
    ]
    console.out("would train:")
    for name, text in lines:
        if text:
            console.paragraph(text, f"  {name:<11} ")
    for text in would["warnings"]:
        console.paragraph(f"warning: {text}")
    console.out("next:\n  peftcli train " + " ".join(map(command_word, words)))


def memory_in_words(memory: dict[str, Any]) -> str:
    """Return the memory that a run needs and its parts, the largest first."""
    parts = sorted(((memory[kind] / 2**30, kind) for kind in _MEMORY), reverse=True)
    named = ", ".join(f"{kind} {size:.2f}" for size, kind in parts if size >= _LEAST)
    each = f" in each of {memory['processes']} processes" if memory["processes"] > 1 else ""
    return f"about {memory['peak'] / 2**30:.2f} GiB at the peak{each}, of {named}"


def _counts(data: dict[str, Any], unit: str) -> str:
    """Return how many rows and targets there are, and in which files."""
    rows = f"{data['used']:,} of {count_of(data['rows'], 'row')}"
    more = f", {count_of(data['examples'], 'example')}" if data["examples"] != data["used"] else ""
    files = console.folder_once(data["files"], most=3)
    return f"{rows}{more} in {files}; {data['tokens']:,} {unit}, {data['targets']:,} targets"


def _left_out(data: dict[str, Any]) -> str:
    reasons = dict(data["dropped"]) | ({"bad rows": data["skipped"]} if data["skipped"] else {})
    parts = [f"{count:,} {reason}" for reason, count in reasons.items()]
    if data["truncated"]:
        parts.append(f"{data['truncated']:,} truncated, {data['targets_cut']:,} targets lost")
    return ", ".join(parts)
