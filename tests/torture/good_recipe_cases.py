"""Recipes that look odd and are in order, each with what some of its settings must mean."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bad_recipe_cases import GOOD
from tables import cases

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Valid:
    """A recipe that must be accepted."""

    text: str | bytes
    means: dict[str, Any] = field(default_factory=dict)
    """Settings, and the values that they must have."""
    args: tuple[str, ...] = ()
    setup: Callable[[Path], object] = lambda folder: None
    env: dict[str, str] = field(default_factory=dict)


def more(text: str, **rest: Any) -> Valid:
    return Valid(GOOD + text, **rest)


def instead(old: str, new: str, **rest: Any) -> Valid:
    assert old in GOOD
    return Valid(GOOD.replace(old, new), **rest)


def rate(text: str, value: float) -> Valid:
    return instead("1e-4", text, means={"training.learning_rate": value})


def override(*args: str, means: dict[str, Any]) -> Valid:
    return Valid(GOOD, means, args)


METHOD = "{type: lora, r: 4, target_modules: [q_proj, v_proj]}"
DATASET = "{train: org/data, eval: org/held-out}"

WRITTEN = {
    "a byte order mark": Valid(codecs.BOM_UTF8 + GOOD.encode(), {"base_model.name": "org/model"}),
    "no newline at the end": Valid(GOOD.rstrip(), {"training.learning_rate": 1e-4}),
    "comments everywhere": Valid(
        "# first\n" + GOOD.replace("\n", "  # x: y {[\n") + "# last", {"base_model.name": "org/model"}
    ),
    "sections in another order": Valid(
        "".join(reversed(GOOD.partition("training:\n")[0].splitlines(True))) + "training:\n  output_dir: out\n",
        {"task.type": "causal_lm"},
    ),
}

ANCHORS = {
    "an anchor used twice": Valid(
        GOOD.replace("org/data", "&d org/data").replace("org/held-out", "*d"), {"dataset.eval": "org/data"}
    ),
}


WORDS = {
    "a long list": instead("[q_proj, v_proj]", str([f"m{n}" for n in range(5000)]), means={"method.type": "lora"}),
    "a hundred gates": more(
        "gates:\n" + "".join(f"  m{n}: '> {n}'\n" for n in range(100)), means={"method.type": "lora"}
    ),
}

OVERRIDES = {
    "twenty at once": override(*(f"gates.m{n}=> {n}" for n in range(20)), means={"method.type": "lora"}),
}


def _files(**texts: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name, text in texts.items():
            path = folder / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return make


EXTENDS = {
    "a chain of 15": Valid(
        "extends: r1.yaml\n",
        {"task.type": "causal_lm"},
        setup=_files(**{f"r{n}": f"extends: r{n + 1}.yaml\n" for n in range(1, 15)}, r15=GOOD),
    ),
    "a name with spaces": Valid(
        "extends: 'my base.yaml'\n",
        {"task.type": "causal_lm"},
        setup=lambda folder: (folder / "my base.yaml").write_text(GOOD),
    ),
    "a link": Valid(
        "extends: link.yaml\n",
        {"task.type": "causal_lm"},
        setup=lambda folder: (_files(base=GOOD)(folder), (folder / "link.yaml").symlink_to("base.yaml")),
    ),
}


def valid_recipes() -> dict[str, Valid]:
    """All of them, by name."""
    classes = cases(
        "good_recipes",
        globals(),
        written=WRITTEN,
        anchors=ANCHORS,
        words=WORDS,
        overrides=OVERRIDES,
        extends=EXTENDS,
    )
    found = {f"{of}: {name}": valid for of, own in classes.items() for name, valid in own.items()}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent.name == "launch":  # parts of recipes, to be extended
            continue
        found[f"configs/{path.relative_to(CONFIGS)}"] = _of_configs(path)
    return found


def _of_configs(path: Path) -> Valid:
    """A recipe of configs/, with the data that it names."""
    name = path.relative_to(CONFIGS.parent)
    return Valid(f"extends: {name}\n", setup=_checkout)


def _checkout(folder: Path) -> None:
    (folder / "configs").symlink_to(CONFIGS)
    for recipe in (CONFIGS / "tasks").glob("*.yaml"):  # what configs/tasks/fetch.py fetches
        for name in re.findall(r"^  (?:train|eval): (data/\S+)$", recipe.read_text(encoding="utf-8"), re.M):
            path = folder / name
            (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.touch()
