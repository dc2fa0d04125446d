"""The place among machines and processes that Slurm and Kubeflow give a command in its environment.

| started by | is |
| --- | --- |
| ``srun`` with one task a node | a machine: it starts a process for each device there |
| ``srun`` with more tasks than nodes | a process |
| a PyTorchJob's pod | a machine |

A recipe that names its machines has its own way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace

from peftcli.schema import Launch

_FIRST_PORT, _PORTS = 20_000, 10_000
"""Below those that systems give out by themselves. A job's number chooses one of them."""


def join_tasks() -> None:
    """Where ``srun`` has started this process as one of several on a node, set the variables that torchrun would."""
    tasks, nodes = (int(os.environ.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("TASKS", "NODES"))
    if tasks <= nodes or "WORLD_SIZE" in os.environ:
        return
    address, port = _meeting_place(os.environ)
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": re.split(r"\D", os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks)))[0],
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def placed(launch: Launch) -> Launch:
    """Return the recipe's launch section with this machine's place among those that a scheduler has started."""
    environment = os.environ
    if launch.num_machines > 1:
        return launch
    if is_pod(environment):
        return replace(
            launch,
            num_machines=int(environment["PET_NNODES"]),
            machine_rank=int(environment.get("PET_NODE_RANK") or environment["RANK"]),
            main_process_ip=environment.get("PET_MASTER_ADDR") or environment["MASTER_ADDR"],
            main_process_port=int(environment.get("PET_MASTER_PORT") or environment["MASTER_PORT"]),
        )
    tasks, nodes = (environment.get(f"SLURM_STEP_NUM_{what}", "1") for what in ("TASKS", "NODES"))
    if tasks == nodes != "1":
        address, port = _meeting_place(environment)
        place = int(environment["SLURM_PROCID"])
        return replace(
            launch, num_machines=int(nodes), machine_rank=place, main_process_ip=address, main_process_port=port
        )
    return launch


def is_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is the first process in one of several pods, whose variables speak of pods and not of processes."""
    several = environment.get("PET_NNODES", "1") not in ("", "1")
    return several and "LOCAL_RANK" not in environment


def _meeting_place(environment: Mapping[str, str]) -> tuple[str, int]:
    """A Slurm step's first node, and a port."""
    first = re.match(r"([^\[,]+)(?:\[(\w+))?", environment["SLURM_STEP_NODELIST"])  # as in node[07-09,12]
    assert first is not None
    return first[1] + (first[2] or ""), _FIRST_PORT + int(environment.get("SLURM_JOB_ID", "0")) % _PORTS
