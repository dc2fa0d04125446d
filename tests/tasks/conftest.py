"""Command lines of ours in this process, for the tests of tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import trainkit

from peftcli.cli.app import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def cli(*args: object, code: int = 0) -> Any:
        trainkit.reset_accelerate()
        assert main([str(arg) for arg in args]) == code, capsys.readouterr().err
        out, err = capsys.readouterr()
        return json.loads(out) if "--json" in args else out + err * bool(code)

    return cli
