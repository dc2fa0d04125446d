"""The ``peftcli`` command: its subcommands, and how errors are shown.

A new command is a file here with one function, and a word in ``_COMMANDS``. Its function imports what it runs, so that
``--help`` imports nothing heavy.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from peftcli.cli import (
    cache,
    check,
    combine,
    console,
    diff,
    evaluate,
    explain,
    generate,
    info,
    inspect,
    merge,
    predict,
    push,
    schema,
    skill,
    status,
    train,
    verify,
)
from peftcli.errors import Interrupted, PeftcliError, UsageError, to_peftcli_error
from peftcli.system import signals
from peftcli.system.cores import set_variables
from peftcli.system.memory import postponed_collection
from peftcli.system.outputs import StdoutClosed
from peftcli.train.devices.launch import is_main_process, launched_processes, report_outcome, started_by_peftcli
from peftcli.train.devices.schedulers import take_slurms_rank

_BROKEN_PIPE = 141
_SHARE_WORK = ("train", "evaluate")
"""The commands whose work the processes of a launcher share."""


class _Group(TyperGroup):
    """Lists the commands under the headings that they were registered with, and runs most of them in one process."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return a command line's command. Where a launcher started several processes, most run in the first alone."""
        resolved, count = super().resolve_command(ctx, args), launched_processes()
        if count > 1 and (name := resolved[0]) not in _SHARE_WORK:
            if not is_main_process():
                if os.environ.get("SLURM_STEP_NUM_TASKS") == str(count):
                    console.log(f"{name} runs in task 0 alone; to run it in each task, set SLURM_STEP_NUM_TASKS=1")
                raise typer.Exit
            console.log(f"{name} runs in one of the {count} processes that were started")
        return resolved

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        headings: dict[str, list[tuple[str, str]]] = {}
        width = max(len(name) for name in self.commands)
        for name, command in self.commands.items():
            text = command.get_short_help_str(formatter.width - width - 6)
            headings.setdefault(getattr(command, "rich_help_panel", ""), []).append((name.ljust(width), text))
        for heading, rows in headings.items():
            with formatter.section(heading):
                formatter.write_dl(rows)


app = typer.Typer(
    cls=_Group, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True
)

_COMMANDS = {
    "Recipes": (train, status, evaluate, inspect, check, explain, schema, skill, cache),
    "Adapters": (generate, predict, merge, verify, info, diff, combine, push),
}
"""Heading of the help -> the files of its commands, each with a function of the file's name."""
for _heading, _files in _COMMANDS.items():
    for _file in _files:
        _name = _file.__name__.rpartition(".")[2]
        app.command(_name, rich_help_panel=_heading)(getattr(_file, _name))


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.out(f"peftcli {version('peftcli')}")
        raise typer.Exit


@app.callback()
def peftcli(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the tracebacks of errors. Works with every command.")
    ] = False,
) -> None:
    """Fine-tune large pretrained models by training few parameters, from one YAML recipe."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line ``args``, by default that of this process; return the exit code."""
    console.open_closed_streams()
    console.json_printed = False
    warnings.formatwarning = console.format_warning
    given = list(sys.argv[1:] if args is None else args)
    options = given[: given.index("--")] if "--" in given else given
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # other libraries' progress bars, which redraw
    debug, as_json = "--debug" in options, "--json" in options
    rest = [arg for arg in options if arg != "--debug"] + given[len(options) :]
    is_own = args is None or started_by_peftcli()  # and nothing is left to stop while this process ends
    try:
        take_slurms_rank()
        set_variables()
        with (
            postponed_collection(),
            console.redacted_streams(),
            console.debug_log() if debug else nullcontext(),
            signals.handle_signals(last=is_own),
        ):
            code = _run(rest or ["--help"])
            sys.stdout.flush()
        report_outcome(None)
        return code
    except StdoutClosed:
        return _BROKEN_PIPE
    except Exception as error:
        if debug:
            import traceback

            console.log(traceback.format_exc())
        return _show_error(_as_peftcli_error(error), as_json)
    except KeyboardInterrupt:
        return _show_error(Interrupted("stopped (SIGINT)", exit_code=130), as_json)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of a library in Rust, which is no Exception
            raise
        return _show_error(_as_peftcli_error(error), as_json)


def _show_error(error: PeftcliError, as_json: bool) -> int:
    """Show an error, or let the launcher show it; return the exit code."""
    code = report_outcome(error)
    return console.report_error(error, as_json) if code is None else code


def _run(args: list[str]) -> int:
    command = get_command(app)
    try:
        with command.make_context("peftcli", args) as context:
            command.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    return 0


def _as_peftcli_error(error: BaseException) -> PeftcliError:
    """Convert an exception to a PeftcliError. For typer's, the hint names the command's help."""
    if (ours := to_peftcli_error(error)) is not None:
        return ours
    if hasattr(error, "format_message"):
        path = getattr(getattr(error, "ctx", None), "command_path", "peftcli")
        message = error.format_message().replace("Value error, ", "")  # typer uses pydantic
        return UsageError(message, hint=f"see `{path} --help`")
    if isinstance(error, typer.Abort):
        return Interrupted("aborted", exit_code=130)
    return PeftcliError(f"peftcli failed: {type(error).__name__}: {error}; run with --debug for the traceback")
