"""Build the documentation as a site of plain HTML files.

    python docs/site build/site

Pages are README.md and the Markdown files of docs. Others are made here: a page for each method, from the table of
methods, and the recipes of configs. A link that leaves these files keeps its text only. Nothing is fetched: no fonts,
no scripts of others. A link or an anchor that leads nowhere fails the build.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOOSE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"(^```.*?^```\n?)", re.MULTILINE | re.DOTALL)
_MARK = re.compile(
    r"^<!-- (?:not run|include|/include|measured|/measured|quickstart-output|/quickstart-output)\b.*?-->\n", re.M
)


def main() -> None:
    """Write the site into the folder that the command line names."""
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/site FOLDER")
    with tempfile.TemporaryDirectory() as scratch:
        pages = Path(scratch) / "pages"
        stage(pages)
        config = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
        config |= {"docs_dir": str(pages), "site_dir": str(Path(sys.argv[1]).resolve())}
        for part in config["nav"]:
            for name in part.keys() & {"Tasks", "Methods"}:
                part[name] = [*part[name], *listed(pages, name.lower())]
        path = Path(scratch) / "mkdocs.yml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", str(path)]
        if code := subprocess.run(command, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}).returncode:
            sys.exit(code)
    print(f"site: {sys.argv[1]}/index.html")


def listed(pages: Path, folder: str) -> list[dict[str, str]]:
    """Return the navigation's lines for the pages of a folder, its index aside."""
    found = sorted((pages / folder).glob("*.md"))
    return [{path.stem: f"{folder}/{path.name}"} for path in found if path.stem != "index"]


def stage(pages: Path) -> None:
    """Write every page and what pages show into one folder, with links that lead inside it."""
    shutil.copytree(ROOT / "docs", pages, ignore=shutil.ignore_patterns("*.py", "site", "*.json", "ci", "__pycache__"))
    shutil.copytree(HERE / "assets", pages / "assets")
    sources = {pages / path.relative_to(ROOT / "docs"): path for path in (ROOT / "docs").rglob("*.md")}
    sources |= {pages / name: ROOT / name for name in LOOSE if name.endswith(".md")}
    sources[pages / "index.md"] = ROOT / "README.md"
    places = {path.resolve(): page for page, path in sources.items()}
    for path in (ROOT / "docs").rglob("*.svg"):
        places[path.resolve()] = pages / path.relative_to(ROOT / "docs")
    made = {**recipes_pages(pages, places), **method_pages(pages)}
    for page, path in sources.items():
        text = path.read_text(encoding="utf-8")
        if page.name == "index.md":
            text = (
                text.partition("\n")[0]
                + "\n"
                + (HERE / "start.txt").read_text(encoding="utf-8")
                + text.partition("\n")[2]
            )
        if page == pages / "reference/methods.md":
            text = re.sub(
                r"^## (\w+)$",
                r"## \1\n\n[Its page, with a recipe and what it learnt](../methods/\1.md)",
                text,
                flags=re.M,
            )
        made[page] = relink(text, path, page, places)
    for page, text in made.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")


def relink(text: str, source: Path, page: Path, places: dict[Path, Path]) -> str:
    """Return a page's text with links to other pages; outside of blocks, a link to no page keeps its text."""

    def link(found: re.Match[str]) -> str:
        image, label, target, anchor = found.groups()
        place = places.get((source.parent / target).resolve())
        if place is None:
            return label
        return f"{image}[{label}]({os.path.relpath(place, page.parent)}{anchor or ''})"

    parts = _FENCE.split(_MARK.sub("", text))
    return "".join(part if part.startswith("```") else _LINK.sub(link, part) for part in parts)


def recipes_pages(pages: Path, places: dict[Path, Path]) -> dict[Path, str]:
    """The gallery: every recipe of configs, by folder. Links to a recipe or folder lead there."""
    titles = {
        "": "From the first run on",
        "tasks": "A task each",
        "methods": "A method each",
        "launch": "Several devices",
    }
    made: dict[Path, str] = {}
    index = "# Recipes to start from\n\nCopy one, change the data and the folder, and run `peftcli check` on it.\n"
    for folder, title in titles.items():
        page = pages / "gallery" / f"{folder or 'first'}.md"
        places[(ROOT / "configs" / folder).resolve()] = page
        text = f"# Recipes: {title[0].lower()}{title[1:]}\n"
        index += f"\n## {title}\n\n"
        for path in sorted((ROOT / "configs" / folder).glob("*.yaml")):
            places[path.resolve()] = page
            recipe = path.read_text(encoding="utf-8")
            says = first_sentence(recipe)
            text += f'\n## {path.stem}\n\n{says}\n\n```yaml title="{path.relative_to(ROOT)}"\n{recipe}```\n'
            index += f"- [{path.stem}]({page.name}#{path.stem}): {says}\n"
        made[page] = text
    made[pages / "gallery/index.md"] = index
    return made


def first_sentence(recipe: str) -> str:
    """Return the first sentence of a recipe's comment."""
    lines = []
    for line in recipe.splitlines():
        if not line.startswith("# ") or line.startswith("#  "):
            break
        lines.append(line[2:])
    return re.split(r"(?<=\.) ", " ".join(lines))[0]


def method_pages(pages: Path) -> dict[Path, str]:
    """A page for each method: its settings, its recipe, and what a short run learnt."""
    reference = (ROOT / "docs/reference/methods.md").read_text(encoding="utf-8")
    table = {
        row[1]: row for row in re.finditer(r"^\| \[`(\w+)`\]\S+ \| (`\w+`) \| (.+?) \| (<\S+>) \|$", reference, re.M)
    }
    rates = [json.loads(line) for line in (ROOT / "benchmarks/learning_rates.jsonl").read_text("utf-8").splitlines()]
    made = {}
    for name, row in table.items():
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", reference, re.M | re.DOTALL)
        assert section
        path = ROOT / f"configs/methods/{name}.yaml"
        recipe = (
            f'## A recipe\n\n```yaml title="{path.relative_to(ROOT)}"\n{path.read_text("utf-8")}```\n'
            if path.exists()
            else ""
        )
        learnt = "".join(what_it_learnt(rates, name))
        body = re.sub(r"^\|", "## Settings\n\n|", section[1].strip(), count=1, flags=re.M)
        made[pages / f"methods/{name}.md"] = (
            f"# {name}\n\n{row[3][0].upper()}{row[3][1:]}. PEFT's name: {row[2]}. Paper: {row[4]}\n\n"
            f"{recipe}\n{learnt}\n{body}\n"
        )
    index = "# Methods, a page each\n\n| method | what it trains |\n| --- | --- |\n"
    made[pages / "methods/index.md"] = index + "".join(f"| [{n}]({n}.md) | {row[3]} |\n" for n, row in table.items())
    return made


def what_it_learnt(rates: list[dict[str, object]], name: str) -> Iterator[str]:
    """A table of runs of 60 steps at the default rate or others, where there are any."""
    rows = [row for row in rates if row.get("case") == name and isinstance(row.get("after"), float)]
    if rows:
        yield "## What 60 steps taught it\n\nOne seed each; [how it was measured](../learning_rates.md).\n\n"
        yield "| task | rate | trained parameters | eval loss before | after |\n| --- | ---: | ---: | ---: | ---: |\n"
        for row in rows:
            yield f"| {row['task']} | {row['rate']} | {row['trainable']:,} "
            yield f"| {row['before']:.3f} | {row['after']:.3f} |\n"


if __name__ == "__main__":
    main()
