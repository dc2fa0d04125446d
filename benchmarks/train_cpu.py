"""Training on a CPU: CPU seconds for 1,000 useful tokens, and memory, against peft with Trainer and against TRL.

SmolLM2-135M-Instruct, LoRA r 16 on all linear layers, batches of 4 rows, one thread. All sides train the same rows of a
round, whose token ids are compared. The learning rate is 0, so that the loss over all targets must come out the same
whatever the order of the rows; sides without an order of their own have the same batches, so the loss of the first step
must be the same too. The floor is the matrix products that the useful tokens need, alone (``floor.py``).

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/train_cpu.py '{"side": "peftcli", "rows": "unequal", "round": 0}'
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from common import BEFORE, Cell, Found, Part, answer, middle
from rows import BATCH, LENGTHS, LONG, LONGEST, rows

BATCHES, SHORT_BATCHES = 5, 25
"""Of a round; short rows need more."""
_PACKED = {"batch": 2, "max_length": LONGEST}
_TRL: Cell = {"function": "trainer", "library": "trl"}
_BF16 = {"base": "bfloat16"}
SIDES: dict[str, tuple[tuple[str, ...], Cell]] = {
    "floor": (("fp32", "bf16"), {"function": "floor"}),
    "peftcli": (("fp32", "bf16"), {}),
    "peftcli, grouped": (("fp32", "bf16"), {"order": "group_by_length"}),
    "peftcli, packing": (("fp32", "bf16"), {"packing": True, **_PACKED}),
    "Trainer": (("fp32", "bf16"), {"function": "trainer"}),
    "Trainer, grouped": (("fp32", "bf16"), {"function": "trainer", "order": "group_by_length"}),
    "Trainer, a row at a time": (
        ("fp32", "bf16"),
        {"function": "trainer", "batch": 1, "gradient_accumulation_steps": BATCH},
    ),
    "Trainer, bf16 base": (("bf16",), {"function": "trainer", "autocast": False, **_BF16}),
    "Trainer, bf16 base, grouped": (
        ("bf16",),
        {"function": "trainer", "autocast": False, "order": "group_by_length", **_BF16},
    ),
    "Trainer, bf16 base and autocast, grouped": (
        ("bf16",),
        {"function": "trainer", "order": "group_by_length", **_BF16},
    ),
    "TRL": (("bf16",), _TRL),
    "TRL, packing": (("bf16",), {**_TRL, "packing": True, **_PACKED}),
    "TRL, packing, no checkpointing, bf16 base": (
        ("bf16",),
        {**_TRL, "packing": True, "gradient_checkpointing": False, **_PACKED, **_BF16},
    ),
    f"peftcli at {BEFORE}": (("fp32", "bf16"), {"function": "earlier"}),
}
"""Side -> the precisions in which it is measured, and its arguments; ``sides.py`` has the functions."""
KINDS = {
    "unequal": [side for side in SIDES if not side.endswith(BEFORE)],
    "unlike": ["floor", "peftcli", "Trainer", "Trainer, grouped"],
    "equal": ["floor", "peftcli", "Trainer", "Trainer, bf16 base", "TRL", "TRL, packing"],
    "short": ["floor", "peftcli", f"peftcli at {BEFORE}", "Trainer"],
}
"""Kind of rows -> sides."""
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2}
"""By which losses may differ."""
TITLES = {
    "unequal": "Rows of unequal length",
    "unlike": "Rows of unequal length that start differently",
    "equal": "Rows of equal length",
    "short": "Short rows",
}


def measure(
    side: str, rows: str, round: int = 0, precision: str = "fp32", batches: int = 0, **more: Any
) -> dict[str, Any]:
    """Train one side in this process.

    Args:
        side: A key of ``SIDES``.
        rows: Their kind.
        round: Which of them.
        precision: fp32 or bf16.
        batches: So many; 0: as many as a round has.
        **more: Other arguments of the side.
    """
    import floor
    import sides

    chosen = rows_of(rows, round, batches or (SHORT_BATCHES if rows == "short" else BATCHES))
    settings = {"max_length": LENGTHS[rows], "batch": BATCH, "precision": precision, **SIDES[side][1], **more}
    function = settings.pop("function", "peftcli")
    if not settings.pop("autocast", True):
        settings["precision"] = "fp32"  # as far as Trainer knows
    if function == "floor":
        return floor.products(chosen, precision)
    return sides.SIDES[function](chosen, **settings)


rows_of = rows


def cells(rounds: int) -> Iterator[Cell]:
    """The cells of training: in each round each side of each kind of rows."""
    for round in range(rounds):
        for kind, names in KINDS.items():
            for side in names:
                for precision in SIDES[side][0]:
                    yield {"side": side, "rows": kind, "precision": precision, "round": round}


def section(found: Found) -> Iterator[str]:
    """A table for each kind of rows and precision."""
    yield "## Training"
    yield from ("", *__doc__.split("\n\n")[1].splitlines())
    for kind, names in KINDS.items():
        yield from ("", f"### {TITLES[kind]}")
        for precision in ("fp32", "bf16"):
            yield from table(found, kind, [name for name in names if precision in SIDES[name][0]], precision)


def table(found: Found, kind: str, names: list[str], precision: str) -> Iterator[str]:
    """The table of some sides; losses are compared within each round, and so are sides with peftcli."""
    cell = {"rows": kind, "precision": precision}
    sizes = found.of(side="peftcli", **cell)
    if not sizes:
        return
    tokens, targets, steps = (sum(figures[key] for figures in sizes.values()) for key in ("tokens", "targets", "steps"))
    yield ""
    yield (
        f"{precision}: {len(sizes)} rounds, {steps * BATCH:,} rows in all, on average {tokens / steps / BATCH:.0f} "
        f"tokens; {targets / tokens:.0%} are targets."
    )
    yield ""
    yield "| side | CPU s for 1,000 tokens | times the floor | against peftcli | peak RSS, MiB | losses |"
    yield "| --- | ---: | ---: | ---: | ---: | --- |"
    for name in names:
        each = found.each("per_thousand", side=name, **cell)
        if not each:
            yield f"| {name} | not measured | | | | |"
            continue
        above, ours = {"side": name, **cell}, {"side": "peftcli", **cell}
        floors = found.ratios("per_thousand", above, {"side": "floor", **cell})
        ratios = found.ratios("per_thousand", above, ours)
        peaks = found.each("peak", side=name, **cell)
        rounds = f" ({len(each)} rounds)" if len(each) < len(sizes) else ""
        times = f"{median(floors):.2f}" if floors else ""
        yield (
            f"| {name}{rounds} | {middle(each)} | {times} | {middle(ratios)} | "
            f"{middle(peaks, 0) if peaks else ''} | {losses(found, name, cell)} |"
        )


def losses(found: Found, name: str, cell: Cell) -> str:
    """Say whether a side's losses and token ids are those of peftcli: over all targets and, in one order, at first."""
    ours, theirs = found.of(side="peftcli", **cell), found.of(side=name, **cell)
    if name == "floor" or not set(ours) & set(theirs):
        return ""
    keys = ["loss"] if {"order", "packing"} & set(SIDES[name][1]) else ["loss", "first_loss"]
    problems, most = list[str](), 0.0
    for at in set(ours) & set(theirs):
        off = max(abs(ours[at][key] - theirs[at][key]) for key in keys)
        if ours[at]["ids"] != theirs[at]["ids"]:
            problems.append("other token ids")
        if off > TOLERANCES[cell["precision"]]:
            problems.append(f"loss off by {off:.1e}")
        most = max(most, off)
    return "; ".join(dict.fromkeys(problems)) or f"equal (within {most:.0e})"


def agrees(found: Found, name: str, cell: Cell) -> bool:
    """Whether a side computed what peftcli did."""
    return losses(found, name, cell).startswith("equal")


# --- growth at 2,048 tokens, and prompt tuning ------------------------------------------------------------------------

_PRECISIONS = ("fp32", "bf16")


def growth_cells(rounds: int) -> Iterator[Cell]:
    """One row of 2,048 tokens a step, activations computed again in the backward pass."""
    for round in range(rounds):
        for precision in _PRECISIONS:
            cell = {"rows": "long", "precision": precision, "round": round, "batches": 1, "batch": 1}
            yield {"side": "peftcli", **cell, "checkpointing": True}
            yield {"side": "Trainer", **cell, "gradient_checkpointing": True}


def growth_section(found: Found) -> Iterator[str]:
    """How much memory a step takes beyond the loaded model."""
    yield f"## Memory at {LONG:,} tokens"
    yield ""
    yield f"One row of {LONG:,} tokens a step, activations computed again in the backward pass on both sides: what the"
    yield "process takes at most during training beyond what it took before the first step."
    yield ""
    yield "| precision | side | growth, MiB | against peftcli | CPU s for 1,000 tokens | losses |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    yield from _compared(found, {"rows": "long"}, "growth")


def prompt_cells(rounds: int) -> Iterator[Cell]:
    """Prompt tuning on rows of unequal length."""
    for round in range(rounds):
        for precision in _PRECISIONS:
            for side in ("peftcli", "Trainer"):
                cell = {"rows": "unequal", "precision": precision, "round": round, "method": "prompt_tuning"}
                yield {"side": side, **cell}


def prompt_section(found: Found) -> Iterator[str]:
    """Prompt tuning against peft."""
    yield "## Prompt tuning"
    yield ""
    yield "20 virtual tokens, which start as the embeddings of the same text on both sides; rows of unequal length."
    yield ""
    yield "| precision | side | CPU s for 1,000 tokens | against peftcli | growth, MiB | losses |"
    yield "| --- | --- | ---: | ---: | ---: | --- |"
    yield from _compared(found, {"rows": "unequal"}, "per_thousand")


def _compared(found: Found, cell: Cell, key: str) -> Iterator[str]:
    other = "per_thousand" if key == "growth" else "growth"
    for precision in _PRECISIONS:
        for side in ("peftcli", "Trainer"):
            mine = {**cell, "precision": precision}
            ratios = found.ratios(key, {"side": side, **mine}, {"side": "peftcli", **mine})
            first, second = (
                middle(found.each(each, side=side, **mine), 0 if each == "growth" else 2) for each in (key, other)
            )
            yield f"| {precision} | {side} | {first} | {middle(ratios)} | {second} | {losses(found, side, mine)} |"


# --- logits, counted --------------------------------------------------------------------------------------------------


def logits_cells(rounds: int) -> Iterator[Cell]:
    """Count once; it is no matter of chance."""
    for precision in _PRECISIONS:
        for side in ("peftcli", "Trainer"):
            yield {"side": side, "rows": "unequal", "precision": precision, "count": True, "batches": 3}


def logits_section(found: Found) -> Iterator[str]:
    """How many logits are computed, and how large the largest tensor of them is."""
    yield "## Logits"
    yield ""
    yield "Counted in the second step and third: rows of logits for each target, and rows of the largest tensor with"
    yield "a side of the vocabulary's size, the head's weight aside."
    yield ""
    yield "| precision | side | rows of logits for a target | rows of the largest tensor |"
    yield "| --- | --- | ---: | ---: |"
    for precision in _PRECISIONS:
        for side in ("peftcli", "Trainer"):
            for figures in found.of(side=side, precision=precision).values():
                rows, largest = figures["rows_per_target"], figures["largest_rows"]
                yield f"| {precision} | {side} | {rows:.2f} | {largest:,} |"


PARTS = {
    "training": Part("train_cpu", cells, section, 135),
    "growth": Part("train_cpu", growth_cells, growth_section, 35),
    "prompts": Part("train_cpu", prompt_cells, prompt_section, 17),
    "logits": Part("train_cpu", logits_cells, logits_section, 3),
}

if __name__ == "__main__":
    answer(measure)
