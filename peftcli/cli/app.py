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
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from peftcli.cli import (
    cache,
    check,
    combine,
    console,
    convert,
    demo,
    diff,
    evaluate,
    explain,
    export,
    generate,
    import_,
    info,
    init,
    inspect,
    merge,
    predict,
    push,
    report,
    runs,
    schema,
    skill,
    status,
    sweep,
    trace,
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
FIRST_HOUR = ("demo", "init", "check", "inspect", "train", "predict", "generate")
"""What a newcomer runs, in this order: the help lists them first, as far as they are there."""
_SHARE_WORK = ("train", "evaluate")
"""The commands whose work the processes of a launcher share."""


class _Group(TyperGroup):
    """Lists the commands under headings, those of a first hour first, and runs most of them in one process."""

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

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Write what the program does and its commands, those of a first hour first."""
        super().format_help_text(ctx, formatter)
        headings: dict[str, list[str]] = {"The first hour": [name for name in FIRST_HOUR if name in self.commands]}
        for name, command in self.commands.items():
            if name not in FIRST_HOUR:
                headings.setdefault(getattr(command, "rich_help_panel", ""), []).append(name)
        width = max(map(len, self.commands))
        for heading, names in headings.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), self.commands[name].get_short_help_str()) for name in names])

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write nothing: ``format_help_text`` has listed them, before the options."""


class _Command(TyperCommand):
    """Shows how its arguments are written, without the types that Python has for them."""

    def get_short_help_str(self, limit: int = 0) -> str:
        """Return the first sentence of the help, whole."""
        paragraph = " ".join((self.help or "").partition("\n\n")[0].split())
        return f"{paragraph.partition('. ')[0].rstrip('.')}."

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the arguments, and the options that must be given: ``ADAPTER --output PATH [OPTIONS]``."""
        params = self.get_params(ctx)
        needed = [param for param in params if param.param_type_name == "option" and param.required]
        options = [f"{param.opts[0]} {param.metavar or (param.name or '').upper()}" for param in needed]
        arguments = [_usage(param) for param in params if param.param_type_name == "argument"]
        return [*arguments, *options, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options, each with its help."""
        rows: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                is_argument = param.param_type_name == "argument"
                row = (_usage(param) if is_argument else record[0], record[1].replace("  [required]", ""))
                rows.setdefault("Arguments" if is_argument else "Options", []).append(row)
        for heading, found in rows.items():
            with formatter.section(heading):
                formatter.write_dl(found)


def _usage(argument: Any) -> str:
    """Return an argument as a usage line has it: ``RECIPE``, ``[KEY=VALUE]...``."""
    name = argument.metavar or argument.name.upper()
    if not argument.required and not name.startswith("["):
        name = f"[{name}]"
    return name + "..." * (argument.nargs != 1 and not name.endswith("..."))


app = typer.Typer(cls=_Group, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=True)

_COMMANDS = {
    "Recipes": (
        *(demo, init, train, sweep, status, runs, report, evaluate),
        *(inspect, check, import_, explain, schema, skill, cache),
    ),
    "Adapters": (generate, predict, trace, merge, export, verify, info, diff, combine, convert, push),
}
"""Heading of the help -> the files of its commands, each with a function of the file's name."""
for _heading, _files in _COMMANDS.items():
    for _file in _files:
        _name = _file.__name__.rpartition(".")[2]
        app.command(_name.rstrip("_"), cls=_Command, rich_help_panel=_heading)(getattr(_file, _name))


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
    if os.environ.get("_PEFTCLI_COMPLETE"):  # the shell asks, after Tab; typer answers, and ends the process
        os.environ["COLUMNS"] = "10000"  # typer breaks the help of a completion, and a shell takes a line for one
        get_command(app)(prog_name="peftcli")
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
