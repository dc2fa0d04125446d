"""The errors that users see. Each class has its own exit code.

PeftcliError
├── RecipeError      2   a recipe that cannot be read, or has wrong settings
├── UsageError       2   a command with wrong arguments
├── DataError        3   a dataset that cannot be trained on
├── ModelError       4   a base model that cannot be loaded
├── AdapterError     4   an adapter, or a method's settings, that do not fit the base model; also a ValueError
│   ├── AdapterTypeError           the same, where PEFT raises TypeError; also a TypeError
│   └── NoMatchingPeftModuleError  the base model has no module that the settings name
├── NetworkError     5   the network; the same command may work later
├── HubError         6   the hub refused
├── StorageError     7   disk, permissions, checkpoints
├── OutOfMemory      8   too little memory on the device or the machine
├── Diverged         9   NaN or Inf in the loss or the gradients
├── ProcessDied     10   a process of the run
├── FolderBusy      11   another run uses the folder
├── GateFailed      12   a quality gate of the recipe
└── Interrupted     75 | 130 | 143   a signal
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any


class PeftcliError(Exception):
    """An error for the user: what is wrong, where, and what to do."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        key: str | None = None,
        hint: str | None = None,
    ):
        super().__init__(message)
        self.message, self.file, self.line, self.key, self.hint = message, file, line, key, hint

    def __reduce__(self) -> tuple[Any, ...]:
        """Let a copy from another process be made without ``__init__``, whose arguments differ from class to class."""
        return type(self).__new__, (type(self), *self.args), self.__dict__

    def __str__(self) -> str:
        """Return ``file:line: key: message`` and, on a second line, the hint."""
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{text}\n{self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, object]:
        """Return the error as run.json contains it."""
        fields = {name: getattr(self, name) for name in ("message", "file", "line", "key", "hint")}
        return {"kind": type(self).__name__, **fields}


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe, with its place in the file."""

    message: str
    file: str
    line: int | None = None
    column: int | None = None
    key: str | None = None
    suggestion: str | None = None
    """A similar key or value that is valid."""

    def __str__(self) -> str:
        """Return ``file:line:column: key: message; did you mean 'x'?``."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{text}; did you mean {self.suggestion!r}?" if self.suggestion else text


class RecipeError(PeftcliError):
    """The recipe cannot be read or has wrong settings (all are listed)."""

    exit_code = 2

    def __init__(self, problems: list[Problem]):
        first = problems[0]
        super().__init__(first.message, file=first.file, line=first.line, key=first.key)
        self.problems = problems

    def as_dict(self) -> dict[str, object]:
        """Return the first problem as the error, and all of them under ``problems``."""
        return {**super().as_dict(), "problems": [asdict(problem) for problem in self.problems]}

    def __str__(self) -> str:
        """Return one line per problem."""
        return "\n".join(str(problem) for problem in self.problems)


class UsageError(PeftcliError):
    """The command's arguments are wrong."""

    exit_code = 2


class DataError(PeftcliError):
    """A dataset that cannot be read, or that contains nothing to train on."""

    exit_code = 3


class ModelError(PeftcliError):
    """A base model, tokenizer or processor that cannot be loaded."""

    exit_code = 4


class AdapterError(PeftcliError, ValueError):
    """An adapter or a method's settings that cannot be read, or that do not fit the base model.

    A ValueError too: code that was written for PEFT catches that.
    """

    exit_code = 4


class AdapterTypeError(AdapterError, TypeError):
    """A setting of another type, or a file that is no adapter's config. A TypeError too, as PEFT's is."""


class NoMatchingPeftModuleError(AdapterError):
    """The base model has no module that the settings name. The name is PEFT's, whose users catch it."""


class PeftWarning(UserWarning):
    """Something that the caller asked for changes nothing, or changes more than it says."""


class NetworkError(PeftcliError):
    """The network failed. The same command may work later."""

    exit_code = 5


class HubError(PeftcliError):
    """The hub refused: no permission, no such repository, a conflict."""

    exit_code = 6


class StorageError(PeftcliError):
    """The disk is full or read-only, a file cannot be read or written, a checkpoint is damaged."""

    exit_code = 7


class OutOfMemory(PeftcliError):
    """The device or the machine has too little memory."""

    exit_code = 8


class Diverged(PeftcliError):
    """The loss or a gradient is NaN or Inf."""

    exit_code = 9


class ProcessDied(PeftcliError):
    """A process of the run died, hung or raised."""

    exit_code = 10


class FolderBusy(PeftcliError):
    """Another run uses the output folder."""

    exit_code = 11


class GateFailed(PeftcliError):
    """A metric missed the recipe's gate. The adapter is kept."""

    exit_code = 12


class Interrupted(PeftcliError):
    """A signal stopped the command."""

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


_OTHER_ENDS = (
    (0, "Done, or done already."),
    (1, "A bug of peftcli; --debug shows the traceback."),
    (75, "SIGTERM, SIGUSR1, SIGHUP or training.max_time, with a checkpoint: run the same command again."),
    (130, "Ctrl-C, or a second one."),
    (141, "Nobody reads stdout any more."),
    (143, "SIGTERM, SIGUSR1 or SIGHUP before there was anything to save; a second one, but of SIGHUP."),
)
"""The exit codes that no class of errors has alone."""


def exit_codes() -> dict[int, str]:
    """Return what each exit code of a command means, in one or two sentences."""
    own: list[Any] = [kind for kind in globals().values() if isinstance(kind, type) and "exit_code" in vars(kind)]
    rows = [(kind.exit_code, (kind.__doc__ or "").partition("\n")[0]) for kind in own if kind is not PeftcliError]
    meanings: dict[int, list[str]] = {}
    for code, meaning in sorted([*_OTHER_ENDS, *rows], key=lambda row: row[0]):
        meanings.setdefault(code, []).append(meaning)
    return {code: " Or: ".join(found) for code, found in meanings.items()}


def causes(error: BaseException | None) -> list[BaseException]:
    """Return an exception and those that led to it, the last one first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def to_peftcli_error(error: BaseException) -> PeftcliError | None:
    """Translate an exception into a PeftcliError; return None if it is unexpected."""
    if isinstance(error, PeftcliError):
        return error
    text = str(error)
    # torch's OutOfMemoryError is recognised by name, since torch may not be loaded
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(phrase in text for phrase in _NO_MEMORY)
    ):
        return OutOfMemory(
            "not enough memory",
            hint="use a device or a machine with more memory, or smaller batches and shorter rows where there are any",
        )
    if os.environ.get("WORLD_SIZE", "1") != "1" and any(phrase in text for phrase in _OTHER_ENDED):
        return ProcessDied(
            "another training process ended", hint="its error gives the reason; run the same command again to resume"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{error.strerror or error}", file=str(error.filename) if error.filename else None)
    return None


_NO_MEMORY = (
    "t allocate memory",
    "Storage size calculation overflowed",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "failure 2 'out of memory'",
)
"""Parts of torch's messages about too little memory."""
_OTHER_ENDED = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "No route to host",
    "Connection timed out",
    "closed by remote peer",
    "communicator was aborted",
    "ncclSystemError",
    "Timed out waiting",
    "client socket has",
    "Socket Timeout",
    "ncclRemoteError",
)
"""Parts of the messages of torch's process groups after another process has ended."""
