"""What a language model has forgotten: how much worse it reads texts that the training data has nothing to do with.

The texts ship with the package (``texts.jsonl``): daily life, small stories and dialogue in English and nine other
languages, code, and conversations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from peftcli.adapters.proof.bootstrap import paired_intervals
from peftcli.tasks.base import Task
from peftcli.tasks.parts import means
from peftcli.tasks.text.drift import drift

_TEXTS = Path(__file__).with_name("texts.jsonl")
_KINDS = ("english", "code", "chat")
"""Groups that are no language but English."""
OTHERS = "other_languages"
"""The group of all languages but English."""
_FIRST, _FEWEST = 8, 24
"""Texts by which the time is estimated, and the fewest that are measured."""


@cache
def shipped_texts() -> list[tuple[str, Any]]:
    """Return the texts, each with its group, in an order in which any number of the first spread over all groups."""
    rows = [json.loads(line) for line in _TEXTS.read_text(encoding="utf-8").splitlines()[1:]]
    found = [(row["group"], row.get("text") or row["messages"]) for row in rows]
    groups = [group for group, _ in found]
    ranks = [groups[:at].count(group) for at, group in enumerate(groups)]
    order = sorted(range(len(found)), key=lambda at: ((ranks[at] + 0.5) / groups.count(groups[at]), at))
    return [found[at] for at in order]


def measure_forgetting(
    model: nn.Module,
    task: Task[Any],
    *,
    seconds: float | None = None,
    divided: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Compare a language model with its base on the texts that ship with the package.

    Args:
        model: Has the adapter. It stays as it is.
        task: Of the model: one that writes text.
        seconds: About how long it may take, with fewer texts if need be; None: as long as it takes.
        divided: Whether the model's weights are divided among processes, all of which call this.
        stopping: Says whether to give up, from time to time, where ``seconds`` are given.

    Returns:
        The ``forgetting`` of run.json: the values, or under ``skipped`` the reason why nothing was measured.
    """
    texts, begun, parts = shipped_texts(), time.perf_counter(), list[torch.Tensor]()
    done, step = 0, _FIRST if seconds is not None else len(texts)
    while done < len(texts):
        some = texts[done : done + step]
        parts.append(drift(model, task, [text for _, text in some], divided=divided))
        done += len(some)
        spent = time.perf_counter() - begun
        if seconds is None or done == len(texts):
            continue
        if stopping():
            return {"skipped": "a signal came while it was measured"}
        if (fewest := spent / done * max(_FEWEST, done + step)) > seconds:
            if done >= _FEWEST:
                break
            return {"skipped": f"it would take about {fewest:.0f} s, more than a tenth of the run ({seconds:.0f} s)"}
    sums = torch.cat(parts).numpy()
    if not np.isfinite(sums).all():
        return {"skipped": "the losses of the texts are not finite"}
    return _summary([group for group, _ in texts[:done]], sums, time.perf_counter() - begun)


def _summary(groups: Sequence[str], sums: np.ndarray, seconds: float) -> dict[str, Any]:
    """Describe the sums (N, 5) of ``drift``, of texts of these groups."""
    base, adapter = (means(sums[:, 0], loss=sums[:, at]) for at in (1, 2))
    interval = paired_intervals(base, adapter)["loss"]
    whole = _means(sums)
    members = {each: [at for at, group in enumerate(groups) if group == each] for each in dict.fromkeys(groups)}
    others = [at for at, group in enumerate(groups) if group not in _KINDS]
    names = [*(name for name in _KINDS if name in members), *sorted(members.keys() - set(_KINDS))]
    ordered = {name: members[name] for name in names} | ({OTHERS: others} if others else {})
    of_groups = {name: _means(sums[at]) for name, at in ordered.items()}
    keys = ("texts", "loss", "kl", "kept_tokens")
    return {
        **whole,
        "low": round(interval.low, 5),
        "high": round(interval.high, 5),
        "seconds": round(seconds, 2),
        "groups": {name: {key: means[key] for key in keys} for name, means in of_groups.items()},
    }


def _means(sums: np.ndarray) -> dict[str, Any]:
    """The means over the tokens of texts, from the sums (N, 5) of ``drift``."""
    tokens, base, adapter, kl, kept = sums.sum(0).tolist()
    return {
        "texts": len(sums),
        "tokens": int(tokens),
        "base_loss": round(base / tokens, 5),
        "adapter_loss": round(adapter / tokens, 5),
        "loss": round((adapter - base) / tokens, 5),
        "kl": round(kl / tokens, 5),
        "kept_tokens": round(kept / tokens, 5),
    }
