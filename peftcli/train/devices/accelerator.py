"""The accelerator: the devices of this process, its place among the others, and the number formats there."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from peftcli.adapters.number_format import has_bf16
from peftcli.errors import UsageError
from peftcli.schema import Recipe
from peftcli.system.addresses import notice_lost_machines, on_several_machines, use_interface_to
from peftcli.system.cores import usable_cores
from peftcli.train.devices.launch import started_by_peftcli
from peftcli.train.runs.identity import Change
from peftcli.train.runs.record import ThreadsRecord
from peftcli.train.runs.resume import Run

_PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others."""


def start_accelerator(recipe: Recipe) -> Accelerator:
    """The devices of this process and its place among the others.

    Raises:
        UsageError: fewer processes were started than were asked for.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if not torch.cuda.is_available():  # or DeepSpeed says on stdout, wherever it is installed, that it has found none
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UsageError(
            "accelerate was asked for several processes and started one",
            hint="add --multi_gpu, on the CPU too; or set launch.num_processes and run peftcli by itself",
        )
    if on_several_machines():
        use_interface_to(os.environ.get("MASTER_ADDR", ""))
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # or accelerate divides what the loop has divided
    precision = "bf16" if uses_bf16(recipe) else "no"
    if asked == 1 and is_initialized() and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # or accelerate refuses another precision than that of this process's last run
    with nullcontext() if asked == 1 else _nothing_on_stdout():
        accelerator = Accelerator(
            mixed_precision=precision,
            cpu=not torch.cuda.is_available(),
            # evaluation runs out of step; and not every step uses all that trains
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=_PATIENCE),  # of NCCL 10 minutes, in which process 0 may encode the data
            ],
        )
    if on_several_machines():
        notice_lost_machines(unanswered=accelerator.device.type == "cpu")
    if accelerator.device.type == "cpu":  # of several processes accelerate calls it cpu:0, to which weights are copied
        PartialState().device = accelerator.state.device = torch.device("cpu")
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        hint = "launch.strategy: fsdp, zero2 or zero3 in the recipe, and accelerate without it"
        raise UsageError("accelerate was told to use Megatron-LM, which peftcli does not", hint=hint)
    wanted, started = recipe.launch.num_processes, accelerator.num_processes
    if started < asked:
        raise UsageError(f"{asked} processes were asked for and {started} started")
    if wanted != "auto" and not started_by_peftcli() and started != wanted * recipe.launch.num_machines:
        message = f"the recipe wants {wanted * recipe.launch.num_machines} processes, the launcher started {started}"
        raise UsageError(message, key="launch.num_processes")
    return accelerator


@contextmanager
def _nothing_on_stdout() -> Iterator[None]:
    """Inside, not even C++ prints there, where ``--json`` has its object: torch 2.10's gloo says who is connected."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def uses_bf16(recipe: Recipe) -> bool:
    """Whether the forward pass computes in bfloat16: as the recipe says, or if the device has arithmetic for it."""
    if recipe.training.bf16 != "auto":
        return recipe.training.bf16
    return has_bf16()


def base_dtype(recipe: Recipe) -> torch.dtype:
    """Number format of the frozen weights."""
    if recipe.base_model.dtype == "auto":
        return torch.bfloat16 if uses_bf16(recipe) else torch.float32
    dtype: torch.dtype = getattr(torch, recipe.base_model.dtype)
    return dtype


def refuse_attention(recipe: Recipe) -> None:
    """Raise UsageError where flash attention is asked for and computes nothing in half precision."""
    halves = uses_bf16(recipe) or base_dtype(recipe) != torch.float32
    if "flash" in (recipe.base_model.attn_implementation or "") and not halves:
        hint = "set training.bf16: true, or base_model.dtype: bfloat16"
        raise UsageError("flash attention does not compute in float32", key="base_model.attn_implementation", hint=hint)


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
