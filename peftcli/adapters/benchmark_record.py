"""lm_eval.json: the results of lm-eval that an adapter's folder keeps, and what the hub shows of them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from peftcli.guard.adapter_folder import find_weights
from peftcli.guard.files import read_json_object
from peftcli.guard.typed_fields import mapping_at
from peftcli.system import date
from peftcli.system.disk import sha256, write_file

RECORD_FILE = "lm_eval.json"
SCHEMA_VERSION = 1
_MAX_RECORD_BYTES = 1 << 24
_TASK, _HUB_ID = re.compile(r"\w[\w.-]{0,99}", re.ASCII), re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def keep(folder: Path, result: dict[str, Any]) -> Path:
    """Write the tasks of a result into the folder's lm_eval.json, beside others that it keeps; return its path.

    Raises:
        AdapterError: the file that is there cannot be read.
        StorageError: it cannot be written.
    """
    path = folder / RECORD_FILE
    facts = {
        **{name: result[name] for name in ("base_model", "lm_eval_version", "limit", "chat")},
        "day": date.today().isoformat(),
        "weights": sha256(find_weights(folder)),
    }
    tasks = {**_kept(folder), **{name: {**task, **facts} for name, task in result["tasks"].items()}}
    record = {"schema_version": SCHEMA_VERSION, "tasks": tasks}
    write_file(path, (json.dumps(record, indent=2, allow_nan=False) + "\n").encode())
    return path


def hub_results(folder: Path) -> dict[str, bytes]:
    """Return the ``.eval_results`` files of benchmarks on the hub: name in the repository -> content.

    Only results on whole tasks, of the weights that are in the folder, on a dataset with a hub id, count.

    Raises:
        AdapterError: lm_eval.json cannot be read.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    found, weights = dict[str, bytes](), ""
    for name, task in sorted(_kept(folder).items()):
        dataset, metrics = task.get("dataset"), mapping_at(task, "metrics")
        is_on_hub = isinstance(dataset, str) and _HUB_ID.fullmatch(dataset) and not os.path.lexists(dataset)
        if not (is_on_hub and metrics and task.get("limit") is None and _TASK.fullmatch(name)):
            continue
        weights = weights or sha256(find_weights(folder))
        metric, value = next(iter(metrics)), mapping_at(metrics, next(iter(metrics))).get("adapter")
        if task.get("weights") != weights or not isinstance(value, (int, float)):
            continue
        about = f"{metric} of the task {name} of lm-eval {task.get('lm_eval_version')}, {task.get('fewshot')}-shot"
        entry = EvalResultEntry(
            dataset_id=str(dataset),
            task_id=str(task.get("dataset_name") or "default"),
            value=value,
            date=task.get("day"),
            notes=f"{about}, the adapter on its base model, measured with peftcli",
        )
        text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True)
        found[f".eval_results/{name}.yaml"] = text.encode()
    return found


def _kept(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the tasks of the folder's lm_eval.json; empty without one."""
    path = folder / RECORD_FILE
    record = read_json_object(path, _MAX_RECORD_BYTES) if os.path.lexists(path) else {}
    return {name: task for name, task in mapping_at(record, "tasks").items() if isinstance(task, dict)}
