"""Which cases of a grid ``make test`` keeps."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from grid import choose

pytest_plugins = ["pytester"]

METHODS, KINDS = [f"method {n}" for n in range(12)], [f"kind {n}" for n in range(5)]
GRID = [{"method": method, "kind": kind} for method, kind in product(METHODS, KINDS)]


def _kept(cases: list[dict[str, str]], keep: int, each: str | None) -> list[dict[str, str]]:
    return [cases[place] for place in sorted(choose(cases, keep, each))]


def test_each_value_keeps_its_case_and_the_others_take_turns() -> None:
    kept = _kept(GRID, 1, "method")
    assert [case["method"] for case in kept] == METHODS
    counts = [sum(case["kind"] == kind for case in kept) for kind in KINDS]
    assert max(counts) - min(counts) <= 1


def test_values_that_the_turns_miss_follow() -> None:
    kept = _kept(GRID, 1, "kind")
    assert {case["method"] for case in kept} == set(METHODS)
    assert len(kept) == len(METHODS)


def test_cases_without_each_are_spread_evenly() -> None:
    assert choose([{"case": n} for n in range(100)], 4, None) == {0, 25, 50, 75}
    assert choose([{"case": n} for n in range(3)], 8, None) == {0, 1, 2}


def test_the_rest_is_slow(pytester: pytest.Pytester) -> None:
    tests = Path(__file__).parent
    pytester.makeini("[pytest]\nmarkers =\n  grid\n  slow")
    pytester.makeconftest(
        f"import sys; sys.path.insert(0, {str(tests)!r}); from grid import mark_slow; "
        "pytest_collection_modifyitems = lambda items: mark_slow(items)"
    )
    pytester.makepyfile(
        """
        import pytest
        pytestmark = pytest.mark.grid
        @pytest.fixture(params=["a-1", "a-2", "b-1"])
        def case(request): return request.param
        @pytest.mark.parametrize("n", range(9))
        def test_one(n): pass
        @pytest.mark.grid(keep=3)
        @pytest.mark.parametrize("n", [pytest.param(0, marks=pytest.mark.slow), *range(1, 9)])
        def test_three(n): assert n
        @pytest.mark.grid(each=lambda case: case[0])
        def test_each(case): pass
        def test_alone(): pass
        """
    )
    pytester.runpytest_inprocess("-m", "not slow").assert_outcomes(passed=1 + 3 + 2 + 1, deselected=8 + 6 + 1)
