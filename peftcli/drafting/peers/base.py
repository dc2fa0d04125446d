"""What the importers share: a table of keys, the draft of a recipe that they fill, and common translations.

An importer is one file with a ``Peer``. Its table says of each of the tool's keys what becomes of it:

- ``To(our key, change)``: the value is carried, as it is or as ``change`` returns it;
- ``By(our key)``: ``build`` reads it together with other keys;
- a text: the key is not carried, and this is why.

A key in no table is listed as unknown. So none is lost without a word.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from peftcli.errors import UsageError
from peftcli.guard.files import is_file, is_folder, open_regular, short_repr
from peftcli.recipe.names import ALIASES, REMEDIES
from peftcli.system.outputs import expand_user

UNKNOWN = "unknown to this importer"
NO_VALUE = "has no value, and so no effect"
COMMAND = "command"
"""The key under which the reader of command lines and programs puts their name."""
_AROUND = {
    "launcher": "an option of what starts the processes; see the section launch",
    "environment": "a variable for the tool's process; set it for peftcli too if a library reads it",
}
"""Section in which the reader of scripts puts what stands around a command -> why it is not carried."""
_INSTEAD = {
    "training.warmup_ratio": ("training.warmup_steps",),
    "training.warmup_steps": ("training.warmup_ratio",),
    "training.num_train_epochs": ("training.max_steps",),
    "training.max_steps": ("training.num_train_epochs",),
}
"""A default is not written where one of these settings is given instead of it."""
_MAX_ROW = 1_000_000


class NotCarried(Exception):
    """A value that has no place in our recipe; the argument is the reason."""


@dataclass(frozen=True)
class Near:
    """A value that is not quite theirs, with what differs. ``value`` is None where nothing has to be written."""

    value: Any
    note: str


@dataclass(frozen=True)
class To:
    """Carry a value to our key. ``change`` translates it; None means that nothing has to be written."""

    key: str
    change: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class By:
    """A key that ``build`` reads; ``key`` is what it decides in our recipe."""

    key: str


Rule = str | To | By


@dataclass(frozen=True)
class Setting:
    """A value of the draft, and the comment that says where it comes from."""

    value: Any
    comment: str


@dataclass(frozen=True)
class Peer:
    """Another tool: its keys, how its files are recognised, and what builds the rest of the recipe."""

    name: str
    label: str
    table: Mapping[str, Rule]
    signs: Sequence[str]
    """Keys, or parts of keys behind a ``*``, by which a file of this tool is recognised."""
    build: Callable[[Draft], None]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Our key -> the tool's default. Each is written unless the file or ``build`` sets the key."""

    def rule(self, key: str) -> Rule | None:
        """Return what becomes of a key: that of the key itself, else of the nearest section around it."""
        name = re.sub(r"\[\d+\]", "[]", key)
        if name in self.table:
            return self.table[name]
        if (section := name.partition(".")[0]) in _AROUND:
            return _AROUND[section]
        while name:
            if (found := self.table.get(f"{name}.*")) is not None:
                return found
            name = re.sub(r"(^|[.\[])[^.\[]*$", "", name)
        return None

    def count_signs(self, keys: Sequence[str]) -> int:
        """Return how many of the tool's signs are among the keys of a file."""
        names = [re.sub(r"\[\d+\]", "[]", key) for key in keys]
        return sum(
            any(
                name.endswith(sign[1:]) if sign.startswith("*") else name.split(".")[0] == sign or name == sign
                for name in names
            )
            for sign in self.signs
        )


class Draft:
    """A recipe in the making: the tool's values, our settings, and what was not carried."""

    def __init__(self, peer: Peer, values: Mapping[str, Any], file: Path):
        self.peer, self.values, self.file = peer, dict(values), file
        self.settings: dict[str, Setting] = {}
        self.sources: list[dict[str, Any]] = []
        self.carried: dict[str, str] = {}
        self.not_carried: dict[str, tuple[Any, str]] = {}
        self.notes: list[str] = []
        self._last = "a key"  # that ``build`` has read

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first of the tool's keys that is given."""
        found = next((key for key in keys if self.values.get(key) is not None), None)
        self._last = found or self._last
        return default if found is None or isinstance(self.values[found], Unknown) else self.values[found]

    def section(self, prefix: str) -> dict[str, Any]:
        """Return the values below a key, under their remaining names."""
        below = {key: value for key, value in self.values.items() if key.startswith(f"{prefix}.")}
        return {key[len(prefix) + 1 :]: value for key, value in below.items() if not isinstance(value, Unknown)}

    def entries(self, list_name: str) -> list[str]:
        """Return the names of a list's entries, as ``datasets[0]``."""
        found = (key.split("]")[0] + "]" for key in self.values if key.startswith(f"{list_name}["))
        return list(dict.fromkeys(found))

    def put(self, key: str, value: Any, source: str) -> None:
        """Write a setting whose value comes from the tool's key ``source``."""
        self.settings[key] = Setting(value, f"from: {source}")

    def say(self, key: str, value: Any, comment: str) -> None:
        """Write a setting for a reason that is not one key of the file."""
        self.settings[key] = Setting(value, comment)

    def drop(self, key: str, reason: str, value: Any = None) -> None:
        """List a key as not carried."""
        self.carried.pop(key, None)
        self.not_carried[key] = (self.values.get(key, value), reason)

    def refuse(self, message: str, hint: str) -> NoReturn:
        """Raise the error of a recipe that cannot be imported.

        Raises:
            UsageError: always.
        """
        raise UsageError(message, file=str(self.file), hint=hint)

    def refuse_full(self, key: str) -> NoReturn:
        """Raise the error of full fine-tuning.

        Raises:
            UsageError: always.
        """
        self.refuse(
            f"{key}: this is full fine-tuning; peftcli trains adapters",
            "The nearest is LoRA of every linear layer with a large r: set the tool's LoRA keys, with r 64 or more, "
            "and import again.",
        )

    def fill(self) -> None:
        """Carry out the tool's table, its ``build`` and its defaults."""
        for key, value in self.values.items():
            self._apply(key, value)
        try:
            self.peer.build(self)
        except NotCarried as reason:
            self.refuse(f"{self._last}: {reason}", "Correct it, or leave it out.")
        except (TypeError, ValueError, AttributeError, LookupError, OverflowError):
            self.refuse(f"{self._last}: its value is not what {self.peer.label} describes", "Correct it, or remove it.")
        self._write_sources()
        for key, value in self.peer.defaults.items():
            if key not in self.settings and not any(other in self.settings for other in _INSTEAD.get(key, ())):
                self.settings[key] = self.default(value)
        for what in ("eval", "save"):
            chosen = self.settings.get(f"training.{what}_strategy")
            if chosen and chosen.value != "steps":
                self._leave_out(f"training.{what}_steps", f"is not read while {what}_strategy is {chosen.value}")
        schedule = self.settings.get("training.lr_scheduler_type")
        if schedule and schedule.value == "constant":
            for name in ("warmup_steps", "warmup_ratio"):
                self._leave_out(f"training.{name}", "is not read while the schedule is constant")

    def default(self, value: Any) -> Setting:
        """Return a setting that the file does not give."""
        return Setting(value, f"{self.peer.label}'s default")

    def _leave_out(self, key: str, reason: str) -> None:
        if self.settings.pop(key, None) is None:
            return
        for theirs, ours in list(self.carried.items()):
            if ours.split(" ")[0] == key:
                self.drop(theirs, reason)

    def _apply(self, key: str, value: Any) -> None:
        rule = self.peer.rule(key)
        if isinstance(value, Unknown):
            self.drop(key, value.reason)
        elif value is None or value == "" or value == {} or value == []:
            self.drop(key, NO_VALUE if rule is not None else f"{UNKNOWN}; {NO_VALUE}")
        elif rule is None:
            self.drop(key, UNKNOWN)
        elif isinstance(rule, str):
            self.drop(key, rule)
        elif isinstance(rule, By):
            self.carried[key] = rule.key
        else:
            self._carry(key, value, rule)

    def _carry(self, key: str, value: Any, rule: To) -> None:
        try:
            changed = rule.change(value)
        except NotCarried as reason:
            self.drop(key, str(reason))
            return
        except (TypeError, ValueError, AttributeError, OverflowError):
            self.drop(key, f"its value is not what {self.peer.label} describes")
            return
        note = f" ({changed.note})" if isinstance(changed, Near) else ""
        changed = changed.value if isinstance(changed, Near) else changed
        self.carried[key] = rule.key + note
        if changed is not None:
            self.settings[rule.key] = Setting(changed, f"from: {key}{note}")

    def path(self, text: Any, *folders: Path) -> str:
        """Return a path as our recipe needs it: relative to the current folder, like the recipe's other paths.

        It is looked for in ``folders``, beside the file, and here. What is in neither stays as it is: a hub's id.
        """
        given = expand_user(Path(str(text)))
        for folder in (*folders, self.file.parent, Path()):
            if not given.is_absolute() and is_there(folder / given):
                return os.path.normpath(folder / given)
        return str(text)

    def add_source(self, source: str, split_key: str = "", **settings: Any) -> None:
        """Add a dataset. ``source`` is the tool's key, or section, that names it; ``split_key`` that of its split."""
        split = settings.pop("split", None)
        if split and "[" in str(split):
            self.drop(
                split_key or f"{source}.split", "a slice of a split; see dataset.limit and dataset.eval_fraction", split
            )
        elif split and split != "train" and is_there(Path(str(settings.get("train")))):
            self.drop(split_key or f"{source}.split", "a local file has no splits; all its rows are read", split)
        elif split and split != "train":
            settings["split"] = split
        self.sources.append({"from": source, **{key: value for key, value in settings.items() if value}})

    def _write_sources(self) -> None:
        if not self.sources:
            return
        if len(self.sources) == 1:
            only = self.sources[0]
            for key, value in only.items():
                if key not in ("from", "weight"):
                    self.put(f"dataset.{key}", value, only["from"])
            return
        entries = [{key: value for key, value in each.items() if key != "from"} for each in self.sources]
        self.put("dataset.mix", entries, ", ".join(dict.fromkeys(each["from"] for each in self.sources)))


@dataclass(frozen=True)
class Unknown:
    """A value that the file does not say: a program computes it, or it is a secret."""

    text: str
    reason: str

    def __str__(self) -> str:
        return self.text


def is_there(path: Path) -> bool:
    """Return whether a path is a file or folder; False for paths that the system refuses."""
    return is_file(path) or is_folder(path)


def first_columns(name: str) -> list[str]:
    """Return the columns in the first row of a .jsonl file or of a .json list; none for any other name."""
    path = Path(name)
    try:
        with open_regular(path) as file:
            start = file.readline(_MAX_ROW).decode("utf-8-sig") if path.suffix in (".jsonl", ".ndjson") else ""
            text = start or file.read(_MAX_ROW).decode("utf-8-sig", "ignore")
        begin = text.index("{")
        row, _ = json.JSONDecoder().raw_decode(text, begin)
    except (OSError, ValueError, RecursionError):
        return []
    return list(row) if isinstance(row, dict) else []


def renamed(names: str) -> dict[str, Rule]:
    """Return rules of keys that are carried unchanged under the name that the table of other tools' spellings has."""
    ours = {name: ALIASES[name].partition(":")[0] for name in names.split()}
    return {name: To("base_model.name" if key == "base_model" else key) for name, key in ours.items()}


def needless(names: str) -> dict[str, Rule]:
    """Return rules of keys that need no setting here; the table of other tools' spellings says what to do instead."""
    return {name: _EFFECTS.get(name, REMEDIES[name]) for name in names.split()}


_EFFECTS = {
    "do_train": "says that it trains; `peftcli train` does",
    "do_predict": "would have answered the test rows; run `peftcli predict`",
    "save_only_model": "leaves the optimizer out of checkpoints; peftcli's can always be resumed from",
    "logging_first_step": "also logs the first step; see training.logging_steps",
    "plot_loss": "draws the loss; peftcli writes loss.png in any case",
    "ddp_timeout": "how long processes wait for one another; it changes nothing that is learnt",
    "ddp_find_unused_parameters": "how DDP adds up gradients; it changes nothing that is learnt",
    "pad_to_sequence_len": "pads each row to the whole length; peftcli computes no padding",
    "remove_unused_columns": "drops columns that the model does not read; peftcli reads those of the task alone",
}
"""Key -> what it does, where the table of other tools' spellings only says to leave it out."""


def reasons(**groups: str) -> dict[str, Rule]:
    """Return rules of keys that are not carried: each argument is a reason's keys, the reason is in ``REASONS``."""
    return {name: REASONS[group] for group, names in groups.items() for name in names.split()}


REASONS = {
    "cache": "where or how it keeps prepared data; peftcli has its own cache",
    "workers": "how many processes prepare the data; it does not change the result",
    "speed": "how it computes faster or in less memory; it does not change what is learnt",
    "log": "what it logs or draws; peftcli writes metrics.jsonl and loss.png",
    "hub": "run `peftcli push` after the training",
    "export": "run `peftcli merge` after the training: it would have written the whole model",
    "kind": "the class of model or tokenizer; peftcli finds it in the model's files",
    "tokens": "the base model's tokenizer knows its special tokens",
    "infer": "how answers are generated after the training; give it to `peftcli generate`",
    "vision": "concerns pictures, videos or sounds; this importer carries recipes of texts",
    "method": "another way of training, or a setting of one, that this importer does not carry",
    "process": "how its launcher starts processes; see the section launch",
    "resume": "a run resumes by itself; see `peftcli train --resume`",
    "secret": "is a secret; a recipe must not contain it: set it in the environment",
    "check": "a check or a help while debugging",
    "moe": "a term of mixtures of experts in the loss; peftcli trains the loss of the targets alone",
}
"""Name of a group of keys -> why they are not carried."""


def number(value: Any) -> int | float:
    """Return a number, also where the file has it as text, as PyYAML reads ``1e-4``."""
    if isinstance(value, bool):
        raise TypeError("a number")
    if isinstance(value, str):
        value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() and value < 2**53 else value


def whole(value: Any) -> int:
    """Return a whole number."""
    found = number(value)
    if found != int(found):
        raise NotCarried("is a share of the run, and peftcli counts steps here")
    return int(found)


def truth(value: Any) -> bool:
    """Return true or false, also where the file or the command line has it as text."""
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if word in ("true", "yes", "1", "on"):
        return True
    if word in ("false", "no", "0", "off", "none"):
        return False
    raise ValueError(word)


def names(value: Any) -> list[str]:
    """Return a list of names, also where they are in one text between commas."""
    given = value if isinstance(value, list) else str(value).split(",")
    return list(dict.fromkeys(str(each).strip() for each in given if str(each).strip()))


def modules(value: Any) -> list[str] | str:
    """Return target modules: a list, ``all-linear``, or a regular expression."""
    found = names(value)
    if len(found) == 1 and found[0].lower() in ("all", "all-linear", "all_linear"):
        return "all-linear"
    is_pattern = isinstance(value, str) and bool(re.search(r"[\\^$*+?()|]", value))
    return str(value) if is_pattern else found


def one_of(accepted: Mapping[str, Any], otherwise: str) -> Callable[[Any], Any]:
    """Return a translation by a table; another value is not carried, for the reason ``otherwise``."""

    def change(value: Any) -> Any:
        key = str(value).lower()
        if key not in accepted:
            raise NotCarried(otherwise.format(short_repr(str(value))))
        return accepted[key]

    return change


def if_true(result: Any) -> Callable[[Any], Any]:
    """Return a translation of a switch: ``result`` where it is on, else nothing has to be written."""
    return lambda given: result if truth(given) else None


def quantise(draft: Draft, kind: str, source: str, double: bool = False) -> None:
    """Write the storage of the base model: ``nf4``, ``fp4`` or ``int8``."""
    value = {"type": kind, "double_quant": True} if double and kind in ("nf4", "fp4") else kind
    draft.put("base_model.quantization", value, source)


def bits_of(draft: Draft, four: str, eight: str, kind: str, double: str, default_double: bool = False) -> None:
    """Write the quantization that the keys ``load_in_4bit``, ``load_in_8bit`` and their details describe."""
    if draft.get(four) and truth(draft.get(four)):
        found = str(draft.get(kind, default="nf4")).lower()
        quantise(draft, found, four, truth(draft.get(double, default=default_double)))
    elif draft.get(eight) and truth(draft.get(eight)):
        quantise(draft, "int8", eight)


def quantise_bits(draft: Draft, bits: str, method: str, kind: str, double: str) -> None:
    """Write the quantization that a number of bits, its method and their details describe."""
    count = draft.get(bits)
    if count is None:
        return
    by = str(draft.get(method, default="bnb")).lower()
    if by not in ("bnb", "bitsandbytes") or number(count) not in (4, 8):
        draft.drop(bits, f"{count} bits by {by}; peftcli has nf4, fp4 and int8 by bitsandbytes")
        return
    found = str(draft.get(kind, default="nf4")) if number(count) == 4 else "int8"
    quantise(draft, found, bits, truth(draft.get(double, default=True)))


_BUILDERS = ("json", "csv", "parquet", "text", "arrow")


def dataset_of(draft: Draft, path: Any, files: Any, key: str) -> str | None:
    """Return the dataset that a path and ``data_files`` name, as ``load_dataset`` reads them."""
    found = names(files) if files else []
    if not found:
        return None if path is None else draft.path(path)
    if path is not None and str(path) not in _BUILDERS and not is_there(Path(draft.path(found[0]))):
        draft.drop(key, "some files of the hub's dataset; dataset.train reads all of it. Download them, and name them")
        return draft.path(path)
    if len(found) > 1:
        draft.drop(key, f"several files; here {found[0]} alone. Name their folder, or each under dataset.mix")
    return draft.path(found[0])


INTERLEAVED = "an epoch ends with one of the datasets there; peftcli's has as many examples as all of them together"
TEMPLATES = "the base model's own chat template is used; this is a template of {}'s own. See base_model.chat_template"


def template(draft: Draft, key: str) -> None:
    """Carry a chat template's name or file, where we can read it."""
    name = draft.get(key)
    if name is None:
        return
    path = draft.path(name)
    if str(name).lower() == "chatml":
        draft.put("base_model.chat_template", "chatml", key)
    elif str(name).endswith((".jinja", ".jinja2")) and is_file(Path(path)):
        draft.put("base_model.chat_template", path, key)
    elif str(name).startswith("tokenizer_default"):
        draft.carried[key] = "base_model.chat_template (unset: the tokenizer's own)"
    else:
        draft.drop(key, TEMPLATES.format(draft.peer.label))
