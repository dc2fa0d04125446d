"""Measure against peers, and write docs/performance.md.

    make bench                               all; says first how long it takes
    python benchmarks training growth        some parts
    python benchmarks training --only TRL    of their cells those that contain a text
    python benchmarks --list                 what there is, and what is measured
    python benchmarks scaling --cell '{"of": "rows", "x": 3000000}'
                                             a cell that is not in the list: it takes long
    python benchmarks --results mine.json    measure all anew, as on another machine

TRL must be installed. What was measured is kept in docs/performance.json, each cell as soon as it is there, and not
measured again: delete it there to do so. Some claims have scripts of their own beside this one; each prints a JSON
object of its ratios as its last line, under the names of ``gates.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import gradients
import memory
import operations
import quickstart
import scaling
import train_cpu
from common import ROOT, Cell, Found, Part, commit, machine, run_cell
from gates import GATES, Results

RESULTS, README = ROOT / "docs/performance.json", ROOT / "README.md"
OTHERS: dict[str, list[str]] = {
    "start": [],
    "threads": [],
    "decode_cpu": [],
    "together": [],
    "merge_memory": [],
}
"""Scripts of their own -> their options."""
HEAD = """\
# Performance

What peftcli takes of time and memory, beside what others take for the same in the same run. Written by `make bench`,
which goes on where it was stopped (`make bench RESULTS=mine.json` begins anew, as on another machine).
SmolLM2-135M-Instruct (`make quickstart` fetches it) and rows made of the quickstart's functions (`benchmarks/rows.py`),
one thread and CPU seconds of the process, unless a table says otherwise. Each figure is a median, with the least and
the most in brackets; ratios are taken round by round. Sides take turns, each in a process of its own. Tables of
different commits may be of different processors: compare seconds within a table only.
"""
GATES_HEAD = """\
## Gates

Ratios say how many times peftcli's time or memory the other side takes, unless the name says otherwise. Rows are those
of unequal length, unless it does; for other kinds of rows see the tables below.

| ratio | gate | goal | measured | |
| --- | ---: | ---: | ---: | --- |"""


def other_cells(rounds: int) -> Iterator[Cell]:
    """Scripts of their own that are there; each repeats its measurement by itself."""
    yield from ({"script": name} for name in OTHERS if Path(__file__).with_name(f"{name}.py").exists())


def other_section(found: Found) -> Iterator[str]:
    """What the scripts printed."""
    yield "## Threads, start, decoding, merging, several adapters"
    for entry in found.entries:
        yield from ("", f"`benchmarks/{entry['cell']['script']}.py`:", "", "```text", *entry["found"]["text"], "```")


PARTS: dict[str, Part] = {
    **train_cpu.PARTS,
    **operations.PARTS,
    **gradients.PARTS,
    **memory.PARTS,
    "others": Part("", other_cells, other_section, 40),
    **quickstart.PARTS,
    **scaling.PARTS,
}


def main() -> None:
    """Measure the parts that are named, as far as they are not measured yet, and write the page of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--only", default="", help="a text that is in the cell, as --list shows it")
    parser.add_argument("--cell", type=json.loads, help="another cell of a part, as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page is written beside it")
    parser.add_argument("--list", action="store_true", help="measure nothing")
    given = parser.parse_args()
    if given.cell and len(given.parts) != 1:
        parser.error("--cell is of one part")
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    store = Store(given.results)
    missing, minutes = list[tuple[str, Cell]](), 0.0
    for name in given.parts or PARTS:
        cells = [given.cell] if given.cell else list(PARTS[name].cells(given.rounds))
        wanted = [cell for cell in cells if given.only in json.dumps(cell)]
        left = [cell for cell in wanted if not store.has(name, cell)]
        part_minutes = PARTS[name].minutes * given.rounds / 5 * len(left) / max(1, len(cells))
        print(f"{name}: {len(wanted)} cells, {len(left)} to measure, about {part_minutes:.0f} minutes")
        missing, minutes = missing + [(name, cell) for cell in left], minutes + part_minutes
        if given.list:
            print(*(f"  {'-' if cell in left else '+'} {json.dumps(cell)}" for cell in wanted), sep="\n")
    print(
        f"in all about {minutes / 60:.1f} hours on one core; what was measured is kept in {given.results}", flush=True
    )
    if given.list:
        return
    failed = 0
    for number, (name, cell) in enumerate(missing, 1):
        print(f"[{number}/{len(missing)}] {name} {json.dumps(cell)}", flush=True)
        started = time.perf_counter()
        try:
            found = measure(PARTS[name], cell)
        except (subprocess.CalledProcessError, json.JSONDecodeError) as error:
            failed += 1
            print(f"  not measured: {error}", flush=True)
            continue
        store.add(name, cell, found)
        print(f"  {time.perf_counter() - started:.0f} s: {json.dumps(found)[:300]}", flush=True)
    store.write_page()
    if failed:
        sys.exit(f"{failed} cells were not measured")


def measure(part: Part, cell: Cell) -> dict[str, Any]:
    """Measure a cell.

    Raises:
        subprocess.CalledProcessError: it could not be measured.
        json.JSONDecodeError: a script's last line is no JSON object.
    """
    if "script" not in cell:
        return run_cell(part.script, cell, part.threads)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if cell["script"] != "threads":
        environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-W", "ignore", f"benchmarks/{cell['script']}.py"]
    text = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    *lines, last = text.rstrip().splitlines()
    return {"gates": json.loads(last), "text": lines}


class Store:
    """What was measured: part -> entries of a cell and its figures."""

    def __init__(self, path: Path):
        self.path = path
        self.parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.parts.update(json.loads(path.read_text()) if path.exists() else {})

    def has(self, part: str, cell: Cell) -> bool:
        """Whether a cell is measured."""
        return any(entry["cell"] == cell for entry in self.parts[part])

    def add(self, part: str, cell: Cell, found: dict[str, Any]) -> None:
        """Keep what was measured, and write the page."""
        stored = Store(self.path)  # another process may measure another part
        stored.parts[part].append({"cell": cell, "found": found, "commit": commit(), "machine": machine()})
        self.parts = stored.parts
        lines = ",\n".join(
            f' "{name}": [\n' + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n ]"
            for name, entries in self.parts.items()
        )
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(f"{{\n{lines}\n}}\n")
        temporary.replace(self.path)
        self.write_page()

    def results(self) -> Results:
        """Return what was measured by part."""
        return {name: Found(self.parts[name]) for name in PARTS}

    def write_page(self) -> None:
        """Write the page, and README's comparison where all of it is measured."""
        results = self.results()
        self.path.with_suffix(".md").write_text("\n".join(page(results)) + "\n")
        lines = list(comparison(results))
        if lines and self.path == RESULTS:
            block = "\n".join(["<!-- measured -->", *lines, "<!-- /measured -->"])
            text = README.read_text()
            README.write_text(re.sub("<!-- measured -->.*<!-- /measured -->", lambda _: block, text, flags=re.DOTALL))


def page(results: Results) -> Iterator[str]:
    """Return the lines of the page."""
    yield from HEAD.splitlines()
    yield from ("", *GATES_HEAD.splitlines(), *(gate.line(results) for gate in GATES))
    for name, part in PARTS.items():
        if results[name]:
            yield ""
            yield from part.section(results[name])
    yield from ("", "## Where", "")
    places = defaultdict(set)
    for name, found in results.items():
        for entry in found.entries:
            places[f"commit {entry['commit']}, {entry['machine']}"].add(name)
    yield from (f"- {', '.join(sorted(names))}: {place}" for place, names in places.items())


def comparison(results: Results) -> Iterator[str]:
    """README's comparison; nothing where a side is not measured yet."""
    training = results["training"]
    sides = {"peft + Trainer": "Trainer", "peft + Trainer, grouped by length": "Trainer, grouped", "TRL": "TRL"}
    lines = []
    for title, kind, precision in (
        ("rows of unequal length, fp32", "unequal", "fp32"),
        ("rows of unequal length, bf16", "unequal", "bf16"),
        ("rows of unequal length that start differently, fp32", "unlike", "fp32"),
        ("rows of unequal length that start differently, bf16", "unlike", "bf16"),
        ("rows of equal length, fp32", "equal", "fp32"),
        ("rows of equal length, bf16", "equal", "bf16"),
        ("short rows, fp32", "short", "fp32"),
        ("short rows, bf16", "short", "bf16"),
    ):
        cell = {"rows": kind, "precision": precision}
        seconds = {
            side: training.each("per_thousand", side=side, **cell)
            for side in train_cpu.KINDS[kind]
            if precision in train_cpu.SIDES[side][0]
        }
        if not all(seconds.values()):
            return
        peers = {
            side: median(each)
            for side, each in seconds.items()
            if side.startswith(("Trainer", "TRL")) and train_cpu.agrees(training, side, cell)
        }
        if not peers:
            return
        best = min(peers, key=lambda side: peers[side])
        ours, floor = median(seconds["peftcli"]), median(seconds["floor"])
        ratio = median(training.ratios("per_thousand", {"side": best, **cell}, {"side": "peftcli", **cell}))
        shown = [f"{peers[side]:.1f}" if side in peers else "" for side in sides.values()]
        lines.append(
            f"| {title} | {ours:.1f} | {' | '.join(shown)} | {peers[best]:.1f} ({best}) | {ratio:.2f} | {floor:.1f} |"
        )
    yield "CPU seconds for 1,000 useful tokens of LoRA r 16 on all linear layers, one thread:"
    yield ""
    yield f"| | peftcli | {' | '.join(sides)} | the fastest of others | ratio | floor |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |"
    yield from lines
    yield ""
    yield "peftcli as it comes; the others as they come, and with the fastest of the settings that were tried. All"
    yield "sides compute the same loss. Each round runs all sides on the same rows, and seconds are medians of the"
    yield "rounds. The ratio is the median of the rounds' ratios, so it differs from the quotient of two columns. The"
    yield "floor is the matrix products alone. How it was measured, memory and the rest:"
    yield "[docs/performance.md](docs/performance.md), by `make bench`."
    yield ""
    yield "| | peftcli | peft |"
    yield "| --- | --- | --- |"
    yield (
        "| text generated behind a soft prompt equals a greedy loop over forward (Llama, GPT-2, Qwen2 shapes, "
        "transformers 5.24) | yes, all three | no, none |"
    )
    yield ""
    yield "That is tested: ours in `tests/core/test_core_generate.py`, PEFT's in"
    yield "`tests/interop/test_where_peft_is_wrong.py`."


if __name__ == "__main__":
    main()
