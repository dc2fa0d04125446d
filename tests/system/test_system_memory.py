"""What a process has held is its own, whoever started it."""

from __future__ import annotations

import subprocess
import sys

from peftcli.system.memory import peak_resident_memory, resident_memory


def test_the_peak_is_not_that_of_the_process_that_started_this_one() -> None:
    held = bytearray(b"x") * 300_000_000
    code = "from peftcli.system.memory import peak_resident_memory; print(peak_resident_memory())"
    small = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert small < len(held) / 2
    assert min(peak_resident_memory(), resident_memory()) > len(held)
