"""What speed and memory must be: ratios of two sides that were measured in one run, and what they should become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import train_cpu
from common import BEFORE, Cell, Found, middle

Results = Mapping[str, Found]
"""Part -> what was measured."""
Values = Callable[[Results], list[float]]
"""The ratio in each round."""


@dataclass(frozen=True)
class Gate:
    """A line of the table."""

    title: str
    bounds: tuple[float, float]
    """What must hold, and the goal."""
    values: Values
    at_most: bool = False
    """Whether less is better."""

    def line(self, results: Results) -> str:
        """Return the line."""
        values, sign = self.values(results), "<=" if self.at_most else ">="
        cells = [self.title, *(f"{sign} {bound:g}" for bound in self.bounds), self.shown(values), self.verdict(values)]
        return f"| {' | '.join(cells)} |"

    def shown(self, values: list[float]) -> str:
        """Return the median, and the least and the most."""
        return f"{max(values):.1e}" if values and max(values) < 1e-3 else middle(values)

    def verdict(self, values: list[float]) -> str:
        """Say whether the median holds."""
        if not values:
            return ""
        found = median(values)
        gate, goal = (found <= bound if self.at_most else found >= bound for bound in self.bounds)
        return "goal" if goal else "holds" if gate else "missed"


def slower(
    side: str, precision: str, rows: str = "unequal", key: str = "per_thousand", part: str = "training"
) -> Values:
    """Return how many times a figure of peftcli another side has; nothing where they compute another loss."""
    cell: Cell = {"rows": rows, "precision": precision}

    def ratios(results: Results) -> list[float]:
        found = results[part]
        if not train_cpu.agrees(found, side, cell):
            return []
        return found.ratios(key, {"side": side, **cell}, {"side": "peftcli", **cell})

    return ratios


def figure(part: str, key: str, **cell: str) -> Values:
    """Return a figure as it was measured."""
    return lambda results: results[part].each(key, **cell)


def printed(name: str) -> Values:
    """Return a ratio that a script of its own printed under the gate's name."""
    return lambda results: [
        float(entry["found"]["gates"][name]) for entry in results["others"].entries if name in entry["found"]["gates"]
    ]


def _own(title: str, bounds: tuple[float, float], at_most: bool = False) -> Gate:
    return Gate(title, bounds, printed(title), at_most)


def _gradients(title: str, bound: float, key: str) -> Gate:
    return Gate(f"gradients, fp32: {title}", (bound, bound), figure("gradients", key), at_most=True)


_OURS = {"side": "peftcli"}
_EARLIER = f"peftcli at {BEFORE}"
_GROWTH = {"rows": "long", "key": "growth", "part": "growth"}
GATES = [
    Gate("fp32 against peft + Trainer, random", (1.8, 2.1), slower("Trainer", "fp32")),
    Gate("bf16 against peft + Trainer, random, autocast", (1.8, 2.3), slower("Trainer", "bf16")),
    Gate("bf16 against peft + Trainer on a bf16 base", (2.0, 2.4), slower("Trainer, bf16 base", "bf16")),
    Gate("fp32, default, against Trainer grouped by length", (1.05, 1.2), slower("Trainer, grouped", "fp32")),
    Gate("bf16, default, against Trainer grouped by length", (1.1, 1.3), slower("Trainer, grouped", "bf16")),
    Gate("bf16 against TRL SFT default", (2.7, 3.5), slower("TRL", "bf16")),
    Gate("bf16 against TRL SFT packed", (2, 2.5), slower("TRL, packing", "bf16")),
    Gate("fp32, default, against own packing", (0.95, 1.05), slower("peftcli, packing", "fp32")),
    Gate("bf16, default, against own packing", (0.95, 1.05), slower("peftcli, packing", "bf16")),
    Gate(f"fp32, short rows, against the default of {BEFORE}", (1.12, 1.25), slower(_EARLIER, "fp32", "short")),
    Gate(f"bf16, short rows, against the default of {BEFORE}", (1.12, 1.25), slower(_EARLIER, "bf16", "short")),
    Gate("peak RSS against Trainer, fp32", (1.8, 2.3), slower("Trainer", "fp32", key="peak")),
    Gate("peak RSS against Trainer, autocast", (2.8, 3.5), slower("Trainer", "bf16", key="peak")),
    Gate("growth at 2048, both checkpointed, against peft, fp32", (2.6, 4.3), slower("Trainer", "fp32", **_GROWTH)),
    Gate("growth at 2048, both checkpointed, against peft, bf16", (2.6, 4.3), slower("Trainer", "bf16", **_GROWTH)),
    _own("wall of two threads with one core taken, against one thread", (1.25, 1.05), at_most=True),
    Gate("rows of logits / targets", (1, 1), figure("logits", "rows_per_target", **_OURS), at_most=True),
    Gate(
        "rows of the largest tensor with a side V", (128, 128), figure("logits", "largest_rows", **_OURS), at_most=True
    ),
    _own("start to ready against Trainer", (1.05, 1.2)),
    _own("check --deep on cached data, CPU s", (2, 1), at_most=True),
    _own("decoding from an unmerged adapter's folder against peft, batch 1", (1.1, 1.2)),
    _own("decoding from an unmerged adapter's folder against peft, batch 8", (1.05, 1.15)),
    _own("merge peak over the imports, verification included, in shards", (1.5, 1.1), at_most=True),
    Gate("prompt tuning against peft, fp32", (1.4, 1.6), slower("Trainer", "fp32", part="prompts")),
    Gate("prompt tuning against peft, bf16", (1.4, 1.6), slower("Trainer", "bf16", part="prompts")),
    _own("several adapters together against one after another, speed of short rows", (1.3, 1.6)),
    _own("several adapters together against one after another, speed of rows that fill a step", (1.3, 1.6)),
    _own("several adapters together against as many processes side by side, memory", (1.8, 2.5)),
    Gate("GPU: tokens/s against peft + Trainer, TRL, liger-patched TRL", (1.3, 1.3), lambda results: []),
    Gate("GPU: peak memory against the same", (0.8, 0.8), lambda results: [], at_most=True),
    _gradients("no padding against the plain path", 1e-5, "unpadded"),
    _gradients("LoRA as one function against the plain path", 1e-5, "fused"),
    _gradients("the chunked loss against an fp64 head", 5e-6, "chunked"),
    _gradients("the same with normally distributed hidden states", 5e-6, "chunked_normal"),
]
