"""merge, combine, generate, inspect and the rest: killed, stopped, on a bad disk, and two of them at once.

What they write is whole under its final name, or not there, and the same command again makes it.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import strace
import trainkit
from campaigns import Campaign, Trial
from hub_server import TOKEN, Hub
from in_process import places
from trainkit import Child, files_of

Before = Callable[[], None] | None


@dataclass(frozen=True)
class Command:
    """A command that writes ``out`` in its folder."""

    name: str
    words: tuple[str, ...]
    """Its arguments. ``{folder}`` and the names of the inputs stand for paths."""
    output: str
    """A file or folder below the folder."""
    prepared: bool = False
    """Whether the output is a folder that is there already."""

    def start(self, folder: Path, before: Before = None) -> Child:
        """Starts it in a process of its own."""
        if self.prepared:
            (folder / self.output).mkdir(exist_ok=True)
        words = [word.format(folder=folder, **places()) for word in self.words]
        return Child(folder, *words, env={"PEFTCLI_CACHE": str(trainkit.scratch() / "cache")}, before=before)

    def product(self, folder: Path) -> dict[str, bytes]:
        """The files of its output by their names; none if there is no output."""
        output = folder / self.output
        if output.is_dir():
            return {name: content for name, content in files_of(output).items() if ".partial" not in name}
        return {output.name: output.read_bytes()} if output.exists() else {}

    def leftovers(self, folder: Path) -> list[str]:
        """What there is of it under other names."""
        return [
            str(path.relative_to(folder)) for path in folder.rglob(".*") if path.name.endswith((".partial", ".tmp"))
        ]


_GENERATE = ("generate", "{adapter}", "--input={prompts}", "--max-new-tokens=4", "--batch-size=2")
_MERGE = ("merge", "{adapter}", "--output={folder}/out", "--no-verify")
COMMANDS = [
    Command("merge", _MERGE, "out"),
    Command("merge into a folder that is there", _MERGE, "out", prepared=True),
    Command("combine", ("combine", "{adapter}=0.5", "{other}=0.5", "--output={folder}/out"), "out"),
    Command("generate", (*_GENERATE, "--output={folder}/out.jsonl"), "out.jsonl"),
    Command("inspect", ("inspect", "{recipe}", "--html={folder}/out.html"), "out.html"),
]
MERGE, MERGE_INTO, COMBINE, GENERATE, INSPECT = COMMANDS


@functools.cache
def whole(command: Command) -> dict[str, bytes]:
    """What the command makes when nothing disturbs it. Made once in this process, and kept."""
    folder = Path(tempfile.mkdtemp(dir=trainkit.scratch(), prefix="whole-"))
    child = command.start(folder)
    assert child.wait() == 0, child.err
    assert not command.leftovers(folder), command.leftovers(folder)
    return command.product(folder)


def check_whole_or_absent(command: Command, folder: Path) -> bool:
    """Fails if anything under a final name is not whole. Whether all of it is there."""
    expected, found = whole(command), command.product(folder)
    for name, content in found.items():
        assert content == expected.get(name), f"{name} is not whole: {len(content)} bytes of {len(expected[name])}"
    if not command.prepared:
        assert not found or found.keys() == expected.keys(), f"only {sorted(found)} is there"
    return found.keys() == expected.keys()


def finish(command: Command, folder: Path) -> None:
    """The same command again makes what was to be made, unless it was made already, and clears up."""
    found = command.product(folder)
    child = command.start(folder)
    code = child.wait()
    if found and command.output == "out":
        assert code == 2, f"over what is there it ended with {code}: {child.err}"
        assert "not empty" in child.err, child.err
        assert command.product(folder) == found
        return
    assert code == 0, f"started again, it ended with {code}: {child.err}"
    assert command.product(folder) == whole(command), "started again, it made something else"
    assert not command.leftovers(folder), f"left over: {command.leftovers(folder)}"


# --- killed, and on a bad disk ----------------------------------------------------------------------------------------


@functools.cache
def points(command: Command) -> list[strace.Point]:
    """The calls by which a command changes its output, or what stands for it until it is whole."""
    strace.require()
    whole(command)
    folder = Path(tempfile.mkdtemp(dir=trainkit.scratch(), prefix="traced-"))
    found = [point for point in strace.points(command.start, folder) if _about_output(point)]
    # what is written before it is published is the same as without the folder
    return [point for point in found if not command.prepared or point.syscall in ("mkdir", "rename", "rmdir")]


def _about_output(point: strace.Point) -> bool:
    """Whether a call is about the output."""
    return point.path.split("/")[0].lstrip(".").startswith("out")


CALLS = {"combine": 43, "merge": 69, "merge into a folder that is there": 12, "generate": 13, "inspect": 5}
"""How many of these calls each command makes."""


def point(command: Command, number: int) -> strace.Point:
    """One of the calls, counted from 0."""
    found = points(command)
    assert len(found) == CALLS[command.name], f"it makes {len(found)} calls, so that not all are tried"
    return found[number]


def kill(command: Command, number: int, folder: Path) -> None:
    """Kill a command when it is about to make a call, then start it again."""
    strace.inject(command.start, folder, point(command, number), "signal=SIGKILL")
    check_whole_or_absent(command, folder)
    finish(command, folder)


def fail(command: Command, number: int, folder: Path) -> None:
    """One call of a command fails: it says so, and leaves nothing."""
    chosen = point(command, number)
    error = "EIO" if chosen.syscall in ("fsync", "close", "chmod") else "ENOSPC"
    child = strace.inject(command.start, folder, chosen, f"error={error}")
    code, messages = child.wait(), [line for line in child.err.splitlines() if line.startswith("error: ")]
    made = check_whole_or_absent(command, folder)
    assert code == 7 or (code == 0 and made and chosen.syscall in _CLEARING), f"it ended with {code}: {child.err}"
    if code:
        assert len(messages) == 1, child.err
        assert str(folder / command.output) in messages[0], messages[0]
        assert command is GENERATE or not command.leftovers(folder), f"left over: {command.leftovers(folder)}"
    finish(command, folder)


_CLEARING = ("unlink", "unlinkat", "rmdir", "close")
"""What may fail without harm."""


def _at_every_call(do: Callable[[Command, int, Path], None]) -> Sequence[Trial]:
    return [
        Trial(f"{command.name}, call {number + 1}", functools.partial(do, command, number))
        for command in sorted(COMMANDS, key=lambda command: list(CALLS).index(command.name))
        for number in range(CALLS[command.name])
    ]


# --- stopped ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """When a function of peftcli is called."""

    place: str
    """``module:function``, or ``module:Class.method``."""
    turn: int = 1

    def __str__(self) -> str:
        return self.place.removeprefix("peftcli.") + (f", time {self.turn}" if self.turn > 1 else "")


@dataclass(frozen=True)
class Signal:
    """Sends a signal to its own process at a moment."""

    moment: Moment
    number: int

    def __call__(self) -> None:
        module, _, name = self.moment.place.partition(":")
        owner = importlib.import_module(module)
        *classes, name = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        inner, calls = getattr(owner, name), []

        def outer(*args: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == self.moment.turn:
                os.kill(os.getpid(), self.number)
            return inner(*args, **options)

        setattr(owner, name, outer)


NAMES = {signal.SIGINT: "INT", signal.SIGTERM: "TERM", signal.SIGUSR1: "USR1"}
STOPPED = [
    (MERGE, Moment("peftcli.adapters.merge:find_adapter")),
    (MERGE, Moment("peftcli.models.open:OpenBase.empty_model")),
    (MERGE, Moment("peftcli.adapters.merge:write_file")),
    (MERGE, Moment("peftcli.models.open:OpenBase.processor")),
    (MERGE, Moment("peftcli.system.outputs:_publish")),
    (MERGE_INTO, Moment("peftcli.adapters.merge:write_file")),
    (MERGE_INTO, Moment("peftcli.system.outputs:_move_into")),
    (COMBINE, Moment("peftcli.adapters.combine:read_tensors", 2)),
    (COMBINE, Moment("peftcli.adapters.combine:write_adapter")),
    (COMBINE, Moment("peftcli.system.outputs:_publish")),
    (GENERATE, Moment("peftcli.models.open:OpenBase.model")),
    (GENERATE, Moment("peftcli.tasks.text.generation:TextGenerator.generate")),
    (GENERATE, Moment("peftcli.tasks.text.generation:TextGenerator.generate", 2)),
    (GENERATE, Moment("peftcli.tasks.text.generation:TextGenerator.generate", 3)),
    (GENERATE, Moment("peftcli.system.outputs:sync_folder")),
    (INSPECT, Moment("peftcli.models.open:OpenBase.processor")),
    (INSPECT, Moment("peftcli.inspection.report:audit")),
    (INSPECT, Moment("peftcli.inspection.page:write_output")),
]


def stop(command: Command, moment: Moment, number: signal.Signals, folder: Path) -> None:
    """A signal ends a command with a message. It leaves nothing half, and starts again."""
    child = command.start(folder, Signal(moment, number))
    code = child.wait()
    made = check_whole_or_absent(command, folder)
    kept = [path for path in command.leftovers(folder) if (folder / path).stat().st_size]
    assert not made or moment.place.startswith("peftcli.system.outputs"), "it went on as if nothing had happened"
    _check_stopped(child, code, number, resumable=bool(kept) or (made and command is GENERATE))
    assert not kept or command is GENERATE, f"left over: {kept}"
    if kept:
        assert "run the same command again to resume" in child.err, child.err
    finish(command, folder)


def _check_stopped(child: Child, code: int, number: signal.Signals, resumable: bool = False) -> None:
    wanted = 130 if number == signal.SIGINT else 75 if resumable else 143
    messages = [line for line in child.err.splitlines() if line.startswith("error: ")]
    assert code == wanted, f"it ended with {code}, not {wanted}: {child.err}"
    assert len(messages) == 1, child.err
    assert f"(SIG{NAMES[number]})" in messages[0], messages[0]
    assert "Traceback" not in child.err, child.err


READING = {
    "evaluate": (
        ("evaluate", "{recipe}", "--adapter={adapter}"),
        (
            "peftcli.train.evaluate_adapter:load_data",
            "peftcli.train.evaluate_adapter:load_base",
            "peftcli.train.evaluate_adapter:evaluate",
        ),
    ),
    "check --deep": (
        ("check", "{recipe}", "--deep"),
        ("peftcli.train.examine:load_data", "peftcli.models.open:OpenBase.empty_model"),
    ),
    "train --dry-run": (("train", "{recipe}", "--dry-run"), ("peftcli.models.open:OpenBase.processor",)),
    "generate, one prompt": (
        ("generate", "{adapter}", "--prompt=a"),
        ("peftcli.tasks.text.generation:generate",),
    ),
    "info": (("info", "{adapter}"), ("peftcli.adapters.diff:read_tensors",)),
    "diff": (("diff", "{adapter}", "{other}"), ("peftcli.adapters.diff:read_tensors",)),
    "check": (("check", "{recipe}"), ("peftcli.recipe.parse:read_tree",)),
}
"""Commands that write nothing, and where a signal finds them."""


def stop_reading(words: Sequence[str], place: str, number: signal.Signals, folder: Path) -> None:
    """A signal ends a command that writes nothing with a message."""
    args = [word.format(**places()) for word in words]
    child = Child(folder, *args, before=Signal(Moment(place), number))
    _check_stopped(child, child.wait(), number)


def stop_push(moment: Moment, number: signal.Signals, failing: int, folder: Path) -> None:
    """A signal ends a push with a message, between two tries too; the next push makes the one commit."""
    with Hub() as hub:
        hub.fail("commit", 500, times=failing) if failing else None
        args = ["push", places()["adapter"], "alice/mine", "--base-model-id=acme/tiny"]
        ask = functools.partial(_ask, hub.url)
        child = Child(folder, *args, env={"HF_TOKEN": TOKEN}, before=_both(ask, Signal(moment, number)))
        _check_stopped(child, child.wait(), number)
        hub.faults.clear()
        again = Child(folder, *args, env={"HF_TOKEN": TOKEN}, before=ask)
        assert again.wait() == 0, again.err
        assert hub.repos["alice/mine"].commits == 1


def _ask(url: str) -> None:
    """Has huggingface_hub, which is imported already, ask a hub of the tests'."""
    from huggingface_hub import constants

    os.environ["HF_ENDPOINT"], constants.HF_HUB_OFFLINE = url, False


def _both(*hooks: Callable[[], None]) -> Callable[[], None]:
    return functools.partial(_call, hooks)


def _call(hooks: Sequence[Callable[[], None]]) -> None:
    for hook in hooks:
        hook()


def _stops() -> Sequence[Trial]:
    trials = [
        Trial(f"{command.name}: {name} at {moment}", functools.partial(stop, command, moment, number))
        for command, moment in STOPPED
        for number, name in NAMES.items()
    ]
    trials += [
        Trial(
            f"{command}: {name} at {place.removeprefix('peftcli.')}",
            functools.partial(stop_reading, words, place, number),
        )
        for command, (words, found) in READING.items()
        for place in found
        for number, name in NAMES.items()
    ]
    trials += [
        Trial(
            f"push: {name} at {Moment(place, turn)}", functools.partial(stop_push, Moment(place, turn), number, failing)
        )
        for place, turn, failing in (
            ("peftcli.adapters.push:_contents", 1, 0),
            ("huggingface_hub:HfApi.create_commit", 1, 0),
            ("huggingface_hub:HfApi.create_commit", 2, 1),
        )
        for number, name in NAMES.items()
    ]
    return trials


# --- two at once ------------------------------------------------------------------------------------------------------


def two_at_once(command: Command, seed: int, folder: Path) -> None:
    """Two processes write the same output: one makes it, and the other says that it is there or being made."""
    go = folder / "go"
    children = [command.start(folder, strace.Gate(go)) for _ in range(2)]
    go.touch()
    codes = sorted(child.wait() for child in children)
    said = "".join(child.err for child in children)
    allowed = [[0, 2]] if command.output == "out" else [[0, 0], [0, 11]]
    assert codes in allowed, f"they ended with {codes}: {said}"
    assert command.product(folder) == whole(command), said
    assert not command.leftovers(folder), f"left over: {command.leftovers(folder)}"


def one_was_killed(command: Command, folder: Path) -> None:
    """Of two processes one is killed half-way: the other one's work stands, and what the first left goes."""
    first = command.start(folder, Signal(_HALF_WAY[command.name], signal.SIGSTOP))
    first.until(lambda: _state(first) == "T")
    try:
        assert command.leftovers(folder), "it had not begun"
        second = command.start(folder)
        code = second.wait()
        assert command.leftovers(folder) or code == 11, "what a living process was writing was removed"
        assert code == (11 if command is GENERATE else 0), f"it ended with {code}: {second.err}"
    finally:
        first.signal(signal.SIGKILL)
        first.wait()
    finish(command, folder)


_HALF_WAY = {
    "merge": Moment("peftcli.adapters.merge:_write_companions"),
    "merge into a folder that is there": Moment("peftcli.adapters.merge:_write_companions"),
    "combine": Moment("peftcli.adapters.combine:write_card"),
    "generate": Moment("peftcli.tasks.text.generation:TextGenerator.generate", 2),
}


def _state(child: Child) -> str:
    return Path(f"/proc/{child.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def _pairs() -> Sequence[Trial]:
    trials = [
        Trial(f"two of {command.name}, {seed}", functools.partial(two_at_once, command, seed))
        for seed in range(2)
        for command in COMMANDS
    ]
    return trials + [
        Trial(f"one of two is killed: {command.name}", functools.partial(one_was_killed, command))
        for command in COMMANDS
        if command.name in _HALF_WAY
    ]


CAMPAIGNS = [
    Campaign(
        "other commands killed at every system call",
        "What has a final name is whole, and the same command again makes what was to be made.",
        functools.partial(_at_every_call, kill),
        least=118,
        sample=1,
    ),
    Campaign(
        "other commands on a bad disk",
        "They end with 7 and one message, leave nothing half, and work again on a good disk.",
        functools.partial(_at_every_call, fail),
        least=118,
        sample=1,
    ),
    Campaign(
        "signals in other commands",
        "A signal ends them with 130, 143 or 75 and one message; nothing half is left.",
        _stops,
        least=90,
        sample=1,
    ),
    Campaign(
        "two commands with one output",
        "One makes it whole, and neither destroys what the other does.",
        _pairs,
        least=10,
        sample=1,
    ),
]
