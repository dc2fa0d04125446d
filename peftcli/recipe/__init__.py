"""Recipes: YAML files and overrides in, a checked ``schema.Recipe`` out. Every mistake at once, each with its place.

values      scalars, places, ``${ENV}``
yaml_file   one YAML file -> values with places
sources     ``extends`` and overrides -> one tree
settings    what a section or method takes: types, defaults and help, read from the dataclasses
parse       tree -> Recipe
checks      what settings mean together; gates
data_checks the same for the data, and whether its paths exist
names       other tools' spellings, near names
reference   help on one key; the JSON Schema
dump        Recipe -> YAML
"""

from __future__ import annotations

from peftcli.recipe.checks import gate_holds, parse_gate, seconds
from peftcli.recipe.dump import to_dict, to_yaml
from peftcli.recipe.parse import Reading, load_recipe, method_config, read, read_recipe
from peftcli.recipe.reference import Explanation, explain, json_schema

__all__ = [
    "Explanation",
    "Reading",
    "explain",
    "gate_holds",
    "json_schema",
    "load_recipe",
    "method_config",
    "parse_gate",
    "read",
    "read_recipe",
    "seconds",
    "to_dict",
    "to_yaml",
]
