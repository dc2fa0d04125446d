"""The recipe as frozen dataclasses. The docstring below a field is its only help text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from peftcli.guard.ranges import ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1

NumberOrAuto = int | Literal["auto"]
Format = Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"]
FILE_SETTINGS = ("delimiter", "encoding", "media_root")
"""Settings of how files are read."""
_MILLION = {"most": 1_000_000}
"""Far above useful values, which take memory in proportion."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """Storage of the base model's frozen linear weights. Embeddings, norms and head stay unquantized.

    Adapter weights are always float32.
    """

    type: Literal["nf4", "fp4", "int8", "int8_weight_only", "int4_weight_only"]
    """bitsandbytes: nf4 is 4 bits for normally distributed weights (QLoRA), fp4 is 4-bit floats, int8 is 8 bits and
    also rounds the inputs to 8 bits. torchao: int8_weight_only, int4_weight_only; int4 takes as much memory as int8,
    because torchao's packed weights do not pass gradients."""
    double_quant: bool = False
    """nf4 and fp4: also quantise the scales, which saves 0.4 bits per weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """nf4 and fp4: number format of the unpacked weights in computations. auto: the format of the other weights."""
    group_size: int | None = None
    """int4_weight_only: number of weights that share a scale; must divide the width of every layer. Unset: 32."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The pretrained model that the adapter is trained on."""

    name: str
    """Hub id, folder, or .gguf file (needs the extra ``gguf``)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights. auto: bfloat16 if training.bf16 is true, else float32."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """Implementation of attention. Unset: transformers' default for the model."""
    quantization: Quantization | None = None
    """Store the frozen linear weights in fewer bits: a type, such as nf4, or a mapping. Unset: as in the model's files.
    Needs the extra ``bitsandbytes`` or ``torchao``."""
    chat_template: str | None = None
    """Chat template that replaces the tokenizer's: ``chatml``, or a .jinja file. It is saved beside the adapter."""
    new_tokens: list[str] = field(default_factory=list)
    """Special tokens to add to the vocabulary. The embedding gets a row for each; these rows are trained and saved."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository or folder. A hub model needs ``revision``, the commit of the code."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the datasets of ``dataset.mix``. Format and columns default to those of ``dataset``."""

    train: str
    """File, folder of files, or hub dataset id."""
    weight: float | None = None
    """Share of an epoch's examples from this dataset, relative to the other weights. Give weights to all datasets of a
    mix or to none. Unset: each example once."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    streaming: bool = False
    """Stream the rows of a hub dataset instead of downloading its files first."""
    format: Format = "auto"
    """Format of the rows. auto: the value of dataset.format."""
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    """Column names, as in dataset.columns. Empty: the value of dataset.columns."""
    limit: int | None = field(default=None, metadata=AT_LEAST_1)
    """Use only the first N rows."""
    group_by: str | None = None
    """Column for dataset.group_by. Unset: the value of dataset.group_by."""
    delimiter: str | None = None
    """Delimiter of the fields, as in dataset.delimiter. Unset: the value of dataset.delimiter."""
    encoding: str | None = None
    """Encoding of the text, as in dataset.encoding. Unset: the value of dataset.encoding."""
    media_root: str | None = None
    """Folder of images and sounds, as in dataset.media_root. Unset: the value of dataset.media_root."""

    def renamed(self) -> list[tuple[str, str]]:
        """Return each name in ``columns`` with the column of the file that it stands for, or with each of several."""
        given = ((key, [name] if isinstance(name, str) else name) for key, name in self.columns.items())
        return [(key, name) for key, names in given for name in names]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The training and evaluation data."""

    train: str | None = None
    """File (.jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet, .arrow, .feather, .xlsx, .conll, .conllu, .bio, .iob,
    each also as .gz or .zst), folder of such files or of images or sounds, folder of ``save_to_disk``, or hub dataset
    id."""
    mix: list[Source] = field(default_factory=list)
    """Several datasets instead of ``train``: with weights, as in [{train: a.jsonl, weight: 3}, {train: b.jsonl, weight:
    1}], or without, as in [a.jsonl, b.jsonl]."""
    eval: str | None = None
    """File, folder or hub dataset for evaluation."""
    eval_fraction: float | None = field(default=None, metadata=ABOVE_0 | BELOW_1)
    """Hold out this fraction of the training rows for evaluation, instead of ``eval``. training.seed chooses the rows.
    Each class keeps its share. Rows that are equal or nearly equal, or that have the same prompt, premise, context,
    picture or sound, stay on one side."""
    eval_seed: int | None = field(default=None, metadata=AT_LEAST_0)
    """Seed that chooses the rows of ``eval_fraction``, so that runs of several seeds are evaluated on the same ones.
    Unset: training.seed."""
    group_by: str | None = None
    """Column of ``eval_fraction``: rows with the same value in it stay on one side, as those of one conversation,
    document or person. A name with a dot takes a key of an object. Unset: what ``eval_fraction`` finds alone."""
    delimiter: str | None = None
    """Delimiter of the fields of CSV and TSV files: one character, as ";" or "\\t". Unset: found from the file's
    records among commas, semicolons, tabs and bars, and said if it is not a comma."""
    encoding: str | None = None
    """Encoding of text files, as utf-8, cp1252 or utf-16. Unset: found from the file's bytes (a byte order mark, UTF-8,
    else cp1252), and said if it is not UTF-8."""
    media_root: str | None = None
    """Folder to which the paths of images and sounds in the rows are relative. Unset: the folder of the rows' file."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset, or of a folder of ``DatasetDict.save_to_disk``, for training."""
    eval_split: str | None = None
    """Split for evaluation, of the hub dataset in ``eval``, or else of the training dataset."""
    streaming: bool = False
    """Stream the rows of a hub dataset instead of downloading its files first; with ``limit``, no more rows than that
    are fetched."""
    format: Format = "auto"
    """Format of the rows. auto: found from the columns. text: {text}; prompt_completion: {prompt, completion};
    messages: {messages: [{role, content}]}; alpaca: {instruction, input, output}; sharegpt: {conversations: [{from,
    value}]}."""
    columns: dict[str, str | list[str]] = field(default_factory=dict)
    """Names of the columns in the file, by the format's names, as in {prompt: question}. A name with a dot takes a key
    of an object, as in {prompt: translation.en}. A list is for ``labels`` of the classification tasks alone: columns
    of 0 and 1, one for each label, as in {labels: [toxic, insult]}."""
    max_length: int = field(default=1024, metadata=AT_LEAST_1)
    """Maximum length of an example, in tokens."""
    overlong: Literal["truncate", "drop", "error", "split"] = "truncate"
    """What to do with longer examples: truncate them at the end, drop them, stop with an error, or split them into
    pieces that are separate examples. They are counted in any case."""
    packing: bool = False
    """Put several examples into each row of a batch, up to max_length. Attention stays within an example.
    per_device_train_batch_size then counts these rows."""
    train_on: Literal["answers", "last_answer", "all", "middle"] = "answers"
    """Which tokens count in the loss. answers: the text of each assistant turn and its end-of-turn token; last_answer:
    the same of the last assistant turn; all: every token; middle: a part of each text, which the model sees after the
    text's beginning and end, between tokens of its own (fill-in-the-middle, for models of code)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used: stop with an error, or skip it. Skipped rows are counted and
    listed."""
    allow: list[str] = field(default_factory=list)
    """Names of findings of ``peftcli inspect`` that must not stop the run."""
    limit: int | None = field(default=None, metadata=AT_LEAST_1)
    """Use only the first N training rows."""

    def sources(self) -> list[Source]:
        """Return the training datasets: those of ``mix``, or the one of ``train``."""
        if not self.mix:
            names = (
                "name",
                "revision",
                "split",
                "streaming",
                "format",
                "columns",
                "limit",
                "group_by",
                *FILE_SETTINGS,
            )
            return [Source(train=self.train or "", **{name: getattr(self, name) for name in names})]
        return [
            replace(
                source,
                format=self.format if source.format == "auto" else source.format,
                columns=source.columns or self.columns,
                group_by=source.group_by or self.group_by,
                **{name: getattr(source, name) or getattr(self, name) for name in FILE_SETTINGS},
            )
            for source in self.mix
        ]


@dataclass(frozen=True, kw_only=True)
class Training:
    """Duration, learning rate, batches and output. Names are mostly those of transformers.TrainingArguments."""

    output_dir: str
    """The run folder: adapter, logs and checkpoints."""
    num_train_epochs: float = 3.0
    """Number of passes over the training data."""
    max_steps: int = -1
    """Number of steps, which overrides num_train_epochs; -1: num_train_epochs decides."""
    per_device_train_batch_size: NumberOrAuto = field(default=8, metadata=AT_LEAST_1 | _MILLION)
    """Examples per device and micro-batch. More is faster and takes more memory. auto: a step has
    gradient_accumulation_steps examples on each device, in the largest micro-batches that fit into memory."""
    per_device_eval_batch_size: int = field(default=8, metadata=AT_LEAST_1 | _MILLION)
    """Examples per device and batch in evaluation."""
    gradient_accumulation_steps: int = field(default=1, metadata=AT_LEAST_1 | _MILLION)
    """Micro-batches per step. The result is the same as with one large batch."""
    learning_rate: float | Literal["auto"] = field(default="auto", metadata=AT_LEAST_0 | _MILLION)
    """Peak learning rate. auto: the measured rate of the method, its start and the task; see docs/learning_rates.md."""
    loraplus_lr_ratio: float | None = field(default=None, metadata=ABOVE_0 | _MILLION)
    """LoRA+ (https://arxiv.org/abs/2402.12354): learning-rate multiplier of LoRA's B, usually 2 to 16. Unset: 1."""
    loraplus_lr_embedding: float = field(default=1e-6, metadata=AT_LEAST_0 | _MILLION)
    """Learning rate of LoRA on embeddings, if loraplus_lr_ratio is set."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "linear"
    )
    """Schedule of the learning rate after the warm-up."""
    warmup_ratio: float = field(default=0.0, metadata=AT_LEAST_0 | {"most": 1})
    """Fraction of the steps during which the learning rate rises from 0, rounded up to whole steps."""
    warmup_steps: int | float = field(default=0, metadata=AT_LEAST_0)
    """Number of warm-up steps; below 1: a fraction of the steps, like warmup_ratio, which it overrides if above 0."""
    init_adapter_from: str | None = None
    """Adapter to start from: a folder or hub id in PEFT's format, of the same method and base model. ``method`` then
    needs only its type; the other settings are the adapter's. Unset: a new adapter."""
    optim: Literal[
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
        "lion_8bit",
        "lion_32bit",
        "paged_lion_8bit",
        "paged_lion_32bit",
        "adafactor",
        "sgd",
    ] = "adamw_torch"
    """Optimizer. adamw_torch is fused unless optim_args says otherwise. The 8-bit, paged and Lion optimizers need the
    extra ``bitsandbytes`` and are mostly for GPUs. An automatic learning rate is for AdamW."""
    optim_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer's class, as in {momentum: 0.9} for sgd."""
    weight_decay: float = field(default=0.0, metadata=AT_LEAST_0)
    """Weight decay. As in Trainer, biases and the weights of norms are not decayed."""
    adam_beta1: float = field(default=0.9, metadata=AT_LEAST_0 | BELOW_1)
    """Decay rate of the mean of past gradients, in AdamW and Lion."""
    adam_beta2: float = field(default=0.999, metadata=AT_LEAST_0 | BELOW_1)
    """Decay rate of the mean of past squared gradients in AdamW; the second rate of Lion."""
    adam_epsilon: float = field(default=1e-8, metadata=ABOVE_0)
    """Term added to AdamW's divisor."""
    max_grad_norm: float = field(default=1.0, metadata=AT_LEAST_0)
    """Clip the norm of the gradients to this value; 0: no clipping."""
    neftune_noise_alpha: float | None = field(default=None, metadata=ABOVE_0)
    """NEFTune (https://arxiv.org/abs/2310.05914): noise on the embeddings of tokens in training, usually 5 to 15.
    Unset: none."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16. auto: if the device is fast with it. The adapter stays float32, and so do linear heads for
    classes and numbers."""
    gradient_checkpointing: bool | Literal["auto", "offload"] = False
    """Recompute activations in the backward pass: about a third slower, much less memory for long examples. auto: only
    if the memory is not enough otherwise. offload, for very long examples: keep the layers' inputs, which that needs,
    in the CPU's memory and not on the GPU, and compute MLPs 2,048 tokens at a time. transformers 6 calls it
    activation_checkpointing; both names are read."""
    torch_compile: bool = False
    """Compile the model's layers. The first step takes longer; on a CPU later steps were not faster."""
    use_liger_kernel: bool = False
    """Compute norms, rotary positions and gated layers with liger-kernel's functions for GPUs, if it supports the
    model. Needs the extra ``liger``."""
    train_sampling_strategy: Literal["random", "group_by_length", "sequential"] = "random"
    """Order of the examples. group_by_length puts examples of similar length together, which saves
    time where padding is computed."""
    seed: int = field(default=42, metadata=AT_LEAST_0 | {"most": 2**32 - 1})
    """Seed of initialisation, example order and dropout. The same seed gives the same adapter."""
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to evaluate, if there is evaluation data. Unless ``no``, evaluation also runs at the end."""
    eval_on_start: bool = False
    """Also evaluate before the first step, which measures the base model."""
    eval_steps: int = field(default=100, metadata=AT_LEAST_1)
    """Steps between evaluations, with eval_strategy steps."""
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to write a checkpoint that training can resume from. Unless ``no``, the last step also writes one, as does
    each step at which early stopping may end the run."""
    save_steps: int = field(default=100, metadata=AT_LEAST_1)
    """Steps between checkpoints, with save_strategy steps."""
    save_total_limit: int = field(default=2, metadata={"least": 2})
    """Number of newest checkpoints to keep; at least 2, since an older one replaces a damaged one."""
    max_time: str | None = None
    """Stop with a checkpoint this long after the start of the command, as in 3h30m or 90s; the same command then
    resumes. The time for the current step and the checkpoint is added."""
    save_on_signal: Literal["SIGUSR1", "SIGUSR2"] | None = "SIGUSR2"
    """Signal on which a checkpoint is written while training continues, for the warning of a spot machine or scheduler.
    null: none. INT, TERM, HUP and USR1 (unless it is chosen here) stop with a checkpoint."""
    load_best_model_at_end: bool = False
    """Save the adapter of the best evaluation instead of the last one."""
    metric_for_best_model: str = "eval_loss"
    """Metric that decides which evaluation is best, under its name in the evaluation's report."""
    greater_is_better: bool | None = None
    """Whether a larger metric_for_best_model is better. Unset: no for losses, perplexity, error rates, the KL and the
    reward of rejected answers, else yes. A metric of task.metric_code needs it."""
    early_stopping_patience: int | None = field(default=None, metadata=AT_LEAST_1)
    """Stop after this many evaluations in a row without an improvement of metric_for_best_model. Unset: train to the
    end."""
    early_stopping_threshold: float = field(default=0.0, metadata=AT_LEAST_0)
    """Smallest change that counts as an improvement, with early_stopping_patience."""
    logging_steps: int = field(default=10, metadata=AT_LEAST_1)
    """Steps between lines in metrics.jsonl and in the log."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = field(default_factory=list)
    """Trackers that also receive the lines of metrics.jsonl; each needs the extra of its name. If one fails, there is a
    warning and training continues without it."""
    run_name: str | None = None
    """Name of the run in trackers. Unset: the name of its folder."""
    dataloader_num_workers: NumberOrAuto = field(default="auto", metadata=AT_LEAST_0 | {"most": 1024})
    """Worker processes for each training process, which read and decode files ahead of it. The result does not depend
    on their number. auto: for images and sounds, one for each core but the first, at most 8; for texts none."""
    verify: bool = True
    """At the end, load the adapter folder in a fresh process and compare its outputs for a few rows with the trained
    model's. ``peftcli verify`` repeats this later."""
    compare_with_base: bool | Literal["auto"] = "auto"
    """At the end, measure the base model on the evaluation rows too, and report each metric's difference with a 95 %
    interval. auto: if this takes less than a tenth of the run's time so far. The gates ``max_regression`` and, of tasks
    that write no text, ``forgetting`` have it made."""
    measure_forgetting: bool | Literal["auto"] = "auto"
    """At the end, of tasks that write text: measure how much worse the adapter reads 200 texts that ship with peftcli
    than the base model does. auto: as many of them as fit a tenth of the run's time. The gate ``forgetting`` bounds it,
    and has all of them measured."""

    @property
    def rows_at_once(self) -> int:
        """per_device_train_batch_size, once it is a number: see ``train.memory.fit``."""
        assert self.per_device_train_batch_size != "auto"
        return self.per_device_train_batch_size

    @property
    def offloads(self) -> bool:
        """Whether kept activations wait in the CPU's memory."""
        return self.gradient_checkpointing == "offload"


SHARDED = ("fsdp", "hybrid")
"""Values of launch.strategy that divide the base model by FSDP2."""
DIVIDED = (*SHARDED, "zero3")
"""Values of launch.strategy that divide the base model."""
USED_BY = {
    "cpu_offload": DIVIDED,
    "cpu_ram_efficient_loading": DIVIDED,
    "reshard_after_forward": SHARDED,
    "shard_size": ("hybrid",),
    "zero_optimization": ("zero2", "zero3"),
}
"""Setting of launch -> the values of launch.strategy that it is for."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The devices. By default every visible GPU, or one process on the CPU."""

    num_processes: NumberOrAuto = field(default="auto", metadata=AT_LEAST_1 | {"most": 1024})
    """Processes on this machine, one device each."""
    num_machines: int = field(default=1, metadata=AT_LEAST_1 | {"most": 100_000})
    """Number of machines that train together; run the same command on each."""
    machine_rank: int = field(default=0, metadata=AT_LEAST_0)
    """Number of this machine, from 0."""
    main_process_ip: str = "127.0.0.1"
    """Address of machine 0."""
    main_process_port: NumberOrAuto = field(default="auto", metadata=AT_LEAST_1 | {"most": 65535})
    """Port of machine 0. auto: a free port; required with several machines."""
    max_restarts: int = field(default=3, metadata=AT_LEAST_0)
    """Number of times the processes of several machines are restarted when a process or a machine is lost."""
    strategy: Literal["auto", "replicate", "ddp", "fsdp", "hybrid", "zero2", "zero3"] = "replicate"
    """What each process holds of the base model. replicate: all of it. ddp: the same, and PyTorch's DDP adds up the
    gradients. fsdp: a part of each layer, and a whole layer only while it computes. hybrid: the same, divided among the
    processes of a machine, and whole on each machine. zero2: all of it, and a part of the optimizer's state, by
    DeepSpeed. zero3: a part of both. auto: the first of replicate, hybrid and fsdp that fits into memory."""
    shard_size: NumberOrAuto = field(default="auto", metadata={"least": 2, "most": 1024})
    """hybrid: number of processes that divide a base model among them, the same on each machine, of whose processes it
    must be a divisor. auto: those of a machine."""
    cpu_offload: bool = False
    """Keep the base model's parts of fsdp, hybrid and zero3 in the CPU's memory until they are needed."""
    reshard_after_forward: bool = True
    """fsdp and hybrid: free the other processes' parts of a layer after the forward pass, and gather them again for the
    backward pass. false: keep them, which halves the communication and needs memory for all layers at once."""
    cpu_ram_efficient_loading: bool = False
    """fsdp, hybrid and zero3: only the first process, with hybrid the first of each group that divides a base model,
    reads the model's files, and sends the others their parts. false, or if the adapter starts from data: each process
    maps the files, and needs memory for a whole model if they are in another number format."""
    accelerate_config: str | None = None
    """A file of ``accelerate config``: it sets processes, machines, FSDP and DeepSpeed unless this section sets them,
    and the precision if training.bf16 is auto."""
    deepspeed: str | None = None
    """A JSON file with a configuration of DeepSpeed, as in TrainingArguments: it sets strategy, cpu_offload and
    zero_optimization unless this section sets them, and the precision if training.bf16 is auto."""
    zero_optimization: dict[str, Any] = field(default_factory=dict)
    """zero2 and zero3: settings of DeepSpeed's ``zero_optimization`` section, as in {overlap_comm: true}."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    base_model: BaseModel
    """The pretrained model: its name, or a mapping."""
    task: dict[str, Any] | None = None
    """The task: a name, or a mapping with ``type`` and the task's own settings. Without a name or ``type``, the task is
    found from the base model and the data, if they leave one choice. See ``peftcli info tasks``."""
    method: dict[str, Any]
    """The method: ``type`` and the method's own settings, under PEFT's names. See ``peftcli info methods``."""
    dataset: Dataset
    """The training and evaluation data."""
    training: Training
    """The training: duration, learning rate, batches and output."""
    launch: Launch = field(default_factory=Launch)
    """The devices and machines."""
    gates: dict[str, str | bool | dict[str, str]] = field(default_factory=dict)
    """Conditions on the final metrics, as in {eval_loss: "<= 1.2"}, on what was forgotten, as in {forgetting:
    "<= 0.05"}, and ``learnt: true``: the run must show signs of learning. ``max_regression: {against:
    outputs/last/run.json, eval_loss: 2%}`` compares with an earlier run on the same evaluation rows. If one fails, the
    exit code is 12."""
