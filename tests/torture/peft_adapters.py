"""The bad adapters in PEFT, for comparison."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import warnings
from pathlib import Path

import bad_adapter_cases
import trainkit
from adapter_folders import MEMORY, SECONDS, Folder, adapter, merge

OURS = ("base model", "beside it")
"""Classes of what PEFT is not asked for: it is given the base model, and no tokenizer."""
_REFUSED = 17


def peft_accepts() -> dict[str, int]:
    """Loads each bad adapter into the tiny base model with ``PeftModel.from_pretrained``, in a process of its own.

    Returns:
        How many ``trials`` there were, and how many were ``accepted``, ``refused`` with an exception, still ran after
        ten seconds (``hung``), or ended the process (``crashed``), as for lack of memory.
    """
    import peft

    counts = dict.fromkeys(("trials", "accepted", "refused", "hung", "crashed"), 0)
    base = trainkit.build("llama")
    for of, cases in bad_adapter_cases.CLASSES.items():
        for case in cases.values():
            if of in OURS or not case.anywhere or case.commands == (merge,):
                continue
            with tempfile.TemporaryDirectory() as place:
                folder = Folder(Path(place))
                folder.write(adapter(case.method))
                case.spoil(folder)
                counts["trials"] += 1
                counts[_outcome(peft, base, folder.path)] += 1
    return counts


def _outcome(peft: object, base: object, folder: Path) -> str:
    child = os.fork()
    if child == 0:
        _load(peft, base, folder)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {0: "accepted", _REFUSED: "refused", -signal.SIGALRM: "hung"}.get(code, "crashed")


def _load(peft: object, base: object, folder: Path) -> None:
    """In a child, which does not return."""
    code = 1
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        warnings.simplefilter("ignore")
        peft.PeftModel.from_pretrained(base, str(folder))
        code = 0
    except MemoryError:
        code = 1
    except Exception:
        code = _REFUSED
    finally:
        os._exit(code)
