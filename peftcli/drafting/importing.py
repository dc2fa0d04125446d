"""``peftcli import``: another tool's recipe becomes ours. Each key is carried, translated, or listed with a reason."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.data.rows import count_of
from peftcli.drafting.compose import recipe_text, shown
from peftcli.drafting.foreign import read_foreign
from peftcli.drafting.peers import COMMAND, PEERS, Draft, Peer, Unknown
from peftcli.drafting.peers.base import NO_VALUE
from peftcli.errors import Problem, UsageError
from peftcli.guard.files import one_line
from peftcli.recipe import read
from peftcli.system.secrets import redact_values

_ROUNDS = 10
_MISSING = "no such file"


@dataclass(frozen=True)
class Imported:
    """A recipe that was imported."""

    recipe: str
    """The text of the new recipe."""
    tool: str
    carried: Mapping[str, str]
    """The tool's key -> ours."""
    not_carried: Mapping[str, tuple[Any, str]]
    """The tool's key -> its value, and why it was not carried."""
    notes: list[str]
    """What to look at."""
    problems: list[Problem]
    """What `peftcli check` says: files that are not here."""

    def as_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        left = [
            {"key": key, "value": str(value) if isinstance(value, Unknown) else value, "reason": reason}
            for key, (value, reason) in self.not_carried.items()
        ]
        found = {"recipe": self.recipe, "tool": self.tool, "carried": dict(self.carried), "not_carried": left}
        plain: dict[str, Any] = redact_values(
            found | {"notes": self.notes, "missing": [p.message for p in self.problems]}
        )
        return plain

    def report(self) -> list[str]:
        """Return lines for the log: the counts, each key that was not carried and why, what to look at."""
        left = {key: each for key, each in self.not_carried.items() if not each[1].endswith(NO_VALUE)}
        empty = len(self.not_carried) - len(left)
        counts = f"{count_of(len(self.carried), 'key')} carried, {len(left)} not carried"
        return [
            f"{self.tool}: {counts}{f', {empty} without a value' if empty else ''}",
            *(f"  not carried: {one_line(key)}: {shown(value)}: {reason}" for key, (value, reason) in left.items()),
            *(f"  look at: {note}" for note in self.notes),
            *(f"  missing here: {problem.key}: {problem.message}" for problem in self.problems),
        ]


def import_recipe(path: Path, tool: str | None = None) -> Imported:
    """Import the recipe of another tool.

    Args:
        path: The tool's file.
        tool: Name of the tool in ``PEERS``; None: it is recognised by its keys.

    Raises:
        UsageError: the file cannot be read, is of no known tool, or trains in a way that cannot be imported.
        RecipeError: the file is not YAML.
    """
    foreign = read_foreign(path)
    peer = _peer(path, foreign.values, tool or foreign.tool)
    values = {key: value for key, value in foreign.values.items() if key != COMMAND or key in peer.table}
    draft = Draft(peer, _without_no(peer, values), path)
    draft.fill()
    if "base_model.name" not in draft.settings:
        draft.refuse("names no base model that can be read", _needed(draft, "model"))
    if not draft.sources:
        draft.refuse("names no training data that can be read", _needed(draft, "data"))
    text, problems = _checked(draft)
    return Imported(text, peer.name, draft.carried, draft.not_carried, draft.notes, problems)


def _without_no(peer: Peer, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with an option ``no_x``, which the tool does not have, as ``x`` that is false."""
    found = dict(values)
    for key in values:
        if key.startswith("no_") and peer.rule(key) is None and peer.rule(key[3:]) is not None and found[key] is True:
            del found[key]
            found[key[3:]] = False
    return found


def _needed(draft: Draft, word: str) -> str:
    found = [f"{key}: {reason}" for key, (_, reason) in draft.not_carried.items() if word in key and reason != NO_VALUE]
    return found[0] if found else f"Is it a file that {draft.peer.label} trains with? --from TOOL chooses another tool."


def _peer(path: Path, values: Mapping[str, Any], tool: str | None) -> Peer:
    """Return the tool: the one that is given, else the one with most of its own keys in the file."""
    names = ", ".join(PEERS)
    if tool is not None:
        if tool not in PEERS:
            raise UsageError(f"no importer for {tool!r}", key="--from", hint=f"The tools are: {names}")
        return PEERS[tool]
    signs = {name: peer.count_signs([*values]) for name, peer in PEERS.items()}
    best = max(signs.values(), default=0)
    found = [name for name, count in signs.items() if count == best]
    if best and len(found) == 1:
        return PEERS[found[0]]
    between = " or ".join(found) if best else names
    raise UsageError(
        "the keys do not say which tool's recipe this is",
        file=str(path),
        hint=f"Name the tool: --from TOOL, with one of {between}",
    )


def _checked(draft: Draft) -> tuple[str, list[Problem]]:
    """Return the recipe that `peftcli check` accepts, and the problems of files that are not here.

    What the check refuses otherwise becomes a key that is not carried, with the check's reason.
    """
    for _ in range(_ROUNDS):
        text = recipe_text(draft)
        problems = _problems(text)
        missing = [each for each in problems if each.message.startswith(_MISSING)]
        others = [each for each in problems if each not in missing]
        if not others:
            return text, missing
        for problem in others:
            _give_up(draft, problem)
    raise UsageError("cannot be imported", file=str(draft.file), hint=str(problems[0]))


def _problems(text: str) -> list[Problem]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, "utf-8")
        return read(path).problems


def _give_up(draft: Draft, problem: Problem) -> None:
    """Remove a setting that the check refuses, and list the tool's keys that it came from."""
    key = re.sub(r"\[.*", "", problem.key or "")
    while key and key not in draft.settings:
        key = key.rpartition(".")[0]
    if not key or key in ("base_model.name", "method.type", "dataset.train", "dataset.mix"):
        raise UsageError(f"cannot be imported: {problem.key}: {problem.message}", file=str(draft.file))
    setting = draft.settings.pop(key)
    if key in draft.peer.defaults and setting.value != draft.peer.defaults[key]:
        draft.settings[key] = draft.default(draft.peer.defaults[key])
    sources = [theirs for theirs, ours in draft.carried.items() if ours.split(" ")[0] == key]
    for source in sources or [f"{key} ({setting.comment})"]:
        draft.drop(source, f"peftcli check: {problem.key}: {problem.message}", setting.value)
