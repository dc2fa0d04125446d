"""Recipe -> YAML, every setting written out."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from peftcli.recipe.values import read_scalar
from peftcli.schema import Recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, sections and settings in the schema's order."""
    described = dataclasses.asdict(recipe)
    if recipe.task is not None and list(recipe.task) == ["type"]:
        described["task"] = recipe.task["type"]
    return described


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a file that ``load_recipe`` reads back as an equal Recipe."""
    text: str = yaml.dump(
        _escaped(to_dict(recipe)),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
        default_flow_style=False,
    )
    return text


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = not isinstance(read_scalar(text), str) or not text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _string)


def _escaped(data: Any) -> Any:
    """``data`` with each literal ``${`` written so that reading it fills nothing in. Keys are never filled in."""
    if isinstance(data, dict):
        return {key: _escaped(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_escaped(item) for item in data]
    return data.replace("${", "$${") if isinstance(data, str) else data
