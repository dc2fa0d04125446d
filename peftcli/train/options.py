"""How a command wants a run to start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RESUME_MODES = ("auto", "must", "never")
"""What ``--resume`` takes beside the folder of a checkpoint."""


@dataclass(frozen=True)
class StartOptions:
    """What to do about a run that is in the folder already."""

    resume: str = "auto"
    """``auto``: from the newest whole checkpoint of the folder, if there is one; ``must``: the same, and there must be
    one; ``never``: from the beginning, and there must be no run to resume; or the path of a checkpoint."""
    allow_change: Sequence[str] = ()
    """Keys in which a resumed run may differ from this recipe, as the refusal names them. run.json then records what
    changed, and that the result is not that of one recipe."""
    overwrite: bool = False
    """Whether this run may replace another one, which is moved aside once this one is complete."""


DEFAULTS = StartOptions()
