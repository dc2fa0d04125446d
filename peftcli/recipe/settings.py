"""The settings of a section or a method: names, types, defaults and help, read from its dataclass."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from peftcli.guard.typed_fields import branches, section_class
from peftcli.methods import METHODS
from peftcli.schema import Recipe
from peftcli.tasks import TASKS

_WORDS = {
    str: "a string",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}
_PLURALS = {str: "strings", int: "integers", float: "numbers"}


@dataclass(frozen=True)
class Setting:
    """One key of a recipe."""

    name: str
    hint: Any
    default: Any
    """The value if the key is absent; ``dataclasses.MISSING`` if the key is required."""
    owner: type

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def section(self) -> type | None:
        """The dataclass of a key whose value is a mapping of settings."""
        return section_class(self.hint)

    @property
    def items(self) -> type | None:
        """The dataclass of a key whose value is a list of mappings of settings."""
        return section_class(item_hint(self.hint, list))

    @property
    def help(self) -> str:
        """The docstring below the field."""
        return field_help(self.owner, self.name)


@cache
def settings(cls: type) -> dict[str, Setting]:
    """Return the keys that a recipe may give for a dataclass, in order."""
    hints = get_type_hints(cls)
    out = {}
    for entry in dataclasses.fields(cls):
        if entry.metadata.get("recipe", True):
            default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            out[entry.name] = Setting(entry.name, hints[entry.name], default, cls)
    return out


def sections() -> dict[str, type]:
    """Return the fixed sections of a recipe: name -> dataclass."""
    return {name: entry.section for name, entry in settings(Recipe).items() if entry.section}


def only_required(section: type) -> str | None:
    """Return the only required setting of a section, or None: ``{type: nf4}`` may be written as ``nf4``."""
    needed = [name for name, entry in settings(section).items() if entry.required]
    return needed[0] if len(needed) == 1 else None


def method_settings(method: str) -> dict[str, Setting]:
    """Return the settings of a method, without ``type``."""
    config: Any = METHODS[method].config_class()
    return settings(config)


def task_settings(task: str) -> dict[str, Setting]:
    """Return the settings of a task, without ``type``."""
    return settings(TASKS[task].settings)


def kinds(hint: Any) -> set[Any]:
    """Return the plain types that a hint accepts: {list, NoneType} for ``list[int] | None``, {str} for Literal["a"]."""
    out = set()
    for branch in branches(hint):
        if get_origin(branch) is Literal:
            out |= {type(value) for value in get_args(branch)}
        else:
            out.add(get_origin(branch) or branch)
    return out


def item_hint(hint: Any, container: type) -> Any:
    """Return the hint of the items of a list, or of the values of a mapping."""
    for branch in branches(hint):
        if get_origin(branch) is container:
            return get_args(branch)[-1]
    return Any


def choices(hint: Any) -> list[str]:
    """Return the texts among the literal values of a hint."""
    values = (value for branch in branches(hint) if get_origin(branch) is Literal for value in get_args(branch))
    return [value for value in values if isinstance(value, str)]


def describe_type(hint: Any) -> str:
    """Describe a hint in words: ``a list of strings or a string``."""
    words: list[str] = []
    for branch in branches(hint):
        origin, args = get_origin(branch), get_args(branch)
        if origin is Literal:
            words += [str(value).lower() if isinstance(value, bool) else str(value) for value in args]
        elif branch is bool:
            words += ["true", "false"]
        elif origin is list:
            words.append(f"a list of {_plural(args[0])}")
        elif origin is dict:
            words.append(f"a mapping of names to {_plural(args[1])}")
        elif dataclasses.is_dataclass(branch):
            alone = only_required(branch)  # type: ignore[arg-type]
            words += [*(choices(settings(branch)[alone].hint) if alone else ()), "a mapping"]  # type: ignore[arg-type]
        elif branch is not type(None):
            words.append(_WORDS.get(branch, "a value"))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _plural(hint: Any) -> str:
    words = []
    for branch in branches(hint):
        items = f"lists of {_plural(get_args(branch)[0])}" if get_origin(branch) is list else "values"
        words.append("mappings" if dataclasses.is_dataclass(branch) else _PLURALS.get(branch, items))
    return " or ".join(words)


def field_help(owner: type, name: str) -> str:
    """Return the docstring below a field of a dataclass."""
    return next((found for cls in owner.__mro__ if (found := _docstrings(cls).get(name))), "")


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """Return field name -> the string below it in the source of ``cls``."""
    out: dict[str, str] = {}
    for node in ast.walk(_module_tree(cls.__module__)) if dataclasses.is_dataclass(cls) else ():
        if not isinstance(node, ast.ClassDef) or node.name != cls.__name__:
            continue
        for field, text in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                value = text.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    out[field.target.id] = " ".join(value.value.replace("``", "`").split())
    return out


@cache
def _module_tree(module: str) -> ast.Module:
    return ast.parse(inspect.getsource(sys.modules[module]))
