"""Every method x task of the conformance table."""

from __future__ import annotations

from pathlib import Path

import pytest
from task_methods import is_refused, trains, why_not

from peftcli.methods import METHODS
from peftcli.tasks import TASKS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_on_a_task(method: str, task: str, tmp_path: Path) -> None:
    if reason := why_not(method, task):
        is_refused(method, task, tmp_path)
        pytest.skip(reason)
    trains(method, task, tmp_path)
