"""``peftcli info``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from peftcli.cli import console
from peftcli.cli.options import Json
from peftcli.errors import UsageError
from peftcli.methods import METHODS
from peftcli.system.packages import Misfit, extras, installed_version, misfits

_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
_MAX_ROWS = 8
"""Modules, or kinds of them, that are shown without --updates."""
USES = {
    "metrics": "sequence_classification, token_classification, image_classification, audio_classification; "
    "bleu, chrf, rouge_l; grpo with json_schema",
    "vision": "image_classification, semantic_segmentation, object_detection, image_text_to_text",
    "audio": "speech_recognition, audio_classification",
    "diffusion": "text_to_image",
    "gguf": "base models in .gguf files; export to llama.cpp and ollama",
    "excel": "rows in .xlsx files",
    "optuna": "sweeps over ranges, or over more than 30 settings",
    "bitsandbytes": "base_model.quantization: nf4, fp4, int8",
    "torchao": "base_model.quantization: int8_weight_only, int4_weight_only",
    "lm-eval": "evaluate --lm-eval",
    "liger": "training.use_liger_kernel",
    "deepspeed": "launch.strategy: zero2, zero3",
    **{name: f"training.report_to: {name}" for name in ("tensorboard", "wandb", "mlflow", "trackio")},
}
"""Extra -> the tasks and settings that need it."""
_OTHERS = ("peft", "diffusers")
"""Packages that peftcli runs without: shown where they are installed."""
_PACKAGES = ("peftcli", "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface-hub")


def info(
    what: Annotated[
        str,
        typer.Argument(metavar="[ADAPTER|methods|tasks|env]", help="An adapter (folder or hub id), or what to list."),
    ] = "env",
    updates: Annotated[
        bool | None,
        typer.Option(
            "--updates/--no-updates",
            help="Show how much an adapter changes each weight, or not at all; by default each kind of module.",
        ),
    ] = None,
    readers: Annotated[
        bool, typer.Option("--readers", help="Show what other programs do with the adapter, and what mends it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show an adapter, the methods, the tasks, or what is installed."""
    tables = {"methods": _methods, "tasks": _tasks}
    if readers and what in ("env", *tables):
        raise UsageError("needs an adapter: peftcli info ADAPTER --readers", key="--readers")
    if what == "env":
        _env(as_json)
    elif what in tables:
        rows = tables[what]()
        if as_json:
            console.print_json({what: rows})
        else:
            console.table(list(rows[0]), [list(row.values()) for row in rows])
    else:
        _adapter(what, updates, readers, as_json)


def _adapter(adapter: str, updates: bool | None, readers: bool, as_json: bool) -> None:
    """Print an adapter's facts; those that need no torch come before its import, which takes seconds."""
    from peftcli.adapters.info import describe, describe_readers

    if readers:
        return _print_readers(adapter, describe_readers(adapter), as_json)
    facts = describe(adapter)
    if not as_json:
        _print_facts(_in_short(facts))
    if updates is False:
        return console.print_json(facts) if as_json else None
    from peftcli.adapters.diff import analyse

    found = analyse(adapter)
    if as_json:
        return console.print_json({**facts, "updates": found})
    if "reason" in found:
        return console.out(f"updates: cannot be computed: {found['reason']}")
    console.out(f"norm of all updates: {found['norm']:.4g}")
    dead = found["dead"] if updates else found["dead"][:_MAX_ROWS]
    more = f", and {len(found['dead']) - len(dead)} more" if len(found["dead"]) > len(dead) else ""
    console.paragraph(f"dead modules: {', '.join(dead) or 'none'}{more}\n")
    if updates or len(found["modules"]) <= _MAX_ROWS:
        return console.table(["module", "r", "norm", "effective r"], list(map(_updates_of, found["modules"])))
    return _print_kinds(found["modules"])


def _print_readers(adapter: str, rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print a program a paragraph."""
    if as_json:
        return console.print_json({"adapter": adapter, "readers": rows})
    for row in rows:
        verdict = {"yes": "reads it", "wrongly": "reads it wrongly", "no": "does not read it"}[row["reads"]]
        why = f": {'; '.join(row['why'])}" if row["why"] else ""
        console.paragraph(f"{row['program']} {verdict}{why}")
        if row["needs"]:
            console.paragraph(f"  needs {row['needs']}")
        if row["reads"] != "yes":
            console.out(f"  mend: {row['mend'] or 'nothing does: peftcli generate and PEFT load it'}")
    return None


def _in_short(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts for a reader: PEFT's names beside the method, and of the file one line."""
    out = {name: value for name, value in facts.items() if name not in ("peft_type", "task_type", "dtypes", "bytes")}
    names = ", ".join(filter(None, (facts["peft_type"], facts["task_type"])))
    stored = f"{facts['tensors']} in {', '.join(facts['dtypes'])}, {console.format_size(facts['bytes'])}"
    return out | {"method": f"{facts['method']} ({names})", "tensors": stored}


def _print_kinds(modules: Sequence[dict[str, Any]]) -> None:
    """Print a row for the modules whose names differ in numbers alone, those of the largest updates first."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for each in modules:
        kinds.setdefault(_NUMBER.sub("*", each["module"]), []).append(each)
    together: list[dict[str, Any]] = [
        {
            "module": name,
            "r": ", ".join(map(str, sorted({each["r"] for each in found}))),
            "norm": math.hypot(*(each["norm"] for each in found)),
            "effective_r": sum(each["effective_r"] for each in found) / len(found),
        }
        for name, found in kinds.items()
    ]
    together.sort(key=lambda row: row["norm"], reverse=True)
    rows = [[*_updates_of(row), len(kinds[row["module"]])] for row in together[:_MAX_ROWS]]
    console.table(["modules", "r", "norm", "effective r", "count"], rows)
    left = f"{len(together) - _MAX_ROWS} more kinds; " if len(together) > _MAX_ROWS else ""
    console.out(f"{left}--updates shows each module")


def _updates_of(row: dict[str, Any]) -> list[Any]:
    return [row["module"], row["r"], f"{row['norm']:.4g}", f"{row['effective_r']:.1f}"]


def _methods() -> list[dict[str, Any]]:
    return [
        {"method": name, "peft_type": row.peft_type, "summary": row.summary, "paper": row.paper}
        for name, row in METHODS.items()
    ]


def _tasks() -> list[dict[str, Any]]:
    from peftcli.tasks import TASKS

    return [
        {"task": name, "task_type": row.task_type, "auto_class": row.auto_class, "summary": row.summary}
        for name, row in TASKS.items()
    ]


def _env(as_json: bool) -> None:
    """Print versions and devices; the versions come before the import of torch, which takes seconds and may fail."""
    import platform

    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {name: installed_version(name) or "not installed" for name in _PACKAGES}
    lacking, wrong = extras(), misfits((*_PACKAGES, *_OTHERS))
    if as_json:
        more = {"extras": lacking, "misfits": list(map(asdict, wrong)), "devices": _devices()}
        return console.print_json({**facts, **more})
    _print_facts(facts | {name: installed_version(name) for name in _OTHERS})
    _print_facts({"devices": _devices()})
    for each in wrong:
        console.paragraph(f"warning: {each.by} demands {each.package}{each.wanted}, not {each.installed}{_what(each)}")
    if not wrong:
        console.paragraph("ok: these versions fit together")
    console.out()
    rows = [(name, "missing" if lacks else "there", USES.get(name, "")) for name, lacks in lacking.items()]
    console.table(["extra", "is", "for"], sorted(rows, key=lambda row: row[1] == "missing"))
    if any(lacking.values()):
        console.out("to install a missing one: pip install 'peftcli[NAME]'")
    return None


def _what(misfit: Misfit) -> str:
    """Return what follows from a misfit, where it is known."""
    if misfit.package != "peft" or misfit.by.startswith("peftcli"):
        return ""
    return ": its add_adapter raises; peftcli needs no peft and works\nmore: peftcli explain peft_too_old"


def _devices() -> list[str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [f"torch cannot be imported: {error}"]
    if torch.cuda.is_available():
        return [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else [f"cpu, {torch.get_num_threads()} threads"]


def _print_facts(facts: dict[str, Any]) -> None:
    for name, value in facts.items():
        # soft prompts adapt no module, and OFT's r is 0 where its blocks have a size
        if value not in (None, []) and (name, value) not in (("r", 0), ("modules_adapted", 0)):
            console.out(f"{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
