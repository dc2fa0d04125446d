"""Give an encoder that has none a head that fills masks, trained on Python's own language reference.

    python configs/tasks/pretrain_masks.py models/MiniLM-L6 models/minilm-masks

Takes two to ten minutes. The language reference is what ``help`` shows of Python's statements and types, which every
Python has; no recipe trains on it. The whole model is trained, with 15 % of the tokens masked. A folder that exists is
left alone.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from peftcli.demos.pretrain_masks import add_head


def main() -> None:
    """Train the encoder with its head, and save it."""
    if len(sys.argv) != 3:
        sys.exit("usage: pretrain_masks.py ENCODER FOLDER")
    encoder, folder = map(Path, sys.argv[1:])
    if folder.exists():
        print(f"pretrain: {folder} is there already")
        return
    add_head(encoder, folder, partial(print, "pretrain:", flush=True))
    print(f"pretrain: ready in {folder}")


if __name__ == "__main__":
    main()
