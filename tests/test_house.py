"""The structure of the package: no import circles, few imports inside functions, and figures that only fall."""

from __future__ import annotations

import ast
import functools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import house  # noqa: E402

PACKAGE = ROOT / "peftcli"

ALLOWED = {
    "peftcli.adapters.load": 2,
    "peftcli.cli.cache": 3,
    "peftcli.cli.check": 2,
    "peftcli.cli.combine": 3,
    "peftcli.cli.completion": 3,
    "peftcli.cli.console": 1,
    "peftcli.cli.convert": 1,
    "peftcli.cli.demo": 3,
    "peftcli.cli.diff": 1,
    "peftcli.cli.evaluate": 3,
    "peftcli.cli.explain": 1,
    "peftcli.cli.export": 1,
    "peftcli.cli.generate": 4,
    "peftcli.cli.import_": 1,
    "peftcli.cli.info": 3,
    "peftcli.cli.init": 1,
    "peftcli.cli.inspect": 5,
    "peftcli.cli.junit": 1,
    "peftcli.cli.lm_eval": 2,
    "peftcli.cli.merge": 1,
    "peftcli.cli.predict": 1,
    "peftcli.cli.progress": 1,
    "peftcli.cli.push": 1,
    "peftcli.cli.report": 1,
    "peftcli.cli.runs": 1,
    "peftcli.cli.schema": 1,
    "peftcli.cli.status": 1,
    "peftcli.cli.sweep": 1,
    "peftcli.cli.trace": 1,
    "peftcli.cli.train": 5,
    "peftcli.cli.train_together": 6,
    "peftcli.cli.verify": 1,
    "peftcli.demos.run": 1,
    "peftcli.recipe.data_checks": 1,
    "peftcli.train.preview": 1,
    "peftcli.train.start": 2,
}
"""Module -> how many imports of the package may stand inside its functions. A command imports what it runs when it
runs, so that ``--help`` answers at once; ``train.preview`` and ``train.start`` do so for theirs. No number here may
grow, and no module outside ``cli`` may be added."""


FAMILIES: dict[str, int] = {}
"""File -> names of model families that it still contains. They belong into a table of facts: see CONTRIBUTING.md."""

CLASSES = {
    "adapters/load.py": {"AutoModel"},
    "core/linear.py": {"Conv1D"},
    "core/quantised.py": {"Conv1D"},
    "data/hub_rows.py": {"BuilderConfig"},
    "data/readers.py": {"ClassLabel"},
    "peft_api/config.py": {"MultitaskPromptTuningInit", "PromptEncoderReparameterizationType", "PromptTuningInit"},
    "peft_api/for_libraries.py": {"PreTrainedModel"},
    "peft_api/layers.py": {"Int8Params", "MixedModel", "ModulesToSaveWrapper", "Params4bit", "PreTrainedModel"},
    "peft_api/namespaces.py": {"AutoPeftModelFor", "PeftModelFor"},
    "train/optim.py": {"AdamW"},
    "train/devices/zero.py": {"DeepSpeed"},
}
"""File -> classes of libraries that it still names in a text, as one that compares the name of a type does."""


@functools.cache
def parsed() -> house.Modules:
    return house.parsed(ROOT)


def test_no_modules_import_one_another() -> None:
    assert house.cycles(house.imports(parsed())) == []


def test_imports_inside_functions_only_become_fewer() -> None:
    found = house.inner_imports(parsed())
    assert {name: count for name, count in found.items() if count > ALLOWED.get(name, 0)} == {}


def test_a_circle_is_found() -> None:
    assert house.cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_figures_only_fall() -> None:
    """A bound that a change must raise is a question for its review: is there less code that does it?"""
    bounds = json.loads((ROOT / house.BOUNDS).read_text(encoding="utf-8"))
    figures = house.figures(ROOT, parsed()) | house.reading_figures()
    found = {name: figure.value for name, figure in figures.items()}
    assert found.keys() == bounds.keys(), "run: python docs/house.py --write"
    above = {name: (value, bounds[name]) for name, value in found.items() if value > bounds[name]}
    assert not above, "above the bound; shorten the code (names: python docs/house.py --list), or argue for --write"
    below = {name: (value, bounds[name]) for name, value in found.items() if value < 0.98 * bounds[name]}
    assert not below, "the bounds follow what has become smaller; run: python docs/house.py --write"


def test_shared_folders_name_no_model_family() -> None:
    found = {file: len(names) for file, names in house.names_in(parsed(), PACKAGE, house.is_model_type).items()}
    more = {file: count for file, count in found.items() if count > FAMILIES.get(file, 0)}
    assert not more, "write a row in a table of facts, or a rule that names no family: see CONTRIBUTING.md"
    assert found == FAMILIES, "there are fewer now: lower the numbers"


def test_shared_folders_name_no_class_of_a_library() -> None:
    listed = house.names_in(parsed(), PACKAGE, house.is_foreign_class, texts_only=True)
    found = {file: set(names) for file, names in listed.items()}
    more = {file: names for file, names in found.items() if names - CLASSES.get(file, set())}
    assert not more, "ask what the object does, or write a row in a table of facts: see CONTRIBUTING.md"
    assert found == CLASSES, "there are fewer now: shorten the lists"


def test_a_name_is_found_as_a_whole_text_or_identifier() -> None:
    tree = ast.parse('"""Like llama."""\nif kind == "gpt_neox" or llama: called, x = "Conv1D", "a mamba"')
    modules = {PACKAGE / "core/a.py": house.Module("peftcli.core.a", tree, list(ast.walk(tree)))}
    assert house.names_in(modules, PACKAGE, house.is_model_type) == {"core/a.py": ["gpt_neox", "llama"]}
    assert house.names_in(modules, PACKAGE, house.is_foreign_class, texts_only=True) == {"core/a.py": ["Conv1D"]}
