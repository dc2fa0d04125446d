"""Take pictures of reports in Chromium: python docs/pictures/report.py NAME=RUN_FOLDER ...

Each is drawn anew from its run folder and becomes report-NAME-light.png, as wide as a laptop's window. The pictures in
docs are of `peftcli train configs/quickstart.yaml` and of the recipes that `peftcli demo` writes, trained with
training.compare_with_base=true.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from peftcli.train.runs.listing import write_report

HERE = Path(__file__).parent
WIDTH, HEIGHT = 1200, 1800
"""Of the window; the picture has two thirds of both, so that it stays small."""


def main() -> None:
    """Take the pictures that the command line names."""
    for word in sys.argv[1:]:
        name, _, run = word.partition("=")
        with tempfile.TemporaryDirectory() as scratch:
            page, shot = Path(scratch, "report.html"), Path(scratch, "shot.png")
            write_report([Path(run)], page)
            take(page, shot)
            with Image.open(shot) as picture:
                small = picture.convert("RGB").resize((WIDTH * 2 // 3, HEIGHT * 2 // 3), Image.Resampling.LANCZOS)
            small.quantize(128, Image.Quantize.MAXCOVERAGE).save(HERE / f"report-{name}-light.png", optimize=True)


def take(page: Path, shot: Path) -> None:
    """Write the picture of a page."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    options += ["--blink-settings=preferredColorScheme=1", f"--user-data-dir={page.parent}/browser"]
    size = f"--window-size={WIDTH},{HEIGHT}"
    subprocess.run([browser, *options, size, f"--screenshot={shot}", f"file://{page}"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
