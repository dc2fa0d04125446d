"""Run the training loop; evaluate, save, log and react to signals between steps."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import torch

from peftcli.core.weights import adapter_state
from peftcli.data.rows import count_of
from peftcli.errors import Diverged, ModelError, OutOfMemory, UsageError, to_peftcli_error
from peftcli.system.signals import TIME_LIMIT, wants_save
from peftcli.train.batches import num_workers
from peftcli.train.data import RunData
from peftcli.train.evaluate import best_metric, evaluate, main_metric
from peftcli.train.events import Evaluated, Message, Stepped, StepResult
from peftcli.train.loop import LESS_LEARNING, Gradients, fit
from peftcli.train.memory.fit import too_large_a_step, too_large_an_evaluation
from peftcli.train.plan import Plan
from peftcli.train.runs.checkpoint import State, random_state, restore_random, save_checkpoint
from peftcli.train.runs.identity import digests
from peftcli.train.runs.resume import Run
from peftcli.train.trackers import Trackers


class TrainingLoop:
    """The steps of a run, and what happens between them."""

    def __init__(self, run: Run, data: RunData, state: State, gradients: Gradients, trackers: Trackers):
        self._run, self.data, self.state, self.plan = run, data, state, data.plan
        self.gradients, self.trackers = gradients, trackers
        self.training, self.progress = run.recipe.training, state.progress
        self.started, self.seconds_before = time.perf_counter(), run.record.wall_seconds or 0.0
        self.tokens_before = state.progress.num_tokens
        self.pending_is_saved = False
        """Whether a checkpoint holds the state before the evaluation that is made."""
        self.evaluated_step = -1
        """The step of the last evaluation here."""

    def run(self) -> Iterator[None]:
        """Train to the end, pausing before the first step and after each one.

        Raises:
            Interrupted: a signal came, or the time limit passed; there is a checkpoint.
            Diverged: a loss or gradient is NaN or Inf.
        """
        try:
            self._start()
            yield
            if not self._is_over():
                yield from self._steps()
            if self._is_over():
                name, count = self.training.metric_for_best_model, self.progress.no_better
                self._run.tell(Message(f"stopped early: {name} was no better in {count_of(count, 'evaluation')}"))
        except Exception as error:
            if isinstance(to_peftcli_error(error), OutOfMemory):
                raise self._too_large() from error
            if self.progress.step == 0 and _is_of_model(error):
                message = f"{type(self.state.model).__name__} does not take what this task gives it: {error}"
                hint = "choose another base model for this task; run with --debug for the traceback"
                raise ModelError(message, key="base_model", hint=hint) from error
            raise
        finally:
            self._record_speed()

    def _start(self) -> None:
        stop, progress = self._run.stop, self.progress
        stop.check()
        stop.at_once = False
        if progress.pending is None and progress.step == 0 and self.training.eval_on_start:
            progress.pending = {}
        if progress.pending is not None:
            self._log_pending()

    def _steps(self) -> Iterator[None]:
        training, plan, patience = self.training, self.plan, self.training.early_stopping_patience
        with closing(self.gradients), closing(fit(self.gradients)) as steps:
            for result in steps:
                line = self._count(result)
                last = result.step == plan.total_steps
                saves = _is_due(training.save_strategy, training.save_steps, result.step, plan)
                evaluates = last or _is_due(training.eval_strategy, training.eval_steps, result.step, plan)
                if not evaluates:
                    self._log(line)
                else:
                    self.progress.pending = line
                    ends = last or (patience is not None and self.progress.no_better + 1 >= patience)  # it may
                    if saves or (ends and training.save_strategy != "no"):
                        self.save()  # or what fails from here on would lose the steps
                        self.pending_is_saved = True
                    self._log_pending()
                if last or self._is_over():
                    break
                self._handle_request()
                if saves and not evaluates:
                    self.save()
                    self._handle_request(saved=True)
                yield

    def _too_large(self) -> OutOfMemory:
        """The error of the step, or the evaluation, that the memory does not hold."""
        if self.progress.pending is not None:
            return too_large_an_evaluation(self._run.recipe, saved=self._run.stop.saved)
        step, sizes = self.progress.step, self.plan.sizes
        rows = [[int(size) for row in batch for size in sizes[row]] for batch in self.gradients.micro_batches(step)]
        largest = max(rows, key=sum)
        return too_large_a_step(step + 1, largest, self._run.recipe, self.data.task, saved=self._run.stop.saved)

    def _is_over(self) -> bool:
        """Whether training ends early: evaluations have been no better for as long as the recipe waits."""
        patience, progress = self.training.early_stopping_patience, self.progress
        if patience is None or self.evaluated_step != progress.step:  # a resumed run may have less patience
            return False
        return progress.no_better >= patience and progress.step < self.plan.total_steps

    def _count(self, result: StepResult) -> dict[str, Any]:
        """Count a step. Returns its line of metrics.jsonl; empty where the step is not logged."""
        plan, progress = self.plan, self.progress
        loss_sum = result.loss * result.num_targets
        progress.step = result.step
        progress.loss_sum += loss_sum
        progress.num_targets += result.num_targets
        progress.num_tokens += result.num_tokens
        progress.window_loss_sum += loss_sum
        progress.window_num_targets += result.num_targets
        mean = progress.window_loss_sum / progress.window_num_targets
        logged = result.step % self.training.logging_steps == 0 or result.step in (1, plan.total_steps)
        self._run.tell(Stepped(result, plan.epoch(result.step), logged, mean))
        if not logged:
            return {}
        progress.window_loss_sum, progress.window_num_targets = 0.0, 0
        line = asdict(result) | {"loss": mean}
        return line | line.pop("measures")

    def _log(self, line: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, unless it is empty."""
        if line and self._run.is_main:
            step = self.progress.step
            entry = {"step": step, "epoch": self.plan.epoch(step), **line}
            self._run.folder.log(entry)
            self.trackers.log(entry)

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def _log_pending(self) -> None:
        """Evaluate, and log the metrics in the pending line."""
        line = dict(self.progress.pending or {})
        line |= self.evaluate()
        self.progress.pending, self.pending_is_saved = None, False
        self._log(line)

    def evaluate(self) -> dict[str, float]:
        """The metrics on the evaluation data; empty where the recipe wants no evaluation."""
        training, progress, data = self.training, self.progress, self.data
        if data.examples.eval is None or training.eval_strategy == "no":
            return {}
        random = random_state()
        metrics = evaluate(
            self.state.prepared.model,
            data.task,
            data.examples.eval,
            training.per_device_eval_batch_size,
            self._run.accelerator,
            num_workers=num_workers(training, data.task),
            stopping=self._stops_evaluation,
        )
        self.state.prepared.gather_parameters()
        if metrics is None:
            restore_random(random)  # as when it is made from the beginning
            if not wants_save(self.request()):
                self._interrupt()
            self._run.stop.save = False
            self.save()
            self.pending_is_saved = True
            return self.evaluate()
        if not math.isfinite(metrics["eval_loss"]):
            raise Diverged(f"the evaluation after step {progress.step} is not finite: {metrics}", hint=LESS_LEARNING)
        if self._run.is_main:
            data.task.illustrate(self.state.model, self._run.folder.path, progress.step)
        defined = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name, value in metrics.items():
            if name not in defined:
                self._run.warn(f"{name} is {value} after step {progress.step}: it is left out, and is not the best")
        is_best = self._record_metrics(metrics, defined)
        self._run.tell(Evaluated(progress.step, defined, is_best, main_metric(self.data.task, defined)))
        return defined

    def _record_metrics(self, metrics: dict[str, float], defined: dict[str, float]) -> bool:
        """Keep the defined metrics, and the adapter if it is the best so far and the recipe wants the best."""
        training, progress = self.training, self.progress
        progress.last_eval, self.evaluated_step = defined, progress.step
        if progress.step == 0:
            progress.first_eval = defined
        name = best_metric(training)
        if name not in metrics:
            raise UsageError(
                f"evaluation reports {', '.join(metrics)}, not {training.metric_for_best_model}",
                key="training.metric_for_best_model",
            )
        lower = any(fnmatchcase(name.removeprefix("eval_"), known) for known in self.data.task.lower_is_better)
        greater = not lower if training.greater_is_better is None else training.greater_is_better
        before = progress.best_eval.get(name)
        gain = 0.0 if before is None else metrics[name] - before if greater else before - metrics[name]
        best = name in defined and (before is None or gain > 0)
        counts = name in defined and (before is None or gain > training.early_stopping_threshold)
        progress.no_better = 0 if counts else progress.no_better + 1
        if best:
            progress.best_eval, progress.best_step = defined, progress.step
            if training.load_best_model_at_end:
                tensors = adapter_state(self.state.model)
                self.state.best_adapter = {key: value.cpu().clone() for key, value in tensors.items()}
        return best

    # --- checkpoints and signals --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint."""
        run, record = self._run, self._run.record
        keep = self.training.save_total_limit
        made_by = {**digests(record.identity), "run": json.loads(record.content())}
        if run.is_main:
            (run.replaces or run.folder).keep_lock()
            run.folder.sync_metrics()
        path = save_checkpoint(run.folder.checkpoints, self.state, keep, run.accelerator, made_by)
        run.stop.saved = True
        record.steps.done, record.resumable = self.progress.step, True
        self._record_speed()
        run.write_record()
        run.tell(Message(f"checkpoint: {path}"))

    def _record_speed(self) -> None:
        elapsed, record = time.perf_counter() - self.started, self._run.record
        record.wall_seconds = round(self.seconds_before + elapsed, 3)
        record.tokens_per_second = round((self.progress.num_tokens - self.tokens_before) / elapsed, 1)

    def request(self) -> float:
        """The request that any process has received, agreed by all; 0: none."""
        accelerator, request = self._run.accelerator, self._run.stop.request
        if accelerator.num_processes > 1:
            flag = torch.tensor(float(request), device=accelerator.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            request = float(flag)
        return request

    def _handle_request(self, *, saved: bool = False) -> None:
        """Save if a checkpoint is requested and not ``saved``; raise Interrupted if a stop is requested."""
        request = self.request()
        if not request:
            return
        self._run.stop.save = False
        if not saved:
            self.save()
        if not wants_save(request):
            self._interrupt(request)

    def _stops_evaluation(self) -> bool:
        """Whether a request stops the evaluation; the time limit does not, or a long one would never end.

        Nor does a request for a checkpoint where this step has one, or no step is done.
        """
        request = self.request()
        if wants_save(request) and (self.pending_is_saved or not self.progress.step):
            self._run.stop.save = False
            return False
        return request not in (0, TIME_LIMIT)

    def _interrupt(self, request: float = 0) -> NoReturn:
        """Raise Interrupted, with a checkpoint if a step was done."""
        stop, step, request = self._run.stop, self.progress.step, request or self.request()
        if not step:
            raise stop.to_error("stopped before the first step", saved=stop.saved, request=request)
        if self.progress.pending is not None and not self.pending_is_saved:
            self.save()
        raise stop.to_error(f"stopped after step {step} of {self.plan.total_steps}", saved=True, request=request)


def _is_due(strategy: str, every: int, step: int, plan: Plan) -> bool:
    return step % every == 0 if strategy == "steps" else strategy == "epoch" and plan.ends_epoch(step)


def _is_of_model(error: Exception) -> bool:
    """Whether an unexpected exception comes from the base model's own code, which a task has called."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = max(at for at, name in enumerate(names) if name.startswith("peftcli."))
    called = names[own + 1 : own + 2] == ["torch.nn.modules.module"]
    return called and names[own].startswith("peftcli.tasks.") and to_peftcli_error(error) is None
