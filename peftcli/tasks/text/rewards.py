"""Rewards of answers that can be checked: what grpo learns from, and measures in evaluation."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from peftcli.data.rows import Place
from peftcli.errors import DataError
from peftcli.system.outputs import expand_user
from peftcli.tasks.settings import AnswerReward, GrpoSettings
from peftcli.tasks.text.own_code import as_data_error, own_function

_SECONDS = 2.0
"""For matching a regular expression with one answer."""


class CheckedAnswer(NamedTuple):
    """An answer, and the row that it answers."""

    text: str
    tokens: int
    """Its length, its end included."""
    columns: Mapping[str, Any]
    """The values of the row."""
    place: Place


Check = Callable[[Sequence[CheckedAnswer]], Sequence[Any]]
"""Gives each answer its reward, a number that is not checked yet."""


class Rewards:
    """The rewards that a recipe names."""

    def __init__(self, settings: GrpoSettings):
        """Compile them.

        Raises:
            DataError: a pattern, schema or function cannot be read, or its code is not allowed.
        """
        self.names = names_of(settings.rewards)
        self.weights = np.array([each.weight for each in settings.rewards])
        self._keys = [f"task.rewards[{at}].{each.kind}" for at, each in enumerate(settings.rewards)]
        self._checks = [
            _CHECKS[each.kind](each, key, settings) for each, key in zip(settings.rewards, self._keys, strict=True)
        ]

    def __call__(self, answers: Sequence[CheckedAnswer]) -> np.ndarray:
        """Return the reward of each answer by each check, (N, K), float64, without their weights.

        Raises:
            DataError: a check fails, or gives an answer no finite number. It names the answer's row.
        """
        columns = [_numbers(*each, answers) for each in zip(self._checks, self._keys, strict=True)]
        return np.array(columns, np.float64).T


def names_of(rewards: Sequence[AnswerReward]) -> list[str]:
    """Return the names of rewards in logs and metrics; a second one of the same name gets a number."""
    seen, names = Counter[str](), list[str]()
    for each in rewards:
        own = each.python.rpartition(":")[2] if each.python else each.kind
        name = each.name or own
        seen[name] += 1
        names.append(f"{name}_{seen[name]}" if seen[name] > 1 else name)
    return names


def columns_read(rewards: Sequence[AnswerReward]) -> list[tuple[str, str]]:
    """Return the columns that rewards need of each row, each with the kind of the reward."""
    wanted = [(each.exact_match, "exact_match") for each in rewards if each.exact_match is not None]
    return [*wanted, *((str(each.json_schema), "json_schema") for each in rewards if _is_column(each.json_schema))]


def wrong_column(value: Any, kind: str) -> str | None:
    """Return why a row's value is nothing that a reward of this kind compares an answer with; None: it is."""
    if kind == "exact_match":
        return None if isinstance(value, str | int | float) else f"expected a text or a number, found {value!r:.60}"
    try:
        _validator(json.loads(value) if isinstance(value, str) else value)
    except (ValueError, DataError) as error:
        return f"contains no JSON Schema: {error!s:.200}"
    return None


def _is_column(schema: Any) -> bool:
    return isinstance(schema, str) and not schema.endswith(".json")


def _numbers(check: Check, key: str, answers: Sequence[CheckedAnswer]) -> list[float]:
    """The rewards of answers by one check, all of them finite numbers."""
    try:
        with as_data_error(key):
            found = list(check(answers))
    except DataError as error:
        if len(answers) > 1:
            for each in answers:  # to name the one that fails by itself
                _numbers(check, key, [each])
        raise answers[0].place.error(f"{error.message}, for the answer {answers[0].text!r:.60}", key=key) from error
    if len(found) != len(answers):
        raise DataError(f"returns {len(found)} rewards for {len(answers)} answers", key=key)
    for value, answer in zip(found, answers, strict=True):
        if not (isinstance(value, int | float | np.number | np.bool_) and math.isfinite(value)):
            raise answer.place.error(f"the reward is {value!r:.60} for the answer {answer.text!r:.60}", key=key)
    return [float(value) for value in found]


def _exact_match(reward: AnswerReward, key: str, settings: GrpoSettings) -> Check:
    column = str(reward.exact_match)
    return lambda answers: [each.text.strip() == str(each.columns[column]).strip() for each in answers]


def _contains(reward: AnswerReward, key: str, settings: GrpoSettings) -> Check:
    text = str(reward.contains)
    return lambda answers: [text in each.text for each in answers]


def _regex(reward: AnswerReward, key: str, settings: GrpoSettings) -> Check:
    try:
        pattern = regex.compile(str(reward.regex))
    except regex.error as error:
        raise DataError(f"{reward.regex!r:.60} is not a regular expression: {error}", key=key) from None
    return lambda answers: [pattern.search(each.text, timeout=_SECONDS) is not None for each in answers]


def _length(reward: AnswerReward, key: str, settings: GrpoSettings) -> Check:
    bounds = reward.length or {}
    least, most = bounds.get("min", 0), bounds.get("max", math.inf)
    return lambda answers: [least <= each.tokens <= most for each in answers]


def _json_schema(reward: AnswerReward, key: str, settings: GrpoSettings) -> Check:
    schema = reward.json_schema
    if _is_column(schema):
        column = str(schema)

        def of_row(answer: CheckedAnswer) -> bool:
            value = answer.columns[column]
            return _fits(answer.text, _validator(json.loads(value) if isinstance(value, str) else value))

        return lambda answers: list(map(of_row, answers))
    if isinstance(schema, str):
        try:
            schema = json.loads(expand_user(Path(schema)).read_text())
        except (OSError, ValueError) as error:
            raise DataError(f"{reward.json_schema}: {error}", key=key) from None
    try:
        validator = _validator(schema)
    except DataError as error:
        raise DataError(error.message, key=key) from None
    return lambda answers: [_fits(each.text, validator) for each in answers]


def _validator(schema: Any) -> Any:
    """A validator that fetches nothing.

    Raises:
        DataError: it is no JSON Schema.
    """
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for
    from referencing import Registry

    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise DataError(f"is no JSON Schema: {error.message:.200}") from None
    return kind(schema, registry=Registry())


def _fits(text: str, validator: Any) -> bool:
    """Whether an answer is JSON, as its standard says it, that fits a schema."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return bool(validator.is_valid(value))


def _python(reward: AnswerReward, key: str, settings: GrpoSettings) -> Check:
    own = own_function(str(reward.python), key, allowed=settings.trust_reward_code, switch="task.trust_reward_code")

    def check(answers: Sequence[CheckedAnswer]) -> Sequence[Any]:
        names = dict.fromkeys(name for each in answers for name in each.columns)
        columns = {name: [each.columns.get(name) for each in answers] for name in names}
        found: Sequence[Any] = own([each.text for each in answers], **columns)
        return found

    return check


_CHECKS: dict[str, Callable[[AnswerReward, str, GrpoSettings], Check]] = {
    "exact_match": _exact_match,
    "contains": _contains,
    "regex": _regex,
    "json_schema": _json_schema,
    "length": _length,
    "python": _python,
}
