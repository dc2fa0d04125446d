"""Show a training run: a progress bar on a terminal, plain lines elsewhere, and the summary at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from peftcli.cli import console
from peftcli.data.rows import count_of
from peftcli.guard.files import command_word
from peftcli.reporting.blocks import in_order
from peftcli.train.events import Evaluated, Event, Message, Ready, RowsRead, Stepped

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.status import Status

_ROWS_INTERVAL = 5.0
"""Seconds between two lines about rows read."""
_MAX_METRICS = 8
_SHOWN = 0.001
"""The share of padding from which on it is shown."""
_THREADS = {
    "environment": "as the environment says",
    "cores": "one for each usable core",
    "resumed": "as when the run began",
}
"""Reason for the number of threads -> how it is told."""


class Progress:
    """Shows the events of ``peftcli.train.run.train`` on stderr."""

    def __init__(self, *, quiet: bool = False, label: str = ""):
        """Show a run; with a label, one of several at once, whose lines begin with it."""
        self.quiet, self.label = quiet, label
        self.redraws = not label and console.is_terminal(sys.stderr)
        self.trained = False
        self.total = 0
        self.size, self.unit = 0, "tokens"
        self.started = time.perf_counter()
        self.first_step = 0
        self.bar: RichProgress | None = None
        self.status: Status | None = None
        self.last_rows_line, self.last_rows = time.perf_counter(), ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_error: object) -> None:
        for display in (self.bar, self.status):
            if display is not None:
                display.stop()

    def show(self, event: Event) -> None:
        """Show an event; of a quiet run, only warnings."""
        self.trained |= isinstance(event, Ready)
        if self.quiet and not (isinstance(event, Message) and event.is_warning):
            return
        match event:
            case Message():
                self._log(f"warning: {event.text}" if event.is_warning else event.text)
            case RowsRead():
                self._show_rows(event)
            case Ready():
                self._show_ready(event)
            case Stepped():
                self._show_step(event)
            case Evaluated():
                names = in_order(event.metrics, event.main)
                metrics = "  ".join(f"{name} {event.metrics[name]:.4f}" for name in names)
                best = "  (best)" if event.best and event.step else ""
                self._log(f"evaluation after step {event.step}: {metrics}{best}")

    def _show_rows(self, event: RowsRead) -> None:
        text = f"{event.source}: {count_of(event.count, 'row')} {event.what}"
        if self.redraws:
            if self.status is None:
                self.status = console.rich_console(stderr=True).status("")
                self.status.start()
            self.status.update(console.clean(text))
            if event.done:
                self.status.stop()
                self.status = None
        elif not event.done and time.perf_counter() - self.last_rows_line < _ROWS_INTERVAL:
            return
        if (event.done or self.status is None) and text != self.last_rows:
            self._log(text)
            self.last_rows_line, self.last_rows = time.perf_counter(), text

    def _show_ready(self, event: Ready) -> None:
        run = event.run
        parameters, data = run["parameters"], run["data"]
        share = 100 * parameters["trainable"] / parameters["all"]
        self._log(f"training {parameters['trainable']:,} of {parameters['all']:,} parameters ({share:.3g} %)")
        self.unit = data.get("unit", self.unit)
        left_out = sum(data["dropped"].values()) + data["skipped"]
        lost = f" ({data['targets_cut']:,} targets lost)" if data["targets_cut"] else ""
        split = f", {data['split']} split" if data["split"] else ""
        split += f" ({data['pieces_left_out']} lose pieces without targets)" if data["pieces_left_out"] else ""
        examples = count_of(data["examples"], "example")
        self._log(
            f"on {examples}: {data['tokens']:,} {self.unit}, {data['targets']:,} of them targets; "
            f"{left_out} left out, {data['truncated']} truncated{lost}{split}"
        )
        if (padding := 1 - data["efficiency"]) >= _SHOWN:
            self._log(f"{padding:.1%} of the {self.unit} of a batch are padding, which this model or method needs")
        where = f"{run['processes']} x {run['device']}" if run["processes"] > 1 else run["device"]
        if threads := run.get("threads"):
            where += f" with {count_of(threads['count'], 'thread')}, {_THREADS[threads['reason']]}"
        begin = f"resuming after step {event.start_step}" if event.start_step else "from the start"
        self._log(f"{count_of(event.total_steps, 'step')} on {where}; {begin}")
        self.total, self.first_step, self.started = event.total_steps, event.start_step, time.perf_counter()
        if self.redraws:
            self._start_bar()

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[state]}"),
            console=console.rich_console(stderr=True),
            refresh_per_second=2,
        )
        self.bar.add_task("training", total=self.total, completed=self.first_step, state="")
        self.bar.start()

    def _show_step(self, event: Stepped) -> None:
        result = event.result
        self.size += result.num_tokens
        elapsed = time.perf_counter() - self.started
        rate = self.size / elapsed
        state = f"loss {event.mean_loss:.4f}  lr {result.learning_rate:.1e}  {rate:,.0f} {self.unit}/s"
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=result.step, state=state)
        elif event.logged:
            left = elapsed / (result.step - self.first_step) * (self.total - result.step)
            self._log(f"step {result.step}/{self.total}  epoch {event.epoch:.2f}  {state}  {_clock(left)} left")

    def _log(self, text: str) -> None:
        console.log(f"[{self.label}] {text}" if self.label else text)


def summary(run: dict[str, Any], folder: str) -> str:
    """Summarise the run in a folder, which may have been moved since, and suggest the next commands."""
    parameters, steps, evals = run["parameters"], run["steps"], run["eval"]
    share = 100 * parameters["trainable"] / parameters["all"]
    size = next(item["bytes"] for item in run["artefacts"] if item["path"] == "adapter_model.safetensors")
    early = f" of {steps['total']:,}, stopped early" if steps["done"] < steps["total"] else ""
    pace = ""
    if speed := run.get("tokens_per_second"):
        peak, unit = max(run["peak_memory_bytes"].values()) / 2**30, run["data"].get("unit", "tokens")
        pace = f" in {_clock(run['wall_seconds'])}, {speed:,.0f} {unit}/s, peak memory {peak:.1f} GiB"
    lines = [f"done: {count_of(steps['done'], 'step')}{early}{pace}"]
    lines.append(f"  train loss  {run['train_loss']:.4f}")
    lines += _metrics_table(evals["first"], evals["kept"], evals.get("main", "eval_loss"))
    lines += [f"  {line}" for line in comparison_lines(run.get("comparison", {}))]
    warnings = run.get("warnings", [])
    lines += [f"  warning     {text}" for text in warnings]
    if "forgetting" in run:
        lines.append(f"  forgotten   {_forgotten(run['forgetting'])}")
    for gate in run["gates"]:
        lines.append(f"  gate        {gate['metric']} {gate['gate']}: {'passed' if gate['passed'] else 'FAILED'}")
    held = f"{parameters['trainable']:,} parameters, {share:.3g} %; {console.format_size(size)}"
    lines.append(f"  adapter     {folder} ({held})")
    word = command_word(folder)
    if any(item["path"] == "report.html" for item in run["artefacts"]):
        lines.append(f"  report      {folder.rstrip('/')}/report.html")
    if run["recipe"]["base_model"]["trust_remote_code"]:  # by the recipe's leave only
        use = f"peftcli evaluate {command_word(f'{folder}/recipe.yaml')} --adapter {word} dataset.eval=FILE"
    else:
        from peftcli.tasks import TASKS

        use = TASKS[run["task"]["type"]].filled(run["task"]).command(word)
    lines += ["next:", f"  {use}"]
    if warnings or not all(gate["passed"] for gate in run["gates"]):  # it is not good enough to be merged or shared
        return "\n".join(lines)
    if run["mergeable"]:
        lines.append(f"  peftcli merge {word} --output {command_word(folder.rstrip('/') + '-merged')}")
    base = " --base-model-id USER/BASE" if run["identity"]["base_model"] else ""  # it is a folder, not on the hub
    lines.append(f"  peftcli push {word} USER/NAME{base}")
    return "\n".join(lines)


def comparison_lines(found: Mapping[str, Any]) -> list[str]:
    """Return a comparison with the base model in three lines at most; none where none was asked for."""
    if "skipped" in found:
        return [f"not compared with the base model: {found['skipped']}"]
    metrics, lines = found.get("metrics", {}), list[str]()
    for name in in_order(metrics, found.get("main", ""))[:2]:
        each = metrics[name]
        chance = ", no more than chance" if each["verdict"] == "no_difference" else f", {each['verdict']}"
        lines.append(
            f"{name} {each['base']:.4f} -> {each['adapter']:.4f} (base -> adapter), difference "
            f"{each['difference']:+.3g}, 95 % interval {each['low']:+.3g} to {each['high']:+.3g}{chance}"
        )
    if right := found.get("right"):
        guesses = "; the base model's head is new, so it guesses" if found["base_head_is_new"] else ""
        counts = f"of {count_of(found['rows'], 'row')} the base model has {right['base']:,} right"
        lines.append(f"{counts}; the adapter keeps {right['kept']:,} of them and gains {right['gained']:,}{guesses}")
    return lines


def table_of_adapters(result: Mapping[str, Any]) -> list[str]:
    """Return the lines of several adapters: the main metric of each, against the base model and the best of them."""
    main, lines = result["eval"]["main"], [f"{result['eval']['main']}: adapter, value, difference to base, to the best"]
    for row in result["adapters"]:
        found = [
            (row.get(key, {}).get("metrics", row.get(key, {}))).get(main) for key in ("comparison", "against_best")
        ]
        words = [
            f"{each['difference']:+.3g} ({each['low']:+.3g} to {each['high']:+.3g}, {each['verdict']})"
            if each
            else none
            for each, none in zip(found, ("not compared", "the best"), strict=True)
        ]
        lines.append(f"{row['adapter']}  {row['eval']['last'][main]:.6g}  {'  '.join(words)}")
    if spread := result.get("spread", {}).get(main):
        lines.append(
            f"over {len(result['adapters'])} seeds: mean {spread['mean']:.6g}, deviation {spread['deviation']:.3g}"
        )
    return lines


def _metrics_table(first: Mapping[str, float], kept: Mapping[str, float], main: str) -> list[str]:
    """Return the lines of a table of metrics before and after training; none without evaluation."""
    names = in_order(kept, main)
    shown = names[:_MAX_METRICS]
    width = max(map(len, shown), default=0)
    lines = [f"  {'metric':<{width}}{'before':>10}{'after':>10}"] if shown else []
    for name in shown:
        before = f"{first[name]:.4f}" if name in first else "-"
        lines.append(f"  {name:<{width}}{before:>10}{kept[name]:>10.4f}")
    return lines + [f"  and {len(names) - len(shown)} more in run.json"] * (len(names) > len(shown))


def _forgotten(found: Mapping[str, Any]) -> str:
    """Say in a line what was forgotten, or why it is not known."""
    if "skipped" in found:
        return f"not measured: {found['skipped']}"
    return (
        f"loss {found['loss']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}) on {found['texts']} other texts, "
        f"{found['kept_tokens']:.0%} of the base's tokens kept"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
