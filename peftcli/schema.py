"""The recipe: frozen dataclasses. The docstring below a field is its only help text."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

NumberOrAuto = int | Literal["auto"]
Format = Literal["auto", "text", "prompt_completion", "messages", "alpaca", "sharegpt"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the frozen weights of the base model's linear layers are stored. Embeddings, norms and head stay as they are.

    Adapter weights are float32 in any case.
    """

    type: Literal["nf4", "fp4", "int8", "int8_weight_only", "int4_weight_only"]
    """nf4: 4 bits, for weights that are spread like a bell curve (QLoRA's); fp4: 4-bit floats; int8: 8 bits, and inputs
    are rounded to 8 bits too; those are bitsandbytes'. int8_weight_only, int4_weight_only: torchao's; int4 takes the
    memory of int8, since torchao's packed weights pass no gradients."""
    double_quant: bool = False
    """nf4 and fp4: quantise the scales too, 0.4 bits a weight less."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """nf4 and fp4: number format that weights are unpacked to and multiplied in. auto: that of the other weights."""
    group_size: int | None = None
    """int4_weight_only: so many weights share a scale; it must divide every layer's width. Unset: 32."""


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """The pretrained model that the adapter is trained on."""

    name: str
    """Hub id, folder, or .gguf file (needs the extra ``gguf``)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen weights. auto: bfloat16 where training.bf16 holds, else float32."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    """How attention is computed. Unset: transformers' choice for the model."""
    quantization: Quantization | None = None
    """Store the frozen linear weights in fewer bits: a type alone, as nf4, or a mapping. Unset: as the model stores
    them. Needs the extra ``bitsandbytes`` or ``torchao``."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: ``chatml``, or a .jinja file. It is saved beside the adapter."""
    new_tokens: list[str] = field(default_factory=list)
    """Special tokens to add to the vocabulary. The embedding grows by a row each; those rows are trained and saved."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository carries. Needs a pinned ``revision``."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of the datasets of ``dataset.mix``. Format and columns that it does not give are those of ``dataset``."""

    train: str
    """File, folder of files, or hub dataset id."""
    weight: float | None = None
    """Its share of the examples of an epoch, relative to the others' weights: all datasets of a mix have one, or none.
    Unset: as many as it has."""
    name: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset."""
    streaming: bool = False
    """Fetch the rows of a hub dataset as they are read, instead of downloading its files first."""
    format: Format = "auto"
    """What its rows hold. auto: what dataset.format says."""
    columns: dict[str, str] = field(default_factory=dict)
    """Its columns under other names. None: what dataset.columns says."""
    limit: int | None = None
    """Use only its first so many rows."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is trained on, and what is measured on."""

    train: str | None = None
    """File (.jsonl, .json, .csv, .parquet, each also as .gz or .zst), folder of such files, or hub dataset id."""
    mix: list[Source] = field(default_factory=list)
    """Instead of ``train``: several datasets, each with a weight, as in
    [{train: a.jsonl, weight: 3}, {train: b.jsonl, weight: 1}], or as they are, as in [a.jsonl, b.jsonl]."""
    eval: str | None = None
    """File, folder or hub dataset to evaluate on."""
    eval_fraction: float | None = None
    """Instead of ``eval``: this share of the training rows, chosen by training.seed, is held out."""
    name: str | None = None
    """Configuration of a hub dataset."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset to train on."""
    eval_split: str | None = None
    """Split of the same hub dataset to evaluate on."""
    streaming: bool = False
    """Fetch the rows of a hub dataset as they are read, instead of downloading its files first; with ``limit``, no more
    of it is fetched."""
    format: Format = "auto"
    """What a row holds. auto: found from the columns. text: {text}; prompt_completion: {prompt, completion};
    messages: {messages: [{role, content}]}; alpaca: {instruction, input, output};
    sharegpt: {conversations: [{from, value}]}."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns under other names: the format's name -> the file's name, as in {prompt: question}."""
    max_length: int = 1024
    """Longest example, in tokens."""
    overlong: Literal["truncate", "drop", "error", "split"] = "truncate"
    """What happens to a longer example: cut at the end, left out, refused, or split into pieces that are trained one by
    one. Always counted."""
    packing: bool = False
    """Fill each row of a batch with several examples, up to max_length. They do not see each other: attention stays
    within an example. per_device_train_batch_size then counts such rows."""
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    """Which tokens count in the loss. answers: what the assistant says, and its end-of-turn token."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What happens at a row that cannot be used: stop, or go on without it. Skipped rows are counted and listed."""
    allow: list[str] = field(default_factory=list)
    """Findings of ``peftcli inspect`` that would stop the run, and shall not: their names."""
    limit: int | None = None
    """Use only the first so many training rows."""

    def sources(self) -> list[Source]:
        """What is trained on: the datasets of ``mix``, or the one of ``train``."""
        if not self.mix:
            names = ("name", "revision", "split", "streaming", "format", "columns", "limit")
            return [Source(train=self.train or "", **{name: getattr(self, name) for name in names})]
        return [
            replace(
                source,
                format=self.format if source.format == "auto" else source.format,
                columns=source.columns or self.columns,
            )
            for source in self.mix
        ]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How long, how fast, and where to. Names are those of transformers.TrainingArguments."""

    output_dir: str
    """The run folder: adapter, logs and checkpoints."""
    num_train_epochs: float = 3.0
    """Passes over the training data."""
    max_steps: int = -1
    """Stop after so many steps instead; -1: num_train_epochs decides."""
    per_device_train_batch_size: int = 8
    """Examples that one device holds at once. More is faster and takes more memory."""
    per_device_eval_batch_size: int = 8
    """The same, while evaluating."""
    gradient_accumulation_steps: int = 1
    """Micro-batches that make one step. The result equals that of one big batch."""
    learning_rate: float = 2e-4
    """Peak step size. 1e-4 to 3e-4 suits LoRA; prompt tuning wants 100 times more."""
    loraplus_lr_ratio: float | None = None
    """LoRA+ (https://arxiv.org/abs/2402.12354): LoRA's B learns at so many times learning_rate; 2 to 16 is usual.
    Unset: at the same rate."""
    loraplus_lr_embedding: float = 1e-6
    """With loraplus_lr_ratio: the learning rate of LoRA on embeddings."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "linear"
    )
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    warmup_steps: int = 0
    """The same as a number of steps; overrides warmup_ratio when above 0."""
    weight_decay: float = 0.0
    """AdamW's decay of the trained weights."""
    adam_beta1: float = 0.9
    """AdamW's memory of past gradients."""
    adam_beta2: float = 0.999
    """AdamW's memory of past squared gradients."""
    adam_epsilon: float = 1e-8
    """AdamW's floor of the divisor."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0: never."""
    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16. auto: where the device is fast at it. The adapter stays float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about a third slower, far less memory for long examples."""
    train_sampling_strategy: Literal["random", "group_by_length", "sequential"] = "random"
    """Order of the examples. group_by_length puts similar lengths together, which saves padding."""
    seed: int = 42
    """Seed of initialisation, order and dropout. The same seed gives the same adapter."""
    eval_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to evaluate, if there is evaluation data. It is done at the end in any case, unless ``no``."""
    eval_on_start: bool = False
    """Evaluate before the first step too: what the base model does."""
    eval_steps: int = 100
    """With eval_strategy steps: how often."""
    save_strategy: Literal["no", "steps", "epoch"] = "epoch"
    """When to write a checkpoint that training can resume from."""
    save_steps: int = 100
    """With save_strategy steps: how often."""
    save_total_limit: int = 2
    """How many checkpoints are kept, the newest; at least 2."""
    max_time: str | None = None
    """Stop with a checkpoint once so much time has gone by since the start of the command, as in 3h30m or 90s; the same
    command then goes on. What the step under way and the checkpoint take comes on top."""
    save_on_signal: Literal["SIGUSR1", "SIGUSR2"] | None = "SIGUSR2"
    """At this signal a checkpoint is written and training goes on: for the notice that a spot machine or a scheduler
    gives. null: at none. INT, TERM and USR1, unless it is named here, stop with a checkpoint."""
    load_best_model_at_end: bool = False
    """Keep the adapter of the best evaluation instead of the last one."""
    metric_for_best_model: str = "eval_loss"
    """Which metric is best: the name of a metric as evaluation reports it."""
    greater_is_better: bool | None = None
    """Whether more of it is better. Unset: yes, unless the name ends in loss or perplexity."""
    logging_steps: int = 10
    """How often a line is written to metrics.jsonl and shown."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """On which devices. By default every visible GPU, or one process on the CPU."""

    num_processes: NumberOrAuto = "auto"
    """Processes on this machine, one device each."""
    num_machines: int = 1
    """Machines that train together; the same command runs on each."""
    machine_rank: int = 0
    """Which of them this is, from 0."""
    main_process_ip: str = "127.0.0.1"
    """Address of machine 0."""
    main_process_port: NumberOrAuto = "auto"
    """Port of machine 0. auto: a free one; with several machines it must be given."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run."""

    base_model: BaseModel
    """The pretrained model: its name, or a mapping."""
    task: dict[str, Any] | None = None
    """What the model does: a task's name, or ``type`` and the task's own settings. Unset: found from the base model and
    the data, where one choice is left. See ``peftcli info tasks``."""
    method: dict[str, Any]
    """How it is adapted: ``type`` and the method's own settings, under PEFT's names. See ``peftcli info methods``."""
    dataset: Dataset
    """What it learns from."""
    training: Training
    """How it learns."""
    launch: Launch = field(default_factory=Launch)
    """Where it runs."""
    gates: dict[str, str] = field(default_factory=dict)
    """Metrics that must hold at the end, as in {eval_loss: "<= 1.2"}; else exit code 12."""
