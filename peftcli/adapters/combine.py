"""Combine adapter folders into one, from their files alone; those of pipelines with their base model too."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from peftcli.adapters.card import write_card
from peftcli.adapters.load import SHARED_FILES, AdapterSource, find_adapter
from peftcli.core.files import read_tensors, write_adapter
from peftcli.errors import AdapterError, HubError, ModelError, NetworkError, UsageError
from peftcli.guard.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from peftcli.methods.combinations import Adapter, Combination
from peftcli.methods.lora.combine import combine
from peftcli.models.open import open_base
from peftcli.system.disk import write_file
from peftcli.system.outputs import expand_user, new_folder, require_empty
from peftcli.system.secrets import redact
from peftcli.tasks import DIFFUSERS_FILE, TASK_FILE, TASKS

_MAY_DIFFER = ("_config.json", ".jinja", "special_tokens_map.json")
"""Ends of files that say how texts and pictures are prepared, and who wrote them. The first adapter's are taken."""


def combine_adapters(
    adapters: Sequence[str],
    weights: Sequence[float],
    output: Path,
    *,
    method: str = "cat",
    density: float | None = None,
    r: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Write one adapter of several, each times its weight, to ``output``.

    Args:
        adapters: folders or hub ids.
        weights: one for each.
        output: new or empty folder; it appears whole or not at all.
        method: one of ``peftcli.methods.combinations.COMBINATIONS``.
        density: the share of values that ``ties``, ``dare`` and ``magnitude_prune`` keep.
        r: that of the result, for ``svd``.
        seed: of what ``dare`` draws.

    Returns:
        What was written: output, adapters, method, r, modules, parameters, bytes, and ``error``: how far the update is
        from the weighted sum, as a share of it, in all and in the ``worst_module``.

    Raises:
        AdapterError: an adapter cannot be read, or they cannot be combined.
        ModelError, HubError, NetworkError: the base model cannot be read, which adapters of pipelines need.
        UsageError: settings that do not go together, or the output folder holds something.
        StorageError: it cannot be written.
    """
    output = expand_user(output)
    require_empty(output)
    how = Combination(method, r, density, generator=torch.Generator().manual_seed(seed))
    try:
        how.check()
    except AdapterError as error:
        raise UsageError(error.message, key=f"--{error.key}") from None
    sources = [find_adapter(adapter) for adapter in adapters]
    for adapter, source in zip(adapters, sources, strict=True):
        if source.record.get("makes_up_for_quantization"):
            raise AdapterError(
                "corrects the error of the quantised weights of its base model, and times a weight it would not",
                file=adapter,
                hint=f"merge it alone: {shlex.join(['peftcli', 'merge', adapter])} --output OUTPUT --dequantize",
            )
    files = _companions(adapters, sources)
    read = (Adapter(name, each.config, read_tensors(each.folder)) for name, each in zip(adapters, sources, strict=True))
    made = combine(list(read), weights, how)
    # what it was copied from may hold a password
    made.config.base_model_name_or_path = redact(made.config.base_model_name_or_path or "") or None
    with new_folder(output) as partial:
        write_adapter(made.tensors, made.config, partial)
        for name, content in files.items():
            write_file(partial / name, content)
        if (task := sources[0].task) and TASKS[task].form:  # other libraries' files hold the weights too
            try:
                base = open_base(sources[0].base)
            except (ModelError, HubError, NetworkError) as error:
                error.message += f"; combining adapters of {task} needs their base model"
                raise
            opened = sources[0].open_task(base)
            assert opened is not None
            opened.save(partial)
        write_card(partial)
    given = [{"adapter": adapter, "weight": weight} for adapter, weight in zip(adapters, weights, strict=True)]
    worst = max(made.errors, key=made.errors.__getitem__)
    return {
        "output": str(output),
        "adapters": given,
        "method": method,
        "r": made.config.r,
        "modules": len(made.errors),
        "parameters": sum(value.numel() for value in made.tensors.values()),
        "bytes": (output / "adapter_model.safetensors").stat().st_size,
        "error": made.error,
        "worst_module": {"module": worst, "error": made.errors[worst]},
    }


def _companions(adapters: Sequence[str], sources: Sequence[AdapterSource]) -> dict[str, bytes]:
    """The files that say how the adapters' model reads and answers: name -> content, the first adapter's."""
    found: dict[str, bytes] = {}
    for name in SHARED_FILES:
        there = [(at, path.read_bytes()) for at, each in enumerate(sources) if (path := each.folder / name).is_file()]
        if name.endswith((CONFIG_FILE, WEIGHTS_FILE, DIFFUSERS_FILE, "README.md", "loss.png")) or not there:
            continue
        first, found[name] = there[0]
        for at, content in there:
            if content == found[name] or name.endswith(_MAY_DIFFER):
                continue
            if name != TASK_FILE or _meaning(sources[first]) != _meaning(sources[at]):
                message = f"{adapters[first]} and {adapters[at]} have different files {name}"
                hint = (
                    "only adapters that read and answer alike can be combined: one task, the same classes in one order"
                )
                raise AdapterError(message, hint=hint)
    return found


def _meaning(source: AdapterSource) -> Any:
    """The task, and those of its settings that decide what an input or an output means."""
    settings = source.recorded_settings
    if settings is None:
        return source.task
    given = {each.name: getattr(settings, each.name) for each in fields(settings) if "may_differ" not in each.metadata}
    return source.task, given, source.recorded_options
