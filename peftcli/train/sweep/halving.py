"""Successive halving: which runs of a sweep go on, what a second seed changes, and which one wins.

Everything that is measured stands in the record, and nothing that stands there is done again: after a stop the same
decisions follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Protocol

from peftcli.train.sweep.record import Measurement, SeedsCompared, SweepRecord, TrialRecord
from peftcli.train.sweep.space import Settings

QUARTER, HALF, END = 0.25, 0.5, 1.0
"""Shares of a run's steps: a half of the runs goes on from each of the first two."""
WAVE = 4
"""Settings that are proposed at once: more know less of one another, fewer share less of the base model."""
LABELS = {QUARTER: "1/4", HALF: "1/2", END: "all"}


class TimeUp(Exception):
    """What is left of ``--minutes`` is for one run to end."""


class Track(Protocol):
    """Trains the runs of a record."""

    record: SweepRecord

    def trial(self, settings: Settings, second_seed_of: TrialRecord | None = None) -> TrialRecord:
        """Return the run with these settings, a new one where there is none."""

    def reach(self, trials: Sequence[TrialRecord], share: float, *, last: bool = False) -> None:
        """Train runs until a share of their steps, and measure them there, or note why they failed.

        Raises:
            TimeUp: the time is needed to end the best one, unless this is the ``last``.
        """

    def measure(self) -> None:
        """Measure all runs that are under way, where they are."""

    def drop(self, trial: TrialRecord, why: str) -> None:
        """End a run, with a checkpoint."""


class Proposals(Protocol):
    """Proposes settings."""

    def ask(self, count: int) -> list[Settings]:
        """Propose settings to try at once."""

    def tell(self, measured: Sequence[Measurement | None]) -> None:
        """Take what those of the last ``ask`` gave; None: it failed."""


class Halving:
    """Decides which runs go on."""

    def __init__(self, track: Track):
        self.track, self.record = track, track.record
        self.later: list[str] = []
        """What the search has not begun."""

    # --- order --------------------------------------------------------------------------------------------------------

    def ranked(self, trials: Sequence[TrialRecord], share: float) -> list[TrialRecord]:
        """The runs that were measured at a share of their steps, the best first; equals by loss, then by order."""
        measured = [each for each in trials if each.at(share) and not each.error]
        return sorted(measured, key=lambda each: self._cost(each, share))

    def _cost(self, trial: TrialRecord, share: float) -> tuple[float, float]:
        """What is smaller for a better run: of one with a second seed, the mean of both."""
        seeds = [each for each in self.record.runs if trial.name in (each.name, each.second_seed_of)]
        found = [each for each in (one.at(share) for one in seeds) if each is not None]
        value = fmean(each.value for each in found)
        return -value if self.record.greater_is_better else value, found[0].metrics.get("eval_loss", 0.0)

    def own(self) -> list[TrialRecord]:
        """The runs under the recipe's seed."""
        return [each for each in self.record.runs if each.second_seed_of is None]

    # --- the search ---------------------------------------------------------------------------------------------------

    def halve(self, trials: Sequence[TrialRecord], share: float) -> list[TrialRecord]:
        """Train runs until a share of their steps, and keep the better half, rounded up."""
        self.track.reach(trials, share)
        kept = self.ranked(trials, share)[: math.ceil(len(trials) / 2)]
        for trial in trials:
            if trial not in kept and not trial.error and not trial.at(HALF):
                self.track.drop(trial, f"stopped at {LABELS[share]}")
        return kept

    def race(self, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
        """Train runs to a half of their steps, a half of them that far; return those that were, the best first."""
        kept = self.halve(trials, QUARTER)
        self.track.reach(kept, HALF)
        return self.ranked(kept, HALF)

    def grid(self, settings: Sequence[Settings]) -> list[TrialRecord]:
        """Race all of these settings; return the runs that are to end."""
        raced = self.race([self.track.trial(each) for each in settings])
        self.compare_seeds()
        return self.ranked(raced, HALF)[: math.ceil(len(raced) / 2)]

    def one_after_another(self, stages: Mapping[str, Callable[[Settings], list[Settings]]]) -> list[TrialRecord]:
        """Race the settings of each stage, made from the best before it; return the run that is to end."""
        best: list[TrialRecord] = []
        for key, stage in stages.items():
            self.later = [*stages][[*stages].index(key) + 1 :]
            made = stage(best[0].settings if best else {})
            self.race([*best[:1], *map(self.track.trial, made)])
            best = self.ranked(self.own(), HALF)
        self.compare_seeds()
        return self.ranked(self.own(), HALF)[:1]

    def proposed(self, proposals: Proposals, count: int) -> list[TrialRecord]:
        """Race settings that are proposed by what was measured before; return the runs that are to end."""
        trials: dict[str, TrialRecord] = {}
        for done in range(0, count, WAVE):
            self.later = [f"{count - done} of {count} proposals"]
            wave = [self.track.trial(each) for each in proposals.ask(min(WAVE, count - done))]
            self.track.reach(wave, QUARTER)
            proposals.tell([None if each.error else each.at(QUARTER) for each in wave])
            trials |= {each.name: each for each in wave}
            for each in self.ranked([*trials.values()], QUARTER)[math.ceil(len(trials) / 2) :]:
                self.track.drop(each, f"stopped at {LABELS[QUARTER]}")  # it may go on later
        self.later = []
        return self.grid([each.settings for each in trials.values()])

    def compare_seeds(self) -> None:
        """Repeat the best two under a second seed, as far as they came, and record what that changes."""
        best = self.ranked(self.own(), HALF)[:2]
        if self.record.seeds is not None or len(best) < 2:
            return
        again = [self.track.trial(each.settings, each) for each in best]
        self.track.reach(again, HALF)
        for each in again:
            if not each.error:
                self.track.drop(each, "second seed")
        pairs = [[each.at(HALF) for each in pair] for pair in zip(best, again, strict=True)]
        values = [[each.value for each in pair if each is not None] for pair in pairs]
        if any(len(pair) < 2 for pair in values):
            return  # one has failed
        order = self.ranked(best, HALF)
        values = [values[best.index(each)] for each in order]
        difference = abs(fmean(values[0]) - fmean(values[1]))
        by_seed = max(abs(first - second) for first, second in values)
        names = [each.name for each in order]
        within = difference <= by_seed
        self.record.seeds = SeedsCompared(
            runs=names, share=HALF, values=values, difference=difference, by_seed=by_seed, within=within
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def name_winner(self, search: Callable[[], list[TrialRecord]]) -> TrialRecord | None:
        """Search, let the runs that are left end, and name the best one; None where all have failed."""
        try:
            left = search()
            for each in self.own():
                if each not in left and not each.error and not each.complete:
                    self.track.drop(each, each.verdict or f"stopped at {LABELS[HALF]}")
            self.track.reach(left, END)
        except TimeUp:
            left = self._best_known()
        while not (ended := self.ranked(left, END)):
            others = [each for each in self._by_progress() if each not in left]
            if not others:
                return None
            left = others[:1]  # the best of the rest, where those that went on have failed
            self.track.reach(left, END, last=True)
        winner = ended[0]
        for place, each in enumerate(ended, 1):
            each.verdict = f"complete, place {place}"
        winner.verdict, self.record.winner = "winner", winner.name
        return winner

    def _by_progress(self) -> list[TrialRecord]:
        """All runs that were measured and have not failed: those that came farthest first, the best of these first."""
        own = [each for each in self.own() if each.last and not each.error]
        shares = sorted({each.last.share for each in own if each.last}, reverse=True)
        found = {each.name: each for share in shares for each in self.ranked(own, share)}
        return [*found.values()]

    def _best_known(self) -> list[TrialRecord]:
        """Let the best run end that is known when the time is up."""
        if not self._by_progress():
            self.track.measure()
        best = self._by_progress()[:1]
        for each in self.record.runs:
            if each not in best and not each.error and not each.complete:
                self.track.drop(each, each.verdict or ("stopped" if each.steps else "not tried") + ": no time left")
        unbegun = [each.described for each in self.record.runs if not each.steps]
        seeds = ["a second seed"] if self.record.seeds is None else []
        self.record.not_tried = [*unbegun, *self.later, *seeds]
        self.track.reach(best, END, last=True)
        return best
