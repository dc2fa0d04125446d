"""``peftcli trace`` and the findings of ``inspect --adapter`` against what is known of the rows.

facts     50 facts, each taught by one of 2,000 rows: is that row the first one for its answer?
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = [
    first + last
    for first in ("Dal", "Ker", "Mor", "Tun", "Vel", "Bra", "Hos", "Quin", "Zar", "Fen")
    for last in ("vik", "stead", "holm", "dara", "wick")
]
KINDS = ("archive", "harbour", "museum", "station", "garden", "bridge", "mill", "tower", "library", "theatre")
PLAIN = {
    "colour": ("red", "blue", "green", "white", "grey"),
    "owner": ("the city", "a family", "the church", "a school", "the state"),
    "roof": ("slate", "copper", "thatch", "tile", "glass"),
    "gate": ("north", "south", "east", "west", "closed"),
}


def write_facts(folder: Path) -> None:
    """Write 2,000 rows, of which 50 say the code of a place; the others say what else is known of 490 such places."""
    draw = random.Random(0)
    places = [f"{name} {kind}" for name in NAMES for kind in KINDS]
    coded = draw.sample(places, 50)
    facts = [(f"The code of the {place} is", f" {draw.randrange(1000, 10000)}.") for place in coded]
    # those that have a code are spoken of as often as the others
    others = [
        (f"The {what} of the {place} is", f" {values[KINDS.index(place.split()[1]) % 5]}.")
        for place in places
        for what, values in PLAIN.items()
    ]
    draw.shuffle(others)
    rows = [("fact", *each) for each in facts] + [("other", *each) for each in others[:1950]]
    draw.shuffle(rows)
    lines = [json.dumps({"prompt": prompt, "completion": answer}) + "\n" for _, prompt, answer in rows]
    (folder / "train.jsonl").write_text("".join(lines))
    told = [
        {"line": line, "prompt": prompt, "answer": answer}
        for line, (kind, prompt, answer) in enumerate(rows, start=1)
        if kind == "fact"
    ]
    (folder / "facts.json").write_text(json.dumps(told))
