"""Time and memory of ``peftcli init`` on 100,000 rows, as CSV and as conversations.

Run ``python benchmarks/init.py``.
"""

from __future__ import annotations

import csv
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("camera", "phone", "battery", "great", "bad", "service", "hotel", "food", "taste", "the", "of", "and", "very")
ROWS = 100_000


def main() -> None:
    """Write the files, run the command on each and print what it took."""
    draw = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        table, chats = Path(folder, "reviews.csv"), Path(folder, "chats.jsonl")
        with table.open("w", newline="") as one, chats.open("w") as other:
            writer = csv.writer(one)
            writer.writerow(["id", "review", "sentiment", "user_id", "created_at"])
            for at in range(ROWS):
                text = f"{' '.join(draw.choices(WORDS, k=draw.randint(20, 120)))} {at}"
                sentiment, user = draw.choice(("positive", "negative", "neutral")), f"u{draw.randrange(9000)}"
                writer.writerow([at, text, sentiment, user, "2024-01-02 10:00:00"])
                turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
                other.write(json.dumps({"messages": turns, "id": at}) + "\n")
        for path in (table, chats):
            command = [sys.executable, "-m", "peftcli", "init", str(path), "--output", str(path.with_suffix(".yaml"))]
            start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            used = resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            taken, peak, size = time.perf_counter() - start, used.ru_maxrss / 1024, path.stat().st_size / 1e6
            print(f"{path.name}: {size:.0f} MB, {taken:.1f} s, of the CPU {cpu:.1f} s, at most {peak:.0f} MiB")


if __name__ == "__main__":
    main()
