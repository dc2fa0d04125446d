"""Read another tool's recipe into flat keys: YAML or JSON, a command line in a shell script, a program or notebook.

Nothing is executed: shell variables are replaced only where the script sets them to a plain text, and of a program the
keyword arguments are read that are written as values.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.drafting.peers import COMMAND, Unknown
from peftcli.errors import RecipeError, UsageError
from peftcli.guard.files import irregular_kind, is_file, one_line, os_reason, read_small, short_repr
from peftcli.recipe.values import Problems, Value, read_scalar
from peftcli.recipe.yaml_file import MAX_BYTES, MAX_VALUES, parse_text
from peftcli.system.secrets import redact

_MAX_NOTEBOOK = 20_000_000
_MOST = 5
"""Problems of a file that are shown."""
_SECRET = Unknown("...", "is a secret; a recipe must not contain it: set it in the environment")
_SECRET_KEY = re.compile(
    r"(^|[._])((hub|hf|wandb|swanlab|access|api|auth)_(token|key|api_key)|\w*(password|secret))$|(^|\.)token$",
    re.I,
)
_EXECUTED = re.compile(r"\$\([^()]*(?:\([^()]*\)[^()]*)*\)|`[^`]*`")
_SHELL = "contains a variable or command of the shell, which is not executed"
_COMPUTED = "is computed by the program, which is not executed"


@dataclass(frozen=True)
class Foreign:
    """What a file says: flat keys such as ``datasets[0].path``, and the tool that a command names."""

    values: dict[str, Any]
    tool: str | None = None


def read_foreign(path: Path) -> Foreign:
    """Read a recipe of another tool.

    Raises:
        UsageError: the file cannot be read, or contains no settings.
        RecipeError: a file that is not YAML.
    """
    try:
        found = _read_kind(path, _read(path))
    except RecursionError:
        raise UsageError("nested too deeply to be a recipe", file=str(path)) from None
    return replace(found, values={key: _without_secret(key, value) for key, value in found.values.items()})


def _without_secret(key: str, value: Any) -> Any:
    if value is not None and not isinstance(value, Unknown) and _SECRET_KEY.search(key):
        return _SECRET
    return _SECRET if isinstance(value, str) and redact(value) != value else value


def _read_kind(path: Path, text: str) -> Foreign:
    if path.suffix == ".ipynb":
        return _program(_code_of(text, path), path)
    if path.suffix == ".py":
        return _program(text, path)
    if path.suffix in (".sh", ".bash", ".txt", ".cmd", ".slurm", ".sbatch") or text.startswith("#!"):
        return _script(text, path)
    return Foreign(_yaml(text, path))


def _read(path: Path) -> str:
    limit = _MAX_NOTEBOOK if path.suffix == ".ipynb" else MAX_BYTES
    try:
        return read_small(path, limit).decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError("no such file", file=str(path)) from None
    except UnicodeDecodeError:
        raise UsageError("not UTF-8 text, so no recipe", file=str(path)) from None
    except (OSError, ValueError) as error:
        raise UsageError(irregular_kind(path) or f"cannot be read: {os_reason(error)}", file=str(path)) from None


def _yaml(text: str, path: Path) -> dict[str, Any]:
    problems = Problems()
    top = parse_text(re.sub(r"\$(?=\{)", "$$", text), str(path), problems)  # ${ is another tool's, not our variable
    if found := [each for each in problems.in_order() if not each.message.startswith("looks like a token")]:
        raise RecipeError(found[:_MOST])
    values = dict(_flatten("", top)) if top is not None else {}
    return {key: _interpolate(value, values) for key, value in values.items()}


def _flatten(key: str, value: Value) -> Iterator[tuple[str, Any]]:
    """Yield flat keys with plain values; a list of scalars is one value."""
    if isinstance(value.data, dict) and (value.data or not key):
        for name, inner in value.data.items():
            yield from _flatten(f"{key}.{name}" if key else name, inner)
    elif isinstance(value.data, list) and any(not isinstance(item.data, str) for item in value.data):
        for at, item in enumerate(value.data):
            yield from _flatten(f"{key}[{at}]", item)
    elif isinstance(value.data, list):
        yield key, [_SECRET if item.refused else item.scalar for item in value.data]
    elif isinstance(value.data, dict):
        yield key, {}
    else:
        yield key, _SECRET if value.refused else value.scalar


def _interpolate(value: Any, values: dict[str, Any]) -> Any:
    """Replace ``${key}``, which torchtune takes from the same file."""
    if not isinstance(value, str) or "${" not in value:
        return value

    def fill(match: re.Match[str]) -> str:
        found = values.get(match[1])
        return match[0] if found is None or isinstance(found, (list, dict, Unknown)) else str(found)

    filled = re.sub(r"\$\{([\w.]+)\}", fill, value)
    return Unknown(value, "contains a variable that the file does not set") if "${" in filled else filled


# Command lines

_COMMANDS: tuple[tuple[str, str], ...] = (
    (r"(^|/)trl$", "trl"),
    (r"(^|/)swift$", "ms-swift"),
    (r"(^|/)llamafactory-cli$|(^|/)llmf$", "llama-factory"),
    (r"(^|/)axolotl$|^axolotl\.cli\.\w+$", "axolotl"),
    (r"(^|/)mlx_lm(\.lora)?$|^mlx_lm\.lora$", "mlx-lm"),
    (r"(^|/)tune$", "torchtune"),
    (r"(^|/)unsloth$|unsloth[-_]cli\.py$", "unsloth"),
    (r"(^|/)(sft|dpo|kto|orpo|cpo|reward|reward_modeling|grpo|ppo|rloo)(_\w+)?\.py$", "trl"),
    (r"swift/cli/(sft|pt|rlhf)\.py$", "ms-swift"),
    (r"src/train(_bash)?\.py$", "llama-factory"),
)
"""Word of a command line -> the tool. The words after it are the tool's."""


def _script(text: str, path: Path) -> Foreign:
    """Read the last command of a script that trains."""
    variables: dict[str, str] = {}
    found: Foreign | None = None
    for words in _commands_of(text, path):
        own: dict[str, str] = {}
        while words and (given := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", words[0], re.DOTALL)):
            own[given[1]] = _fill(given[2], variables)
            words = words[1:]
        if not words:
            variables |= own
        if words[:1] == ["export"]:
            pairs = (word.partition("=") for word in words[1:])
            variables |= {name: _fill(value, variables) for name, _, value in pairs}
            continue
        for at, word in enumerate(words):
            tool = next((tool for pattern, tool in _COMMANDS if re.search(pattern, word)), None)
            if tool and _trains(words[at:]):
                found = _command(tool, [_fill(each, variables) for each in words[at:]], path)
                around = {f"launcher.{name}": value for name, value in _options(words[:at]) if name != "m"}
                around |= {f"environment.{name}": value for name, value in own.items()}
                found = replace(found, values=found.values | around)
                break
    if found is None:
        raise UsageError(
            "contains no command of a tool that can be imported",
            file=str(path),
            hint="It looks for trl, swift, llamafactory-cli, axolotl, mlx_lm.lora, tune run, unsloth train, or sft.py.",
        )
    return found


_TRAINING = {
    "swift": ("sft", "pt", "rlhf"),
    "llamafactory-cli": ("train",),
    "axolotl": ("train", "preprocess"),
    "tune": ("run",),
    "unsloth": ("train",),
    "mlx_lm": ("lora",),
    "trl": ("sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo", "ppo", "gkd", "online_dpo"),
}
"""Program of many commands -> those that train."""


def _trains(words: list[str]) -> bool:
    wanted = _TRAINING.get(Path(words[0]).name)
    return wanted is None or words[1:2] == [] or words[1] in wanted


def _commands_of(text: str, path: Path) -> Iterator[list[str]]:
    """Yield the words of each command; what the shell would execute within a word stays as it is written."""
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        hidden = _EXECUTED.findall(line)
        plain = re.sub(r"(?<=[^\s;&|])#", "\x02", _EXECUTED.sub("\x01", line))  # within a word # begins no comment
        lexer = shlex.shlex(plain, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        try:
            words = [word.replace("\x02", "#") for word in lexer]
        except ValueError:
            raise UsageError("a quote that is never closed", file=str(path)) from None
        command: list[str] = []
        for word in [*words, ";"]:
            if word and set(word) <= set(";&|"):
                if command:
                    yield command
                command = []
            else:
                parts = word.split("\x01")
                command.append(parts[0] + "".join(hidden.pop(0) + part for part in parts[1:] if hidden))


def _fill(word: str, variables: dict[str, str]) -> str:
    """Replace variables that the script has set to a text."""
    return re.sub(
        r"\$(?:(\w+)|\{(\w+)(?::-([^{}]*))?\})",
        lambda match: variables.get(match[1] or match[2], match[0] if match[3] is None else match[3]),
        word,
    )


def _command(tool: str, words: list[str], path: Path) -> Foreign:
    """Read the options of a command, and the file that it names, under the options."""
    options = dict(_options(words[1:]))
    places = list(_places(words[1:]))
    named = options.pop("config", None) or options.pop("c", None)
    named = named if isinstance(named, list) else [named] if named else []
    named += [word for word in places if re.search(r"\.(ya?ml|json)$", word)][:1]
    values = _named_file(tool, str(named[0]), path) if named else {}
    pairs = (str(word).partition("=") for word in [*places, *named[1:]] if "=" in str(word))
    options |= {key: read_scalar(value) for key, _, value in pairs}
    values |= options
    values[COMMAND] = " ".join([Path(words[0]).name, *([] if words[0].endswith(".py") else places[:1])])
    return Foreign({key: _shell_value(value) for key, value in values.items()}, tool)


def _named_file(tool: str, name: str, path: Path) -> dict[str, Any]:
    """Read the file that a command names: beside the script, or from the current folder."""
    for each in (path.parent / name, Path(name)):
        if is_file(each):
            return _yaml(_read(each), each)
    hint = "Copy it beside the script."
    if tool == "torchtune":
        hint = f"Write it with `tune cp {one_line(name)} recipe.yaml`, and import that."
    raise UsageError(f"names {short_repr(name)}, which is not a file here", file=str(path), hint=hint)


def _places(words: list[str]) -> Iterator[str]:
    """Yield the words before the first option."""
    for word in words:
        if word.startswith("-"):
            return
        yield word


def _options(words: list[str]) -> Iterator[tuple[str, Any]]:
    """Yield the options: one value, several, or true without one; also KEY=VALUE, as torchtune has it."""
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not re.match(r"--?[A-Za-z]", word):
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if equals:
            yield name, read_scalar(value)
            continue
        given = []
        while at < len(words) and not re.match(r"--?[A-Za-z]", words[at]):
            given.append(read_scalar(words[at]))
            at += 1
        yield name, True if not given else given[0] if len(given) == 1 else given


def _shell_value(value: Any) -> Any:
    texts = value if isinstance(value, list) else [value]
    unsafe = any(isinstance(each, str) and re.search(r"\$[\w({]|`", each) for each in texts)
    return Unknown(" ".join(map(str, texts)), _SHELL) if unsafe else value


# Programs

_CALLS = re.compile(
    r"(FastLanguageModel|FastModel|FastVisionModel)\.(from_pretrained|get_peft_model)$"
    r"|(SFT|DPO|KTO|ORPO|GRPO|CPO|Reward|Unsloth)Trainer$"
    r"|(SFT|DPO|KTO|ORPO|GRPO|CPO|Reward)Config$|(Unsloth)?TrainingArguments$|LoraConfig$"
    r"|load_dataset$|train_on_responses_only$|get_chat_template$"
)
_ONLY = {"FastLanguageModel.from_pretrained": ("model_name",), "load_dataset": ("path", "name")}
"""Names of positional arguments."""


def _code_of(text: str, path: Path) -> str:
    """Return the code of a notebook's cells, without lines for the shell."""
    try:
        cells = json.loads(text)["cells"]
        sources = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        lines = [line for source in sources for line in source.splitlines()]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError("not a notebook", file=str(path)) from None
    return "\n".join(line for line in lines if not re.match(r"\s*[!%]", line))


def _program(text: str, path: Path) -> Foreign:
    """Read the keyword arguments of the calls that train."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None)
        raise UsageError("not a program of Python", file=str(path), line=line) from None
    nodes = list(ast.walk(tree))
    if len(nodes) > 10 * MAX_VALUES:
        raise UsageError("too large a program to be a recipe", file=str(path))
    constants = _constants(tree)
    values: dict[str, Any] = {}
    names: list[str] = []
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
        name = ast.unparse(call.func)
        short = (
            ".".join(name.split(".")[-2:])
            if name.endswith(("from_pretrained", "get_peft_model"))
            else name.split(".")[-1]
        )
        if short in names:
            values[f"{short} (line {call.lineno})"] = Unknown(short, "is called again; the first call counts")
        elif _CALLS.search(short):
            names.append(short)
            for key, value in _arguments(call, short, constants):
                values[f"{short.rpartition('.')[2]}.{key}"] = value
    if not any(name.startswith("Fast") for name in names):
        raise UsageError(
            "contains no call that can be imported",
            file=str(path),
            hint="It reads programs with FastLanguageModel; TRL's settings fit into a YAML of `trl sft`.",
        )
    trainer = next((name for name in names if name.endswith("Trainer")), "SFTTrainer")
    values[COMMAND] = f"script {trainer}"
    return Foreign(values, "unsloth")


def _constants(tree: ast.Module) -> dict[str, Any]:
    """Names that the program sets once, to a value that is written there."""
    found: dict[str, Any] = {}
    twice: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            twice |= {name} & {*found}
            found[name] = _literal(node.value, {})
    return {name: value for name, value in found.items() if name not in twice and not isinstance(value, Unknown)}


def _arguments(call: ast.Call, name: str, constants: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    positions = _ONLY.get(
        name.replace("FastModel", "FastLanguageModel").replace("FastVisionModel", "FastLanguageModel"), ()
    )
    for key, node in zip(positions, call.args, strict=False):
        yield key, _literal(node, constants)
    for keyword in call.keywords:
        if keyword.arg is None:
            yield "**", Unknown(ast.unparse(keyword.value)[:100], _COMPUTED)
        elif isinstance(keyword.value, ast.Call) and keyword.arg == "args":
            continue  # read as a call of its own
        else:
            value = _literal(keyword.value, constants)
            if isinstance(value, dict) and value:
                yield from ((f"{keyword.arg}.{key}", inner) for key, inner in value.items())
            else:
                yield keyword.arg, value


def _literal(node: ast.expr, constants: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, MemoryError, RecursionError, SyntaxError):
        return Unknown(ast.unparse(node)[:100], _COMPUTED)
    return list(value) if isinstance(value, tuple) else value
