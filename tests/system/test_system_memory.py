"""What a process has held is its own, whoever started it; and no garbage is collected while a command imports."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from peftcli.system.memory import collect_from_here, peak_resident_memory, postponed_collection, resident_memory


def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    held = bytearray(b"x") * 300_000_000
    code = "from peftcli.system.memory import peak_resident_memory; print(peak_resident_memory())"
    small = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert small < len(held) / 2
    assert min(peak_resident_memory(), resident_memory()) > len(held)


def test_collection_is_postponed_and_goes_on_without_what_was_there() -> None:
    frozen = gc.get_freeze_count()
    with postponed_collection():
        assert not gc.isenabled()
        collect_from_here()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_whoever_collects_no_garbage_decides() -> None:
    gc.disable()
    try:
        with postponed_collection():
            collect_from_here()
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.grid
@pytest.mark.parametrize("arguments", [["info", "methods"], ["train", "no-such-file.yaml"]])
def test_the_command_line_leaves_collection_as_it_was(arguments: list[str]) -> None:
    code = (
        f"import gc; from peftcli.cli.app import main; main({arguments}); print(gc.isenabled(), gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True 0"
