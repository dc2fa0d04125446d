"""A campaign: many trials of one promise. Each module beside this one that holds some has them in ``CAMPAIGNS``."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """One attempt to break a promise."""

    name: str
    """What is done, in a few words; unlike the others' of its campaign."""
    run: Callable[[Path], None]
    """Does it in an empty folder. Raises AssertionError that says what was not as promised."""


@dataclass(frozen=True)
class Campaign:
    """The trials of one promise."""

    name: str
    """Its row in docs/reliability.md."""
    promise: str
    """What must hold in every trial, in one sentence."""
    trials: Callable[[], Sequence[Trial]]
    """All of them, in the same order each time. Makes the list and does nothing else."""
    least: int
    """How many trials the report must have."""
    sample: int
    """How many of them ``make test`` runs, spread over the whole."""

    def sampled(self) -> list[Trial]:
        """The trials of ``make test``."""
        trials = self.trials()
        count = min(self.sample, len(trials))
        return [trials[index * len(trials) // count] for index in range(count)]


@dataclass(frozen=True)
class Result:
    """What came of one trial."""

    trial: Trial
    failure: str | None
    """What was not as promised; None: it was."""


def results(trials: Sequence[Trial]) -> Iterator[Result]:
    """Runs the trials one after another, each in a folder of its own that is removed afterwards."""
    for trial in trials:
        with tempfile.TemporaryDirectory(prefix="peftcli-torture-") as folder:
            try:
                trial.run(Path(folder))
            except AssertionError as error:
                yield Result(trial, str(error) or "an assertion failed")
            except Exception as error:  # of the command, which was not to raise it
                yield Result(trial, f"{type(error).__name__}: {error}")
            else:
                yield Result(trial, None)


MODULES = (
    "kills",
    "disk_faults",
    "checkpoints",
    "signals_in_training",
    "processes",
    "several_machines",
    "limits",
    "other_commands",
    "paths_and_modes",
    "planted_secrets",
    "hub_faults",
    "offline",
    "bad_recipes",
    "bad_data",
    "bad_adapters",
)
"""The modules beside this one that hold campaigns, in the order of the report."""


def campaigns() -> list[Campaign]:
    """All campaigns."""
    return [campaign for name in MODULES for campaign in importlib.import_module(name).CAMPAIGNS]
