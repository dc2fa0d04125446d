"""Take pictures of reports in Chromium: python docs/pictures/report.py NAME-light=RUN NAME-phone-dark=RUN ...

Each is drawn anew from its run folder, and becomes report-NAME-light.png or report-NAME-phone-dark.png. The pictures in
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
LOOKS = {"light": (1200, 1800, 1, 800), "phone-dark": (360, 1100, 0, 360)}
"""Last part of the name -> width and height of the page, whether it is light, and the width of the picture."""


def main() -> None:
    """Take the pictures that the command line names."""
    for word in sys.argv[1:]:
        name, _, run = word.partition("=")
        width, height, light, shown = next(look for end, look in LOOKS.items() if name.endswith(f"-{end}"))
        with tempfile.TemporaryDirectory() as scratch:
            write_report([Path(run)], Path(scratch, "report.html"))
            shot = take(Path(scratch), width, height, light)
            with Image.open(shot) as picture:
                page = picture.convert("RGB").crop((0, 0, width, height))
            small = page.resize((shown, height * shown // width), Image.Resampling.LANCZOS)
            small.quantize(128, Image.Quantize.MAXCOVERAGE).save(HERE / f"report-{name}.png", optimize=True)


def take(folder: Path, width: int, height: int, light: int) -> Path:
    """Return the picture of report.html in a folder, in a frame: a window has at least 500 pixels."""
    frame, shot = folder / "frame.html", folder / "shot.png"
    size = f"border:0;width:{width}px;height:{height}px"
    scheme = '<meta name="color-scheme" content="light dark">'
    frame.write_text(f'{scheme}<body style="margin:0"><iframe src="report.html" style="{size}">')
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/browser"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", f"--blink-settings=preferredColorScheme={light}"]
    options += [f"--window-size={max(width, 500)},{height}", f"--screenshot={shot}"]
    subprocess.run([browser, *options, f"file://{frame}"], check=True, capture_output=True)
    return shot


if __name__ == "__main__":
    main()
