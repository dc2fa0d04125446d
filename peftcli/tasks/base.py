"""The task seam: how rows become examples, examples a batch, a batch a loss, and losses metrics.

A task subclasses ``Task``, whose last methods do nothing by default. A few capabilities (``Packs``, ``Predicts``, ...)
are protocols, for which commands ask with ``isinstance``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

import torch

from peftcli.data.rows import UNANSWERED, Reader, Row, Table
from peftcli.data.store import Column, Example, Outcome, View
from peftcli.errors import AdapterError, DataError, PeftcliError
from peftcli.models.parts import parameters_of_heads
from peftcli.schema import Source
from peftcli.system.disk import write_file
from peftcli.tasks.findings import FINDINGS
from peftcli.tasks.parts import Parts, RowScore, parts_of_sums
from peftcli.tasks.settings import TASK_FILE, TaskSettings
from peftcli.tasks.shown import Description, Shown

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from peftcli.core.config import AdapterConfig
    from peftcli.data.findings import Finding, Records
    from peftcli.models.open import LoadedModel, OpenBase
    from peftcli.tasks.text.generation import TextGenerator

_MAX_SHOWN = 12
"""Labels that a note names."""
Settings = TypeVar("Settings", bound=TaskSettings)
Batch = dict[str, Any]
"""Tensors by the names of the model's arguments, the first dimension B. What ``loss`` alone needs, of any kind, has a
name that begins with an underscore: the model does not get it."""


class OtherModel(Protocol):
    """Another model than the one that trains, a base or an adapter with its base. It is loaded when it is asked."""

    @property
    def content(self) -> str:
        """A hash over its files; its name where it is one of the hub."""

    @property
    def processor(self) -> Any:
        """What makes its inputs."""

    def model(self, dtype: torch.dtype) -> nn.Module:
        """Load the model, frozen, on its device, with weights of this type."""

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
        """Answer rows as ``predict`` does, in their order."""


OpenOther = Callable[[str, str], OtherModel]
"""Takes the name of a base model or of an adapter, and that of a task."""


@dataclass(frozen=True)
class Loss:
    """What a forward pass over one batch gives."""

    total: torch.Tensor
    """Summed over the batch's targets; a scalar, float32, with gradients."""
    sums: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What metrics are made of, without gradients: of any shape (a confusion matrix is one), the same shape in each
    batch. Evaluation adds them over batches and processes, in float64."""
    outputs: Sequence[Any] = ()
    """In evaluation alone, for metrics that no sum gives: one object an example of the batch, in order. Evaluation
    gathers them over processes, in the order of the data."""
    of_targets: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What ``sums`` are the sums of, target by target, row after row; for tasks with ``sums_targets``."""


class Task(ABC, Generic[Settings]):
    """One task, bound to its settings and its processor."""

    name: ClassVar[str]
    """The task's in ``TASKS``."""
    unit: ClassVar[str] = "examples"
    """What ``Example.size`` counts, in the plural: tokens, frames, patches."""
    targets_in_size: ClassVar[bool] = True
    """Whether a size counts the targets too; else what users read adds them."""
    flags: ClassVar[Mapping[str, int]] = {}
    """Facts of rows that run.json counts: name -> bit of ``Outcome.flags``. ``truncated`` says that a row was cut."""
    versions: ClassVar[Sequence[str]] = ("transformers",)
    """Packages whose version decides what ``encode`` gives."""
    findings_of_flags: ClassVar[Mapping[str, int]] = {}
    """Names of findings, each about the used rows with a flag -> bit of ``Outcome.flags``."""
    loss_falls: ClassVar[bool] = True
    """Whether the loss of training falls as the model learns, so that one that rises is a doubt."""
    lower_is_better: ClassVar[Sequence[str]] = ("loss", "perplexity")
    """Names of metrics of which a smaller value is better, or patterns of them."""
    input_packages: ClassVar[Mapping[str, str]] = {}
    """Optional packages that read the rows' files -> the extra that brings each."""
    instead_of_texts: ClassVar[str] = ""
    """What a model does that reads no text, in words: virtual tokens have no place in it."""
    reads_files: ClassVar[bool] = False
    """Whether ``encode`` and ``collate`` read files. Worker processes then call both, ahead of the loop."""
    skips_parts: ClassVar[bool] = False
    """Whether some batches run a part of the model alone, as those without pictures do not run a vision tower."""
    gathers: ClassVar[bool] = False
    """Whether ``loss`` compares the rows of all processes: each must take part each time."""
    identity: ClassVar[Sequence[str]] = ()
    """Columns whose values make two inputs equal, by which ``inspect`` finds duplicates. None: it does not look."""
    method: AdapterConfig | None = None
    """The config of the method. ``open`` sets it."""
    number_format: Mapping[str, Any] | None = None
    """That of evaluations, which a run sets: ``bf16``, whether they compute in it, and ``dtype`` of the base model."""
    virtual_tokens: int = 0
    """How many tokens the method puts before those of a row, each at a position of its own. ``open`` sets it."""
    label_columns: ClassVar[Sequence[str]] = ()
    """Columns in which rows of equal inputs should agree. None: the inputs hold all of a row."""
    sums_targets: ClassVar[bool] = False
    """Whether ``Loss.of_targets`` says what each target adds to the sums, so that rows in a batch can be told apart."""
    origins: ClassVar[Sequence[str]] = ("path", "mask_path", "row")
    """Columns that say where an example is from, and not what it holds."""
    open_other: OpenOther
    """Opens another model. ``ask_others`` sets it."""
    adapts: str = ""
    """Which parts of the model are changed, for the user, where it has several. ``fit_model`` sets it."""
    head_is_new: bool = False
    """Whether the base model lacks weights that the task needs, as a head's. Whoever loads it sets it."""
    shares: ClassVar[Sequence[str]] = ()
    """Columns of rows that hold a part of the input which other rows may have too, with another answer: a premise, a
    context. ``dataset.eval_fraction`` keeps such rows together."""

    def __init__(self, settings: Settings, processor: Any, base: OpenBase):
        """``TASKS[name].open`` calls this.

        The processor is of the kind that the task's row names; None where it names none.
        """
        for package, extra in self.input_packages.items():
            require_extra(package, extra)
        self.settings, self.processor, self.base = settings, processor, base

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, Column]:
        """The arrays of an example. Most tasks have the same ones whatever their settings: a ``ClassVar``."""

    @property
    def outputs_are_new(self) -> bool:
        """Whether the model's outputs mean something else than the base model's, also where they are as many."""
        return False

    @property
    def packages(self) -> Mapping[str, str]:
        """Optional packages that training and evaluation need -> the extra that brings each."""
        return {}

    @property
    def divides(self) -> bool:
        """Whether the loss of a batch is the sum of those of its parts, so that it may be computed a part at a time.

        That of a task that compares the rows of a batch is not.
        """
        return not self.gathers

    @property
    def judges_rows(self) -> bool:
        """Whether an answer is right or wrong, so that ``parts`` says it of each row. Of tasks that write no text.

        The gate ``forgetting`` counts rows that are no longer right.
        """
        return True

    def sizes_with_targets(self, view: View) -> np.ndarray:
        """The size of each example, with its targets: what users read as its tokens."""
        return view.sizes if self.targets_in_size else view.sizes + view.targets

    @property
    def advice(self) -> Mapping[str, str]:
        """What to do where every row is left out, by the reason of ``Outcome``."""
        return {}

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know before rows are encoded."""
        return ()

    def trained_on(self, format: str, shared: Mapping[str, str]) -> None:
        """Take note of the training rows: their format, and the texts that all of them share."""

    def fingerprint(self) -> dict[str, Any]:
        """What decides what ``encode`` gives, besides rows, settings and ``versions``: part of the cache's key."""
        described = self.processor.to_json_string() if self.processor is not None else ""
        return {"processor": hashlib.sha256(described.encode()).hexdigest()}

    def model_options(self) -> dict[str, Any]:
        """Options of ``from_pretrained``: ``num_labels``, ``id2label``, ``label2id``, ``problem_type``."""
        return self.settings.model_options()

    def record_findings(self, records: Records) -> list[Finding]:
        """What the outcomes and flags of rows show; errors among it stop a run."""
        flags = self.findings_of_flags.items()
        found = [records.findings(FINDINGS[name], records.with_flag(flag), of_used=True) for name, flag in flags]
        found.append(records.findings(FINDINGS["rows_not_accepted"], records.with_outcome(*UNANSWERED)))
        return [each for some in found for each in some]

    @abstractmethod
    def read(self, table: Table) -> Reader:
        """Find the columns that the task reads in a source. Most tasks return ``table.reader(...)``.

        Raises:
            DataError: they are not there.
        """

    def encode(self, rows: Sequence[Row], reader: Reader) -> list[Outcome | DataError]:
        """Turn rows into examples: each by ``encode_row``, unless the task encodes many at once.

        Returns:
            For each row its examples (or the reason why it has none), or the error that it is.

        Raises:
            DataError: no row of the source can be encoded.
        """
        found = list[Outcome | DataError]()
        for row in rows:
            if reason := reader.left_out(row):
                found.append(Outcome([], reason))
                continue
            try:
                found.append(self.encode_row(row, reader))
            except DataError as error:
                found.append(error)
        return found

    def survey(self, reader: Reader, rows: Callable[[], Iterator[Row]], on_rows: Callable[[int, bool], None]) -> Reader:
        """Look at all rows of a source before the first one is encoded; return the reader with what is found of them.

        ``rows`` returns those that can be read; ``on_rows`` is told how many rows are looked at, and whether that is
        all.
        """
        return reader

    def ask_others(self, open_other: OpenOther) -> None:
        """Take what opens other models, before rows are encoded. A task that needs one checks it here.

        Raises:
            PeftcliError: the other model does not fit.
        """
        self.open_other = open_other

    def evaluation_task(self) -> Task[Any]:
        """Return the task that encodes evaluation rows, where these are encoded in another way."""
        return self

    def shared(self, row: Row, reader: Reader) -> Any:
        """The part of a row's input that other rows may have too, with another answer; empty: none."""
        return [row.values.get(reader.names[name]) for name in self.shares if name in reader.names]

    def encode_row(self, row: Row, reader: Reader) -> Outcome:
        """Turn a row into its examples, or the reason why it has none.

        Raises:
            DataError: the row cannot be encoded: ``row.place.error(message)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither encode_row nor encode")

    @abstractmethod
    def collate(self, examples: Sequence[Example], *, training: bool) -> Batch:
        """Put examples, or the packed rows that ``join`` made of them, into one batch on the CPU.

        Augmentation is for batches of ``training`` alone.
        """

    @property
    def reports(self) -> Sequence[str]:
        """Names of all that ``metrics`` may return, or patterns of those whose names the data gives."""
        return ("loss", "*")

    @property
    def measures(self) -> Sequence[str]:
        """Names of ``Loss.sums`` whose means over the targets of a step training logs. No metrics of evaluation."""
        return ()

    @property
    def main_metric(self) -> str:
        """The metric of ``reports`` that says most of how good the model is."""
        return "loss"

    def constant_metrics(self, view: View) -> dict[str, float]:
        """Return what a model that answers all examples alike would reach at best, by metric, as far as it is known.

        Of the loss it may be what equal probabilities for all answers reach.
        """
        return {}

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Run the model and sum the loss over the targets. ``model.training`` says whether it trains."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, np.ndarray], outputs: Sequence[Any], num_targets: int) -> dict[str, float]:
        """Compute what evaluation reports, without the prefix ``eval_``; ``loss`` is among it.

        ``sums`` are those of ``Loss`` over all batches, float64; ``outputs`` too, one an example of the data, in its
        order; ``num_targets`` over all examples.
        """

    def parts(self, rows: Sequence[RowScore]) -> Parts:
        """Return what each row adds to the sums that metrics are made of.

        The metrics of all rows together are those of ``metrics``; one that no sum gives is left out. Without another
        definition ``metrics`` must need no outputs.
        """
        return parts_of_sums(rows, self.metrics)

    # --- what only some tasks do --------------------------------------------------------------------------------------

    @property
    def needs_scan(self) -> bool:
        """Whether the settings lack what only the data says, as the names of labels."""
        return False

    def scan(self, tables: Iterable[tuple[Table, Iterator[Row]]]) -> Any:
        """Read the training rows, source by source, before any row is encoded, and return complete settings.

        Rows that cannot be read are left out.

        Raises:
            DataError: the rows do not say it.
        """
        return self.settings

    @property
    def found(self) -> str:
        """What ``scan`` has found, for the user."""
        return ""

    def fit_model(self, model: nn.Module, config: AdapterConfig | None) -> list[str]:
        """Change the loaded base model before an adapter is put into it, as new tokens need rows.

        ``config`` is a new adapter's, which may be changed to train what is new; None where one is loaded or none is.
        Returns what the user should know.

        Raises:
            AdapterError: the method puts virtual tokens before a text, which the model does not read.
        """
        if self.instead_of_texts and getattr(config, "is_prompt_learning", False):
            message = "puts virtual tokens before those of a text; a model that {} has no place for them"
            hint = "Use a method that changes layers, as lora."
            raise AdapterError(message.format(self.instead_of_texts), key="method.type", hint=hint)
        return []

    def check_model(self, model: nn.Module) -> None:
        """Check a model with its adapter, on its device, before it trains.

        Raises:
            ModelError: it cannot be trained for the task.
        """

    def padded_probe(self, model: nn.Module) -> Batch | None:
        """Return a padded batch by which a model shows whether it may leave out padding; None: texts alone show it.

        It is on the model's device, of a task whose model reads more than texts.
        """
        return None

    def refuse_size(self, largest: int, *, of_target: bool = False) -> None:
        """Check the size of the largest example, or of the largest target where that is apart.

        Raises:
            DataError: the base model cannot read it.
        """

    def groups(self, view: View) -> np.ndarray | None:
        """Return a number for each example: a batch has examples of one number. None: of any."""
        return None

    def refuse_rows(self, examples: View, count: int, *, training: bool) -> None:
        """Check, for a loss that compares rows, that there are enough of them, for ``training`` or evaluation.

        ``count`` are compared at most: those that are in the model at once, in all processes if the task ``gathers``.

        Raises:
            DataError: something else would be learnt, or measured.
        """

    def gather_nothing(self, device: torch.device) -> None:
        """Take part in the comparison of a micro-batch of which this process has no rows; of tasks that ``gathers``."""

    def step_inputs(self, examples: Iterable[Example]) -> Batch:
        """Return what the loss needs of all examples of a step, however they are split, for each of its batches."""
        return {}

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> None:
        """Write files that show what the model does into a run's folder, in one process, after an evaluation."""

    def stops(self, model: nn.Module) -> list[int]:
        """Return the tokens that end an answer of the finished adapter, where the model's own config lacks some."""
        return []

    def save(self, folder: Path) -> list[str]:
        """Write the files that a reader needs besides adapter and base model, and return their names."""
        return []

    def write_task(self, folder: Path, **parts: Any) -> str:
        """Write task.json, by which an adapter's readers know its task, and return the file's name.

        ``parts`` are dataclasses or mappings: ``settings`` of the task; ``config``, keys of the base model's config
        that a reader must set; ``prompt``, the form of a prompt; ``generation``, limits of answers.
        """
        values = {"type": self.name, **parts}
        if self.number_format is not None:
            values["number_format"] = self.number_format
        text = json.dumps(values, indent=2, ensure_ascii=False, default=asdict) + "\n"
        write_file(folder / TASK_FILE, text.encode())
        return TASK_FILE

    def show(self, example: Example) -> Shown:
        """Show an example as texts, labels, pictures and facts."""
        return Shown()

    def findings(self, view: View) -> list[Finding]:
        """Look for what is odd with the training or evaluation examples, beyond their records. None is an error."""
        return []

    def describe(self, view: View) -> Description:
        """Describe the training or evaluation examples: shares, counts of classes, how answers end."""
        return Description()


def refuse_unread(settings: Any, names: Iterable[str], message: str) -> None:
    """Raise DataError with this message for the first of these settings that has another value than its default."""
    for each in fields(settings):
        if each.name in names and getattr(settings, each.name) != each.default:
            raise DataError(message, key=f"task.{each.name}")


@runtime_checkable
class Packs(Protocol):
    """Joins examples to one row, in which the model keeps them apart; its settings have ``packing``, ``max_length``."""

    def join(self, examples: Sequence[Example]) -> Example:
        """Join examples to one row."""

    def samples(self) -> Sequence[Example]:
        """Two short examples of equal length, for the check that the model keeps packed examples apart."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How rows are answered."""

    batch_size: int = 8
    """Rows at once in the model."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns under other names, as ``dataset.columns`` gave them for training."""
    beside: Path = Path("peftcli")
    """Files that answers name go into folders whose names begin with this: the file of answers."""
    first: int = 1
    """The number of the first row, by which such files are named."""


def table_of(rows: Sequence[Row], columns: Mapping[str, str]) -> Table:
    """Return the table of rows to answer, of which some ``columns`` have other names."""
    there = tuple(dict.fromkeys(name for row in rows for name in row.values))
    source = Source(train="", columns=dict(columns))
    return Table(source, rows[0].place.source, there, first=rows[0].values)


@runtime_checkable
class Predicts(Protocol):
    """Answers rows."""

    @property
    def arguments(self) -> Sequence[str]:
        """The columns that texts or files on the command line fill, row after row."""

    def predict(self, model: nn.Module, rows: Sequence[Row], options: PredictOptions) -> Iterator[dict[str, Any]]:
        """Answer rows that have the columns of training, but for the label: one JSON object a row, in order."""


@runtime_checkable
class AsksRows(Protocol):
    """Answers rows in words, and may be asked for one, as ``generate`` and a chat do."""

    def generator(self, model: nn.Module, columns: Mapping[str, str]) -> TextGenerator:
        """Return what answers rows with a model, whose ``columns`` may have other names."""


@runtime_checkable
class Probes(Protocol):
    """Makes up inputs, to compare a model's outputs before and after a change."""

    def probe(self) -> Batch:
        """A small batch without targets, the same each time. The model's ``logits`` of it are compared."""


@runtime_checkable
class Begins(Protocol):
    """Looks at the model as training begins."""

    def begin(self, model: nn.Module, from_adapter: bool) -> None:
        """Look at a model with the adapter that training begins with, on its device: a new one, or ``from_adapter``.

        A resumed run begins with the same one again.
        """


@runtime_checkable
class Exports(Protocol):
    """Has readers in another ecosystem, whose models are folders with files of their own."""

    def export(self, folder: Path) -> None:
        """Write such files beside a merged model."""

    def ask_exported(self, folder: Path, texts: Sequence[str]) -> tuple[list[dict[str, Any]], Any]:
        """Return rows made of texts, and the numbers that the other library's model in a folder answers to each."""


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if hasattr(value, "to") else value for name, value in batch.items()
    }


def model_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """The model's arguments in a batch."""
    return {name: value for name, value in batch.items() if not name.startswith("_")}


def scores_of(outputs: Any) -> torch.Tensor:
    """What a model says of each row: its logits, those of starts and ends (B, T, 2), a sample, or what comes first.

    First come hidden states, or the logits of a model that has several heads.
    """
    if "sample" in outputs:
        return outputs.sample
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
    return outputs.logits if "logits" in outputs else outputs[0]


def logits_of(
    model: nn.Module, examples: Sequence[Example], collate: Callable[[Sequence[Example]], Batch], batch_size: int
) -> list[torch.Tensor]:
    """The logits of each example, float32 on the CPU, in order. Examples of similar size share a batch."""
    device = next(model.parameters()).device

    def compute(some: Sequence[Example]) -> torch.Tensor:
        with torch.inference_mode():
            return scores_of(model(**model_inputs(on_device(collate(some), device)))).float().cpu()

    return in_batches(examples, batch_size, compute)


def in_batches(
    examples: Sequence[Example], batch_size: int, compute: Callable[[Sequence[Example]], Iterable[Any]]
) -> list[Any]:
    """What ``compute`` gives for each example, in order. Examples of similar size share a batch."""
    order = sorted(range(len(examples)), key=lambda at: examples[at].size)
    found: dict[int, Any] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        found |= zip(chosen, compute([examples[at] for at in chosen]), strict=True)
    return [found[at] for at in range(len(examples))]


def refuse_other_classes(task: Task[Any], options: Mapping[str, Any], settings: Any, folder: Path) -> None:
    """Check that a head that goes on training keeps the meaning of its outputs.

    ``options`` and ``settings`` are those that the adapter that holds the head records; empty where it does not say
    them.

    Raises:
        DataError: the classes or letters are others, or in another order.
    """
    both: dict[str, list[Any]] = {
        "labels": [list(each.get("id2label", {}).values()) for each in (options, task.model_options())],
        "vocabulary": [getattr(each, "vocabulary", None) for each in (settings, task.settings)],
    }
    for name, (before, now) in both.items():
        if before and now and before != now:
            hint = f"task: {{{name}: {json.dumps(before, ensure_ascii=False)}}}"
            raise DataError(f"are {now}, and {before} in {folder}", key=f"task.{name}", hint=hint)


def with_trained_head(loaded: LoadedModel, task: Task[Any]) -> LoadedModel:
    """Return the model, with the last layer of a head for as many other labels among the new ones, and a note."""
    stored: dict[Any, Any] = getattr(task.base.config, "id2label", None) or {}
    wanted: dict[Any, Any] = task.model_options().get("id2label", {})
    before, now = ([str(names[key]) for key in sorted(names, key=int)] for names in (stored, wanted))
    is_same = len(before) != len(now) or before == now or all(name.startswith("LABEL_") for name in before)
    if is_same and not task.outputs_are_new:
        return loaded
    count = len(now) or task.model_options().get("vocab_size")
    known = {name: loaded.model.get_parameter(name) for name in parameters_of_heads(loaded.model)}
    last = [name for name, value in known.items() if value.shape[:1] == (count,) and name not in loaded.initialised]
    if not last:
        return loaded
    modules = sorted({name.rpartition(".")[0] for name in last})
    others = "" if task.outputs_are_new else f" ({', '.join(before[:_MAX_SHOWN])})"
    note = f"{', '.join(modules)} of {task.base.name} was made for other labels{others}, and is trained too"
    return replace(loaded, initialised=(*loaded.initialised, *last), note=note)


def number_in(value: Any) -> Any:
    """The number that a text holds, as tables of texts have it; any other value as it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def reader_of_texts(processor: Any) -> Any:
    """What makes tokens of texts: a part of a processor, or the processor itself."""
    return getattr(processor, "tokenizer", processor)


def facts_of_processor(processor: Any) -> dict[str, Any]:
    """What decides how a processor treats any text, as JSON; empty for one that reads no texts."""
    reads = reader_of_texts(processor)
    if not hasattr(reads, "special_tokens_map"):
        return {}
    facts = {
        **{name: str(token) for name, token in reads.special_tokens_map.items()},
        "padding_side": reads.padding_side,
        "truncation_side": reads.truncation_side,
        "chat_template": hashlib.sha256(str(reads.chat_template).encode()).hexdigest(),
    }
    return {name: value for name, value in facts.items() if value is not None}


def require_extra(package: str, extra: str, key: str = "task", kind: type[PeftcliError] = DataError) -> None:
    """Check that an optional package is installed.

    Raises:
        PeftcliError: it is not installed; of this kind, and names the extra.
    """
    if importlib.util.find_spec(package) is None:
        raise kind(f"needs the package {package}: pip install 'peftcli[{extra}]'", key=key)


def encoding(name: str, task: Task[Any]) -> dict[str, Any]:
    """Everything that decides how the task called ``name`` encodes a row: part of the cache's key."""
    decisive = [each.name for each in fields(task.settings) if each.metadata.get("encodes", True)]
    settings = {each: json.loads(json.dumps(getattr(task.settings, each))) for each in decisive}
    versions = {package: version(package) for package in task.versions}
    return {"task": name, "settings": settings, "versions": versions, **task.fingerprint()}
