"""What each command prints with ``--json``, in success and in failure, is one object that its schema describes."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import trainkit
from jsonschema import Draft202012Validator
from taskkit import CASES
from typer.main import get_command

from peftcli import errors, output_schemas
from peftcli.adapters.push import Pushed
from peftcli.cli.app import app
from peftcli.cli.explain import explain
from peftcli.errors import PeftcliError
from peftcli.output_schemas import names, output_schema
from peftcli.recipe import json_schema, load_recipe
from peftcli.recipe.explain_names import explainable
from peftcli.tasks import TASKS
from peftcli.train.events import Ready, Stepped
from peftcli.train.run import train
from peftcli.train.runs.folder import StartOptions

FOLDER = Path(output_schemas.__file__).parent
EVALUATES = ("training.eval_strategy=epoch", "training.eval_on_start=true", "gates.eval_loss=<= 100")


@functools.cache
def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(output_schema(name))


def assert_valid(name: str, data: Any) -> None:
    found = [f"{error.json_path}: {error.message[:300]}" for error in validator(name).iter_errors(data)]
    assert found == []


@pytest.fixture
def answer(cli: Callable) -> Callable[..., dict[str, Any]]:
    """The one JSON object that a command prints, which its schema describes."""

    def answer(*args: object, code: int = 0) -> dict[str, Any]:
        trainkit.reset_accelerate()
        ran = cli(*args, "--json")
        assert ran.code == code, ran.err
        data = json.loads(ran.out)
        assert isinstance(data, dict)
        assert_valid(str(args[0]), data)
        if data.keys() == {"error"}:
            assert_valid("error", data)
            assert data["error"]["exit_code"] == code
        return data

    return answer


@pytest.fixture
def fails(answer: Callable) -> Callable[..., dict[str, Any]]:
    """The error that a command prints."""

    def fails(code: int, kind: str, *args: object) -> dict[str, Any]:
        data = answer(*args, code=code)
        assert data.keys() == {"error"}
        assert data["error"]["kind"] == kind
        return data["error"]

    return fails


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and adapters beside it: lora, other (another r) and prompt."""
    folder = tmp_path_factory.mktemp("schemas")
    recipe = trainkit.write_recipe(folder)
    small = "training.max_steps=1"
    for name, change in {"lora": "method.r=4", "other": "method.r=2", "prompt": trainkit.PROMPT_TUNING}.items():
        trainkit.run_recipe(recipe, small, change, f"training.output_dir={folder}/{name}")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = trainkit.write_recipe(tmp_path)
    path.write_text(path.read_text().replace("max_steps: 8", "max_steps: 4"))
    return path


# --- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_a_schema_is_one_and_says_what_each_field_is(name: str) -> None:
    schema = output_schema(name)
    Draft202012Validator.check_schema(schema)
    assert schema["title"]
    for path, node in nodes(schema):
        if "properties" in node and "$defs" not in path[-1:] and not {"if", "then"} & set(path):
            assert node["additionalProperties"] is False or "last" in path, path  # the line of metrics.jsonl
            assert set(node["required"]) <= set(node["properties"]), path
            for key, field in node["properties"].items():
                assert field.get("description", "").endswith(".") or "$ref" in field, (path, key)
        if node.get("type") == "array":
            assert node["items"], path
        if "$ref" in node:
            assert node["$ref"].removeprefix("#/$defs/") in schema["$defs"], path


def test_no_two_definitions_have_one_name() -> None:
    files = {path.name.partition(".")[0]: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    assert [*sorted(files)] == names()
    count = Counter([*files, *(name for schema in files.values() for name in schema.get("$defs", ()))])
    assert [name for name, times in count.items() if times > 1] == []


def test_every_command_that_prints_json_has_one() -> None:
    commands = get_command(app).commands
    with_json = {name for name, command in commands.items() if any("--json" in one.opts for one in command.params)}
    assert with_json == set(commands) - {"schema", "skill"}  # which print one thing
    assert set(names()) == with_json | {"run", "error"}


def test_the_schema_of_errors_knows_every_kind() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, PeftcliError)}
    definitions = output_schema("error")["$defs"]
    assert set(definitions["kind"]["enum"]) == {kind.__name__ for kind in kinds}
    codes = {kind.exit_code for kind in kinds} | {75, 130, 143}
    assert set(definitions["failure"]["properties"]["exit_code"]["enum"]) == codes


def nodes(schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every schema in a schema, with the keys that lead to it."""
    if isinstance(schema, list):
        for item in schema:
            yield from nodes(item, path)
    elif isinstance(schema, dict):
        named = path[-1:] in (("properties",), ("$defs",))
        if not named:
            yield path, schema
        for key, inner in schema.items():
            if named or key not in ("enum", "const", "required"):
                yield from nodes(inner, (*path, key))


# --- peftcli schema -------------------------------------------------------------------------------------------------


@pytest.mark.grid(keep=4)
@pytest.mark.parametrize("name", names())
def test_a_schema_is_printed(cli: Callable, name: str) -> None:
    ran = cli("schema", name)
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out) == output_schema(name)


def test_the_schema_of_recipes_is_printed(cli: Callable) -> None:
    assert json.loads(cli("schema", "recipe").out) == json_schema()
    assert cli("schema").out == cli("schema", "recipe").out


def test_a_schema_that_there_is_not(cli: Callable) -> None:
    ran = cli("schema", "trian")
    assert (ran.code, ran.out) == (2, "")
    assert "train" in ran.err
    assert all(name in cli("schema", "--help").out for name in names())


# --- the commands ---------------------------------------------------------------------------------------------------


def test_train(answer: Callable, fails: Callable, recipe: Path) -> None:
    assert answer("train", recipe, *EVALUATES)["status"] == "complete"
    assert answer("train", recipe, *EVALUATES)["status"] == "complete"  # nothing left to do
    assert fails(2, "RecipeError", "train", recipe, "training.sead=1")["problems"]
    fails(2, "UsageError", "train", recipe)  # another recipe in that folder
    (recipe.parent / "train.jsonl").write_text("{broken\n")
    assert fails(3, "DataError", "train", recipe, f"training.output_dir={recipe.parent}/b")["line"] == 1


def test_train_misses_a_gate(answer: Callable, recipe: Path) -> None:
    run = answer("train", recipe, "training.eval_strategy=epoch", "gates={eval_loss: <= 0.1}", code=12)
    assert [gate["passed"] for gate in run["gates"]] == [False]


@pytest.mark.slow  # starts processes
def test_train_in_two_processes(recipe: Path) -> None:
    def train(*settings: str) -> tuple[int, dict[str, Any]]:
        child = trainkit.Child(recipe.parent, "train", recipe, "launch.num_processes=2", *settings, "--json")
        code = child.wait()
        data = json.loads(child.out)
        assert_valid("train", data)
        return code, data

    code, run = train()
    assert (code, run["status"], run["processes"]) == (0, "complete", 2)
    code, failed = train("method.target_modules=[q_porj]", f"training.output_dir={recipe.parent}/typo")
    assert (code, failed["error"]["kind"], failed["error"]["exit_code"]) == (4, "NoMatchingPeftModuleError", 4)


def test_train_dry_run(answer: Callable, fails: Callable, recipe: Path) -> None:
    assert answer("train", recipe, "--dry-run")["steps"] == 4
    fails(4, "RecipeError", "train", recipe, "--dry-run", "method.target_modules=[q_porj]")


def test_train_on_a_mix(answer: Callable, recipe: Path) -> None:
    rows = recipe.parent / "train.jsonl"
    (recipe.parent / "more.jsonl").write_text(rows.read_text() + "{broken\n")
    mix = f"[{{train: {rows}, weight: 2}}, {{train: {recipe.parent}/more.jsonl, weight: 1}}]"
    recipe.write_text(recipe.read_text().replace(f"train: {rows}, eval: {recipe.parent}/eval.jsonl", f"mix: {mix}"))
    settings = ("dataset.eval_fraction=0.2", "dataset.on_bad_row=skip", "dataset.packing=true")
    run = answer("train", recipe, *settings, "training.eval_strategy=epoch")
    assert len(run["data"]["sources"]) == 2
    assert [finding["name"] for finding in run["data"]["findings"]] == ["bad_rows"]


def test_evaluate(answer: Callable, fails: Callable, place: Path) -> None:
    recipe = place / "recipe.yaml"
    assert answer("evaluate", recipe, *EVALUATES, "--adapter", place / "lora")["gates"]
    assert answer("evaluate", recipe)["adapter"] is None
    answer("evaluate", recipe, "training.eval_strategy=epoch", "gates.eval_loss=<= 0.1", code=12)
    fails(4, "AdapterError", "evaluate", recipe, "--adapter", place)
    fails(2, "RecipeError", "evaluate", place / "nowhere.yaml")


def test_check(answer: Callable, fails: Callable, recipe: Path) -> None:
    warnings = answer("check", recipe, "training.learning_rate=1")["warnings"]
    assert [warning["key"] for warning in warnings] == ["training.learning_rate"]
    assert answer("check", recipe, "--deep")["errors"] == []
    recipe.write_text(recipe.read_text().replace("max_steps", "max_stesp").replace("train.jsonl", "trian.jsonl"))
    assert len(answer("check", recipe, code=2)["errors"]) == 2
    fails(2, "UsageError", "check", recipe, "--nope")


def test_check_deep_with_problems(answer: Callable, recipe: Path) -> None:
    rows = recipe.parent / "train.jsonl"
    rows.write_text(rows.read_text() + rows.read_text())
    settings = {"all-linear": "[q_porj]", "max_length: 128": "max_length: 20"}
    text = recipe.read_text()
    for old, new in settings.items():
        text = text.replace(old, new)
    recipe.write_text(text)
    found = answer("check", recipe, "--deep", code=3)
    assert found["errors"]


def test_inspect(answer: Callable, fails: Callable, recipe: Path) -> None:
    assert len(answer("inspect", recipe, "--rows", 2)["rows"]) == 2
    bare = recipe.with_name("bare.yaml")
    bare.write_text(recipe.read_text().replace(f"eval: {recipe.parent}/eval.jsonl, ", ""))
    assert answer("inspect", bare)["audit"]["eval"] is None
    rows = recipe.parent / "train.jsonl"
    rows.write_text(2 * rows.read_text() + "{broken\n")
    found = answer("inspect", recipe, code=3)
    assert found["audit"]["train"]["bad_rows"]
    assert found["audit"]["train"]["duplicates"]["exact"] == 10
    fails(2, "UsageError", "inspect", recipe, "--row", "999")


@pytest.mark.grid
@pytest.mark.parametrize("task", TASKS)
def test_inspect_of_every_task(answer: Callable, tmp_path: Path, task: str) -> None:
    found = answer("inspect", CASES[task].write(tmp_path), "--rows", 1)
    assert len(found["rows"]) == 1
    assert (found["audit"]["batches"]["efficiency"]["packed"] is None) == (task != "causal_lm")


def test_explain(answer: Callable, fails: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("training.seed", "method", "lora", "causal_lm", "dataset.mix"):
        assert answer("explain", key)["key"] == key
    for key in explainable():
        explain([key], as_json=True)
        assert_valid("explain", json.loads(capsys.readouterr().out))
    assert "hint" in fails(2, "UsageError", "explain", "lora_rank")


def test_cache(answer: Callable, fails: Callable, recipe: Path, tmp_path: Path) -> None:
    with trainkit.environment(PEFTCLI_CACHE=str(tmp_path / "cache")):
        assert answer("cache", "list")["entries"] == []
        answer("inspect", recipe)
        assert len(answer("cache", "list")["entries"]) == 2
        assert answer("cache", "dir") == {"folder": str(tmp_path / "cache")}
        assert len(answer("cache", "clear")["removed"]) == 2
        fails(2, "UsageError", "cache", "clean")


def test_generate(answer: Callable, fails: Callable, place: Path, tmp_path: Path) -> None:
    few = ("--max-new-tokens", 2)
    assert answer("generate", place / "lora", "--prompt", "What?", *few)["tokens"] <= 2
    target = tmp_path / "answers.jsonl"
    files = ("--input", trainkit.write_rows(tmp_path / "asked.jsonl", trainkit.PROMPTS[:3]), "--output", target)
    assert answer("generate", place / "prompt", *files, *few)["rows"] == 3
    for line in target.read_text().splitlines():
        assert_valid("generate", json.loads(line))
    fails(4, "AdapterError", "generate", place, "--prompt", "What?")
    assert fails(2, "UsageError", "generate", place / "lora")["key"] == "--json"  # a chat


def test_merge(answer: Callable, fails: Callable, place: Path, tmp_path: Path) -> None:
    assert answer("merge", place / "lora", "--output", tmp_path / "a")["max_logit_difference"] < 1e-3
    unverified = answer("merge", place / "lora", "--output", tmp_path / "b", "--no-verify", "--dtype", "bfloat16")
    assert unverified["max_logit_difference"] is None
    fails(2, "UsageError", "merge", place / "lora", "--output", tmp_path / "a")


def test_info(answer: Callable, fails: Callable, place: Path) -> None:
    assert answer("info", place / "lora")["updates"]["modules"]
    assert "updates" not in answer("info", place / "lora", "--no-updates")
    assert answer("info", place / "prompt")["updates"]["reason"]
    assert answer("info", "methods")["methods"]
    assert answer("info", "tasks")["tasks"]
    assert answer("info", "env")["devices"]
    assert answer("info", place / "lora", "--readers")["readers"]
    fails(4, "AdapterError", "info", place)
    fails(2, "UsageError", "info", "env", "--readers")


def test_export(answer: Callable, fails: Callable, place: Path, tmp_path: Path) -> None:
    written = answer("export", place / "lora", "--for", "vllm", "--output", tmp_path / "a")
    assert (written["form"], written["r"], written["error"]) == ("lora", 8, 0)
    assert answer("export", place / "lora", "--for", "ollama", "--output", tmp_path / "b")["files"]["Modelfile"]
    fails(4, "AdapterError", "export", place / "prompt", "--for", "vllm", "--output", tmp_path / "c")
    fails(2, "UsageError", "export", place / "lora", "--output", tmp_path / "c")


def test_diff(answer: Callable, fails: Callable, place: Path) -> None:
    assert answer("diff", place / "lora", place / "lora")["equal"]
    assert answer("diff", place / "lora", place / "other")["config"]
    assert answer("diff", place / "lora", place / "prompt")["reason"]
    fails(4, "AdapterError", "diff", place / "lora", place)


def test_combine(answer: Callable, fails: Callable, place: Path, tmp_path: Path) -> None:
    both = (f"{place}/lora=0.7", f"{place}/other=0.3")
    assert answer("combine", *both, "--output", tmp_path / "a")["error"] == 0
    assert answer("combine", *both, "--output", tmp_path / "b", "--method", "svd", "--r", 2)["error"] > 0
    fails(2, "UsageError", "combine", f"{place}/lora", "--output", tmp_path / "c")


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push(answer: Callable, fails: Callable, place: Path, tmp_path: Path, hub: Any) -> None:
    adapter = shutil.copytree(place / "lora", tmp_path / "lora")
    to = (adapter, "alice/tiny", "--base-model-id", "acme/base")
    assert answer("push", *to, "--dry-run")["commit"] is None
    assert hub.requests == []
    assert answer("push", *to)["commit"] == hub.repos["alice/tiny"].at("main").oid
    assert fails(2, "UsageError", "push", adapter, "alice/tiny")["hint"]
    hub.token = "another"
    fails(6, "HubError", "push", *to)


def test_status(answer: Callable, fails: Callable, place: Path, recipe: Path) -> None:
    out = recipe.parent / "out"
    fails(2, "UsageError", "status", out)
    assert answer("status", place / "lora")["last"]["step"] == 1
    settings = (*EVALUATES, "training.save_strategy=steps", "training.save_steps=3", "training.max_steps=100000")
    child = trainkit.Child(recipe.parent, "train", recipe, *settings)
    child.until(lambda: (out / "checkpoints/step-000003").exists())
    assert answer("status", out)["pid"] == child.process.pid
    child.signal(signal.SIGKILL)
    child.wait()
    killed = answer("status", out)
    assert (killed["status"], killed["exit_code"], killed["resumable"]) == ("interrupted", 137, True)


# --- run.json -------------------------------------------------------------------------------------------------------


def test_run_json_in_every_state(recipe: Path) -> None:
    out, seen = recipe.parent / "out", Counter[str]()

    def look(event: Any = None) -> None:
        if (out / "run.json").exists():
            run = trainkit.read_run(out)
            assert_valid("run", run)
            seen[run["status"]] += 1

    def interrupt(event: Any) -> None:
        look()
        if isinstance(event, Stepped) and event.result.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    def fail(event: Any) -> None:
        look()
        if isinstance(event, Ready):
            raise OSError(28, "No space left on device")

    saves = ("training.save_strategy=steps", "training.save_steps=2")
    for on_event, code in ((fail, 7), (interrupt, 75)):
        with pytest.raises(PeftcliError) as caught:
            trainkit.run_recipe(recipe, *EVALUATES, *saves, on_event=on_event)
        assert caught.value.exit_code == code
        look()
    allowed = ["training.learning_rate"]
    other = f"{allowed[0]}=1e-3"
    trainkit.reset_accelerate()
    train(load_recipe(recipe, [*EVALUATES, *saves, other]), StartOptions(allow_change=allowed), look)
    look()
    assert seen.keys() == {"running", "failed", "interrupted", "complete"}
    run = trainkit.read_run(out)
    assert [attempt.get("reason") for attempt in run["attempts"]] == ["failed", "interrupted", "complete"]
    assert [change["key"] for change in run["changes"]] == allowed
    assert list(Draft202012Validator(json_schema()).iter_errors(run["recipe"])) == []


# --- they are not vacuous -------------------------------------------------------------------------------------------

OPEN = {
    # Objects whose keys are names of other things, or that are described elsewhere.
    "ends", "eval.best", "eval.first", "eval.kept", "eval.last", "data.dropped", "data.eval.dropped",
    "data.eval.sha256", "data.sha256", "identity.data", "identity.recipe", "recipe", "versions",
}  # fmt: skip


def objects(data: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object in ``data`` that is closed, with its place."""
    if isinstance(data, dict) and path not in OPEN:
        yield path, data
        for key, value in data.items():
            yield from objects(value, f"{path}.{key}".lstrip("."))
    elif isinstance(data, list):
        for item in data:
            yield from objects(item, path)


def test_a_run_may_lack_nothing_and_hold_nothing_else(recipe: Path) -> None:
    run = trainkit.run_recipe(recipe, *EVALUATES).run
    optional = {
        "pid",
        "host",
        "task",
        "bf16",
        "threads",
        "data.eval",
        "comparison",
        "comparison.skipped",
        "data.unit",
        "eval.main",
        "forgetting",
        "forgetting.skipped",
        "attempts.end_step",
        "attempts.reason",
    }
    for name in ("run", "train"):
        assert_valid(name, run)
        assert_closed(name, run, open_={"task"}, optional=optional)
        for key, value in run.items():
            assert not validator(name).is_valid({**run, key: [value, "and more"]}), key


def test_an_inspection_may_lack_nothing_and_hold_nothing_else(answer: Callable, recipe: Path) -> None:
    found = answer("inspect", recipe)
    for split in ("train", "eval"):
        del found["audit"][split]["ends"], found["audit"][split]["left_out"]
        found["audit"][split] |= {"ends": {}, "left_out": {}}
    OPEN_HERE = {f"audit.{split}.{name}" for split in ("train", "eval") for name in ("ends", "left_out")}
    assert_closed("inspect", found, OPEN_HERE)


def test_an_error_may_lack_nothing_and_hold_nothing_else(fails: Callable, recipe: Path) -> None:
    error = {"error": fails(2, "RecipeError", "train", recipe, "training.sead=1")}
    for name in names():
        if name not in ("run",):
            assert_closed(name, error, optional={"error.problems"})


def test_a_push_may_lack_nothing_and_hold_nothing_else() -> None:
    assert_closed("push", asdict(Pushed("https://hub/a/b", None, ["a"], 3, True, "# A card\n")))


def assert_closed(
    name: str, data: dict[str, Any], open_: set[str] = frozenset(), optional: set[str] = frozenset()
) -> None:
    data = copy.deepcopy(data)
    assert_valid(name, data)
    for path, each in objects(data):
        if path in open_:
            continue
        each["surplus"] = 1
        assert not validator(name).is_valid(data), f"{path} may hold anything"
        del each["surplus"]
        for key in [key for key in each if f"{path}.{key}".lstrip(".") not in optional]:
            value = each.pop(key)
            assert not validator(name).is_valid(data), f"{path}.{key} may be missing"
            each[key] = value
    assert_valid(name, data)
