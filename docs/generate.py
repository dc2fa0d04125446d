"""Write the reference pages and the schema of run.json from the code, and the files that pages include.

    python docs/generate.py            write them
    python docs/generate.py --check    fail, and name the stale ones

Nothing here imports torch: names, types, defaults and help are read from dataclasses, tables and signatures.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import peft_names
from json_schema import schema_of

from peftcli import errors
from peftcli.cli.app import app, peftcli
from peftcli.methods import METHODS, NOT_HERE
from peftcli.output_schemas import names
from peftcli.recipe.messages import MESSAGES
from peftcli.recipe.names import ALIASES
from peftcli.recipe.settings import Setting, describe_type, method_settings, settings
from peftcli.schema import Recipe
from peftcli.tasks import TASKS
from peftcli.tasks.findings import FINDINGS
from peftcli.tasks.metrics import METRICS
from peftcli.train.runs.record import RunRecord
from peftcli.train.sweep.record import SweepRecord

ROOT = Path(__file__).parent.parent
SCHEMAS = ROOT / "peftcli/output_schemas"
_INCLUDE = re.compile(r"(<!-- include: (\S+) -->\n).*?(<!-- /include -->)", re.DOTALL)
_NOTE = "<!-- Written by `make docs` from the code. Do not edit. -->\n\n"
_MORE_OF_CODES = """\
`check --deep` and `train --dry-run` list every problem that they find, and end with the code of the first.

`status` exits with 0 whatever the run's state, 2 if there is no run, 7 if run.json cannot be read.
`status --json` gives the code with which the run ended: 137 where it was killed before it could say so.
"""


def main() -> int:
    """Write the pages, or with ``--check`` compare them. Returns the exit code."""
    run = json.dumps(schema_of(RunRecord, "run.json"), indent=2) + "\n"
    pages = {SCHEMAS / "run.schema.json": run, SCHEMAS / "sweep.schema.json": sweep_schema()}
    pages |= {ROOT / "docs/reference" / f"{name}.md": _NOTE + page() for name, page in PAGES.items()}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        pages[path] = _INCLUDE.sub(_included, path.read_text(encoding="utf-8"))
    pages[ROOT / "docs/peft.md"] = _NOTE + peft_page()
    pages[ROOT / "docs/decisions/README.md"] = _NOTE + decisions_page()
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is stale: run 'make docs'", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages[path], encoding="utf-8")
    return int("--check" in sys.argv and bool(stale))


def sweep_schema() -> str:
    """The schema of what ``sweep --json`` prints: sweep.json, or the error."""
    schema = schema_of(SweepRecord, "peftcli sweep")
    definitions = schema.pop("$defs")
    head = {key: schema.pop(key) for key in ("$schema", "title")} | {"description": schema["description"]}
    schema = {key: value for key, value in schema.items() if key not in ("if", "then")}
    choice = [{"$ref": "#/$defs/swept"}, {"$ref": "error.schema.json"}]
    return json.dumps({**head, "anyOf": choice, "$defs": {"swept": schema, **definitions}}, indent=2) + "\n"


def recipe_page() -> str:
    """Every section and setting of a recipe."""
    top = settings(Recipe)
    text = "# Settings of a recipe\n\nHow recipes work is in [recipes](../recipes.md). The same, on the command line:\n"
    text += "`peftcli explain training.learning_rate`. `required` settings must be given.\n\n"
    text += _settings_table(top)
    for name, entry in top.items():
        if entry.section:
            text += f"\n## {name}\n\n{entry.help}\n\n{_settings_table(_flat(settings(entry.section)))}"
    text += "\n## method\n\n`type` names the method; its settings are on [methods](methods.md).\n"
    text += "\n## extends\n\nA recipe may also hold `extends`: the path, relative to it, of a recipe that it changes.\n"
    text += "\n## Names in other tools\n\nIn axolotl, LLaMA-Factory, TRL and others. `peftcli check` suggests the "
    text += "setting, and accepts no other name.\n\n"
    theirs: dict[str, list[str]] = {}
    for name, ours in ALIASES.items():
        theirs.setdefault(f"`{ours}`", []).append(f"`{name}`")
    return text + _table(("setting", "in other tools"), [(ours, ", ".join(names)) for ours, names in theirs.items()])


def methods_page() -> str:
    """Every method with its settings, and what PEFT has besides."""
    rows = [(f"[`{n}`](#{n})", f"`{m.peft_type}`", m.summary, f"<{m.paper}>") for n, m in METHODS.items()]
    text = "# Methods\n\n" + _table(("method", "PEFT's name", "what it trains", "paper"), rows)
    for name, method in METHODS.items():
        doc = inspect.getdoc(method.config_class()) or ""
        text += f"\n## {name}\n\n{doc}\n\n{_settings_table(_flat(method_settings(name)))}"
    if NOT_HERE:
        text += "\n## What PEFT 0.21 has besides\n\n`peftcli` refuses these by name.\n\n"
        text += _table(("PEFT's name", "why it is not here"), [(f"`{name}`", why) for name, why in NOT_HERE.items()])
    return text


def peft_page() -> str:
    """Every public name of PEFT, and what became of it here."""
    names = [name for listed in peft_names.PUBLIC.values() for name in listed.split()]
    text = peft_names.INTRODUCTION.format(version=peft_names.VERSION, total=len(names))
    text += "\n## What differs\n\n"
    text += _table(
        ("name", "what differs, and why"), [(n if " " in n else f"`{n}`", how) for n, how in peft_names.DIFFERS.items()]
    )
    text += "\n## What is refused\n\nPEFT accepts these.\n\n" + _table(("what", "why"), peft_names.REFUSED)
    text += "\n## What is absent\n\n"
    text += _table(("name", "why"), [(f"`{name}`", why) for name, why in peft_names.ABSENT.items()])
    text += "\n## What is present\n"
    for module, listed in peft_names.PUBLIC.items():
        if there := [name for name in listed.split() if not peft_names.absent(name)]:
            text += f"\n`{module}`: " + ", ".join(f"`{name}`" for name in there) + "\n"
    return text


def decisions_page() -> str:
    """Every decision, by its title."""
    found = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    titles = [path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for path in found]
    return "# Decisions\n\n" + "".join(f"- [{title}]({path.name})\n" for title, path in zip(titles, found, strict=True))


def tasks_page() -> str:
    """Every task."""
    rows = [
        (f"`{n}`", f"`{t.task_type}`" if t.task_type else "none", f"`{t.auto_class}`", t.summary)
        for n, t in TASKS.items()
    ]
    return "# Tasks\n\n" + _table(("task", "PEFT's name", "transformers' class", "what the model does"), rows)


def commands_page() -> str:
    """Every command with its arguments and options."""
    text = "# Commands\n\nstdout is the answer, stderr is the log. With `--json`, stdout is exactly one JSON object.\n"
    text += "Exit codes are on [exit codes](exit-codes.md).\n\n"
    text += _table(("option of `peftcli` itself", "default", "what it does"), _parameters(peftcli))
    for command in app.registered_commands:
        assert command.callback is not None
        text += f"\n## peftcli {command.name}\n\n{inspect.getdoc(command.callback)}\n"
        if rows := _parameters(command.callback):
            text += "\n" + _table(("argument or option", "default", "what it does"), rows)
    return text


def exit_codes_page() -> str:
    """Every exit code."""
    rows = [(str(code), meaning) for code, meaning in errors.exit_codes().items()]
    text = "# Exit codes\n\nOf every command; `peftcli explain CODE` prints a row.\n\n" + _table(
        ("code", "meaning"), rows
    )
    return f"{text}\n{_MORE_OF_CODES}"


def findings_page() -> str:
    """Every finding of ``peftcli inspect``."""
    rows = []
    for name, kind in FINDINGS.items():
        rows.append((f"`{name}`", kind.levels, kind.summary, kind.advice))
    text = "# Findings\n\nWhat [`peftcli inspect`](../data.md) reports of a dataset. The names stay;\n"
    text += "`peftcli explain NAME` prints a row.\n\n"
    return text + _table(("finding", "level", "the rows", "what to do"), rows)


def metrics_page() -> str:
    """Every metric."""
    rows = [(f"`eval_{name}`", metric.summary, metric.scale) for name, metric in METRICS.items()]
    text = "# Metrics\n\nWhat evaluation reports, in `run.json`, `metrics.jsonl` and gates, where the task has it.\n"
    text += (
        "`peftcli explain NAME` prints a row. The gate `forgetting` is of [what was forgotten](../forgetting.md).\n\n"
    )
    return text + _table(("metric", "what it measures", "values"), rows)


def messages_page() -> str:
    """Errors and warnings that need more than a line."""
    rows = list[tuple[str, ...]]()
    for name, each in MESSAGES.items():
        parts = " or ".join(f"`{part}`" for part in each.parts)
        rows.append((f"`{name}`", parts, each.meaning, f"{each.advice} [More](../{each.page})."))
    text = "# Messages\n\nErrors and warnings that need more than a line. `peftcli explain NAME` prints a row,\n"
    text += "and so does `peftcli explain 'TEXT OF THE ERROR'`.\n\n"
    return text + _table(("name", "a part of the text", "what it means", "what to do"), rows)


def json_page() -> str:
    """Every field of what commands print with ``--json``, from the schemas."""
    schemas = {name: json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8")) for name in names()}
    schemas["run"] = schema_of(RunRecord, "run.json")
    text = (
        "# JSON\n\nWith `--json` a command prints one JSON object on stdout and nothing else there: its answer, or an "
    )
    text += "[error](#an-error).\nWhere stdout is not UTF-8, all but ASCII is escaped.\n"
    text += "What it prints, and what `run.json` holds, has a JSON Schema (draft 2020-12), which "
    text += "`peftcli schema NAME` prints.\nThe names: " + ", ".join(f"`{name}`" for name in schemas) + ".\n"
    for name in ("error", "run", *(name for name in schemas if name not in ("error", "run"))):
        schema = schemas[name]
        text += f"\n## {schema['title']}\n\n{schema['description']}\n"
        for part in schema.get("anyOf", [schema]):
            if "$ref" not in part:
                text += f"\n{_fields_table(part, schemas, schema)}"
            elif part["$ref"].startswith("#"):
                held = schema["$defs"][part["$ref"].rpartition("/")[2]]
                text += f"\n{held['description']}\n\n{_fields_table(held, schemas, schema)}"
    return text


def _fields_table(held: dict[str, Any], schemas: dict[str, Any], file: dict[str, Any]) -> str:
    rows = [(f"`{path}`", kind, text) for path, kind, text in _fields(held, schemas, file)]
    return _table(("field", "type", "meaning"), rows)


def _fields(
    held: dict[str, Any], schemas: dict[str, Any], file: dict[str, Any], before: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Path, type and meaning of each field of an object, followed by the object that it holds, or by each kind."""
    for name, field in held.get("properties", {}).items():
        path = before + name
        inner, kind = _described(field, schemas, file)
        missing = "" if name in held["required"] else "; may be missing"
        yield path, kind + missing, field.get("description") or inner[0].get("description", "")
        path += "[]" * kind.startswith("list")
        one_of_several = sum("properties" in each for each in inner) > 1
        for each in inner:
            if one_of_several and "properties" in each:
                yield path, "one kind of object", each["description"]
            yield from _fields(each, schemas, file, f"{path}.")


def _described(
    field: dict[str, Any], schemas: dict[str, Any], file: dict[str, Any]
) -> tuple[list[dict[str, Any]], str]:
    """What a field may hold, or a list in it; and its type in words."""
    if "$ref" in field:
        place, _, name = field["$ref"].partition("#/$defs/")
        if not place:
            return _described(file["$defs"][name], schemas, file)
        title = schemas[place.partition(".")[0]]["title"]
        return [{}], f"as in [{title}](#{title.lower().replace(' ', '-').replace('.', '')})"
    if "anyOf" in field:
        parts = [_described(part, schemas, file) for part in field["anyOf"]]
        kinds = dict.fromkeys(kind for _, kind in parts)
        return [each for held, _ in parts for each in held], (", or " if "->" in parts[0][1] else " or ").join(kinds)
    if field.get("type") == "array":
        inner, kind = _described(field["items"], schemas, file)
        if kind.startswith("as in"):
            return inner, f"list, each {kind}"
        each_kind = (re.sub(r"^(?!as in)\w+", r"\g<0>s", each) for each in kind.split(" or "))
        return inner, f"list of {' or '.join(each_kind)}"
    if "enum" in field:
        return [field], ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return [field], f"`{field['const']}`"
    if isinstance(each := field.get("additionalProperties"), dict):
        return [field], f"object: name -> {_described(each, schemas, file)[1]}"
    one = field.get("type", "anything")
    if isinstance(one, list) and "array" in one:
        one = [f"list of {field['items']['type']}s" if kind == "array" else kind for kind in one]
    return [field], " or ".join([one] if isinstance(one, str) else one)


PAGES: dict[str, Callable[[], str]] = {
    "recipe": recipe_page,
    "methods": methods_page,
    "tasks": tasks_page,
    "commands": commands_page,
    "exit-codes": exit_codes_page,
    "findings": findings_page,
    "metrics": metrics_page,
    "messages": messages_page,
    "json": json_page,
}


def _settings_table(known: dict[str, Setting]) -> str:
    rows = [(f"`{name}`", describe_type(e.hint), _default(e), e.help) for name, e in known.items()]
    return _table(("setting", "type", "default", "what it does"), rows)


def _default(entry: Setting) -> str:
    if entry.required:
        return "required"
    if entry.default is None:
        return "unset"
    return "see below" if entry.section else f"`{_shown(entry.default)}`"


def _flat(known: dict[str, Setting]) -> dict[str, Setting]:
    """The settings, each mapping or list of mappings followed by what it holds."""
    out = {}
    for name, entry in known.items():
        out[name] = entry
        if held := entry.section or entry.items:
            out |= {f"{name}.{inner}": found for inner, found in settings(held).items()}
    return out


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, str, str]]:
    """Name, default and help of each argument and option, from the function's annotations."""
    rows = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = get_args(get_type_hints(function, include_extras=True)[name])
        option = type(info).__name__ == "OptionInfo"
        spelled = [info.default, *(info.param_decls or ())] if isinstance(info.default, str) else []
        names = ", ".join(spelled) or (f"--{name.replace('_', '-')}" if option else info.metavar or name.upper())
        metavar = f" {info.metavar or _value(kind)}" if option and kind is not bool else ""
        default = names.partition("/")[0] if parameter.default is True else parameter.default
        absent = default is None or default is False or default is parameter.empty
        required = "required" if default is parameter.empty else ""
        rows.append((f"`{names}{metavar}`", required if absent else f"`{_shown(default)}`", info.help or ""))
    return rows


def _value(kind: Any) -> str:
    """What an option of this type takes: its values, or its type in capitals."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if within := get_args(kind):  # of a list, or of what may be left out
        return _value(within[0])
    return "TEXT" if kind is str else kind.__name__.upper()


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def _included(found: re.Match[str]) -> str:
    path = ROOT / found[2]
    kind = {".py": "python", ".yml": "yaml", ".sbatch": "bash"}.get(path.suffix, path.suffix[1:])
    return f"{found[1]}```{kind}\n{path.read_text(encoding='utf-8').strip()}\n```\n{found[3]}"


if __name__ == "__main__":
    sys.exit(main())
