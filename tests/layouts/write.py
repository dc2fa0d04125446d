"""Write the files of the layouts below a folder, the same bytes each time.

python tests/layouts/write.py FOLDER [LAYOUT ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

from layouts import LAYOUTS


def main() -> None:
    """Write those that are named, or all."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    for name in sys.argv[2:] or LAYOUTS:
        for path in LAYOUTS[name].write(Path(sys.argv[1]) / name):
            print(path)


if __name__ == "__main__":
    main()
