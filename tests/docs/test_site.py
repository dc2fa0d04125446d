"""The site that `make docs-site` builds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import ROOT


@pytest.mark.slow  # installs mkdocs
def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    """Strict: a link or an anchor that leads nowhere fails it."""
    [package] = re.findall(r"'(mkdocs-material[^']*)'", (ROOT / "Makefile").read_text(encoding="utf-8"))
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package], check=True)
    done = subprocess.run(
        [python, "docs/site", str(tmp_path / "site")], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    pages = {path.relative_to(site).as_posix(): path.read_text("utf-8") for path in site.rglob("*.html")}
    recipes = [path.stem for path in (ROOT / "configs").rglob("*.yaml")]
    gallery = pages["gallery/index.html"]
    assert [name for name in recipes if f"#{name}" not in gallery] == []
    assert {f"methods/{name}.html" for name in ("lora", "prompt_tuning", "ia3")} <= pages.keys()
    for name, text in pages.items():
        loads = re.findall(r'<(?:script|link|img|source)[^>]+(?:src|srcset|href)="?(https?://[^" >]+)', text)
        assert [each for each in loads if "canonical" not in each] == [], name
        assert not re.search(r"\{ ?\.md-button", text), name
