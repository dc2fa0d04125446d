"""One training run, from recipe to run folder."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from peftcli.card import write_card
from peftcli.core.files import write_adapter, write_file
from peftcli.core.weights import adapter_state
from peftcli.data.ends import missing_stops
from peftcli.data.findings import refuse
from peftcli.data.sources import eval_source, open_source
from peftcli.errors import (
    DataError,
    Diverged,
    GateFailed,
    OutOfMemory,
    PeftcliError,
    ProcessDied,
    StorageError,
    UsageError,
)
from peftcli.models import tokens
from peftcli.models.load import load_tokenizer, stored_or_asked
from peftcli.recipe import gate_holds, method_config, parse_gate, to_dict, to_yaml
from peftcli.schema import Recipe
from peftcli.tasks import TASKS
from peftcli.tasks.base import Task
from peftcli.train.attention import takes_one_row
from peftcli.train.batches import Plan
from peftcli.train.checkpoint import (
    Progress,
    State,
    damage,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
    sha256,
)
from peftcli.train.data import Data, load_data, plan_of
from peftcli.train.evaluate import evaluate
from peftcli.train.folder import SCHEMA_VERSION, RunFolder
from peftcli.train.loop import LESS_LEARNING, StepResult, fit
from peftcli.train.packing_check import start_packing
from peftcli.train.report import (
    Evaluated,
    OnEvent,
    Phase,
    Ready,
    RowsRead,
    Saved,
    Stepped,
    Warned,
    draw_losses,
    peak_memory_bytes,
    versions,
)
from peftcli.train.setup import adapted_model, calibrate, prepare, start_accelerator
from peftcli.train.signals import Stop, handled


def train(recipe: Recipe, *, resume: str = "auto", on_event: OnEvent = lambda event: None) -> dict[str, Any]:
    """Train what a recipe describes and write its run folder; go on where an earlier run of it stopped.

    Args:
        recipe: what to train.
        resume: ``auto``: the newest whole checkpoint of the folder, if there is one; or the path of a checkpoint.
        on_event: is told what happens; see ``peftcli.train.report``.

    Returns:
        The content of run.json.

    Raises:
        PeftcliError: of the kind that its class says. run.json then says so too.
    """
    with handled() as stop:
        accelerator = start_accelerator(recipe)
        tell: OnEvent = on_event if accelerator.is_main_process else lambda event: None
        with _open_folder(recipe, accelerator) as (folder, run):
            if run["status"] == "complete":
                return run
            stop.saved = run["resumable"]
            with _kept_account(folder, run, accelerator):
                task, config = TASKS[recipe.task].load(), method_config(recipe)
                run["base_model"]["quantization"] = stored_or_asked(recipe.base_model)
                tell(Phase("reading the data"))
                tokenizer = load_tokenizer(recipe.base_model)
                data = load_data(
                    recipe,
                    task,
                    tokenizer,
                    on_rows=lambda *read: tell(RowsRead(*read)),
                    on_note=lambda text: tell(Warned(text)),
                )
                if accelerator.is_main_process:
                    folder.write_skipped(data.skipped())
                refuse(data.findings, recipe.dataset.allow)
                _refuse_other_content(run, data.report["content"], folder)
                plan = plan_of(recipe, data, accelerator.num_processes)
                for text in (*data.warnings, *plan.repeated(data.names)):
                    tell(Warned(text))
                tell(Phase(f"loading {recipe.base_model.name}"))
                model, injection = adapted_model(recipe, config, tokenizer)
                _refuse_positions(model, int(data.train.lengths.max()))
                if note := tokens.settle_pad(tokenizer, model):
                    tell(Warned(note))
                if config.needs_batches():
                    tell(Phase("calibrating the adapter on the training data"))
                    injection = calibrate(model, injection, config, recipe, data, tokenizer, accelerator)
                trainee = prepare(model, config, recipe, plan, accelerator)
                efficiency = plan.efficiency
                if plan.packs:
                    start_packing(model, accelerator)
                    efficiency = 1.0 if takes_one_row(model) else efficiency
                state = State(trainee, accelerator.unwrap_model(trainee.model), config, Progress())
                checkpoint = _checkpoint_to_resume(folder, resume, accelerator, tell)
                if checkpoint is not None:
                    load_checkpoint(checkpoint, state, accelerator)
                run |= {
                    "data": data.report | {"efficiency": efficiency, "passes_per_epoch": plan.passes},
                    "parameters": {"trainable": injection.trainable, "all": injection.total},
                    "mergeable": config.merge_problem() is None,
                    "makes_up_for_quantization": config.needs_base_weights(),
                    "device": accelerator.device.type,
                    "steps": {"done": state.progress.step, "total": plan.total_steps},
                }
                run["attempts"].append({"start": _now(), "from_step": state.progress.step})
                if accelerator.is_main_process:
                    folder.cut_metrics(-1 if checkpoint is None else state.progress.step)
                    folder.write(run)
                tell(Ready(run, state.progress.step, plan.total_steps))
                _train_steps(recipe, task, tokenizer, data, plan, state, folder, run, accelerator, stop, tell)
                if accelerator.is_main_process:
                    _finish(recipe, state, tokenizer, folder, run)
            return _of_main_process(run)


def _train_steps(
    recipe: Recipe,
    task: Task,
    tokenizer: Any,
    data: Data,
    plan: Plan,
    state: State,
    folder: RunFolder,
    run: dict[str, Any],
    accelerator: Accelerator,
    stop: Stop,
    tell: OnEvent,
) -> None:
    """The loop, with evaluation, checkpoints and logs where the recipe wants them."""
    training, progress = recipe.training, state.progress

    def run_eval() -> dict[str, float]:
        if data.eval is None or training.eval_strategy == "no":
            return {}
        batch_size = training.per_device_eval_batch_size
        metrics = evaluate(state.trainee.model, task, data.eval, tokenizer, batch_size, accelerator)
        if not all(map(math.isfinite, metrics.values())):
            raise Diverged(f"the evaluation after step {progress.step} is not finite: {metrics}", hint=LESS_LEARNING)
        tell(Evaluated(progress.step, metrics, _note_eval(recipe, state, metrics)))
        return metrics

    def log(entry: dict[str, Any]) -> None:
        if entry and accelerator.is_main_process:
            folder.log({"step": progress.step, "epoch": plan.epoch(progress.step), **entry})

    def save() -> None:
        path = save_checkpoint(folder.checkpoints, state, training.save_total_limit, accelerator)
        run["steps"]["done"], run["resumable"] = progress.step, True
        if accelerator.is_main_process:
            folder.write(run)
        tell(Saved(path))

    stop.at_once = False
    if progress.step == 0 and training.eval_on_start:
        log(run_eval())
    with _timed(run, progress):
        for result in fit(state.trainee, task, data.train, tokenizer, plan, accelerator, progress.step):
            entry = _note_step(result, plan, training.logging_steps, progress, tell)
            last = result.step == plan.total_steps
            if last or _due(training.eval_strategy, training.eval_steps, result.step, plan):
                entry |= run_eval()
            log(entry)
            if _asked_to_stop(stop, accelerator) and not last:
                save()
                raise stop.interrupted(f"stopped after step {result.step} of {plan.total_steps}", saved=True)
            if not last and _due(training.save_strategy, training.save_steps, result.step, plan):
                save()


@contextlib.contextmanager
def _timed(run: dict[str, Any], progress: Progress) -> Iterator[None]:
    """Adds the seconds spent inside to the run's, and notes the speed."""
    started, tokens_before = time.perf_counter(), progress.num_tokens
    try:
        yield
    finally:
        elapsed = time.perf_counter() - started
        run["wall_seconds"] = round(run.get("wall_seconds", 0.0) + elapsed, 3)
        run["tokens_per_second"] = round((progress.num_tokens - tokens_before) / elapsed, 1)


def _note_step(result: StepResult, plan: Plan, logging_steps: int, progress: Progress, tell: OnEvent) -> dict[str, Any]:
    """Count a step. Gives what metrics.jsonl holds of it; nothing when its turn to be logged has not come."""
    loss_sum = result.loss * result.num_targets
    progress.step = result.step
    progress.loss_sum += loss_sum
    progress.num_targets += result.num_targets
    progress.num_tokens += result.num_tokens
    progress.window_loss_sum += loss_sum
    progress.window_num_targets += result.num_targets
    mean = progress.window_loss_sum / progress.window_num_targets
    logged = result.step % logging_steps == 0 or result.step in (1, plan.total_steps)
    tell(Stepped(result, plan.epoch(result.step), logged, mean))
    if not logged:
        return {}
    progress.window_loss_sum, progress.window_num_targets = 0.0, 0
    return {**asdict(result), "loss": mean}


def _note_eval(recipe: Recipe, state: State, metrics: dict[str, float]) -> bool:
    """Keep the metrics, and the adapter if it is the best so far and the recipe wants the best."""
    training, progress = recipe.training, state.progress
    progress.last_eval = metrics
    if progress.step == 0:
        progress.first_eval = metrics
    name = training.metric_for_best_model
    if name not in metrics:
        name = f"eval_{name}"
    if name not in metrics:
        raise UsageError(
            f"evaluation reports {', '.join(metrics)}, not {training.metric_for_best_model}",
            key="training.metric_for_best_model",
        )
    greater = training.greater_is_better
    greater = not name.endswith(("loss", "perplexity")) if greater is None else greater
    before = progress.best_eval.get(name)
    best = before is None or (metrics[name] > before if greater else metrics[name] < before)
    if best:
        progress.best_eval, progress.best_step = metrics, progress.step
        if training.load_best_model_at_end:
            state.best_adapter = {key: value.cpu().clone() for key, value in adapter_state(state.model).items()}
    return best


def _finish(recipe: Recipe, state: State, tokenizer: Any, folder: RunFolder, run: dict[str, Any]) -> None:
    """Write the product: adapter, tokenizer if it is another, card, curve, recipe, and what the gates say."""
    progress = state.progress
    tensors = state.best_adapter if state.best_adapter is not None else adapter_state(state.model)
    kept = progress.best_eval if state.best_adapter is not None else progress.last_eval
    write_adapter(tensors, state.config, folder.path)
    own = tokens.save_with_adapter(folder.path, tokenizer, recipe.base_model)
    write_file(folder.path / "recipe.yaml", to_yaml(recipe).encode())
    draw_losses(folder.metrics(), folder.path / "loss.png")
    run["steps"]["done"] = progress.step
    run["attempts"][-1] |= {"end_step": progress.step, "reason": "complete"}
    run |= {
        "train_loss": progress.loss_sum / progress.num_targets if progress.num_targets else None,
        "eval": {
            "first": progress.first_eval,
            "last": progress.last_eval,
            "best": progress.best_eval,
            "best_step": progress.best_step,
            "kept": kept,
        },
        "peak_memory_bytes": peak_memory_bytes(),
        "gates": check_gates(recipe.gates, kept),
    }
    failed = [gate for gate in run["gates"] if not gate["passed"]]
    generation = getattr(state.model, "generation_config", None)
    if stops := missing_stops(tokenizer, folder.path, getattr(generation, "eos_token_id", None)):
        run["eos_token_id"] = stops
    run |= {"status": "complete", "resumable": False, "error": None, "exit_code": 12 if failed else 0}
    folder.write(run)
    write_card(folder.path)
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "recipe.yaml", *own)
    run["artefacts"] = [
        {"path": name, "bytes": (folder.path / name).stat().st_size, "sha256": sha256(folder.path / name)}
        for name in names
    ]
    folder.write(run)


def check_gates(gates: dict[str, str], metrics: dict[str, float]) -> list[dict[str, Any]]:
    """What each gate wanted, what was measured, and whether it holds."""
    checked = []
    for name, text in gates.items():
        operator, bound = parse_gate(text)
        value = metrics.get(name)
        passed = value is not None and gate_holds(operator, value, bound)
        checked.append({"metric": name, "gate": text, "value": value, "passed": passed})
    return checked


def raise_failed_gates(gates: list[dict[str, Any]]) -> None:
    """Raises GateFailed naming the gates that do not hold."""
    failed = [f"{gate['metric']} is {gate['value']}, wanted {gate['gate']}" for gate in gates if not gate["passed"]]
    if failed:
        raise GateFailed("; ".join(failed), key="gates")


@contextlib.contextmanager
def _open_folder(recipe: Recipe, accelerator: Accelerator) -> Iterator[tuple[RunFolder, dict[str, Any]]]:
    """Lock the run folder and give run.json as it stands now: new, to be gone on with, or complete.

    Raises:
        UsageError: it holds other files, or the run of another recipe, other data, another number of processes.
        FolderBusy: another run holds it.
    """
    folder = RunFolder(Path(recipe.training.output_dir))
    shared: list[Any] = [None]
    if accelerator.is_main_process:
        identity = _identity(recipe, accelerator.num_processes)
        _run_so_far(folder, identity)  # refuses before anything is written
        folder.lock()
        before = _run_so_far(folder, identity)
        shared[0] = before or _new_run(recipe, identity, accelerator)
    broadcast_object_list(shared)
    try:
        yield folder, shared[0]
    finally:
        folder.unlock()


def _run_so_far(folder: RunFolder, identity: dict[str, Any]) -> dict[str, Any] | None:
    run = folder.read()
    if run is None or not (run.get("attempts") or folder.checkpoints.exists()):
        return None  # none, or one that ended before its first step: nothing can be lost
    _refuse_drift(run.get("identity", {}), identity, folder)
    return run


def _of_main_process(run: dict[str, Any]) -> dict[str, Any]:
    """The main process's ``run``, in all of them."""
    shared = [run]
    broadcast_object_list(shared)
    return shared[0]


def _identity(recipe: Recipe, num_processes: int) -> dict[str, Any]:
    """What makes two runs the same: the recipe, but for where it stands and runs; the bytes of data and base model."""
    described = to_dict(recipe)
    training = {key: value for key, value in described["training"].items() if key != "output_dir"}
    described = {key: value for key, value in described.items() if key != "launch"} | {"training": training}
    return {
        "recipe": described,
        "data": _data_hashes(recipe),
        "base_model": _base_hash(recipe.base_model.name),
        "processes": num_processes,
    }


def _new_run(recipe: Recipe, identity: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    base = recipe.base_model
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "new",
        "exit_code": None,
        "error": None,
        "resumable": False,
        "identity": identity,
        "recipe": to_dict(recipe),
        "recipe_sha256": hashlib.sha256(to_yaml(recipe).encode()).hexdigest(),
        "base_model": {"name": base.name, "revision": base.revision, "sha256": identity["base_model"]},
        "versions": versions(),
        "processes": accelerator.num_processes,
        "seeds": {"training": recipe.training.seed},
        "attempts": [],
        "artefacts": [],
    }


@contextlib.contextmanager
def _kept_account(folder: RunFolder, run: dict[str, Any], accelerator: Accelerator) -> Iterator[None]:
    """Inside, run.json says running; afterwards it says how the run ended."""
    main, attempts_before = accelerator.is_main_process, len(run["attempts"])
    run |= {"status": "running", "pid": os.getpid(), "exit_code": None, "error": None}
    if main:
        folder.write(run)
    try:
        yield
    except BaseException as error:
        known = _known_error(error)
        interrupted = known.exit_code in (75, 130, 143)
        run |= {
            "status": "interrupted" if interrupted else "failed",
            "exit_code": known.exit_code,
            "error": known.as_dict(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if len(run["attempts"]) > attempts_before:
            run["attempts"][-1] |= {"end_step": run["steps"]["done"], "reason": run["status"]}
        if main:
            with contextlib.suppress(StorageError):
                folder.write(run)
        if known is error:
            raise
        raise known from error


def _known_error(error: BaseException) -> PeftcliError:
    """The error as one of ours."""
    if isinstance(error, PeftcliError):
        return error
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return OutOfMemory(
            "not enough memory for this batch",
            hint="lower per_device_train_batch_size and raise gradient_accumulation_steps as much; "
            "lower dataset.max_length; or set training.gradient_checkpointing: true",
        )
    if "closed by peer" in text or "reset by peer" in text:  # gloo; what the other process says comes first
        return ProcessDied(
            "another training process ended", hint="its error says why; run the same command again to go on"
        )
    if isinstance(error, OSError):
        return StorageError(f"{error.strerror or error}", file=error.filename and str(error.filename))
    return PeftcliError(f"{type(error).__name__}: {text}")


def _refuse_positions(model: Any, longest: int) -> None:
    """Raises DataError if the longest example has more tokens than the base model has trained positions."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions and longest > positions:
        raise DataError(
            f"the longest example has {longest:,} tokens, and the base model {positions:,} positions",
            key="dataset.max_length",
            hint=f"set dataset.max_length: {positions}, or less",
        )


def _refuse_other_content(run: dict[str, Any], content: list[str], folder: RunFolder) -> None:
    """Stops where the rows were encoded otherwise before the run was stopped, or are by another process of it.

    Raises:
        UsageError: another tokenizer, chat template or version of transformers gave other tokens.
        DataError: the data changed while the processes read it.
    """
    if run.get("attempts") and run["data"].get("content", content) != content:
        raise UsageError(
            "holds a run whose rows were encoded otherwise: the tokenizer, its chat template (which may write the "
            "date), the hub's dataset or transformers has changed; nothing was changed",
            file=str(folder.path),
            key="training.output_dir",
            hint="choose another training.output_dir, or delete that folder",
        )
    if any(other != content for other in gather_object([content])):
        raise DataError("changed while the processes read it; run the command again", key="dataset")


def _refuse_drift(before: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    """Raises UsageError when the folder's run is of another recipe, other data or another number of processes."""
    old, new = _flat(before), _flat(now)
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    if changed:
        lines = [f"  {key}: {old.get(key)!r} -> {new.get(key)!r}" for key in changed[:8]]
        raise UsageError(
            "holds a run of another recipe or other data; nothing was changed\n" + "\n".join(lines),
            file=str(folder.path),
            key="training.output_dir",
            hint="choose another training.output_dir, or delete that folder",
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf for name, inner in value.items() for key, leaf in _flat(inner, f"{prefix}.{name}".lstrip(".")).items()
    }


def _checkpoint_to_resume(folder: RunFolder, resume: str, accelerator: Accelerator, tell: OnEvent) -> Path | None:
    """The checkpoint to go on from, agreed by all processes."""
    found: list[Any] = [None]
    if accelerator.is_main_process:
        if resume == "auto":
            found[0] = newest_whole(folder.checkpoints, lambda text: tell(Warned(text)))
        else:
            found[0] = Path(resume)
            if not found[0].is_dir():
                raise UsageError("no such checkpoint", file=resume, key="--resume")
            if reason := damage(found[0]):
                raise StorageError(f"damaged checkpoint: {reason}", file=resume)
    broadcast_object_list(found)
    checkpoint = found[0]
    assert checkpoint is None or isinstance(checkpoint, Path)
    return checkpoint


def _due(strategy: str, every: int, step: int, plan: Plan) -> bool:
    return step % every == 0 if strategy == "steps" else strategy == "epoch" and plan.ends_epoch(step)


def _asked_to_stop(stop: Stop, accelerator: Accelerator) -> bool:
    """Whether any process was asked to stop; all of them learn it."""
    if accelerator.num_processes > 1:
        flag = torch.tensor(float(stop.signal), device=accelerator.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        stop.signal = int(flag)
    return bool(stop.signal)


def _data_hashes(recipe: Recipe) -> dict[str, str]:
    """sha256 of the recipe's local data files, and of its chat template's."""
    dataset, template = recipe.dataset, recipe.base_model.chat_template
    sources = [*dataset.sources(), *filter(None, [eval_source(dataset)])]
    local = [open_source(source) for source in sources if Path(source.train).exists()]
    hashes = {name: digest for opened in local for name, digest in opened.fingerprint().items()}
    if template and Path(template).is_file():
        hashes[template] = sha256(Path(template))
    return hashes


def _base_hash(name: str) -> str | None:
    """One hash over the weights and the config of a local base model; None for one of the hub."""
    path = Path(name)
    files = sorted(path.glob("*.safetensors")) + sorted(path.glob("config.json")) if path.is_dir() else [path]
    if not all(file.is_file() for file in files) or not files:
        return None
    return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
