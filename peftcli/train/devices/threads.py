"""How many threads compute on a CPU: one for each usable core, and as many when a run is resumed.

With another number of threads some sums come out with other last bits, so the number is chosen once a run, by the
machine and not by what else runs on it.
"""

from __future__ import annotations

import os

import torch

from peftcli.system.cores import usable_cores
from peftcli.train.runs.identity import Change
from peftcli.train.runs.record import ThreadsRecord
from peftcli.train.runs.resume import Run

_MOST = torch.get_num_threads()
"""Torch's own choice: as the user's settings say, else one for each core, of which hyper-threads share one."""
_BY_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def use_threads(run: Run) -> ThreadsRecord | None:
    """Let as many threads compute as a run needs; return what run.json records, None unless it computes on a CPU.

    Notes if a resumed run cannot have as many as before.
    """
    if run.accelerator.device.type != "cpu":
        return None
    before = run.record.threads.count if run.record.data and run.record.threads else None
    cores = max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if any(name in os.environ for name in _BY_USER) and "PEFTCLI_THREADS" not in os.environ:
        chosen = ThreadsRecord(count=_MOST, reason="environment")
    elif before is not None and before <= cores:
        chosen = ThreadsRecord(count=before, reason="resumed")
    else:
        chosen = ThreadsRecord(count=min(_MOST, cores), reason="cores")
    torch.set_num_threads(chosen.count)
    if before is not None and before != chosen.count:
        run.changes.append(Change("threads", before, chosen.count))
    return chosen
