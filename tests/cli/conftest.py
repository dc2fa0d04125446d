from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub

from peftcli.cli.app import main

GOOD = """\
base_model: org/model
task: causal_lm
method: {type: lora, r: 4}
dataset: {train: org/data, eval: org/held-out}
training:
  output_dir: outputs/run
"""


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs a command line in this process."""

    def cli(*args: object) -> Ran:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return cli


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a good recipe, with lines after it."""

    def recipe(more: str = "", name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(GOOD + more, encoding="utf-8")
        return path

    return recipe


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that this process uses."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


# --- a page in Chromium ---------------------------------------------------------------------------------------------

PROBE = """<!DOCTYPE html><html><head><meta name="color-scheme" content="light dark"></head><body>
<iframe id="page" src="page.html" style="border:0;width:WIDTHpx;height:900px"></iframe><pre id="found"></pre><script>
const frame = document.getElementById("page");
const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const paper = rgb(frame.contentWindow.getComputedStyle(at).backgroundColor);
    if (paper.length === 3 || paper[3] > 0) return paper;
  }
}
function light([r, g, b]) {
  const [x, y, z] = [r, g, b].map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}
function contrast(element) {
  const [one, other] = [light(rgb(frame.contentWindow.getComputedStyle(element).color)), light(behind(element))];
  return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
}
frame.onload = () => {
  const page = frame.contentDocument, found = {};
  const all = (selector) => [...page.querySelectorAll(selector)];
  const tell = () => document.getElementById("found").textContent = JSON.stringify(found);
  LOOK
};
</script></body></html>"""
"""A page in a frame, and what a test looks at in it: LOOK."""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Opens a file of the test's folder in headless Chromium."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium: install the package chromium (Debian), or google-chrome")

    def browse(name: str, scheme: str, *options: str) -> subprocess.CompletedProcess[str]:
        preferred = {"dark": 0, "light": 1}[scheme]
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
            "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--allow-file-access-from-files",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=10000",
            f"--user-data-dir={tmp_path}/browser", f"--blink-settings=preferredColorScheme={preferred}",
            *options, f"file://{tmp_path}/{name}",
        ]  # fmt: skip
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        # what a page's script logs, what it throws, and whatever the content security policy stops
        assert "CONSOLE" not in ran.stderr, ran.stderr
        return ran

    return browse


@pytest.fixture
def look(browse: Callable, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a script over the page in a frame of so many pixels, and gives what it has found."""

    def look(script: str, scheme: str = "light", width: int = 400) -> dict[str, Any]:
        probe = PROBE.replace("LOOK", script).replace("WIDTH", str(width))
        (tmp_path / "probe.html").write_text(probe)
        dom = browse("probe.html", scheme, "--dump-dom", f"--window-size={width + 100},1000").stdout
        shown = re.search(r'<pre id="found">(.+?)</pre>', dom, re.DOTALL)
        assert shown, dom[-2000:]
        found: dict[str, Any] = json.loads(unescape(shown[1]))
        return found

    return look
