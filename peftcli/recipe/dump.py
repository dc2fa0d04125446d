"""Write a Recipe as YAML, with every setting."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml

from peftcli.recipe.values import read_scalar
from peftcli.schema import Recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to plain data, in the order of the schema."""
    data = dataclasses.asdict(recipe)
    if recipe.task is not None and list(recipe.task) == ["type"]:
        data["task"] = recipe.task["type"]
    return data


def to_yaml(recipe: Recipe) -> str:
    """Convert a recipe to YAML that ``load_recipe`` reads back as an equal Recipe."""
    text: str = yaml.dump(
        _escape(to_dict(recipe)),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
        default_flow_style=False,
    )
    return text


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, with strings as ``_string`` represents them."""


def _string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = not isinstance(read_scalar(text), str) or not text.isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _string)


def _escape(data: Any) -> Any:
    """Escape each literal ``${`` in values, so that reading them does not substitute variables; keys have none."""
    if isinstance(data, dict):
        return {key: _escape(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_escape(item) for item in data]
    return data.replace("${", "$${") if isinstance(data, str) else data
