"""Findings from the gradients of a run's rows: which look mislabelled, hurt evaluation, or teach nothing."""

from __future__ import annotations

import numpy as np

from peftcli.adapters.proof.influence import agreement, dot_products, lengths, mislabelled_score
from peftcli.data.findings import Finding, Kind
from peftcli.data.used_rows import UsedRows
from peftcli.tasks.findings import INFLUENCE
from peftcli.train.trace import TracedRun, index_of

_HURTS = 4.0
"""Standard deviations from the mean by which a row's influence on the evaluation is bad."""
_LONG, _NOTHING = 2.0, 1e-3
"""Lengths of a gradient, relative to the mean, above which a row is not learnt, and below which it teaches nothing."""


def influence_findings(run: TracedRun) -> list[Finding]:
    """Return what the gradients of the training rows show, of each kind the rows where it shows most first."""
    rows, index = UsedRows(run.data.train), index_of(run, run.data.train)
    length, agrees = lengths(index), agreement(index)
    mean = float(length.mean()) or 1.0
    marks = {
        "looks_mislabelled": ((agrees < 0) & (length > _LONG * mean), -mislabelled_score(agrees, length)),
        "without_influence": (length < _NOTHING * mean, length),
    }
    if run.data.eval is not None:
        of_eval = index_of(run, run.data.eval, "evaluation rows")
        wanted = np.sum([sketches.sum(0) for _, sketches in of_eval.chunks()], axis=0)
        helps = dot_products(index, wanted)
        marks["hurts_evaluation"] = (helps < min(0.0, helps.mean() - _HURTS * helps.std()), helps)
    return [_finding(INFLUENCE[name], rows, *each) for name, each in marks.items() if each[0].any()]


def _finding(kind: Kind, rows: UsedRows, mask: np.ndarray, order: np.ndarray) -> Finding:
    worst = [int(at) for at in np.argsort(order, kind="stable") if mask[at]]
    return kind.finding(len(worst), len(rows), map(rows.place, worst))
