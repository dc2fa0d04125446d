"""Checks of a recipe's settings: ranges, and combinations that do not work."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peftcli.errors import UsageError
from peftcli.guard.ranges import out_of_range
from peftcli.methods import METHODS
from peftcli.models.find import is_path
from peftcli.recipe.data_checks import check_data, exists, ways_to_evaluate
from peftcli.recipe.deepspeed_config import zero_problem
from peftcli.recipe.names import closest, closest_file
from peftcli.recipe.values import Report
from peftcli.schema import USED_BY, Launch, Recipe
from peftcli.system.outputs import expand_user
from peftcli.tasks import TASKS

LEARNT = "learnt"
"""The gate that is of no metric: whether the run has learnt anything."""
MAX_REGRESSION = "max_regression"
"""The gate that compares with an earlier run."""
FORGETTING = "forgetting"
"""The gate of what was forgotten: of texts that ship with peftcli, or of evaluation rows that the base had right."""
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
}
_GATE = re.compile(r"\s*(<=|>=|==|<|>)\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?)\s*")
_BOUND = re.compile(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(%?)\s*")
_TIME = re.compile(r"(?:(?P<d>[0-9]{1,4})d)?(?:(?P<h>[0-9]{1,6})h)?(?:(?P<m>[0-9]{1,8})m)?(?:(?P<s>[0-9]{1,9})s)?")
_MAX_FLOAT, _MAX_SIZE = 3.4e38, 2**31 - 1
_POLYNOMIAL_END = 1e-7
"""Learning rate at which transformers' schedule of that name ends."""
_SEED = re.compile(r"seed|_key$")
_MAX_BATCH = 10_000_000
_EVAL_KEYS = "dataset.eval, eval_split or eval_fraction"
_NOT_EMPTY = ("base_model.name", "training.output_dir", "training.metric_for_best_model")


def parse_gate(text: str) -> tuple[str, float]:
    """Return operator and bound of a gate such as ``<= 1.2``.

    Raises:
        UsageError: the text is not a gate.
    """
    match = _GATE.fullmatch(text) if len(text) <= 100 else None
    if match is None or not math.isfinite(float(match[2])):
        raise UsageError(f"expected an operator (<=, <, >=, > or ==) and a number, as in '<= 1.2', found {text[:60]!r}")
    return match[1], float(match[2])


def gate_holds(op: str, value: float, bound: float) -> bool:
    """Return whether a metric passes its gate. NaN never does."""
    return _OPERATORS[op](value, bound)


def why_failed(gate: Mapping[str, Any]) -> str:
    """Return why a gate of a run.json does not hold."""
    if "reason" in gate:
        return f"{gate['metric']}: {gate['reason']}"
    value = "was not measured, or is not finite" if gate["value"] is None else f"is {gate['value']}"
    return f"{gate['metric']} {value}, expected {gate['gate']}"


@dataclasses.dataclass(frozen=True)
class Bound:
    """By how much a metric may be worse than an earlier run's."""

    value: float
    is_share: bool
    """Whether it is a share of the earlier value."""

    def of(self, earlier: float) -> float:
        """Return the bound beside an earlier value, in the metric's unit."""
        return self.value * abs(earlier) if self.is_share else self.value

    def __str__(self) -> str:
        return f"{100 * self.value:g}%" if self.is_share else f"{self.value:g}"


def parse_regression(given: object) -> tuple[str, dict[str, Bound]]:
    """Return the run.json and the bound of each metric of a gate ``max_regression``.

    Raises:
        UsageError: it is not one.
    """
    values = dict(given) if isinstance(given, dict) else {}
    against = values.pop("against", "")
    example = "{against: outputs/last/run.json, eval_loss: 2%}"
    if not against or not values:
        raise UsageError(f"expected an earlier run and the metrics that may be worse, as in {example}")
    bounds = dict[str, Bound]()
    for name, text in values.items():
        match = _BOUND.fullmatch(text) if len(text) <= 100 else None
        if match is None:
            raise UsageError(f"{name}: expected a share such as 2%, or a number from 0, found {text[:60]!r}")
        bounds[name] = Bound(float(match[1]) / (100 if match[2] else 1), bool(match[2]))
    return against, bounds


def parse_duration(text: str) -> float:
    """Convert a duration such as ``3h30m`` to seconds.

    Raises:
        UsageError: the text is not a duration.
    """
    match = _TIME.fullmatch(text.replace(" ", "")) if len(text) <= 40 else None
    sizes = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    total = sum(int(match[unit] or 0) * size for unit, size in sizes.items()) if match else 0
    if not total:
        raise UsageError(f"expected days, hours, minutes and seconds, as in 3h30m or 90s, found {text[:60]!r}")
    return float(total)


def check(recipe: Recipe, report: Report) -> None:
    """Report every problem of a recipe whose settings have the right types."""
    for part in (
        _names,
        _tokenizer,
        _quantization,
        _ranges,
        _sizes,
        _length,
        check_data,
        _evaluation,
        _gates,
        _launch,
        _method,
    ):
        part(recipe, report)


def _names(recipe: Recipe, report: Report) -> None:
    for key in _NOT_EMPTY:
        if not str(operator.attrgetter(key)(recipe)).strip():
            report((key,), "is empty")
    is_local, revision = exists(recipe.base_model.name), recipe.base_model.revision
    if recipe.base_model.trust_remote_code and not revision and not is_local:
        report(
            ("base_model.trust_remote_code", "base_model.revision"),
            "runs code from the hub, so base_model.revision must name the commit of that code",
        )
    if is_local and revision is not None:
        keys = ("base_model.revision", "base_model.name")
        report(keys, "applies to hub models, but base_model.name is local; leave it out")
    if "://" in recipe.base_model.name:
        report(("base_model.name",), "must be a path or a hub id, not a URL")
    elif is_path(name := recipe.base_model.name) and not is_local:
        report(("base_model.name",), f"no such file or folder: {name[:200]}", closest_file(name))
    begins, key = recipe.training.init_adapter_from, "training.init_adapter_from"
    if begins is not None and exists(begins):
        start, out = (expand_user(Path(name)).resolve() for name in (begins, recipe.training.output_dir))
        if start.is_relative_to(out) and not re.fullmatch(r"previous-\d+", (*start.relative_to(out).parts, "")[0]):
            report((key,), "is in training.output_dir, where this run writes; give one of the two another folder")


def _tokenizer(recipe: Recipe, report: Report) -> None:
    """Check the chat template and the new tokens."""
    template, key = recipe.base_model.chat_template, "base_model.chat_template"
    if template is not None and template != "chatml":
        if "{%" in template or "{{" in template:
            report((key,), "contains a template; write it to a .jinja file and give the file's path")
        elif not template.endswith(".jinja"):
            message = f"expected chatml or a .jinja file, found {template[:60]!r}; unset: the tokenizer's own"
            report((key,), message, closest(template, ["chatml"]))
        elif not exists(template):
            report((key,), f"no such file: {template[:200]}", closest_file(template))
        elif not expand_user(Path(template)).is_file():
            report((key,), f"not a regular file: {template[:200]}")
    seen: set[str] = set()
    for index, token in enumerate(recipe.base_model.new_tokens):
        key = f"base_model.new_tokens[{index}]"
        if not token.strip():
            report((key,), "is empty")
        elif token != token.strip():
            report((key,), f"begins or ends with white space: {token[:60]!r}")
        elif token in seen:
            report((key,), f"occurs twice in the list: {token[:60]!r}")
        seen.add(token)


def _quantization(recipe: Recipe, report: Report) -> None:
    wanted, key = recipe.base_model.quantization, "base_model.quantization"
    if wanted is None:
        return
    kind = f"{key}.type"
    if recipe.base_model.name.endswith(".gguf"):
        report(
            (key, "base_model.name"),
            "does not work with a .gguf file, which is dequantised on loading; give the original model",
        )
    if wanted.type not in ("nf4", "fp4"):
        if wanted.double_quant:
            report((f"{key}.double_quant", kind), f"is a setting of nf4 and fp4, not of {wanted.type}")
        if wanted.compute_dtype != "auto":
            report((f"{key}.compute_dtype", kind), f"is a setting of nf4 and fp4, not of {wanted.type}")
    if wanted.group_size is not None and wanted.type != "int4_weight_only":
        report((f"{key}.group_size", kind), f"is a setting of int4_weight_only, not of {wanted.type}")
    elif wanted.group_size is not None and wanted.group_size < 1:
        report((f"{key}.group_size",), f"must be at least 1, not {wanted.group_size}")


def _ranges(recipe: Recipe, report: Report) -> None:
    for section in ("dataset", "training", "launch"):
        for name, problem in out_of_range(getattr(recipe, section)):
            report((f"{section}.{name}",), problem)
    training = recipe.training
    if training.learning_rate == "auto" and "adamw" not in training.optim:
        report(("training.learning_rate", "training.optim"), f"give a number: auto is for AdamW, not {training.optim}")
    rate = training.learning_rate
    if training.lr_scheduler_type == "polynomial" and rate != "auto" and rate <= _POLYNOMIAL_END:
        keys = ("training.learning_rate", "training.lr_scheduler_type")
        report(keys, f"must be above {_POLYNOMIAL_END:g}, where polynomial ends, not {rate:g}")
    if training.warmup_steps > 1 and training.warmup_steps % 1:
        report(("training.warmup_steps",), f"must be a whole number or below 1, not {training.warmup_steps}")
    if training.lr_scheduler_type == "constant" and (training.warmup_steps or training.warmup_ratio):
        scheduled = ("training.lr_scheduler_type", "training.warmup_steps", "training.warmup_ratio")
        report(scheduled, "constant has no warm-up", "constant_with_warmup")
    if training.max_time is not None:
        try:
            parse_duration(training.max_time)
        except UsageError as error:
            report(("training.max_time",), error.message)


def _sizes(recipe: Recipe, report: Report) -> None:
    """Check that all numbers fit their types, and that a batch fits into memory."""
    for key, value in _numbers(dataclasses.asdict(recipe), ""):
        if isinstance(value, float) and abs(value) > _MAX_FLOAT:
            report((key,), f"must be at most {_MAX_FLOAT:g}, the largest number of float32, found {value:g}")
        elif isinstance(value, int) and value > _MAX_SIZE and key.startswith("method.") and not _SEED.search(key):
            report((key,), f"must be at most {_MAX_SIZE}, found {value}")
    size, times = recipe.training.per_device_train_batch_size, recipe.training.gradient_accumulation_steps
    one = 1 if size == "auto" else size
    if one * times > _MAX_BATCH and max(one, times) <= 1_000_000:
        report(
            ("training.per_device_train_batch_size", "training.gradient_accumulation_steps"),
            f"and gradient_accumulation_steps make a batch of {one * times:,} examples; at most {_MAX_BATCH:,}",
        )


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yield every number of a recipe with its key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{key}[{index}]")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield key, value


def _length(recipe: Recipe, report: Report) -> None:
    epochs, steps = recipe.training.num_train_epochs, recipe.training.max_steps
    if steps < 1 and steps != -1:
        report(("training.max_steps",), f"must be at least 1, or -1 to use num_train_epochs; not {steps}")
    elif epochs <= 0 and steps == -1:
        report(
            ("training.num_train_epochs", "training.max_steps"),
            f"must be above 0 if max_steps is not given, not {epochs}",
        )


def _evaluation(recipe: Recipe, report: Report) -> None:
    training = recipe.training
    if training.eval_on_start and training.eval_strategy == "no":
        report(("training.eval_on_start", "training.eval_strategy"), "does nothing where training.eval_strategy is no")
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        key = f"training.{name}"
        if getattr(training, name) in (False, None):
            continue
        if not ways_to_evaluate(recipe.dataset):
            report((key, "dataset"), f"needs evaluation data: {_EVAL_KEYS}")
        if training.eval_strategy == "no":
            report((key, "training.eval_strategy"), "needs evaluations: training.eval_strategy steps or epoch")


def _gates(recipe: Recipe, report: Report) -> None:
    for name, text in recipe.gates.items():
        key = f"gates.{name}"
        if not name.strip():
            report((key, "gates"), "has an empty name; give the name of a metric")
        if name == LEARNT:
            if not isinstance(text, bool):
                report((key, "gates"), f"expected true or false, found {str(text)[:60]!r}")
            continue
        try:
            if name == MAX_REGRESSION:
                against, _ = parse_regression(text)
                if not exists(against):
                    report((f"{key}.against", key, "gates"), f"no such file: {against[:60]!r}")
            elif isinstance(text, dict):
                report(
                    (key, "gates"), f"expected a condition such as '<= 1.2', found a mapping; {MAX_REGRESSION} has one"
                )
            else:
                parse_gate(str(text))
        except UsageError as error:
            report((key, "gates"), error.message)
        if name == FORGETTING:
            if message := forgetting_problem(recipe):
                report((key, "gates"), message)
            if not forgets_rows(recipe):
                continue
        if not ways_to_evaluate(recipe.dataset):
            report((key, "gates", "dataset"), f"needs evaluation data: {_EVAL_KEYS}")
        elif recipe.training.eval_strategy == "no":
            report((key, "gates", "training.eval_strategy"), "needs an evaluation, but training.eval_strategy is no")


def forgets_rows(recipe: Recipe) -> bool:
    """Whether the task writes no text, so that what is forgotten is rows of the evaluation data."""
    task = TASKS.get((recipe.task or {}).get("type", ""))
    return task is not None and not task.writes_text


def needs_base(recipe: Recipe) -> bool:
    """Whether a gate needs the comparison with the base model."""
    gates = recipe.gates
    return bool(gates.get(MAX_REGRESSION)) or (gates.get(FORGETTING, False) is not False and forgets_rows(recipe))


def forgetting_problem(recipe: Recipe) -> str | None:
    """Return which setting keeps the gate ``forgetting`` from being measured; None where none does."""
    setting = "compare_with_base" if forgets_rows(recipe) else "measure_forgetting"
    if recipe.task is None or getattr(recipe.training, setting) is not False:
        return None
    return f"needs the measure, but training.{setting} is false"


def _launch(recipe: Recipe, report: Report) -> None:
    launch = recipe.launch
    if launch.machine_rank >= max(launch.num_machines, 1):
        report(
            ("launch.machine_rank", "launch.num_machines"),
            f"must be below launch.num_machines ({launch.num_machines}), not {launch.machine_rank}",
        )
    for name, strategies in USED_BY.items():
        may_be_chosen = launch.strategy == "auto" and "hybrid" in strategies
        if getattr(launch, name) != getattr(Launch(), name) and launch.strategy not in strategies and not may_be_chosen:
            *first, last = strategies
            text = f"is for {', '.join(first)}{' and ' * bool(first)}{last}, not {launch.strategy}"
            report((f"launch.{name}", "launch.strategy"), text)
    count, size = launch.num_processes, launch.shard_size
    if isinstance(count, int) and isinstance(size, int) and count % size:
        keys = ("launch.shard_size", "launch.num_processes")
        report(keys, f"must divide the {count} processes of a machine, and is {size}")
    for name, value in launch.zero_optimization.items():
        if (problem := zero_problem(name, value)) is not None:
            report(("launch.zero_optimization",), f"is wrong: {problem}")
    if launch.cpu_ram_efficient_loading and recipe.base_model.quantization is not None:
        keys = ("launch.cpu_ram_efficient_loading", "base_model.quantization")
        report(keys, "is not for weights that are quantised while they are loaded")
    if launch.num_machines > 1 and launch.main_process_port == "auto":
        report(
            ("launch.num_machines", "launch.main_process_port"),
            "above 1 needs launch.main_process_port: the same free port in each command",
        )


def _method(recipe: Recipe, report: Report) -> None:
    values = dict(recipe.method)
    method = METHODS.get(values.pop("type"))
    if method is None:
        return
    config = method.config_class().unchecked(**values)
    for name, message in config.problems():
        if name in values or recipe.training.init_adapter_from is None:  # else it is as the adapter's file says
            report((f"method.{name}",), message)
    for entry in dataclasses.fields(config):
        if "python_only" in entry.metadata and getattr(config, entry.name) != entry.default:
            report((f"method.{entry.name}",), f"must be {entry.default} in a recipe: {entry.metadata['python_only']}")
