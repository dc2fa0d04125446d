"""Which of the contract's many cases run in ``make test``: two methods on every model, the others on two of them."""

from __future__ import annotations

import pytest

EVERYWHERE = ("lora", "prompt_tuning")
OFTEN = ("llama", "t5")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = getattr(item, "callspec", None)
        if case is None or item.path.name != "test_contract.py":
            continue
        method, kind = case.params.get("method"), case.params.get("kind", OFTEN[0])
        if method not in EVERYWHERE and kind not in OFTEN:
            item.add_marker(pytest.mark.slow)
