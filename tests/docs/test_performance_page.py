from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from docs_pages import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks/__main__.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmarks_main", BENCHMARKS / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name, each in list(sys.modules.items()):
        if str(getattr(each, "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]  # names such as "rows" are nobody else's


def test_the_page_is_that_of_its_results(driver: ModuleType) -> None:
    store = driver.Store(driver.RESULTS)
    page = driver.RESULTS.with_suffix(".md")
    assert not page.exists() or page.read_text().splitlines() == list(driver.page(store.results()))


def test_what_was_measured_is_kept_and_compared(driver: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "performance.json"

    def add(side: str, seconds: float, loss: float, **more: Any) -> None:
        found = {
            "tokens": 100,
            "targets": 40,
            "steps": 5,
            "per_thousand": seconds,
            "peak": 10,
            "loss": loss,
            "ids": "a",
        }
        cell = {"side": side, "rows": "unequal", "precision": "fp32", "round": 0}
        driver.Store(results).add("training", cell, found | {"first_loss": loss} | more)

    add("peftcli", 5.0, 2.0)
    add("Trainer", 10.0, 2.00001)
    add("Trainer, grouped", 1.0, 2.5)
    add("peftcli, packing", 5.0, 2.0, ids="b")
    assert driver.Store(results).has(
        "training", {"side": "peftcli", "rows": "unequal", "precision": "fp32", "round": 0}
    )
    page = results.with_suffix(".md").read_text()
    assert "| fp32 against peft + Trainer, random | >= 1.8 | >= 2.1 | 2.00 | holds |" in page
    assert "| Trainer | 10.00 |  | 2.00 | 10 | equal (within 1e-05) |" in page
    assert "| Trainer, grouped | 1.00 |  | 0.20 | 10 | loss off by 5.0e-01 |" in page
    assert "| peftcli, packing | 5.00 |  | 1.00 | 10 | other token ids |" in page


def test_the_exponent_of_growth_is_found(driver: ModuleType) -> None:
    fixed, exponent = driver.scaling.fit([(x, 7 + 0.01 * x**1.5) for x in (10, 100, 1000, 10000)])
    assert exponent == pytest.approx(1.5, abs=0.011)
    assert fixed == pytest.approx(7, rel=0.1)
