"""Where a training step goes, by operation: ``torch.profiler`` over some steps of ``train_cpu.py``'s side peftcli.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/operations.py '{"rows": "unequal", "precision": "bf16"}'
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common import Cell, Found, Part, answer
from train_cpu import BATCHES
from train_cpu import measure as train

_SKIPPED = 1
"""Steps before the profiler starts: in the first one the head is looked for."""
GROUPS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "attention": (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "copies, conversions, gathering": ("copy_", "fill_", "zero_", "cat", "index_select", "index_add_", "index"),
    "the gated layer's activation": ("silu", "silu_backward"),
    "other arithmetic, element by element": (
        *("mul", "mul_", "add", "add_", "sub", "sub_", "div", "div_", "neg"),
        *("pow", "rsqrt", "exp_", "log"),
    ),
    "sums, means and maxima of rows": ("sum", "mean", "amax"),
    "the optimizer": ("_fused_adamw_",),
}
"""Group -> torch's operations in it; whatever else there is, Python's calls among them, is "all the rest"."""


def measure(rows: str, precision: str) -> dict[str, Any]:
    """Return the shares of the groups in a step's CPU time."""
    import sides
    from torch.profiler import ProfilerActivity, profile

    profiler, end_step = profile(activities=[ProfilerActivity.CPU]), sides.Notes.end_step

    def end(notes: sides.Notes) -> None:
        end_step(notes)
        if notes.steps_done == _SKIPPED:
            profiler.start()
        if notes.steps_done == BATCHES:
            profiler.stop()

    sides.Notes.end_step = end
    figures = train("peftcli", rows, precision=precision, batches=BATCHES)
    times = {each.key.removeprefix("aten::"): each.self_cpu_time_total for each in profiler.key_averages()}
    shares = {name: sum(times.pop(key, 0.0) for key in keys) for name, keys in GROUPS.items()}
    shares["all the rest"] = sum(times.values())
    whole = sum(shares.values())
    return {"shares": {name: each / whole for name, each in shares.items()}, "loss": figures["loss"]}


def cells(rounds: int) -> Iterator[Cell]:
    """Once each: shares hardly differ from round to round."""
    for rows in ("unequal", "short"):
        for precision in ("fp32", "bf16"):
            yield {"rows": rows, "precision": precision}


def section(found: Found) -> Iterator[str]:
    """The table of the shares."""
    columns = [entry["cell"] for entry in found.entries]
    yield "## Where a step goes"
    yield ""
    yield "Shares of the CPU time of the steps after the first one, by `torch.profiler`, whose own notes make short"
    yield "calls look longer. Rows as above."
    yield ""
    yield "| operations | " + " | ".join(f"{each['rows']}, {each['precision']}" for each in columns) + " |"
    yield "| --- |" + " ---: |" * len(columns)
    for name in (*GROUPS, "all the rest"):
        shares = (f"{entry['found']['shares'][name]:.0%}" for entry in found.entries)
        yield f"| {name} | " + " | ".join(shares) + " |"


PARTS = {"operations": Part("operations", cells, section, 3)}

if __name__ == "__main__":
    answer(measure)
