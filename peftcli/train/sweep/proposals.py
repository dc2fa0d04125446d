"""Settings that Optuna's TPE proposes, where there are too many to try them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peftcli.errors import UsageError
from peftcli.tasks.base import require_extra
from peftcli.train.sweep.record import Measurement
from peftcli.train.sweep.space import LARGEST_GRID, Range, Settings, Space


def require_optuna(space: Space) -> None:
    """Check that Optuna is there where a space needs it.

    Raises:
        UsageError: it is not installed; names the extra.
    """
    if space.size <= LARGEST_GRID:
        return
    key = next(iter(space.ranges), "sweep")
    try:
        require_extra("optuna", "optuna", key, UsageError)
    except UsageError as error:
        what = "a range" if space.ranges else f"a grid of {space.size:,} settings, more than {LARGEST_GRID},"
        error.message = f"{what} {error.message}"
        error.hint = f"or give values, of which at most {LARGEST_GRID} combinations are all tried"
        raise


class TpeProposals:
    """Proposes settings by a Tree-structured Parzen Estimator. The same measurements give the same proposals."""

    def __init__(self, space: Space, seed: int, greater_is_better: Any):
        """``greater_is_better`` is asked when the first measurements are told."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self.space, self.greater_is_better = optuna, space, greater_is_better
        self._study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        self._asked: list[Any] = []

    def ask(self, count: int) -> list[Settings]:
        """Propose settings to try at once."""
        self._asked = [self._study.ask() for _ in range(count)]
        return [self._settings(trial) for trial in self._asked]

    def _settings(self, trial: Any) -> Settings:
        found = {key: str(trial.suggest_categorical(key, values)) for key, values in self.space.choices.items()}
        return found | {key: _number(trial, key, each) for key, each in self.space.ranges.items()}

    def tell(self, measured: Sequence[Measurement | None]) -> None:
        """Take what those of the last ``ask`` gave; None: it failed."""
        sign = -1 if self.greater_is_better() else 1
        for trial, each in zip(self._asked, measured, strict=True):
            if each is None:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial, sign * each.value)


def _number(trial: Any, key: str, among: Range) -> str:
    """Return a number of a range, of three digits where it is not whole."""
    if among.whole:
        return str(trial.suggest_int(key, int(among.low), int(among.high), log=among.by_factors))
    return f"{trial.suggest_float(key, among.low, among.high, log=among.by_factors):.3g}"
