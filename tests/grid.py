"""Which cases of a grid run in ``make test``.

A test over many methods, models or settings makes one promise many times. Marked ``grid``, it makes it a few times in
``make test`` and every time in ``make test-all``::

    @pytest.mark.grid  # one case
    @pytest.mark.grid(keep=8)  # eight cases in all
    @pytest.mark.grid(each="method")  # a case for every method
    @pytest.mark.grid(each=lambda case: CASES[case].method)  # the same, where a parameter holds more than the method

The mark of a test counts before that of its file. The choice is always the same: spread evenly over the grid, from a
start that hangs on the test's name, the values of the other parameters taking turns.
"""

from __future__ import annotations

import inspect
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import pytest

EACH = "each"


def choose(cases: Sequence[Mapping[str, Hashable]], keep: int, each: str | None, start: int = 0) -> set[int]:
    """Return the places of the cases to keep: ``keep`` in all, or ``keep`` for every value of ``each``.

    With ``each``, more follow until every value that several cases share has had its turn.
    """
    groups = defaultdict(list)
    for place, case in enumerate(cases):
        groups[case[each] if each else None].append(place)
    shared = Counter(item for case in cases for item in case.items())
    seen: Counter[tuple[str, Hashable]] = Counter()
    kept: set[int] = set()

    def take(places: Sequence[int]) -> None:
        place = min(places, key=lambda place: sum(seen[item] for item in cases[place].items()))
        kept.add(place)
        seen.update(cases[place].items())

    for turn, places in enumerate(groups.values(), start):
        for count in range(min(keep, len(places))):
            first = (turn + count * len(places) // keep) % len(places)
            take([place for place in places[first:] + places[:first] if place not in kept])
    for place, case in enumerate(cases if each else ()):
        if any(shared[item] > 1 and not seen[item] for item in case.items()):
            take([place])
    return kept


def _read(each: str | Callable[..., Hashable] | None) -> list[str]:
    """Return the parameters that ``each`` reads."""
    return list(inspect.signature(each).parameters) if callable(each) else [each] if each else []


def _case(params: Mapping[str, object], each: str | Callable[..., Hashable] | None) -> dict[str, Hashable]:
    """Return a case's values, as text since some have no hash; in place of those that ``each`` reads what it makes."""
    if not callable(each):
        return {name: repr(value) for name, value in params.items()}
    read = _read(each)
    others = {name: repr(value) for name, value in params.items() if name not in read}
    return {**others, EACH: each(**{name: params[name] for name in read})}


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Mark the cases that ``make test`` leaves out ``slow``.

    A file's mark with ``each`` is for those of its tests that have the parameter.
    """
    grids = defaultdict(list)
    for item in items:
        mark = item.get_closest_marker("grid")
        if mark is None or not hasattr(item, "callspec") or item.get_closest_marker("slow"):
            continue
        if mark in item.own_markers or item.callspec.params.keys() >= set(_read(mark.kwargs.get("each"))):
            grids[item.parent, item.originalname].append(item)
    for (_, name), grid in grids.items():
        settings = grid[0].get_closest_marker("grid").kwargs
        each = settings.get("each")
        cases = [_case(item.callspec.params, each) for item in grid]
        kept = choose(cases, settings.get("keep", 1), EACH if callable(each) else each, zlib.crc32(name.encode()))
        for place in set(range(len(grid))) - kept:
            grid[place].add_marker(pytest.mark.slow)
