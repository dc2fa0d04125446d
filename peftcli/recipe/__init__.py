"""Recipes: from YAML files and overrides to a checked ``schema.Recipe``. Reports all mistakes, each with its place.

values      scalars, places, ``${ENV}``
yaml_file   one YAML file -> values with places
sources     ``extends`` and overrides -> one tree
settings    the settings of a section or method: types, defaults and help, read from the dataclasses
parse       tree -> Recipe
accelerate_config  what a file of accelerate's, or its launcher, says of processes and machines
checks      ranges and combinations of settings; gates
data_checks the same for ``dataset``, and whether its paths exist
names       other tools' spellings, similar names
rates       the learning rate of a recipe that gives none
reference   help on the keys; the JSON Schema
messages    what errors and warnings mean
explain_names  help on any name: a key, finding, exit code, metric or message
dump        Recipe -> YAML
"""

from __future__ import annotations

from peftcli.recipe.checks import (
    FORGETTING,
    LEARNT,
    MAX_REGRESSION,
    Bound,
    forgets_rows,
    forgetting_problem,
    gate_holds,
    needs_base,
    parse_duration,
    parse_gate,
    parse_regression,
    why_failed,
)
from peftcli.recipe.dump import to_dict, to_yaml
from peftcli.recipe.explain_names import explain, help_on
from peftcli.recipe.parse import load_recipe, method_config, read
from peftcli.recipe.rates import rate_problems
from peftcli.recipe.reference import Explanation, json_schema
from peftcli.recipe.sources import recipes_and_overrides

__all__ = [
    "FORGETTING",
    "LEARNT",
    "MAX_REGRESSION",
    "Bound",
    "Explanation",
    "explain",
    "forgets_rows",
    "forgetting_problem",
    "gate_holds",
    "help_on",
    "json_schema",
    "load_recipe",
    "method_config",
    "needs_base",
    "parse_duration",
    "parse_gate",
    "parse_regression",
    "rate_problems",
    "read",
    "recipes_and_overrides",
    "to_dict",
    "to_yaml",
    "why_failed",
]
