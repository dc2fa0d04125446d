"""One training process, started in the place of ``peftcli``: ``rank.py MARKS FAULT ARGS``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import strike

from peftcli.cli.app import main

if __name__ == "__main__":
    strike(sys.argv[2], Path(sys.argv[1]))
    sys.argv = ["peftcli", *sys.argv[3:]]
    sys.exit(main())
