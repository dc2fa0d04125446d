"""Adapters and base models that are wrong, valid ones that look odd, and mutations of good ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import bad_adapter_cases
import bad_base_cases
from adapter_folders import Folder, adapter, harmless, listing, refused, timed
from bad_adapter_cases import Case
from campaigns import Campaign, Trial
from good_adapter_cases import VALID, Valid
from mutated_adapters import GROUP, absurd, mutated, wrong_types

from peftcli.methods import METHODS

MUTATIONS = 2000


def bad_adapters() -> list[Trial]:
    return [Trial(name, partial(_refused, case)) for name, case in bad_cases().items()] + [
        Trial(f"settings of every type: {method}", partial(wrong_types, method)) for method in METHODS
    ]


def bad_cases() -> dict[str, Case]:
    """All that are made by hand."""
    classes = {**bad_adapter_cases.CLASSES, **bad_base_cases.CLASSES}
    return {f"{of}: {name}": case for of, cases in classes.items() for name, case in cases.items()}


def _refused(case: Case, place: Path) -> None:
    """Every command refuses it with a message, and makes nothing: no file, and none of the marks that code leaves."""
    folder = Folder(place)
    folder.write(adapter(case.method))
    case.spoil(folder)
    before = listing(place)
    for command in case.commands:
        refused(timed(*command(folder), cwd=place), case.code, *case.says)
        assert listing(place) == before, "something was made"


def good_adapters() -> list[Trial]:
    return [Trial(name, partial(_accepted, case)) for name, case in VALID.items()]


def _accepted(case: Valid, place: Path) -> None:
    """Every command takes it, and no code beside it has run."""
    folder = Folder(place)
    folder.write(adapter(case.method))
    case.change(folder)
    before = listing(place)
    for command in case.commands:
        ran = timed(*command(folder), cwd=place)
        assert ran.code == 0, f"{command.__name__} ended with {ran.code}: {ran.err.decode()[-700:]}"
        assert ran.out.strip(), f"{command.__name__} said nothing"
        harmless(ran)
        made = set(listing(place)) - set(before)
        assert all(path.startswith(f"{place}/merged") for path in made), f"something was made: {made}"


def mutated_adapters() -> list[Trial]:
    groups = [
        Trial(f"mutations {number * GROUP} to {(number + 1) * GROUP - 1}", partial(mutated, number))
        for number in range(MUTATIONS // GROUP)
    ]
    return groups + [Trial(f"absurd numbers: {method}", partial(absurd, method)) for method in METHODS]


CAMPAIGNS = [
    Campaign(
        "bad adapters",
        "An adapter or base model that is wrong is refused: exit 4, one message with its file, key or tensor; no code"
        " of it runs, nothing is made, memory and time are bounded.",
        bad_adapters,
        least=500,
        sample=8,
    ),
    Campaign(
        "good adapters",
        "An adapter or base model that only looks odd is taken by info, generate and merge.",
        good_adapters,
        least=60,
        sample=4,
    ),
    Campaign(
        "mutated adapters",
        f"{MUTATIONS} mutations of good adapters, {GROUP} a trial: refused with exit 4, or sound; never a bug, a"
        " signal or a hang.",
        mutated_adapters,
        least=MUTATIONS // GROUP,
        sample=3,
    ),
]
