"""sweep.json: what a sweep tries, how far each run is, and what was decided."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from peftcli import errors
from peftcli.errors import PeftcliError, StorageError
from peftcli.guard.files import read_json_object
from peftcli.system.disk import write_file
from peftcli.train.runs.record import ErrorRecord
from peftcli.train.runs.typed_json import Keywords, WrongValue, from_json, to_json

FILE = "sweep.json"
_LARGEST = 1 << 24
"""Bytes of sweep.json."""


@dataclass(kw_only=True)
class Measurement:
    """An evaluation of a run by the sweep."""

    share: float
    """The share of the run's steps that was done."""
    step: int
    """That step."""
    value: float
    """The metric that decides."""
    metrics: dict[str, float]
    """All metrics."""


@dataclass(kw_only=True)
class TrialRecord:
    """One run of a sweep."""

    name: str
    """Name of its folder and of its recipe (NAME.yaml) in the sweep's folder."""
    settings: dict[str, str]
    """What it changes in the recipe, as overrides give it."""
    seed: int
    """Its training.seed."""
    second_seed_of: str | None = None
    """The run whose settings it repeats under another seed."""
    steps: int = 0
    """Steps done."""
    total: int | None = None
    """Steps of the whole run; null: not known yet."""
    seconds: float = 0.0
    """Time that it took."""
    measured: list[Measurement] = field(default_factory=list)
    """Its evaluations, the earliest first."""
    verdict: str = ""
    """What became of it, for a reader."""
    error: Annotated[ErrorRecord, Keywords(ref="error.schema.json#/$defs/stored_failure")] | None = None
    """Why it failed."""
    complete: bool = False
    """Whether its adapter is written."""

    def at(self, share: float) -> Measurement | None:
        """The evaluation at a share of the steps."""
        return next((each for each in self.measured if each.share == share), None)

    @property
    def last(self) -> Measurement | None:
        """The latest evaluation."""
        return max(self.measured, key=lambda each: each.share, default=None)

    @property
    def described(self) -> str:
        """Its settings in words."""
        words = [f"{key}={value}" for key, value in self.settings.items()]
        return " ".join([*words, f"training.seed={self.seed}"] if self.second_seed_of else words)


@dataclass(kw_only=True)
class SeedsCompared:
    """What a second seed changes in the metric of the best two."""

    runs: list[str]
    """The two, the better one first."""
    share: float
    """The share of the steps at which all were measured."""
    values: list[list[float]]
    """The metric of each of them, under the recipe's seed and the second one."""
    difference: float
    """Between the means of the two."""
    by_seed: float
    """The larger change that the second seed made to one of them."""
    within: bool
    """Whether the difference is no larger than that."""


@dataclass(kw_only=True)
class SweepRecord:
    """The content of sweep.json."""

    status: Literal["running", "interrupted", "complete", "failed"]
    """How the sweep stands."""
    recipe: str
    """The recipe's file."""
    recipe_sha256: str
    """Hash of the recipe as it was read, with the overrides of all runs."""
    keys: list[str]
    """The words of the command line that say what is tried."""
    metric: str | None = None
    """The metric that decides; null: not known yet."""
    greater_is_better: bool = False
    """Whether a larger one is better."""
    runs: list[TrialRecord] = field(default_factory=list)
    """The runs, in the order in which they began."""
    seeds: SeedsCompared | None = None
    """What a second seed changes; null where it was not compared."""
    winner: str | None = None
    """Name of the run whose adapter is the result."""
    not_tried: list[str] = field(default_factory=list)
    """What --minutes left no time for."""
    seconds: float = 0.0
    """Time that the sweep took, in all attempts."""

    def run(self, name: str) -> TrialRecord:
        """The run of a name."""
        return next(each for each in self.runs if each.name == name)

    def write(self, folder: Path) -> None:
        """Write sweep.json.

        Raises:
            StorageError: it cannot be written.
        """
        write_file(folder / FILE, (json.dumps(to_json(self), indent=2) + "\n").encode())

    def as_dict(self) -> dict[str, Any]:
        """The content of sweep.json."""
        content: dict[str, Any] = to_json(self)
        return content


def read_sweep(folder: Path) -> SweepRecord | None:
    """Read the sweep.json of a folder; None where there is none.

    Raises:
        StorageError: it is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return None
    try:
        return from_json(SweepRecord, read_json_object(file, _LARGEST, StorageError, strict=False))
    except WrongValue as error:
        hint = "choose another --output"
        raise StorageError(f"is not a valid sweep.json: {error}", file=str(file), hint=hint) from None


def error_of(trial: TrialRecord) -> PeftcliError:
    """The error with which a run failed."""
    assert trial.error is not None
    kind = getattr(errors, trial.error.kind, PeftcliError)
    known = isinstance(kind, type) and issubclass(kind, PeftcliError)
    made = PeftcliError.__new__(kind if known else PeftcliError)
    PeftcliError.__init__(made, f"{trial.name} failed: {trial.error.message}", hint=trial.error.hint)
    made.file, made.key = trial.error.file, trial.error.key
    return made
