"""Verify an adapter folder in a fresh interpreter, which shares nothing with the process that trained."""

from __future__ import annotations

import gc
import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from peftcli.adapters.proof.verify import mark_verified, needs_verification
from peftcli.errors import AdapterError, Interrupted, PeftcliError
from peftcli.guard.files import command_word
from peftcli.train.devices.launch import STATUS, peftcli_command
from peftcli.train.events import Message, OnEvent, warning

_LAUNCHERS = (
    *("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "ACCELERATE_"),
    *("PEFTCLI_L", STATUS),
)
"""Beginnings of the variables by which launchers say that a process is one of several."""


def verify_run(folder: Path, tell: OnEvent) -> None:
    """Run ``peftcli verify`` on a complete run, unless that was done before, and note in the folder that it passed.

    Raises:
        AdapterError: the folder is not the trained model.
        Interrupted: a signal came.
    """
    if not needs_verification(folder):
        return
    word = command_word(folder)
    tell(Message("loading the adapter folder in a fresh process, to verify it"))
    try:
        answer = _answer_of(folder)
    except Interrupted as stopped:
        hint = f"the run is complete, but not verified: run the same command again, or peftcli verify {word}"
        raise Interrupted(stopped.message, exit_code=stopped.exit_code, hint=hint) from None
    error = answer.get("error", {})
    if error.get("exit_code") == AdapterError.exit_code:
        fields = {name: error[name] for name in ("file", "line", "key", "hint")}
        raise AdapterError(f"the saved adapter is not the trained model: {error['message']}", **fields)
    if error:  # no fault of the folder's: too little memory, a picture that is gone
        tell(warning(f"not verified: {error['message']}; run peftcli verify {word} later"))
    else:
        mark_verified(folder)
        tell(Message("verified: the folder is the trained model"))


def release_gpu_memory() -> None:
    """Give back what a finished run holds of the GPU: the fresh process loads the model again."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _answer_of(folder: Path) -> dict[str, Any]:
    """What ``peftcli verify --json`` prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    command = peftcli_command(["verify", "--json", "--quiet", "--", str(folder)])
    ended = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    with suppress(ValueError):
        answer = json.loads(ended.stdout)
        if isinstance(answer, dict) and answer.keys() & {"tensors", "error"}:
            return answer
    said = ended.stderr.strip().splitlines()
    error = PeftcliError(f"the process ended with {ended.returncode}: {said[-1] if said else 'it said nothing'}")
    return {"error": {**error.as_dict(), "exit_code": error.exit_code}}
