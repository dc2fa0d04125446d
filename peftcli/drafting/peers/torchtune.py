"""torchtune: a YAML file whose parts name a Python object each, under ``_component_``."""

from __future__ import annotations

from typing import Any

from peftcli.drafting.peers.base import (
    By,
    Draft,
    NotCarried,
    Peer,
    Rule,
    To,
    dataset_of,
    names,
    number,
    quantise,
    reasons,
    truth,
    whole,
)
from peftcli.drafting.peers.preference import preference, refuse_sampling

_MODULES = {"output_proj": "o_proj", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_DATASETS: dict[str, dict[str, Any]] = {
    "alpaca_dataset": {"train": "tatsu-lab/alpaca", "format": "alpaca"},
    "alpaca_cleaned_dataset": {"train": "yahma/alpaca-cleaned", "format": "alpaca"},
    "grammar_dataset": {
        "train": "liweili/c4_200m",
        "format": "alpaca",
        "columns": {"instruction": "input", "output": "output"},
    },
    "samsum_dataset": {
        "train": "Samsung/samsum",
        "format": "alpaca",
        "columns": {"instruction": "dialogue", "output": "summary"},
    },
    "slimorca_dataset": {"train": "Open-Orca/SlimOrca-Dedup", "format": "sharegpt"},
    "cnn_dailymail_articles_dataset": {
        "train": "ccdv/cnn_dailymail",
        "name": "3.0.0",
        "format": "text",
        "columns": {"text": "article"},
    },
    "wikitext_dataset": {
        "train": "EleutherAI/wikitext_document_level",
        "name": "wikitext-103-v1",
        "format": "text",
        "columns": {"text": "page"},
    },
    "stack_exchange_paired_dataset": {
        "train": "lvwerra/stack-exchange-paired",
        "columns": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    },
    "hh_rlhf_helpful_dataset": {"train": "RLHFlow/HH-RLHF-Helpful-standard"},
    "instruct_dataset": {"format": "alpaca"},
    "chat_dataset": {},
    "text_completion_dataset": {"format": "text"},
    "preference_dataset": {},
}
"""torchtune's builder -> its dataset, and our settings of its rows."""
_NOT_MASKED = ("alpaca_dataset", "alpaca_cleaned_dataset")
"""Builders whose prompts are trained unless ``train_on_input`` is false."""


def _precision(value: Any) -> bool:
    found = {"bf16": True, "fp32": False, "bfloat16": True, "float32": False}
    if str(value) not in found:
        raise NotCarried("peftcli computes in bfloat16 or float32")
    return found[str(value)]


def _component(accepted: dict[str, Any], otherwise: str) -> Any:
    def change(value: Any) -> Any:
        name = str(value).rpartition(".")[2]
        if name not in accepted:
            raise NotCarried(otherwise)
        return accepted[name]

    return change


_OPTIMIZERS = {
    "AdamW": "adamw_torch",
    "Adam": "adamw_torch",
    "SGD": "sgd",
    "AdamW8bit": "adamw_8bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "PagedAdamW": "paged_adamw_32bit",
    "PagedAdamW32bit": "paged_adamw_32bit",
    "Adafactor": "adafactor",
}

TABLE: dict[str, Rule] = {
    "model._component_": By("method.type"),
    "model.lora_rank": To("method.r", whole),
    "model.lora_alpha": To("method.lora_alpha", number),
    "model.lora_dropout": To("method.lora_dropout", number),
    "model.use_dora": To("method.use_dora", truth),
    "model.lora_attn_modules": By("method.target_modules"),
    "model.apply_lora_to_mlp": By("method.target_modules"),
    "model.apply_lora_to_output": By("method.target_modules"),
    "model.quantize_base": By("base_model.quantization"),
    "model.*": "the shape of the model, which peftcli reads in the base model's files",
    "tokenizer.max_seq_len": To("dataset.max_length", whole),
    "tokenizer.prompt_template": "torchtune's own template; the base model's is used. See base_model.chat_template",
    "tokenizer.*": "the tokenizer, which peftcli reads in the base model's folder",
    "checkpointer.checkpoint_dir": By("base_model.name"),
    "checkpointer.output_dir": By("training.output_dir"),
    "checkpointer.*": "which files the model has; peftcli finds them in the base model's folder",
    "dataset._component_": By("dataset.train"),
    "dataset.source": By("dataset.train"),
    "dataset.data_files": By("dataset.train"),
    "dataset.data_dir": By("dataset.train"),
    "dataset.split": By("dataset.split"),
    "dataset.name": By("dataset.name"),
    "dataset.subset": By("dataset.name"),
    "dataset.column": By("dataset.columns"),
    "dataset.column_map.*": By("dataset.columns"),
    "dataset.conversation_column": By("dataset.columns"),
    "dataset.conversation_style": By("dataset.format"),
    "dataset.train_on_input": By("dataset.train_on"),
    "dataset.masking_strategy": By("dataset.train_on"),
    "dataset.packed": To("dataset.packing", truth),
    "dataset.max_seq_len": To("dataset.max_length", whole),
    "dataset.new_system_prompt": "a system turn for every row; write it into the rows",
    "dataset.split_across_pack": "peftcli cuts no example to fill a packed row",
    "dataset.filter_fn": "a function that chooses rows, which peftcli does not run",
    "packed": To("dataset.packing", truth),
    "dataset_val.source": By("dataset.eval"),
    "dataset_val.data_files": By("dataset.eval"),
    "dataset_val.split": By("dataset.eval_split"),
    "dataset_val.*": "evaluation rows have the form of the training rows here",
    "run_val_every_n_steps": By("training.eval_steps"),
    "batch_size_val": To("training.per_device_eval_batch_size", whole),
    "seed": To("training.seed", whole),
    "shuffle": By("training.train_sampling_strategy"),
    "batch_size": To("training.per_device_train_batch_size", whole),
    "gradient_accumulation_steps": To("training.gradient_accumulation_steps", whole),
    "epochs": To("training.num_train_epochs", number),
    "max_steps_per_epoch": By("training.max_steps"),
    "optimizer._component_": To(
        "training.optim", _component(_OPTIMIZERS, "peftcli has no such optimizer; adamw_torch is used")
    ),
    "optimizer.lr": To("training.learning_rate", number),
    "optimizer.weight_decay": To("training.weight_decay", number),
    "optimizer.fused": "adamw_torch is fused in any case",
    "optimizer.*": "an argument of the optimizer; write it under training.optim_args",
    "lr_scheduler._component_": To(
        "training.lr_scheduler_type",
        _component({"get_cosine_schedule_with_warmup": "cosine"}, "peftcli has no such schedule"),
    ),
    "lr_scheduler.num_warmup_steps": To("training.warmup_steps", number),
    "lr_scheduler.*": "an argument of the schedule, which peftcli does not take",
    "loss._component_": By("task.type"),
    "loss.beta": To("task.beta", number),
    "loss.label_smoothing": To("task.label_smoothing", number),
    "loss.*": "an argument of the loss, which peftcli does not take",
    "clip_grad_norm": To("training.max_grad_norm", number),
    "compile": To("training.torch_compile", truth),
    "output_dir": To("training.output_dir"),
    "log_every_n_steps": To("training.logging_steps", whole),
    "dtype": To("training.bf16", _precision),
    "enable_activation_checkpointing": To("training.gradient_checkpointing", truth),
    "metric_logger._component_": By("training.report_to"),
    "metric_logger.project": "the project's name is WANDB_PROJECT in the environment",
    "metric_logger.name": To("training.run_name"),
    "metric_logger.*": "where it writes its log; peftcli writes metrics.jsonl into the run folder",
    "device": "peftcli uses every device that is there; see the section launch",
    "save_adapter_weights_only": "peftcli saves the adapter alone in any case; see `peftcli merge`",
    "profiler.*": "measures where time goes; it changes nothing that is learnt",
    "quantizer.*": "how the whole model is stored after the training; see `peftcli merge`",
    "fsdp_reshard_after_forward": To("launch.reshard_after_forward", truth),
    "fsdp_cpu_offload": To("launch.cpu_offload", truth),
    "custom_sharded_layers": "how the model is divided over devices; see launch.strategy",
    **reasons(
        resume="resume_from_checkpoint",
        log="log_peak_memory_stats log_level",
        speed="enable_activation_offloading cudnn_deterministic_mode enable_async_checkpointing",
        infer="save_generations",
    ),
}


def _build(draft: Draft) -> None:
    model = str(draft.get("model._component_", default=""))
    name = model.rpartition(".")[2]
    if not name.startswith(("lora_", "qlora_", "dora_", "qdora_")):
        draft.refuse_full(f"model._component_: {model or 'not set'}")
    draft.put("method.type", "lora", "model._component_")
    if "dora" in name:
        draft.put("method.use_dora", True, "model._component_")
    if name.startswith("q") or truth(draft.get("model.quantize_base", default=False)):
        quantise(draft, "nf4", "model._component_" if name.startswith("q") else "model.quantize_base")
    folder = draft.get("checkpointer.checkpoint_dir")
    if folder is not None:
        draft.put("base_model.name", draft.path(str(folder).rstrip("/")), "checkpointer.checkpoint_dir")
    _targets(draft)
    _task(draft)
    _data(draft)
    _steps(draft)


def _targets(draft: Draft) -> None:
    attention = draft.get("model.lora_attn_modules")
    found = [_MODULES.get(each, each) for each in names(attention or ["q_proj", "v_proj"])]
    if truth(draft.get("model.apply_lora_to_mlp", default=False)):
        found += ["gate_proj", "up_proj", "down_proj"]
    if truth(draft.get("model.apply_lora_to_output", default=False)):
        found.append("lm_head")
    source = [
        key
        for key in ("model.lora_attn_modules", "model.apply_lora_to_mlp", "model.apply_lora_to_output")
        if draft.get(key) is not None
    ]
    draft.say(
        "method.target_modules",
        list(dict.fromkeys(found)),
        f"from: {', '.join(source)}" if source else "torchtune's default: q_proj, v_proj",
    )


def _task(draft: Draft) -> None:
    loss = str(draft.get("loss._component_", default="")).rpartition(".")[2]
    if "PPO" in loss or "GRPO" in loss:
        refuse_sampling(draft, f"loss._component_: {loss}")
    if loss == "DPOLoss":
        preference(draft, "dpo", "loss._component_", beta=0.1)
    elif loss in ("RSOLoss", "IPOLoss", "SimPOLoss"):
        draft.refuse(f"loss._component_: {loss} cannot be imported", "It imports DPOLoss and losses of tokens.")
    else:
        draft.say(
            "task.type",
            "causal_lm",
            f"from: loss._component_ ({loss}: the loss of tokens)" if loss else "torchtune: supervised training",
        )


def _data(draft: Draft) -> None:
    if draft.entries("dataset"):
        hint = "Import it with one of them, and name the others under dataset.mix."
        draft.refuse("dataset: a list of datasets cannot be imported", hint)
    given = draft.section("dataset")
    builder = str(given.get("_component_", "")).rpartition(".")[2]
    compared = draft.settings["task.type"].value == "preference"
    if builder not in _DATASETS:
        draft.drop("dataset._component_", "a builder of rows that this importer does not know; the columns decide")
    known = dict(_DATASETS.get(builder, {}))
    source = given.get("source")
    found = dataset_of(draft, source, given.get("data_files"), "dataset.data_files")
    if found in ("json", "csv", "parquet", "text"):
        draft.drop("dataset.source", "a kind of file without data_files")
    elif found is not None:
        known["train"] = found
    known["columns"] = _columns(known, given, builder)
    style = given.get("conversation_style")
    if builder == "chat_dataset" and style is not None:
        known["format"] = "sharegpt" if str(style) == "sharegpt" else "messages"
    draft.add_source(
        "dataset",
        train=draft.path(known.pop("train")) if "train" in known else None,
        split=given.get("split"),
        **known | {"name": given.get("name") or given.get("subset") or known.get("name")},
    )
    validation = draft.get("dataset_val.data_files", "dataset_val.source")
    if validation is not None:
        draft.put("dataset.eval", draft.path(names(validation)[0]), "dataset_val")
    if draft.get("dataset_val.split") is not None:
        draft.put("dataset.eval_split", draft.get("dataset_val.split"), "dataset_val.split")
    if compared:
        return
    whole_text = draft.get("dataset.train_on_input")
    strategy = str(draft.get("dataset.masking_strategy", default=""))
    if whole_text is not None or strategy:
        everything = truth(whole_text) if whole_text is not None else strategy == "train_on_all"
        kind = "all" if everything else "last_answer" if strategy == "train_on_last" else "answers"
        draft.put("dataset.train_on", kind, "dataset.masking_strategy" if strategy else "dataset.train_on_input")
    else:
        draft.say(
            "dataset.train_on", "all" if builder in _NOT_MASKED else "answers", f"torchtune's default of {builder}"
        )


def _columns(known: dict[str, Any], given: dict[str, Any], builder: str) -> dict[str, str]:
    columns = dict(known.get("columns", {}))
    mapped = {key.partition(".")[2]: value for key, value in given.items() if key.startswith("column_map.")}
    if builder in ("alpaca_dataset", "alpaca_cleaned_dataset"):
        columns |= mapped
    elif builder == "instruct_dataset":
        columns = {"instruction": mapped.get("input", "input"), "output": mapped.get("output", "output")}
    elif mapped:
        columns |= mapped
    if given.get("column"):
        columns["text"] = given["column"]
    if given.get("conversation_column"):
        sharegpt = str(given.get("conversation_style", "")) == "sharegpt"
        columns["conversations" if sharegpt else "messages"] = given["conversation_column"]
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs}


def _steps(draft: Draft) -> None:
    limit, epochs = draft.get("max_steps_per_epoch"), number(draft.get("epochs", default=1))
    if limit is not None:
        draft.put("training.max_steps", int(number(limit) * epochs), "max_steps_per_epoch, times epochs")
    if (every := draft.get("run_val_every_n_steps")) is not None:
        draft.put("training.eval_steps", whole(every), "run_val_every_n_steps")
        draft.put("training.eval_strategy", "steps", "run_val_every_n_steps")
    if draft.get("shuffle") is not None and not truth(draft.get("shuffle")):
        draft.put("training.train_sampling_strategy", "sequential", "shuffle")
    logger = str(draft.get("metric_logger._component_", default="")).rpartition(".")[2]
    tracker = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}.get(logger)
    if tracker:
        draft.put("training.report_to", [tracker], "metric_logger._component_")
    elif logger:
        draft.carried["metric_logger._component_"] = "metrics.jsonl in the run folder, in any case"
    if draft.get("checkpointer.output_dir") and "training.output_dir" not in draft.settings:
        draft.put("training.output_dir", draft.get("checkpointer.output_dir"), "checkpointer.output_dir")
    elif "checkpointer.output_dir" in draft.carried:
        draft.drop(
            "checkpointer.output_dir", "peftcli writes the adapter and its logs into one folder, training.output_dir"
        )
    if "training.output_dir" not in draft.settings:
        draft.say("training.output_dir", "outputs/torchtune", "the file names no folder")
    if "dataset.max_length" not in draft.settings:
        draft.drop("tokenizer.max_seq_len", "without it torchtune cuts no row; peftcli takes dataset.max_length: 1024")
    if "training.weight_decay" not in draft.settings:
        optimizer = str(draft.get("optimizer._component_", default="")).rpartition(".")[2]
        draft.say("training.weight_decay", 0.01 if "AdamW" in optimizer else 0.0, f"default of {optimizer}")
    if "training.max_grad_norm" not in draft.settings:
        draft.say("training.max_grad_norm", 0, "torchtune's default: no clipping")


PEER = Peer(
    name="torchtune",
    label="torchtune",
    table=TABLE,
    signs=("*._component_",),
    build=_build,
    defaults={
        "method.r": 8,
        "method.lora_alpha": 16,
        "method.lora_dropout": 0.0,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.num_train_epochs": 1,
        "training.lr_scheduler_type": "constant",
        "training.eval_strategy": "no",
        "training.logging_steps": 1,
    },
)
