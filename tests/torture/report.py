"""docs/reliability.md, from what the campaigns found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from campaigns import Campaign

_HEAD = """\
# What was tried, and what came of it

Written by `make torture`; change the campaigns in `tests/torture/`, not this page. Each row is a promise, and the
number of trials that tried to break it. A trial is a seed, a moment or a file, the same each time. `make test` runs a
sample of each, or another test of its promise; `make torture` runs all; `python tests/torture NAME ...` runs some
of them, and `python tests/torture --list` names them.

{system}; {packages}.

| campaign | what is promised | trials | as promised | minutes |
| --- | --- | ---: | ---: | ---: |
"""

_COMPARED = """
## The same on other tools

The harnesses above, where they apply, on PEFT with transformers' Trainer and on `datasets.load_dataset`; and the kill
harness on a saver that writes its files in place, which it must be able to break.

| harness | what came of it |
| --- | --- |
"""


def page(found: dict[str, Any], campaigns: Sequence[Campaign], machine: dict[str, str], before: str = "") -> str:
    """The page.

    Args:
        found: Name of a campaign or comparison -> what it found.
        campaigns: All of them, in the order of the page.
        machine: What it ran on.
        before: The page as it was, of which the rows of what is not among the found are kept.
    """
    text = _HEAD.format(**machine)
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in before.splitlines() if line.startswith("| ")}
    known = tuple(f"- {campaign.name}: " for campaign in campaigns if campaign.name not in found)
    broken = [line for line in before.splitlines() if line.startswith(known)]
    for campaign in campaigns:
        if (result := found.get(campaign.name)) is None:
            text += rows.get(campaign.name, f"| {campaign.name} | {campaign.promise} | not run | | |") + "\n"
            continue
        failures = result["failures"]
        held = result["trials"] - len(failures)
        minutes = result["seconds"] / 60
        text += f"| {campaign.name} | {campaign.promise} | {result['trials']} | {held} | {minutes:.1f} |\n"
        broken += [f"- {campaign.name}: {each['trial']}: {_first_line(each['failure'])}" for each in failures]
    if broken:
        text += "\n## Not as promised\n\n" + "\n".join(broken) + "\n"
    _, _, last = before.partition(_COMPARED)
    compared = {line.split(" | ")[0].removeprefix("| "): line for line in last.splitlines()}
    for name, result in found.items():
        if "counts" in result:
            shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result["counts"].items())
            harness = name.removeprefix("compare: ")
            compared[harness] = f"| {harness} | {shown} |"
    if compared:
        text += _COMPARED + "\n".join(line for _, line in sorted(compared.items())) + "\n"
    return text


def _first_line(text: str) -> str:
    return next((line.strip()[:200] for line in text.splitlines() if line.strip()), "")
