"""Every error that a user can meet. Each class carries the exit code of its kind.

PeftcliError
├── RecipeError      2   a recipe that cannot be read or means nothing
├── UsageError       2   a command that cannot be carried out as asked
├── DataError        3   a dataset that cannot be trained on
├── ModelError       4   a base model that cannot be loaded
├── AdapterError     4   an adapter, or a method's settings, that do not fit the base model
├── NetworkError     5   the network; the same command may work later
├── HubError         6   the hub refused
├── StorageError     7   disk, permissions, checkpoints
├── OutOfMemory      8   the device's memory, or the machine's
├── Diverged         9   NaN or Inf in the loss or the gradients
├── ProcessDied     10   one of several training processes
├── FolderBusy      11   another run holds the folder
├── GateFailed      12   a quality gate of the recipe
└── Interrupted     75 | 130 | 143   a signal
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass


class PeftcliError(Exception):
    """An error with a message for the user: what is wrong, where, and what to do."""

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

    def __str__(self) -> str:
        """``file:line: key: message`` and, on a line of its own, the hint."""
        place = ":".join(str(part) for part in (self.file, self.line) if part is not None)
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{text}\n{self.hint}" if self.hint else text

    def as_dict(self) -> dict[str, object]:
        """The error as run.json holds it."""
        fields = {name: getattr(self, name) for name in ("message", "file", "line", "key", "hint")}
        return {"kind": type(self).__name__, **fields}


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe, with its place in the file that holds it."""

    message: str
    file: str
    line: int | None = None
    column: int | None = None
    key: str | None = None
    suggestion: str | None = None
    """A nearby key or value that would be valid."""

    def __str__(self) -> str:
        """``file:line:column: key: message; did you mean 'x'?``."""
        place = ":".join(str(part) for part in (self.file, self.line, self.column) if part is not None)
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        return f"{text}; did you mean {self.suggestion!r}?" if self.suggestion else text


class RecipeError(PeftcliError):
    """A recipe that cannot be read, or whose settings are wrong. Lists every problem at once."""

    exit_code = 2

    def __init__(self, problems: list[Problem]):
        first = problems[0]
        super().__init__(first.message, file=first.file, line=first.line, key=first.key)
        self.problems = problems

    def as_dict(self) -> dict[str, object]:
        """The first problem as the error, and all of them under ``problems``."""
        return {**super().as_dict(), "problems": [asdict(problem) for problem in self.problems]}

    def __str__(self) -> str:
        """One line a problem."""
        return "\n".join(str(problem) for problem in self.problems)


class UsageError(PeftcliError):
    """A command that cannot be carried out as asked."""

    exit_code = 2


class DataError(PeftcliError):
    """A dataset that cannot be read, or that would train nothing."""

    exit_code = 3


class ModelError(PeftcliError):
    """A base model, tokenizer or processor that cannot be loaded."""

    exit_code = 4


class AdapterError(PeftcliError):
    """An adapter or a method's settings that cannot be read, or do not fit the base model."""

    exit_code = 4


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
    """The device or the machine has too little memory for what was asked."""

    exit_code = 8


class Diverged(PeftcliError):
    """The loss or a gradient is NaN or Inf."""

    exit_code = 9


class ProcessDied(PeftcliError):
    """One of several training processes died, hung or raised."""

    exit_code = 10


class FolderBusy(PeftcliError):
    """Another run holds the output folder."""

    exit_code = 11


class GateFailed(PeftcliError):
    """A metric missed the recipe's gate. The adapter is kept."""

    exit_code = 12


class Interrupted(PeftcliError):
    """A signal stopped the command."""

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None):
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def known(error: BaseException) -> PeftcliError | None:
    """``error`` as one of ours; None where nobody foresaw it."""
    if isinstance(error, PeftcliError):
        return error
    text = str(error)
    # torch's OutOfMemoryError by its name, since torch may not be loaded
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(each in text for each in _NO_MEMORY)
    ):
        return OutOfMemory(
            "not enough memory",
            hint="lower per_device_train_batch_size and raise gradient_accumulation_steps as much; "
            "lower dataset.max_length; or set training.gradient_checkpointing: true",
        )
    if os.environ.get("WORLD_SIZE", "1") != "1" and any(phrase in text for phrase in _OTHER_ENDED):
        return ProcessDied(
            "another training process ended", hint="its error says why; run the same command again to go on"
        )
    if isinstance(error, OSError) and error.errno is not None:
        return StorageError(f"{error.strerror or error}", file=str(error.filename) if error.filename else None)
    return None


_NO_MEMORY = ("t allocate memory", "Storage size calculation overflowed")
"""What torch says."""
_OTHER_ENDED = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "Socket Timeout",
    "ncclRemoteError",
)
"""What torch's process groups say when one of them is gone."""
