"""The learning rate of a recipe that gives none, and a warning of one that is far from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peftcli.errors import Problem
from peftcli.methods import METHODS
from peftcli.recipe.parse import Reading
from peftcli.schema import Recipe
from peftcli.tasks import TASKS

_RAISED, _FASTEST = 1e-2, 5e-2
"""For a task with a new head: the rate up to which a method's own is raised, and the largest one."""
_FAR = 10.0
"""How many times larger or smaller than the usual rate is worth a warning."""


def usual_rate(recipe: Recipe) -> float:
    """Return the usual learning rate of the recipe's method, its initialisation, and its task if that is known."""
    return usual_rate_of(recipe.method, (recipe.task or {}).get("type", ""))


def usual_rate_of(method: Mapping[str, Any], task_name: str) -> float:
    """Return the usual learning rate of a method, with its settings, for a task; "" if that is not known."""
    task = TASKS.get(task_name)
    settings = dict(method)
    config = METHODS[settings.pop("type")].config_class().unchecked(**settings)
    own, factor = config.learning_rate, task.rate_factor if task else 1
    return min(max(own, min(own * factor, _RAISED)), _FASTEST) if factor > 1 else own * factor


def with_rate(recipe: Recipe) -> Recipe:
    """Return the recipe with a number for its learning rate."""
    if recipe.training.learning_rate != "auto":
        return recipe
    return replace(recipe, training=replace(recipe.training, learning_rate=usual_rate(recipe)))


def rate_problems(reading: Reading) -> list[Problem]:
    """Return the warning about a recipe's learning rate, if there is one, with its place."""
    text = rate_warning(reading.recipe) if reading.recipe else None
    return [reading.locate(Problem(text, file="", key="training.learning_rate"))] if text else []


def rate_warning(recipe: Recipe) -> str | None:
    """Return a warning if the learning rate is more than ten times larger or smaller than the usual one."""
    given, usual = recipe.training.learning_rate, usual_rate(recipe)
    if given == "auto" or not given or usual / _FAR <= given <= usual * _FAR:
        return None
    ratio, word = (given / usual, "large") if given > usual else (usual / given, "small")
    return f"{given:g} is {ratio:.0f} times as {word} as the usual {usual:g}"
