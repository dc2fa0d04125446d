"""Measure an adapter, or the base model alone, on a recipe's evaluation data."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from peftcli.adapters.load import AdapterSource, apply_adapter, find_adapter, other_base
from peftcli.adapters.number_format import trained_bf16
from peftcli.core.inject import unload
from peftcli.data.findings import refuse
from peftcli.errors import GateFailed
from peftcli.models.open import open_base
from peftcli.models.parts import widen_heads
from peftcli.recipe import LEARNT, needs_base, to_dict
from peftcli.schema import Launch, Recipe
from peftcli.system import date
from peftcli.tasks import open_task, row_of, task_record
from peftcli.tasks.base import Begins, Task, with_trained_head
from peftcli.tasks.parts import RowScore
from peftcli.tasks.shown_rows import Examples
from peftcli.tasks.text.fast.norms import fuse_norms
from peftcli.tasks.text.fast.unpadded import unpad
from peftcli.train.batches import num_workers
from peftcli.train.compare import Comparison, Scorer, compare, differences, examples_of, intervals
from peftcli.train.data import Data, load_data, refuse_few_eval_rows, with_task
from peftcli.train.devices.accelerator import start_accelerator
from peftcli.train.evaluate import evaluate, find_doubts, is_lower_better, main_metric, refuse_gates
from peftcli.train.events import Message, OnEvent, warning
from peftcli.train.forgetting import forgotten, is_forced, measured_forgetting
from peftcli.train.gates import check_gates
from peftcli.train.init_adapter import find_init_adapter, refuse_other_start
from peftcli.train.kept_rows import hashes_of
from peftcli.train.memory.fit import peak_memory_bytes
from peftcli.train.runs.record import SCHEMA_VERSION
from peftcli.train.runs.resume import versions
from peftcli.train.runs.typed_json import ABSENT, to_json
from peftcli.train.setup import load_base


def measure(recipe: Recipe, adapter: str | None, tell: OnEvent = lambda event: None) -> dict[str, Any]:
    """The metrics, in the shape of a finished run's run.json, with a comparison of the adapter with the base model.

    ``adapter`` is a folder or hub id; None measures the base model alone. ``tell`` receives what is odd with the
    evaluation data, and which task was found.

    Raises:
        DataError: the recipe has no evaluation data, or it cannot be used.
        UsageError: a gate is of a metric that the task does not have.
        AdapterError: the adapter does not fit the recipe's base model.
    """
    return _measure(recipe, adapter, tell, {})[0]


def measure_several(recipe: Recipe, adapters: Sequence[str], tell: OnEvent = lambda event: None) -> dict[str, Any]:
    """Measure several adapters on the same rows, each against the base model and against the best of them.

    Returns what ``measure`` returns of the best one by the task's main metric, with ``adapters``, a table of all, and
    the ``spread`` of runs that differ by their seed only.

    Raises:
        PeftcliError: as ``measure``.
    """
    recipe = replace(recipe, training=replace(recipe.training, compare_with_base=True))
    base = dict[str, list[RowScore]]()
    measured = [_measure(recipe, adapter, tell, base) for adapter in adapters]
    task, main = measured[0][2], measured[0][0]["eval"]["main"]
    values = [result["eval"]["last"].get(main, math.nan) for result, *_ in measured]
    best = (np.nanargmin if is_lower_better(task, main) else np.nanargmax)(values)
    table = list[dict[str, Any]]()
    for at, (result, comparison, _) in enumerate(measured):
        row = {"adapter": adapters[at], "eval": result["eval"], "comparison": result["comparison"]}
        first, one = measured[best][1], comparison
        if at != best and first and first.adapter and one and one.adapter and one.units is not None:
            found = differences(task, intervals(task, first.adapter, one.adapter, one.units))
            row["against_best"] = to_json(found)
        table.append(row)
    gates = [gate for result, *_ in measured for gate in result["gates"]]
    code = max(result["exit_code"] for result, *_ in measured)
    more = {"spread": _spread([result["eval"]["last"] for result, *_ in measured])} if _are_seeds(adapters) else {}
    return {**measured[best][0], "gates": gates, "exit_code": code, "adapters": table, **more}


def _are_seeds(adapters: Sequence[str]) -> bool:
    """Whether the recipes of runs differ by their seed only, and where they wrote."""
    recipes = [json.loads(json.dumps(find_adapter(adapter).record.get("recipe"), default=str)) for adapter in adapters]
    if not all(recipes):
        return False
    seeds = {each["training"].pop("seed", None) for each in recipes}
    for each in recipes:
        each["training"].pop("output_dir", None)
    return len(seeds) == len(recipes) and all(each == recipes[0] for each in recipes)


def _spread(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """The mean of each metric over runs, and its standard deviation."""
    names = [name for name in metrics[0] if all(name in each for each in metrics)]
    values = {name: [each[name] for each in metrics] for name in names}
    return {
        name: {"mean": float(np.mean(each)), "deviation": float(np.std(each, ddof=1))} for name, each in values.items()
    }


def _measure(
    recipe: Recipe, adapter: str | None, tell: OnEvent, base: dict[str, list[RowScore]]
) -> tuple[dict[str, Any], Comparison | None, Task[Any]]:
    """Measure, and return the comparison with its rows too. ``base`` keeps the scores of the base model."""
    started = time.perf_counter()
    recipe = with_task(recipe, tell)
    source = None if adapter is None else find_adapter(adapter)
    if source is not None and recipe.training.bf16 == "auto" and (bf16 := trained_bf16(source)) is not None:
        recipe = replace(recipe, training=replace(recipe.training, bf16=bf16))
    # as many processes measure as were started, whatever the recipe's launch section says
    accelerator = start_accelerator(replace(recipe, launch=Launch()))
    data = _evaluation_data(recipe, source, tell)
    assert data.eval is not None
    model, task = _adapted_model(recipe, source, data.task, accelerator.device, tell), data.task
    batch_size, workers = recipe.training.per_device_eval_batch_size, num_workers(recipe.training, task)
    metrics = evaluate(model, task, data.eval, batch_size, accelerator, num_workers=workers)
    assert metrics is not None  # nothing asks for less
    doubts = find_doubts(task, data.eval, before={}, after=metrics) if recipe.gates.get(LEARNT) else []
    comparison = None
    if source is not None and (recipe.training.compare_with_base or needs_base(recipe)):
        scorer = Scorer(task, data.eval, batch_size, accelerator, workers)
        comparison = _compare(accelerator.unwrap_model(model), scorer, recipe, examples_of(recipe, data), base, tell)
    forgetting = _forgetting(recipe, source, model, task, accelerator)
    # the base model alone has forgotten nothing
    lost = forgotten(forgetting, comparison) if source is not None else 0.0
    gates = check_gates(recipe.gates, metrics, doubts, task, comparison, lost)
    result = {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "exit_code": 0 if all(gate.passed for gate in gates) else GateFailed.exit_code,
        "recipe": to_dict(recipe),
        "adapter": adapter,
        "base_model": {"name": recipe.base_model.name, "revision": recipe.base_model.revision},
        "data": data.report,
        "eval": {"main": main_metric(task, metrics), "last": metrics},
        **({"forgetting": to_json(forgetting)} if forgetting else {}),
        "gates": to_json(gates),
        "versions": versions(),
        "device": str(accelerator.device),
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_seconds": round(time.perf_counter() - started, 3),
    }
    return result | ({"comparison": to_json(comparison.record)} if comparison else {}), comparison, task


def _compare(
    model: nn.Module,
    scorer: Scorer,
    recipe: Recipe,
    examples: Examples,
    base: dict[str, list[RowScore]],
    tell: OnEvent,
) -> Comparison:
    """Compare with the base model, which is measured once for all adapters that read the same rows alike."""
    task, more = scorer.task, dict[str, Any](examples=examples, head_is_new=scorer.task.head_is_new)
    if scorer.accelerator.num_processes > 1 or not scorer.rows_apart:
        return compare(model, scorer, **more)
    rows = hashlib.sha256(hashes_of(task, scorer.view).tobytes()).hexdigest()
    # the model's config says how many tokens there are, which adapters may add
    alike = (task_record(task, recipe), recipe.training.bf16, str(getattr(model, "config", "")), rows)
    key = json.dumps(alike, default=str, sort_keys=True)
    if key in base:
        tell(Message("the base model was measured on these rows already: its scores are used again"))
    found = compare(model, scorer, **more, base=base.get(key))
    if found.base is not None:
        base[key] = found.base.scores
    return found


def _forgetting(
    recipe: Recipe, source: AdapterSource | None, model: nn.Module, task: Task[Any], accelerator: Accelerator
) -> Any:
    """Measure what an adapter has forgotten, where the recipe asks for it."""
    if source is None or not row_of(recipe).writes_text or not is_forced(recipe):
        return ABSENT
    return measured_forgetting(model, task, accelerator)


def _evaluation_data(recipe: Recipe, source: AdapterSource | None, tell: OnEvent) -> Data:
    """Read and check the evaluation data, for the task as the adapter was trained on it."""
    base = open_base(recipe.base_model)
    if source is not None and (odd := other_base(source, recipe.base_model)):
        tell(warning(odd))
    trained = source is not None and source.recorded_settings and source.task == (recipe.task or {}).get("type")
    with date.fixed_date(None if source is None else source.day):  # as training rendered its rows
        opened = source.open_task(base) if source is not None and trained else None
        data = load_data(recipe, opened or open_task(recipe, base), only_eval=True, tell=tell)
    refuse(data.findings, recipe.dataset.allow)
    data.refuse_size()
    refuse_gates(recipe, data)
    refuse_few_eval_rows(data, recipe.training)
    for text in data.warnings:
        tell(warning(text))
    return data


def _adapted_model(
    recipe: Recipe, source: AdapterSource | None, task: Task[Any], device: Any, tell: OnEvent
) -> nn.Module:
    """Load the base model on the device, with the adapter in it."""
    set_seed(recipe.training.seed)  # a new head is the one that training starts from
    loaded = load_base(recipe, task)
    task.head_is_new = bool(with_trained_head(loaded, task).initialised)  # as training sees it
    if source is None and loaded.initialised:
        new = ", ".join(sorted({name.rpartition(".")[0] or name for name in loaded.initialised}))
        untrained = f"{recipe.base_model.name} has a new and untrained {new}"
        tell(warning(f"{untrained}: this measures what training starts from"))
    task.fit_model(loaded.model, None)
    if source is not None:
        if isinstance(task, Begins) and (start := find_init_adapter(recipe)) is not None:
            refuse_other_start(source, recipe)
            apply_adapter(loaded, start)
            task.begin(loaded.model.to(device), from_adapter=True)  # as training did
            unload(loaded.model)
        apply_adapter(loaded, source)
    widen_heads(loaded.model)
    fuse_norms(loaded.model)  # as in training, to the bit
    model: nn.Module = loaded.model.to(device)
    unpad(model, None if source is None else source.config, probe=task.padded_probe(model))
    return model
