"""One training run, from recipe to run folder."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from peftcli.adapters.card import write_card
from peftcli.core.protocols import after_resume, needs_base_weights, needs_batches
from peftcli.core.weights import adapter_state
from peftcli.data import day
from peftcli.data.findings import refuse
from peftcli.errors import (
    DataError,
    Diverged,
    GateFailed,
    Interrupted,
    PeftcliError,
    StorageError,
    UsageError,
    known,
)
from peftcli.models import tokens
from peftcli.models.load import load_tokenizer, stored_or_asked
from peftcli.recipe import gate_holds, method_config, parse_gate, seconds, to_yaml
from peftcli.schema import Recipe
from peftcli.system.disk import sha256, write_file
from peftcli.system.signals import STARTED, TIME_LIMIT, Stop, handled, wants_save
from peftcli.tasks import TASKS
from peftcli.tasks.base import Task
from peftcli.tasks.text.stop_tokens import missing_stops
from peftcli.train.attention import takes_one_row
from peftcli.train.data import Data, load_data, plan_of
from peftcli.train.evaluate import evaluate
from peftcli.train.launch import note_training
from peftcli.train.loop import LESS_LEARNING, StepResult, fit
from peftcli.train.packing_check import start_packing
from peftcli.train.plan import Plan
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
)
from peftcli.train.runs.checkpoint import (
    Progress,
    State,
    load_checkpoint,
    prune,
    random_state,
    restore_random,
    save_checkpoint,
    set_newer_aside,
    write_finite,
)
from peftcli.train.runs.folder import RunFolder
from peftcli.train.runs.identity import Change, digests
from peftcli.train.runs.resume import (
    OpenRun,
    StartOptions,
    at_commit,
    checkpoint_to_resume,
    commit_of,
    described,
    open_run,
)
from peftcli.train.setup import adapted_model, calibrate, prepare, start_accelerator


def train(
    recipe: Recipe,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> dict[str, Any]:
    """Train what a recipe describes and write its run folder; go on where an earlier run of it stopped.

    Args:
        recipe: what to train.
        resume: ``auto``: the newest whole checkpoint of the folder, if there is one; ``must``: the same, and there must
            be one; ``never``: none, and there must be no run to go on with; or the path of a checkpoint.
        allow_change: keys in which the run that is gone on with may differ from this recipe, as the refusal names them.
            run.json then says what changed, and that the result is not that of one recipe.
        overwrite: whether this run may take the place of another one: that is moved aside once this one is complete.
        on_event: is told what happens; see ``peftcli.train.report``.

    Returns:
        The content of run.json.

    Raises:
        PeftcliError: of the kind that its class says. run.json then says so too.
    """
    options, training = StartOptions(resume, tuple(allow_change), overwrite), recipe.training
    save_on = signal.Signals[training.save_on_signal] if training.save_on_signal else None
    with handled("stopped before the first step", save_on) as stop:
        if training.max_time is not None:
            stop.deadline = STARTED + seconds(training.max_time)
        accelerator = start_accelerator(recipe)
        tell: OnEvent = on_event if accelerator.is_main_process else lambda event: None
        with open_run(recipe, options, accelerator) as here:
            folder, run = here.folder, here.run
            if run["status"] != "complete":
                stop.saved = run["resumable"]
                with _kept_account(folder, run, accelerator, stop):
                    _train(recipe, here, options, accelerator, stop, tell)
            if here.replaces is not None and accelerator.is_main_process:
                here.replaces.replace()
            return _of_main_process(run)


def _train(
    recipe: Recipe, here: OpenRun, options: StartOptions, accelerator: Accelerator, stop: Stop, tell: OnEvent
) -> None:
    """The run, from its data to its product. ``here.run`` is the account of it."""
    folder, run = here.folder, here.run
    task, config = TASKS[recipe.task].load(), method_config(recipe)
    base, recipe = recipe.base_model, at_commit(recipe, here)
    stored = stored_or_asked(recipe.base_model)
    tell(Phase("reading the data"))
    tokenizer = load_tokenizer(recipe.base_model)
    with day.on(run["day"]):
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
    _refuse_other_content(here, options, data.report["content"])
    plan = plan_of(recipe, data, accelerator.num_processes)
    for text in (*data.warnings, *plan.repeated(data.names)):
        tell(Warned(text))
    tell(Phase(f"loading {recipe.base_model.name}"))
    model, injection = adapted_model(recipe, config, tokenizer)
    config.revision = base.revision
    _refuse_positions(model, int(data.train.lengths.max()))
    if note := tokens.settle_pad(tokenizer, model):
        tell(Warned(note))
    if needs_batches(config):
        tell(Phase("calibrating the adapter on the training data"))
        injection = calibrate(model, injection, config, recipe, data, tokenizer, accelerator)
    prepared = prepare(model, config, recipe, plan, accelerator)
    efficiency = plan.efficiency
    if plan.packs:
        start_packing(model, accelerator)
        efficiency = 1.0 if takes_one_row(model) else efficiency
    state = State(prepared, accelerator.unwrap_model(prepared.model), config, Progress())
    checkpoint = checkpoint_to_resume(here, options, recipe.training.save_total_limit, accelerator, tell)
    if checkpoint is not None:
        load_checkpoint(checkpoint, state, accelerator)
        if state.progress.step > plan.total_steps:
            raise UsageError(
                f"the run has done {state.progress.step} steps, and the recipe now wants {plan.total_steps}",
                key="training.max_steps",
            )
        after_resume(state.model, config, state.progress.step, plan.total_steps)
        if state.progress.step == plan.total_steps and state.progress.pending is None:
            state.progress.pending = folder.line_of(state.progress.step)  # an earlier step than the last one, before
    if here.changes:
        for change in here.changes:
            tell(Warned(f"{change}, since step {state.progress.step}: the result is not exactly that of one recipe"))
        run["changes"] += [{**change.as_dict(), "step": state.progress.step} for change in here.changes]
        run |= {"exact": False, "processes": accelerator.num_processes, **described(here.recipe, here.identity)}
    run["base_model"] |= {"quantization": stored, **commit_of(recipe.base_model)}
    run |= {
        "data": data.report | {"efficiency": efficiency, "passes_per_epoch": plan.passes},
        "parameters": {"trainable": injection.trainable, "all": injection.total},
        "mergeable": config.merge_problem() is None,
        "makes_up_for_quantization": needs_base_weights(config),
        "device": accelerator.device.type,
        "steps": {"done": state.progress.step, "total": plan.total_steps},
    }
    if run["attempts"] and "reason" not in run["attempts"][-1]:  # it could not say so
        run["attempts"][-1] |= {"end_step": state.progress.step, "reason": "killed"}
    run["attempts"].append({"start": _now(), "from_step": state.progress.step})
    if accelerator.is_main_process:
        if checkpoint is not None:
            set_newer_aside(folder.checkpoints, state.progress.step, lambda text: tell(Warned(text)))
        # the line of a pending evaluation is written once that is made
        folder.cut_metrics(-1 if checkpoint is None else state.progress.step - (state.progress.pending is not None))
        folder.write(run)
    note_training()
    tell(Ready(run, state.progress.step, plan.total_steps))
    clock = _Clock(run, state.progress)
    steps = _Steps(recipe, task, tokenizer, data, plan, state, folder, run, accelerator, stop, tell, clock)
    try:
        steps.take()
    finally:
        clock.note()
    if accelerator.is_main_process:
        _finish(here.recipe, state, tokenizer, folder, run)


@dataclass
class _Clock:
    """Counts the seconds of training from now on, and the speed, for run.json."""

    run: dict[str, Any]
    progress: Progress

    def __post_init__(self) -> None:
        self._started, self._seconds = time.perf_counter(), self.run.get("wall_seconds", 0.0)
        self._tokens = self.progress.num_tokens

    def note(self) -> None:
        """Write both into the run."""
        elapsed = time.perf_counter() - self._started
        self.run["wall_seconds"] = round(self._seconds + elapsed, 3)
        self.run["tokens_per_second"] = round((self.progress.num_tokens - self._tokens) / elapsed, 1)


@dataclass(frozen=True)
class _Steps:
    """The loop, with evaluation, checkpoints and logs where the recipe wants them, and an ear for signals."""

    recipe: Recipe
    task: Task
    tokenizer: Any
    data: Data
    plan: Plan
    state: State
    folder: RunFolder
    run: dict[str, Any]
    accelerator: Accelerator
    stop: Stop
    tell: OnEvent
    clock: _Clock

    def take(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: a signal came, or the time is over; there is a checkpoint.
            Diverged: something is not finite.
        """
        training, progress, state, plan = self.recipe.training, self.state.progress, self.state, self.plan
        self.stop.check()
        self.stop.at_once = False
        if progress.pending is not None:
            self.log_pending()
        elif progress.step == 0 and training.eval_on_start:
            progress.pending = {}
            self.log_pending()
        for result in fit(
            state.prepared, self.task, self.data.train, self.tokenizer, plan, self.accelerator, progress.step
        ):
            entry = _note_step(result, plan, training.logging_steps, progress, self.tell)
            last = result.step == plan.total_steps
            if last or _due(training.eval_strategy, training.eval_steps, result.step, plan):
                progress.pending = entry
                self.log_pending()
            else:
                self.log(entry)
            if last:
                break
            self.stop_if_asked()
            if _due(training.save_strategy, training.save_steps, result.step, plan):
                self.save()
                self.stop_if_asked(saved=True)

    def log_pending(self) -> None:
        """Evaluate, and log the result in the pending line."""
        progress = self.state.progress
        entry = dict(progress.pending or {})
        entry |= self.evaluated()
        progress.pending = None
        self.log(entry)

    def evaluated(self) -> dict[str, float]:
        """The metrics; nothing where there is no evaluation."""
        training, progress = self.recipe.training, self.state.progress
        if self.data.eval is None or training.eval_strategy == "no":
            return {}
        random = random_state()
        metrics = evaluate(
            self.state.prepared.model,
            self.task,
            self.data.eval,
            self.tokenizer,
            training.per_device_eval_batch_size,
            self.accelerator,
            stopping=lambda: self.asked() not in (0, TIME_LIMIT),  # or a long evaluation would never end
        )
        if metrics is None:
            restore_random(random)  # as when it is made from the beginning
            return self.evaluated() if self.only_saved() else self.give_up()
        if not all(map(math.isfinite, metrics.values())):
            raise Diverged(f"the evaluation after step {progress.step} is not finite: {metrics}", hint=LESS_LEARNING)
        self.tell(Evaluated(progress.step, metrics, _note_eval(self.recipe, self.state, metrics)))
        return metrics

    def log(self, entry: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, if there is something to write."""
        if entry and self.accelerator.is_main_process:
            step = self.state.progress.step
            self.folder.log({"step": step, "epoch": self.plan.epoch(step), **entry})

    def save(self) -> None:
        """Write a checkpoint."""
        progress, run = self.state.progress, self.run
        keep, made_by = self.recipe.training.save_total_limit, digests(run["identity"])
        if self.accelerator.is_main_process:
            self.folder.sync_metrics()
        path = save_checkpoint(self.folder.checkpoints, self.state, keep, self.accelerator, made_by)
        self.stop.saved = True
        run["steps"]["done"], run["resumable"] = progress.step, True
        self.clock.note()
        if self.accelerator.is_main_process:
            self.folder.write(run)
        self.tell(Saved(path))

    def asked(self) -> int:
        """What any process was asked for; all of them learn it."""
        request = self.stop.request
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(request), device=self.accelerator.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            request = int(flag)
        return request

    def only_saved(self) -> bool:
        """Whether no more than a checkpoint was asked for; it is written."""
        if not wants_save(self.asked()):
            return False
        self.stop.save = False
        if self.state.progress.step:
            self.save()
        return True

    def stop_if_asked(self, *, saved: bool = False) -> None:
        """Write the checkpoint that was asked for, unless it stands; raise Interrupted where more was asked for."""
        request = self.asked()
        if not request:
            return
        self.stop.save = False
        if not saved:
            self.save()
        if not wants_save(request):
            self.give_up(request)

    def give_up(self, request: int = 0) -> NoReturn:
        """Raise Interrupted, with a checkpoint if a step was done."""
        step, request = self.state.progress.step, request or self.asked()
        if not step:
            raise self.stop.interrupted("stopped before the first step", saved=self.stop.saved, request=request)
        if self.state.progress.pending is not None:
            self.save()
        raise self.stop.interrupted(
            f"stopped after step {step} of {self.plan.total_steps}", saved=True, request=request
        )


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
    write_finite(tensors, state.config, folder.path)
    own = tokens.save_with_adapter(folder.path, tokenizer, recipe.base_model)
    write_file(folder.path / "recipe.yaml", to_yaml(recipe).encode())
    draw_losses(folder.metrics(), folder.path / "loss.png")
    run["steps"]["done"] = progress.step
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
    folder.write(run)
    write_card(folder.path)  # reads what run.json says
    names = ("adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "recipe.yaml", *own)
    run["artefacts"] = [
        {"path": name, "bytes": (folder.path / name).stat().st_size, "sha256": sha256(folder.path / name)}
        for name in names
    ]
    prune(folder.checkpoints, recipe.training.save_total_limit)  # what could not be deleted when its time came
    run["attempts"][-1] |= {"end_step": progress.step, "reason": "complete"}
    run |= {"status": "complete", "resumable": False, "error": None, "exit_code": 12 if failed else 0}
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


def _of_main_process(run: dict[str, Any]) -> dict[str, Any]:
    """The main process's ``run``, in all of them."""
    shared = [run]
    broadcast_object_list(shared)
    return shared[0]


@contextlib.contextmanager
def _kept_account(folder: RunFolder, run: dict[str, Any], accelerator: Accelerator, stop: Stop) -> Iterator[None]:
    """Inside, run.json says running; afterwards it says how the run ended."""
    main, attempts_before = accelerator.is_main_process, len(run["attempts"])
    run |= {"status": "running", "pid": os.getpid(), "host": platform.node(), "exit_code": None, "error": None}
    if main:
        folder.write(run)
    try:
        yield
    except BaseException as error:
        ours = stop.explains(error) or _for_account(error)
        interrupted = isinstance(ours, Interrupted)
        run |= {
            "status": "interrupted" if interrupted else "failed",
            "exit_code": ours.exit_code,
            "error": ours.as_dict(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        if len(run["attempts"]) > attempts_before:
            run["attempts"][-1] |= {"end_step": run["steps"]["done"], "reason": run["status"]}
        if main:
            with contextlib.suppress(StorageError, OSError):
                if ours.exit_code == PeftcliError.exit_code:
                    folder.note_bug(traceback.format_exc())
                folder.write(run)
        if ours is error:
            raise
        raise ours from error


def _for_account(error: BaseException) -> PeftcliError:
    """The error as one of ours."""
    return known(error) or PeftcliError(f"{type(error).__name__}: {error}", hint="the traceback is in train.log")


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


def _refuse_other_content(here: OpenRun, options: StartOptions, content: list[str]) -> None:
    """Stops where the rows were encoded otherwise before the run was stopped, or are by another process of it.

    Raises:
        UsageError: another tokenizer, chat template or version of transformers gave other tokens.
        DataError: the data changed while the processes read it.
    """
    run = here.run
    before = run["data"].get("content", content) if run["attempts"] else content
    expected = any(change.key.partition(".")[0] in ("data", "dataset", "base_model", "task") for change in here.changes)
    if before != content and not expected:
        if "data" not in options.allow_change:
            raise UsageError(
                "holds a run whose rows were encoded otherwise: the tokenizer, its chat template, the hub's dataset or "
                "transformers has changed; nothing was changed",
                file=str(here.folder.path),
                key="training.output_dir",
                hint="choose another training.output_dir, or --overwrite; to go on all the same: --allow-change data",
            )
        here.changes.append(
            Change("data", *(hashlib.sha256(repr(each).encode()).hexdigest() for each in (before, content)))
        )
    if any(other != content for other in gather_object([content])):
        raise DataError("changed while the processes read it; run the command again", key="dataset")


def _due(strategy: str, every: int, step: int, plan: Plan) -> bool:
    return step % every == 0 if strategy == "steps" else strategy == "epoch" and plan.ends_epoch(step)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
