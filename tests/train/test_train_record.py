"""run.json as a typed record: what is read is what its schema describes, and every wrong value is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import trainkit
from jsonschema import Draft202012Validator

from peftcli.output_schemas import output_schema
from peftcli.train.runs.record import RunRecord
from peftcli.train.runs.typed_json import WrongValue

WRONG: tuple[Any, ...] = (None, [], {}, "x", -1, 1.5, True)
SETTINGS = ("training.eval_strategy=epoch", "training.eval_on_start=true", "gates.eval_loss=<= 100")
FREE = ("recipe", "identity.recipe", "base_model.quantization", "task")
"""Objects that are described elsewhere."""
NAMES = {"versions", "identity.data"} | {
    *(f"{rows}.{name}" for rows in ("data", "data.eval") for name in ("sha256", "dropped")),
    *(f"eval.{name}" for name in ("first", "last", "best", "kept")),
}
"""Objects whose keys are names of other things."""
OPTIONAL = {
    "pid",
    "host",
    "task",
    "bf16",
    "threads",
    "comparison",
    "comparison.skipped",
    "data.unit",
    "data.eval",
    "eval.main",
    "forgetting",
    "forgetting.skipped",
    "attempts.0.end_step",
    "attempts.0.reason",
}


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The run.json of a complete run."""
    recipe = trainkit.write_recipe(tmp_path_factory.mktemp("record"))
    trainkit.run_recipe(recipe, *SETTINGS)
    return (recipe.parent / "out/run.json").read_bytes()


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of an object, and of those inside it."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, each in items:
        yield (*path, key)
        if ".".join(map(str, (*path, key))) not in FREE:
            yield from places(each, (*path, key))


def changed(values: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    out = copy.deepcopy(values)
    inner: Any = out
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return out


def test_it_is_written_as_it_was_read(content: bytes) -> None:
    assert RunRecord.read(json.loads(content)).content() == content


def test_every_value_that_is_read_is_one_that_the_schema_describes(content: bytes) -> None:
    run, schema = json.loads(content), Draft202012Validator(output_schema("run"))
    refused = 0
    for path in places(run):
        for value in WRONG:
            wrong = changed(run, path, value)
            try:
                record, reason = RunRecord.read(wrong), ""
            except WrongValue as error:
                record, reason = None, str(error)
                refused += 1
            named = path[0] in reason if record is None else schema.is_valid(record.as_dict())
            assert named, (path, value, reason)
    assert refused > 400


def test_a_key_that_is_missing_or_unknown(content: bytes) -> None:
    run = json.loads(content)
    for path in places(run):
        holder: Any = copy.deepcopy(run)
        whole = holder
        for key in path[:-1]:
            holder = holder[key]
        if not isinstance(holder, dict) or ".".join(map(str, path[:-1])) in NAMES:
            continue
        del holder[path[-1]]
        if ".".join(map(str, path)) in OPTIONAL:
            RunRecord.read(whole)
        else:
            with pytest.raises(WrongValue, match=r"is missing|schema_version"):
                RunRecord.read(whole)
    with pytest.raises(WrongValue, match=r"data\.'surprise' is unknown"):
        RunRecord.read(changed(run, ("data", "surprise"), 1))


def test_a_run_that_has_not_begun_lacks_what_it_does_not_know(content: bytes) -> None:
    run = json.loads(content) | {"status": "failed", "attempts": []}
    for key in ("data", "steps", "eval", "gates", "wall_seconds", "train_loss"):
        del run[key]
    record = RunRecord.read(run)
    assert not record.data
    assert not record.wall_seconds
    assert record.as_dict() == run
