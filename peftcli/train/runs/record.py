"""run.json, typed: what a run is, how it stands and what it made.

This is its only description. ``output_schemas/run.schema.json`` is generated from these classes and the docstrings
below their fields (``make docs``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from peftcli.errors import PeftcliError
from peftcli.system.disk import sha256
from peftcli.system.secrets import redact_values
from peftcli.train.runs.typed_json import ABSENT, LATER, Keywords, WrongValue, from_json, to_json

SCHEMA_VERSION = 1

Count = Annotated[int, Keywords(minimum=0)]
Positive = Annotated[int, Keywords(minimum=1)]
Sha256 = Annotated[str, Keywords(pattern="^[0-9a-f]{64}$")]
Metrics = Annotated[dict[str, float], Keywords(definition="metrics", description="Metric -> value, as eval_loss.")]
Versions = Annotated[
    dict[str, str], Keywords(definition="versions", description="Version of python and of each package.")
]


@dataclass(kw_only=True)
class ErrorRecord:
    """Why a run stopped or failed."""

    kind: str
    """The kind of failure."""
    message: str
    """What is wrong, for a reader."""
    file: str | None
    """The file or folder that it is about."""
    line: int | None
    """The line in that file, from 1."""
    key: str | None
    """The setting or option that it is about."""
    hint: str | None
    """What to do."""
    problems: list[dict[str, Any]] = ABSENT
    """Every mistake of the recipe; of a RecipeError only."""

    @classmethod
    def of(cls, error: PeftcliError) -> ErrorRecord:
        """The record of an error."""
        values: dict[str, Any] = error.as_dict()
        return cls(**values)


@dataclass(kw_only=True)
class ChangeRecord:
    """One thing that was allowed to change."""

    key: str
    """A setting as the recipe calls it, data.FILE, base_model, processes, threads, device, bf16 or versions.PACKAGE."""
    before: Any
    """What it was."""
    now: Any
    """What it is."""
    step: Count
    """The step after which it holds."""


@dataclass(kw_only=True)
class IdentityRecord:
    """What makes two runs the same."""

    recipe: dict[str, Any]
    """The recipe without the settings that do not change the result."""
    data: dict[str, str]
    """File -> hash of its content."""
    base_model: Sha256 | None
    """Hash of its files."""
    processes: Positive
    """Training processes."""


@dataclass(kw_only=True)
class BaseModelRecord:
    """The base model."""

    name: str
    """Hub id, folder or file."""
    revision: str | None
    """Of the hub: the commit that was loaded."""
    sha256: Sha256 | None
    """Hash of its files; null where they are of another format."""
    quantization: dict[str, Any] | None = LATER
    """How its weights are stored in fewer bits."""


@dataclass(kw_only=True)
class SeedsRecord:
    """Seeds."""

    training: int
    """training.seed."""


@dataclass(kw_only=True)
class ThreadsRecord:
    """Threads that compute in each process."""

    count: Positive
    """How many."""
    reason: Literal["environment", "cores", "resumed"]
    """Why: OMP_NUM_THREADS or MKL_NUM_THREADS says so; one for each usable core; or as when the run began."""


@dataclass(kw_only=True)
class AttemptRecord:
    """One time that the run was started or resumed."""

    start: Annotated[str, Keywords(format="date-time")]
    """When, in UTC."""
    from_step: Count
    """The step that it resumed after; 0: from the start."""
    end_step: Count = ABSENT
    """The last step that it saved or finished."""
    reason: Literal["complete", "interrupted", "failed", "killed"] = ABSENT
    """How it ended; killed: its process could not record why."""


@dataclass(kw_only=True)
class ArtefactRecord:
    """One file of the run folder."""

    path: str
    """Its name."""
    bytes: Count
    """Its size."""
    sha256: Sha256
    """Its hash."""

    @classmethod
    def of(cls, folder: Path, name: str) -> ArtefactRecord:
        """The record of a file that is written."""
        return cls(path=name, bytes=(folder / name).stat().st_size, sha256=sha256(folder / name))


@dataclass(kw_only=True)
class AccountRecord:
    """What became of some rows."""

    files: list[str]
    """The files."""
    sha256: dict[str, str]
    """File -> hash of its content."""
    columns_not_read: list[str]
    """Columns that the format does not use."""
    rows: Count
    """Rows that were read."""
    used: Count
    """Rows that became examples."""
    examples: Count
    """Examples; more than rows where long ones are split."""
    skipped: Count
    """Bad rows that on_bad_row: skip left out."""
    dropped: dict[str, Count]
    """Why rows were left out -> how many."""
    truncated: Count
    """Rows that were cut at max_length."""
    split: Count
    """Rows that were split into several examples."""
    pieces_left_out: Count
    """Rows of which pieces without targets were left out."""
    targets_cut: Count
    """Targets that were cut away."""
    tokens: Count
    """Tokens of all examples."""
    targets: Count
    """Tokens that count for the loss."""


@dataclass(kw_only=True)
class SourceRecord(AccountRecord):
    """One source of a mix."""

    train: str
    """Its name in the recipe."""


@dataclass(kw_only=True)
class FindingRecord:
    """Something that was noticed about some rows."""

    name: str
    """One of the names on the page of findings."""
    level: Literal["error", "warning", "info"]
    """An error stops a run unless the recipe allows it."""
    count: Count
    """How many rows."""
    rows: list[str]
    """Where the first ten of them are."""
    split: Literal["train", "eval"]
    """Whose rows."""


@dataclass(kw_only=True)
class DataRecord(AccountRecord):
    """What was read and trained on."""

    format: str
    """The format of the rows, as messages."""
    columns: dict[str, str] = ABSENT
    """Names of the format -> columns that were read as them, where the recipe does not say it."""
    packing: bool
    """Whether rows hold several examples."""
    sources: list[SourceRecord] = ABSENT
    """Of a mix: the account of each source."""
    eval: AccountRecord = ABSENT
    """The account of the evaluation rows."""
    unit: str = ABSENT
    """What ``tokens`` counts; absent: tokens."""
    findings: list[FindingRecord]
    """What is odd about the rows."""
    content: list[str]
    """One hash a source, of its tokens."""
    efficiency: float = LATER
    """Share of a batch that is not padding."""
    passes_per_epoch: list[float] = LATER
    """How often each source is used in an epoch."""


@dataclass(kw_only=True)
class ParametersRecord:
    """Numbers of parameters."""

    trainable: Count
    """Parameters of the adapter."""
    all: Count
    """Parameters of adapter and base model."""


@dataclass(kw_only=True)
class StepsRecord:
    """Optimizer steps."""

    done: Count
    """Steps in the newest checkpoint, or in the finished adapter."""
    total: Count
    """Steps of the whole run."""


@dataclass(kw_only=True)
class EvaluationRecord:
    """Metrics on the evaluation data; empty where it was not evaluated."""

    main: str = ABSENT
    """The task's main metric, as eval_accuracy, among those that were measured."""
    first: Metrics
    """Before the first step."""
    last: Metrics
    """After the last step."""
    best: Metrics
    """Of the best evaluation."""
    best_step: int | None
    """The step of the best evaluation."""
    kept: Metrics
    """Of the adapter that was written."""


@dataclass(kw_only=True)
class GateRecord:
    """One gate of the recipe."""

    metric: str
    """Whose value it bounds."""
    gate: str
    """The bound, as '<= 1.2'; of learnt, 'true'."""
    value: float | None
    """What was measured; null: nothing, and of learnt."""
    passed: bool
    """Whether it holds."""
    reason: str = ABSENT
    """Of learnt: why it does not hold; of forgetting: why it was not measured."""


@dataclass(kw_only=True)
class DifferenceRecord:
    """One metric of base model and adapter on the same rows."""

    base: float
    """Of the base model, with the adapter off."""
    adapter: float
    """Of the adapter that was written."""
    difference: float
    """Adapter less base."""
    low: float
    """Where the 95 % interval of the difference begins."""
    high: float
    """Where it ends."""
    verdict: Literal["better", "worse", "no_difference"]
    """Of the adapter; no_difference: the interval holds 0."""
    draws: Positive = ABSENT
    """Draws of this metric, where they are fewer than of the others: its value is no function of sums."""


@dataclass(kw_only=True)
class RightRecord:
    """Rows that are right or wrong."""

    base: Count
    """Rows that the base model had right."""
    kept: Count
    """Those that the adapter has right too."""
    lost: Count
    """Those that the adapter has wrong."""
    gained: Count
    """Rows that the adapter alone has right."""


@dataclass(kw_only=True)
class OutputRecord:
    """A row with the outputs of base model and adapter, each shortened."""

    row: str
    """Its file, and its line there or its number."""
    chosen: Literal["best", "worst", "most_changed", "random"]
    """Why this row: the largest gain or loss, the largest change of the output, or chance."""
    input: str
    """What the model is given."""
    wanted: str
    """What the row has as the answer; empty: none."""
    base: str
    """What the base model answers."""
    adapter: str
    """What the adapter answers."""


@dataclass(kw_only=True)
class ComparisonRecord:
    """Base model and adapter on the same evaluation rows, with bootstrap intervals."""

    rows: Count = ABSENT
    """Evaluation rows."""
    units: Count = ABSENT
    """What the bootstrap drew from."""
    unit: Literal["rows", "groups"] = ABSENT
    """What they are; groups where rows belong together."""
    draws: Count = ABSENT
    """Draws."""
    seconds: float = ABSENT
    """What the comparison took."""
    metrics: dict[str, DifferenceRecord] = ABSENT
    """Metric, as eval_loss -> what became of it."""
    main: str = ABSENT
    """The task's main metric."""
    base_head_is_new: bool = ABSENT
    """Whether the base model has no trained head, so that it guesses."""
    right: RightRecord = ABSENT
    """Rows that are right or wrong; absent where a row's answer is neither."""
    outputs: list[OutputRecord] = ABSENT
    """A few rows before and after training."""
    skipped: str = ABSENT
    """Why no comparison was made, instead of all of the above."""


@dataclass(kw_only=True)
class ForgettingGroupRecord:
    """What was forgotten of one group of texts."""

    texts: Count
    """Texts."""
    loss: float
    """By how much the cross-entropy rose, in nats a token."""
    kl: float
    """KL divergence from base model to adapter, in nats a token."""
    kept_tokens: float
    """Share of the base model's likeliest tokens that are the adapter's too."""


@dataclass(kw_only=True)
class ForgettingRecord:
    """What a language model forgot, on texts that the package holds."""

    texts: Count = ABSENT
    """Texts."""
    tokens: Count = ABSENT
    """Their tokens but for each first one, which nothing predicts."""
    base_loss: float = ABSENT
    """Cross-entropy of the base model, in nats a token."""
    adapter_loss: float = ABSENT
    """Cross-entropy with the adapter, in nats a token."""
    loss: float = ABSENT
    """By how much it rose: what the gate ``forgetting`` compares."""
    low: float = ABSENT
    """Where the 95 % interval of the rise begins."""
    high: float = ABSENT
    """Where it ends."""
    kl: float = ABSENT
    """KL divergence from base model to adapter, in nats a token."""
    kept_tokens: float = ABSENT
    """Share of the base model's likeliest tokens that are the adapter's too."""
    seconds: float = ABSENT
    """What the measurement took."""
    groups: dict[str, ForgettingGroupRecord] = ABSENT
    """english, code, chat, other_languages or one of these languages -> what was forgotten of it."""
    skipped: str = ABSENT
    """Why it was not measured, instead of all of the above."""


@dataclass(kw_only=True)
class MemoryRecord:
    """The most memory that the process held, in bytes."""

    rss: Count
    """Of the machine."""
    cuda: Count = ABSENT
    """Of the GPU."""


@dataclass(kw_only=True)
class RunRecord:
    """A run, as run.json in its folder holds it and `peftcli train --json` prints it.

    Fields that may be missing are added as the run learns them.
    """

    schema_version: Literal[1] = 1
    """The version of this file's layout."""
    status: Literal["running", "complete", "interrupted", "failed"]
    """Status of the run. Running with a pid that no longer exists means interrupted."""
    exit_code: int | None
    """The exit code that it ended with; null while it runs."""
    error: Annotated[ErrorRecord, Keywords(ref="error.schema.json#/$defs/stored_failure")] | None
    """Why it stopped or failed."""
    resumable: bool
    """Whether there is a checkpoint to resume from."""
    exact: bool
    """Whether the result is that of one recipe from the start; false after a change that was allowed."""
    changes: list[ChangeRecord]
    """What was allowed to change between attempts."""
    identity: IdentityRecord
    """What makes two runs the same."""
    recipe: dict[str, Any]
    """The recipe, every setting written out; `peftcli schema` describes it."""
    recipe_sha256: Sha256
    """The hash of the recipe."""
    base_model: BaseModelRecord
    """The base model."""
    versions: Versions
    """Versions of the packages that the result depends on."""
    processes: Positive
    """Training processes."""
    seeds: SeedsRecord
    """Seeds."""
    attempts: list[AttemptRecord]
    """Each time that it was started or resumed."""
    artefacts: list[ArtefactRecord]
    """What it wrote; empty until it is complete."""
    pid: Positive = ABSENT
    """The process that wrote this last."""
    host: str = ABSENT
    """The name of its machine."""
    day: Annotated[str, Keywords(format="date")]
    """The day on which the run began. Chat templates write this day, however often the run is resumed."""
    task: dict[str, Any] = ABSENT
    """The task: its type and its settings, with those that only the data says, as the names of classes."""
    data: DataRecord = LATER
    """What was read and trained on."""
    parameters: ParametersRecord = LATER
    """Numbers of parameters."""
    mergeable: bool = LATER
    """Whether `peftcli merge` can fold the adapter into the base model."""
    makes_up_for_quantization: bool = LATER
    """Whether the adapter fits the quantised weights only."""
    device: str = LATER
    """As cpu or cuda."""
    bf16: bool = ABSENT
    """Whether it computes in bfloat16."""
    threads: ThreadsRecord = ABSENT
    """Threads that compute in each process, on a CPU. A resumed run has as many."""
    steps: StepsRecord = LATER
    """Optimizer steps."""
    train_loss: float | None = LATER
    """Mean loss per target over all steps."""
    eval: EvaluationRecord = LATER
    """Metrics on the evaluation data; empty where it was not evaluated."""
    comparison: ComparisonRecord = ABSENT
    """Base model and adapter on the same evaluation rows."""
    forgetting: ForgettingRecord = ABSENT
    """Of language models: what was forgotten."""
    gates: list[GateRecord] = LATER
    """The recipe's gates."""
    warnings: list[str] = ABSENT
    """Why the result may be of no use, as that nothing was learnt; absent where nothing says that."""
    eos_token_id: list[int] = ABSENT
    """Tokens that end an answer and that the base model does not name."""
    peak_memory_bytes: MemoryRecord = LATER
    """The most memory that the process held, in bytes."""
    wall_seconds: float = LATER
    """Seconds of training, over all attempts."""
    tokens_per_second: float = LATER
    """Of the last attempt."""

    @classmethod
    def read(cls, values: dict[str, Any]) -> RunRecord:
        """The record that the object in run.json is.

        Raises:
            WrongValue: it is not a run.json of this version.
        """
        if (version := values.get("schema_version")) != SCHEMA_VERSION:
            raise WrongValue(f"schema_version is {str(version)[:20]}, and {SCHEMA_VERSION} is read")
        record = from_json(cls, values, complete=values.get("status") == "complete")
        if record.attempts and not record.data:
            raise WrongValue("data is missing")
        return record

    def content(self) -> bytes:
        """The content of run.json, without secrets."""
        return (json.dumps(redact_values(self.as_dict()), indent=2, sort_keys=True, default=str) + "\n").encode()

    def as_dict(self) -> dict[str, Any]:
        """The record as a JSON object."""
        values: dict[str, Any] = to_json(self)
        return values
