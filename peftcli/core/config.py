"""Adapter configs: dataclasses whose fields are the keys of ``adapter_config.json``. No torch here."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import PurePath
from typing import Any, ClassVar, Literal, cast

from peftcli.errors import AdapterError, AdapterTypeError
from peftcli.guard.files import one_line, short_name, short_repr
from peftcli.guard.patterns import Pattern, check_patterns
from peftcli.guard.ranges import out_of_range
from peftcli.guard.typed_fields import (
    OFF,
    choices_of,
    default_of,
    fits,
    hints_of,
    read_fields,
    read_section,
    section_class,
)

CONFIGS: dict[str, Callable[[], Any]] = {}
"""PEFT's name of a method, a ``PeftType`` -> how to import its config class. ``peftcli.methods`` fills it."""
NOT_HERE: dict[str, str] = {}
"""PEFT's methods that peftcli does not have: name in adapter_config.json -> why. ``peftcli.methods`` fills it."""

BOOKKEEPING = {"recipe": False}
"""Metadata of the fields that describe the file, not the method: a recipe's ``method`` does not take them."""
UNSUPPORTED = {"recipe": False, "unsupported": True}
"""Metadata of PEFT's settings that are taken while they are switched off, and otherwise are an error."""
_NEWEST_PEFT = (0, 21)
"""The newest version of PEFT whose settings are known."""

TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""The settings that say which modules are adapted."""
USUAL_TARGETS: dict[str, dict[str, list[str] | str]] = {}
"""Method -> ``model_type`` -> the modules that it adapts by default; ``*`` is any other family. ``peftcli.methods``
fills this table and the next two from ``methods/_families.py``."""
READ_PAST_CALLS: dict[str, list[str]] = {}
"""``model_type`` -> modules whose weights the model reads without calling them: see ``core.targets``."""
COUNT_AFTER_PADDING: set[str] = set()
"""The model types that count positions from the one after the pad token's id."""


class NameEnum(str, Enum):  # noqa: UP042 - pickles and reprs of StrEnum differ
    """A text with a ``value``, and shown as that."""

    __str__ = str.__str__


class TaskType(NameEnum):
    """PEFT's names of the tasks."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


@dataclass(kw_only=True)
class AdapterConfig:
    """The base of every method's config: common fields, and reading and writing ``adapter_config.json``.

    A method's class gives its ``peft_type``. Settings that are wrong are an error when the config is made.
    """

    readable_by: ClassVar[str] = "0.13.0"
    """The oldest version of PEFT that reads what is written here."""
    file_prefix: ClassVar[str] = "base_model.model."
    """Prefix of a module's path in the names of the adapter file."""
    always_written: ClassVar[tuple[str, ...]] = ()
    """Fields that readers need even at their default."""
    sizes: ClassVar[tuple[str, ...]] = ("r", "rank_pattern")
    """Fields that set how much memory is taken: numbers, or numbers by pattern. A file with absurd ones is refused."""
    filled_later: ClassVar[tuple[str, ...]] = ()
    """Fields that are checked when the adapter is put into a model only: they may be set in between."""
    as_sets: ClassVar[tuple[str, ...]] = ()
    """Fields whose lists become sets, as PEFT's do: their order means nothing."""

    peft_type: str = field(default="", metadata=BOOKKEEPING)
    """PEFT's name of the method, upper case; a ``PeftType`` in a config. The class says it, whatever is given."""
    auto_mapping: dict[str, Any] | None = field(default=None, metadata=BOOKKEEPING, compare=False)
    """PEFT's note of the base model's class, where task_type does not say it."""
    peft_version: str | None = field(default=None, metadata=BOOKKEEPING, compare=False)
    """The version of PEFT that wrote the file that the config was read from. Unset: ``readable_by``."""
    task_type: str | None = field(default=None, metadata=BOOKKEEPING)
    """PEFT's task name: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS, TOKEN_CLS, QUESTION_ANS or FEATURE_EXTRACTION."""
    base_model_name_or_path: str | None = field(default=None, metadata=BOOKKEEPING)
    """Hub id or path of the base model."""
    revision: str | None = field(default=None, metadata=BOOKKEEPING)
    """Revision of the base model on the hub."""
    inference_mode: bool = field(default=False, metadata=BOOKKEEPING)
    """Whether the adapter is loaded frozen."""
    modules_to_save: list[str] | None = None
    """Modules, besides the adapter's, that are trained in full and saved with it: a new classification head."""

    @property
    def learning_rate(self) -> float:
        """The peak learning rate where a recipe gives none. Most methods have one: a ``ClassVar``."""
        return 1e-3

    def __post_init__(self) -> None:
        self.normalise()
        self.check(later=self.filled_later)

    @classmethod
    def unchecked(cls, **values: Any) -> AdapterConfig:
        """Return the config with these settings, whatever ``problems`` finds in them."""
        config = cls.__new__(cls)
        for entry in fields(cls):
            setattr(config, entry.name, values.get(entry.name, default_of(entry)))
        config.normalise()
        return config

    def normalise(self) -> None:
        """Convert values to the types that all code here relies on."""
        kind = cast("Any", type(self))
        for entry in fields(self):
            value, hint = plain(vars(self)[entry.name]), hints_of(kind)[entry.name]
            if isinstance(value, list):
                value = set(value) if entry.name in self.as_sets and fits(value, hint) else value
            elif isinstance(value, int) and not fits(value, hint) and fits(bool(value), hint):
                value = bool(value)  # 1 is taken for True
            elif section := section_class(hint):
                value = read_section(section, value, entry.name) if isinstance(value, dict) else value
                if value is not None and not isinstance(value, section):
                    message = f"expected a mapping or {section.__name__}, found {short_repr(value)}"
                    raise AdapterTypeError(message, key=entry.name)
            if value is None and not fits(None, hint):
                value = default_of(entry)
            setattr(self, entry.name, value)
        name = kind.peft_type or self.peft_type
        self.peft_type = next((known for known in CONFIGS if known == name), name)  # a PeftType
        self.peft_version = self.peft_version or self.readable_by
        if self.task_type in list(TaskType):
            self.task_type = TaskType(self.task_type)

    def problems(self) -> list[tuple[str, str]]:
        """Return the settings that are wrong whatever the model, as ``(key, message)``."""
        found: list[tuple[str, str]] = []
        if self.task_type not in (None, *TaskType):
            message = f"Invalid task type: {short_repr(self.task_type)}. Must be one of the following task types: "
            found.append(("task_type", f"{message}{', '.join(TaskType)}."))
        found += [*other_choices(self), *out_of_range(self)]
        for entry in fields(self):
            value = vars(self)[entry.name]
            if entry.metadata.get("unsupported") and value not in (default_of(entry), *OFF):
                found.append((entry.name, f"{self.peft_type} with {entry.name}={short_repr(value)} is not supported"))
        if self.revision is not None and ".." in self.revision:
            found.append(("revision", f"{short_repr(self.revision)} is not a revision: git allows no '..' in it"))
        return found

    def check(self, later: Collection[str] = ()) -> None:
        """Raise AdapterError for the first of ``problems()``, but for those of the fields ``later``."""
        for entry in dataclasses.fields(self):
            value, hint = vars(self)[entry.name], hints_of(cast("Any", type(self)))[entry.name]
            is_setting = entry.metadata.get("file", True) and not section_class(hint)  # normalise() reads the sections
            given = list(value) if isinstance(value, set) else value
            if is_setting and not fits(given, hint):
                raise AdapterTypeError(f"expected {entry.type}, found {short_repr(value)}", key=entry.name)
        for key, message in self.problems():
            if key not in later:
                raise AdapterError(one_line(message), key=key)

    def note_base_class(self, model: Any) -> None:
        """Note the class of a model of transformers where ``task_type`` does not say it: PEFT's auto class asks."""
        kind = type(model)
        if self.task_type is None and kind.__module__.startswith("transformers."):
            self.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}

    def prepare(self, load_tokenizer: Callable[..., Any]) -> None:
        """Turn settings that are text into token ids. Called once, before a new adapter is injected.

        ``load_tokenizer(name, **options)`` returns the tokenizer of that name, or with None the base model's.
        """

    def check_steps(self, total: int) -> None:
        """Raise AdapterError where the settings cannot be had in this many optimizer steps."""

    def merge_problem(self) -> str | None:
        """Return why this adapter cannot be merged into the base model, or None."""
        return None

    def packing_problem(self) -> str | None:
        """Return why several examples cannot share a row in training, or None."""
        return None

    def reads_batches(self) -> bool:
        """Return whether the gradients of an example depend on the others of its batch."""
        return False

    def reads_past_calls(self) -> bool:
        """Return whether the adapter may read weights past their modules' calls, where DeepSpeed has parts only."""
        return True

    @classmethod
    def from_dict(
        cls, values: dict[str, Any], file: str | None = None, *, unknown_keys: Literal["refuse", "warn"] = "refuse"
    ) -> AdapterConfig:
        """Return the config that the object of an ``adapter_config.json`` describes.

        Keys that newer writers add are accepted while they are switched off (null, false, empty). Warns of others if
        the file says that a newer PEFT than those known here wrote it, or if only the settings matter.

        Args:
            values: the object.
            file: where it was read from, for messages.
            unknown_keys: ``refuse`` those that may change what an adapter computes, or ``warn`` of them.

        Raises:
            AdapterError: a key that changes the result and is not supported, or a value of the wrong kind.
        """
        known = {entry.name for entry in fields(cls) if entry.metadata.get("file", True)}
        unknown = sorted(key for key in values.keys() - known if values[key] not in OFF)
        names = [short_name(key) for key in unknown]
        found = [f"{name}={short_repr(values[key])}" for name, key in zip(names, unknown, strict=True)]
        if unknown and unknown_keys == "refuse" and not _is_newer(values.get("peft_version")):
            raise AdapterError(f"{cls.peft_type} with {found[0]} is not supported", key=names[0], file=file)
        if unknown:
            ignored = f"Unexpected keyword arguments {names} for class {cls.__name__}, these are ignored. A newer PEFT "
            place = f"{file}: " if file else ""
            warnings.warn(one_line(f"{place}{ignored}may have written them: {', '.join(found)}"), stacklevel=2)
        given = read_fields(cls, {key: value for key, value in values.items() if key in known}, file)
        try:
            return cls(**given)
        except AdapterError as error:
            raise type(error)(error.message, key=error.key, file=file) from None

    def file_dict(self) -> dict[str, Any]:
        """Return the object for an adapter's file: what every reader needs, and what differs from the default.

        ``target_modules`` and other unordered lists are sorted, so equal configs give equal bytes. The metadata
        ``ordered`` says that a list is used in its order.
        """
        keep = {"task_type", "base_model_name_or_path", "inference_mode", *self.always_written}
        out: dict[str, Any] = {"peft_type": type(self).peft_type, "peft_version": self.readable_by}
        for entry in fields(self):
            value = vars(self)[entry.name]
            if not entry.metadata.get("file", True) or entry.name in out:
                continue
            if dataclasses.is_dataclass(value) and not isinstance(value, type):
                value = dataclasses.asdict(value)
            if entry.name in keep or value != default_of(entry):
                value = plain(value)
                are_names = isinstance(value, list) and all(isinstance(item, str) for item in value)
                out[entry.name] = sorted(value) if are_names and not entry.metadata.get("ordered") else value
        return out


def not_one_of(config: object, key: str, *choices: object) -> list[tuple[str, str]]:
    """Return the setting if it is not one of the choices: ``(key, message)``."""
    value = getattr(config, key)
    words = ("unset" if one is None else str(one).lower() if isinstance(one, bool) else str(one) for one in choices)
    *others, last = words
    shown = f"{', '.join(others)} or {last}" if others else last
    return [] if value in choices else [(key, f"must be {shown}, not {value!r}")]


def other_choices(config: Any) -> list[tuple[str, str]]:
    """Return ``(key, message)`` for each setting whose value is not in its Literal."""
    found: list[tuple[str, str]] = []
    kind: Any = type(config)
    for key, hint in hints_of(kind).items():
        if choices := choices_of(hint):
            found += not_one_of(config, key, *choices)
    return found


def _is_newer(version: object) -> bool:
    """Return whether that is a version of PEFT above the newest known one."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", version) if isinstance(version, str) else None
    return found is not None and (int(found[1]), int(found[2])) > _NEWEST_PEFT


@dataclass(kw_only=True)
class TargetedConfig(AdapterConfig):
    """A config of a method that wraps chosen modules of the model."""

    adapts_attention: ClassVar[bool] = False
    """Whether it adapts the output projection of PyTorch's ``MultiheadAttention``, of which only the weight is read."""
    as_sets: ClassVar[tuple[str, ...]] = ("target_modules", "exclude_modules")

    target_modules: list[str] | str | None = None
    """Which modules to adapt: a list of names or name endings, one regular expression over full names,
    or ``all-linear`` (every linear layer but the output head). Unset: the usual choice for the model's family. In a
    task of texts, ``all-linear`` and the usual choice leave out a model's towers for images and sound."""
    unreached: list[str] = field(default_factory=list, metadata={"recipe": False, "file": False}, repr=False)
    """Full names of modules that the task's inputs never reach: adapted only where ``target_modules`` names them."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.target_modules is not None and not self.target_modules:
            found.append(("target_modules", "names no module"))
        for entry in fields(self):
            value = vars(self)[entry.name]
            try:
                if entry.name in ("target_modules", "exclude_modules") and isinstance(value, str):
                    Pattern(value)
                elif entry.name.endswith("_pattern") and isinstance(value, dict):
                    check_patterns(value)
            except AdapterError as error:
                found.append((entry.name, error.message))
        return found

    def usual_targets(self, model_type: str) -> list[str] | str:
        """Return what unset target_modules mean for a family of models."""
        own, loras = USUAL_TARGETS.get(self.peft_type.lower(), {}), USUAL_TARGETS.get("lora", {})
        return own.get(model_type) or own.get("*") or loras.get(model_type, "all-linear")


@dataclass(kw_only=True)
class ExcludingConfig(TargetedConfig):
    """A TargetedConfig of a method for which PEFT knows ``exclude_modules``."""

    exclude_modules: list[str] | str | None = None
    """Modules to leave alone, written as target_modules are."""


@dataclass(kw_only=True)
class LayeredConfig(TargetedConfig):
    """A TargetedConfig of a method for which PEFT knows ``layers_to_transform``."""

    layers_to_transform: list[int] | int | None = None
    """Indices of the transformer layers to adapt, from 0. Unset: all. Beside these, modules whose full names
    target_modules gives."""
    layers_pattern: list[str] | str | None = field(default=None, metadata={"ordered": True})
    """Name of the model's list of layers ("layers", "h"), or a regular expression for its end, where
    layers_to_transform cannot find it by itself."""

    def normalise(self) -> None:
        super().normalise()
        if self.layers_to_transform == []:  # as PEFT's files have it
            self.layers_to_transform = None

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        is_pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_pattern and self.layers_to_transform is not None:
            found.append(("layers_to_transform", "needs target_modules as a list of names"))
        try:
            check_patterns(as_list(self.layers_pattern))
        except AdapterError as error:
            found.append(("layers_pattern", error.message))
        if self.layers_pattern and self.layers_to_transform is None:
            found.append(("layers_pattern", "means nothing without layers_to_transform"))
        if any(index < 0 for index in as_list(self.layers_to_transform)):
            found.append(("layers_to_transform", "indices count from 0"))
        return found


def as_list(value: Any) -> list[Any]:
    """Return the entries of a setting that is one, a list of them, or None."""
    return [] if value is None else value if isinstance(value, list) else [value]


@dataclass(kw_only=True)
class BiasConfig(TargetedConfig):
    """A config of a method that can train biases of the base model too."""

    bias: str = "none"
    """Which biases of the base model are trained too: none, all, or those of the adapted layers. The last is written
    as PEFT writes it for the method: vera_only, fourier_only, MiSS_only, ..."""

    def problems(self) -> list[tuple[str, str]]:
        found = super().problems()
        if self.bias not in ("none", "all") and not self.bias.endswith("_only"):
            found.append(("bias", f"must be none, all or end in _only, not {self.bias!r}"))
        return found


@dataclass(kw_only=True)
class FanInConfig(TargetedConfig):
    """A config of a method whose file says how the adapted weights are stored."""

    fan_in_fan_out: bool = field(default=False, metadata={"recipe": False})
    """Whether the adapted weights are stored (in, out), as GPT-2's are. Found from the layer itself."""


def extend(kind: type, methods: type) -> None:
    """Give a class the attributes and methods of another, which a layer above brings, as if it were a base class."""
    for name, value in vars(methods).items():
        if not name.startswith("__") and name not in vars(kind):
            setattr(kind, name, value)


def config_class(values: dict[str, Any], file: str | None = None) -> Any:
    """Return the config class of the method that an ``adapter_config.json`` object names.

    Raises:
        AdapterError: there is no such method.
    """
    name = values.get("peft_type")
    if isinstance(name, str) and name in CONFIGS:
        return CONFIGS[name]()
    if isinstance(name, str) and name in NOT_HERE:
        raise AdapterError(f"{name} is not supported: {NOT_HERE[name]}", key="peft_type", file=file)
    problem = "no method is named" if name is None else f"no method is called {short_repr(name)}"
    kind = AdapterTypeError if name is None else AdapterError
    raise kind(f"{problem}; known: {', '.join(CONFIGS)}", key="peft_type", file=file)


def plain(value: Any) -> Any:
    """Return a setting as JSON has it: the value of an enum, the text of a path, the sorted list of a set.

    Mappings and sequences of other kinds become dicts and lists, and what numpy and PyTorch have, numbers and lists.
    """
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, Set):
        value = sorted(value, key=lambda one: (type(one).__name__, one))
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(each) for each in value]
    return value.value if isinstance(value, Enum) else str(value) if isinstance(value, PurePath) else value
