"""The place among machines and processes that Slurm and Kubeflow give a command in its environment.

| started by | is |
| --- | --- |
| ``srun`` with one task a node | a machine: it starts a process for each device there |
| ``srun`` with more tasks than nodes | a process |
| a PyTorchJob's pod | a machine |

A recipe that names its machines has its own way. For runs that know nothing of one another, several to an ``srun``, set
``SLURM_STEP_NUM_TASKS=1``.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from peftcli.errors import UsageError
from peftcli.schema import Launch

_FIRST_PORT, _PORTS = 20_000, 10_000
"""Below those that systems give out by themselves. The numbers of job and step choose one of them."""


def take_slurms_rank() -> None:
    """Where ``srun`` has started this process as one of several on a node, set the variables that torchrun would."""
    step = _step()
    if step is None or step.tasks <= step.nodes or "WORLD_SIZE" in os.environ:
        return
    node = int(os.environ.get("SLURM_NODEID", "0"))
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": str(step.tasks),
        "LOCAL_WORLD_SIZE": str(step.tasks_on(node)),
        "MASTER_ADDR": step.first_node,
        "MASTER_PORT": str(step.port),
    }


def with_schedulers_place(launch: Launch) -> Launch:
    """Return the recipe's launch section with this machine's place among those that a scheduler has started.

    Raises:
        UsageError: the pods of a PyTorchJob have no numbers.
    """
    environment, step = os.environ, _step()
    if launch.num_machines > 1:
        return launch
    if is_pod() and _has_others():
        try:
            return replace(
                launch,
                num_machines=int(environment["PET_NNODES"]),
                machine_rank=int(environment.get("PET_NODE_RANK") or environment["RANK"]),
                main_process_ip=environment.get("PET_MASTER_ADDR") or environment["MASTER_ADDR"],
                main_process_port=int(environment.get("PET_MASTER_PORT") or environment["MASTER_PORT"]),
            )
        except (KeyError, ValueError):
            message = "the pods of this PyTorchJob have no fixed number and no ranks (PET_NNODES, RANK, MASTER_ADDR)"
            hint = "a job with a master and workers, without elasticPolicy; lost pods come back all the same"
            raise UsageError(message, key="launch.num_machines", hint=hint) from None
    if step is not None and step.tasks == step.nodes > 1:
        return replace(
            launch,
            num_machines=step.nodes,
            machine_rank=int(environment["SLURM_PROCID"]),
            main_process_ip=step.first_node,
            main_process_port=step.port,
        )
    return launch


def is_pod() -> bool:
    """Whether this is the first process in a pod, whose variables speak of pods and not of processes."""
    return "LOCAL_RANK" not in os.environ and (os.environ.get("WORLD_SIZE") == "1" or _has_others())


def _has_others() -> bool:
    """Whether a PyTorchJob has more than one pod."""
    return os.environ.get("PET_NNODES", "1") not in ("", "1")


@dataclass(frozen=True)
class _Step:
    """What one ``srun`` has started."""

    tasks: int
    nodes: int

    @property
    def first_node(self) -> str:
        """Of names such as gpu-[007-009,12]-ib,login1 the first."""
        whole = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", os.environ["SLURM_STEP_NODELIST"])
        return whole.partition(",")[0]

    @property
    def port(self) -> int:
        """The port at which all meet."""
        job, step = (int(os.environ.get(f"SLURM_{name}_ID", "0")) for name in ("JOB", "STEP"))
        return _FIRST_PORT + (job * 7 + step) % _PORTS

    def tasks_on(self, node: int) -> int:
        """Return how many tasks a node has, of 2(x3),1 and the like."""
        counts = list[int]()
        for each in os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(self.tasks)).split(","):
            count, _, times = each.partition("(x")
            counts += [int(count)] * int(times.rstrip(")") or 1)
        return counts[min(node, len(counts) - 1)]


def _step() -> _Step | None:
    """Return the step that this process is a task of; None outside of Slurm and in an interactive shell."""
    if "SLURM_STEP_NODELIST" not in os.environ or "SLURM_PTY_PORT" in os.environ:
        return None
    return _Step(*(int(os.environ.get(f"SLURM_STEP_NUM_{what}", "1")) for what in ("TASKS", "NODES")))
