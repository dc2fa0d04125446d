"""Take pictures of the terminal, 80 columns wide, in light and dark: python docs/pictures/terminal.py.

The commands run in the checkout, with the small chat model that `make quickstart` fetches. rich draws what they print.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, SVG_EXPORT_THEME
from rich.text import Text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = "models/SmolLM2-135M-Instruct"
QUICK = "configs/quickstart.yaml"
SHOWN = {
    "help": ["--help"],
    "error": ["check", QUICK, "training.learning_rte=1e-3", "method.lora_rank=4"],
    "inspect": ["inspect", QUICK, "--rows", "1"],
    "train": ["train", QUICK, "training.max_steps=10", "dataset.limit=40", "training.output_dir=OUT"],
}
"""Name of the picture -> the command of ours in it."""
THEMES = {"light": DEFAULT_TERMINAL_THEME, "dark": SVG_EXPORT_THEME}


def main() -> None:
    """Take the pictures that the command line names, or all."""
    for name in sys.argv[1:] or SHOWN:
        printed = run(SHOWN[name])
        for theme, colours in THEMES.items():
            console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
            line = " ".join(["$ peftcli", *SHOWN[name]]).replace("OUT", "outputs/short")
            console.print(Text(line, "bold"), Text.from_ansi(printed), sep="\n")
            svg = console.export_svg(title="peftcli", theme=colours, unique_id=f"{name}-{theme}")
            # the picture's own fonts, not those that rich would fetch
            start = svg.index("    @font-face")
            svg = svg[:start] + svg[svg.index(f"    .{name}-{theme}-matrix") :]
            (HERE / f"terminal-{name}-{theme}.svg").write_text(svg, encoding="utf-8")


def run(command: list[str]) -> str:
    """Return what a command prints on a terminal of 80 columns, its colours with it."""
    with tempfile.TemporaryDirectory() as scratch:
        words = [word.replace("OUT", f"{scratch}/short") for word in command]
        environment = {**os.environ, "COLUMNS": "80", "QUICKSTART_MODEL": MODEL, "TERM": "xterm-256color"}
        lines = " 2>&1 | cat" if command[0] == "train" else ""  # its bar would be drawn over itself
        typed = [
            "script",
            "--quiet",
            "--return",
            "--command",
            f"stty cols 80; {sys.executable} -m peftcli {' '.join(words)}{lines}",
        ]
        done = subprocess.run(
            [*typed, "/dev/null"], cwd=ROOT, env=environment, check=False, capture_output=True, text=True
        )
        return last_state(done.stdout.replace(f"{scratch}/short", "outputs/short").replace("\r\n", "\n"))


def last_state(text: str) -> str:
    """Return the lines as they are at the end: what a carriage return went back over is left out."""
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.rstrip().split("\n"))


if __name__ == "__main__":
    main()
