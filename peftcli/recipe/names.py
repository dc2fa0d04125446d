"""Names that are meant: other tools' spellings of our keys, and near names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

ALIASES = {
    # axolotl, LLaMA-Factory, TRL, unsloth and others: their key -> ours. Suggested, never accepted.
    "model": "base_model",
    "model_name": "base_model",
    "model_id": "base_model",
    "model_path": "base_model",
    "model_name_or_path": "base_model",
    "base_model_name_or_path": "base_model",
    "pretrained_model_name_or_path": "base_model",
    "model_revision": "base_model.revision",
    "revision_of_model": "base_model.revision",
    "torch_dtype": "base_model.dtype",
    "model_dtype": "base_model.dtype",
    "attn_impl": "base_model.attn_implementation",
    "flash_attn": "base_model.attn_implementation",
    "flash_attention": "base_model.attn_implementation",
    "use_flash_attention_2": "base_model.attn_implementation",
    "load_in_4bit": "base_model.quantization",
    "load_in_8bit": "base_model.quantization",
    "quantization_bit": "base_model.quantization",
    "quantization_config": "base_model.quantization",
    "bnb_4bit_quant_type": "base_model.quantization",
    "bnb_4bit_use_double_quant": "base_model.quantization",
    "bnb_4bit_compute_dtype": "base_model.quantization",
    "use_bnb_nested_quant": "base_model.quantization",
    "task_type": "task",
    "adapter": "method.type",
    "peft_type": "method.type",
    "finetuning_type": "method.type",
    "fine_tune_type": "method.type",
    "peft_method": "method.type",
    "lora_r": "method.r",
    "lora_rank": "method.r",
    "rank": "method.r",
    "alpha": "method.lora_alpha",
    "dropout": "method.lora_dropout",
    "lora_target": "method.target_modules",
    "lora_target_modules": "method.target_modules",
    "lora_target_linear": "method.target_modules",
    "lora_modules_to_save": "method.modules_to_save",
    "additional_target": "method.modules_to_save",
    "lora_bias": "method.bias",
    "use_rs_lora": "method.use_rslora",
    "peft_use_rslora": "method.use_rslora",
    "peft_layers_to_transform": "method.layers_to_transform",
    "peft_init_lora_weights": "method.init_lora_weights",
    "prompt_length": "method.num_virtual_tokens",
    "n_tokens": "method.num_virtual_tokens",
    "data": "dataset.train",
    "datasets": "dataset.train",
    "data_path": "dataset.train",
    "dataset_path": "dataset.train",
    "dataset_name": "dataset.train",
    "train_file": "dataset.train",
    "train_data": "dataset.train",
    "train_dataset": "dataset.train",
    "dataset_config": "dataset.name",
    "eval_file": "dataset.eval",
    "eval_data": "dataset.eval",
    "eval_dataset": "dataset.eval",
    "test_datasets": "dataset.eval",
    "validation_file": "dataset.eval",
    "val_size": "dataset.eval_fraction",
    "val_set_size": "dataset.eval_fraction",
    "test_split": "dataset.eval_split",
    "dataset_test_split": "dataset.eval_split",
    "dataset_train_split": "dataset.split",
    "sequence_len": "dataset.max_length",
    "sequence_length": "dataset.max_length",
    "cutoff_len": "dataset.max_length",
    "max_seq_length": "dataset.max_length",
    "max_seq_len": "dataset.max_length",
    "model_max_length": "dataset.max_length",
    "max_samples": "dataset.limit",
    "train_on_inputs": "dataset.train_on",
    "train_on_prompt": "dataset.train_on",
    "mask_prompt": "dataset.train_on",
    "assistant_only_loss": "dataset.train_on",
    "completion_only_loss": "dataset.train_on",
    "output": "training.output_dir",
    "save_dir": "training.output_dir",
    "out_dir": "training.output_dir",
    "adapter_path": "training.output_dir",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "iters": "training.max_steps",
    "max_iters": "training.max_steps",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "train_batch_size": "training.per_device_train_batch_size",
    "eval_batch_size": "training.per_device_eval_batch_size",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "accumulation_steps": "training.gradient_accumulation_steps",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "scheduler": "training.lr_scheduler_type",
    "warmup": "training.warmup_steps",
    "warmup_iters": "training.warmup_steps",
    "gradient_clipping": "training.max_grad_norm",
    "max_norm": "training.max_grad_norm",
    "clip_grad": "training.max_grad_norm",
    "grad_checkpoint": "training.gradient_checkpointing",
    "use_gradient_checkpointing": "training.gradient_checkpointing",
    "group_by_length": "training.train_sampling_strategy",
    "random_state": "training.seed",
    "random_seed": "training.seed",
    "evaluation_strategy": "training.eval_strategy",
    "steps_per_eval": "training.eval_steps",
    "save_every": "training.save_steps",
    "log_every": "training.logging_steps",
    "steps_per_report": "training.logging_steps",
    "num_gpus": "launch.num_processes",
    "nproc_per_node": "launch.num_processes",
    "num_nodes": "launch.num_machines",
    "nnodes": "launch.num_machines",
    "node_rank": "launch.machine_rank",
    "master_addr": "launch.main_process_ip",
    "master_port": "launch.main_process_port",
}

_MAX_FILES = 2000


def alias_of(name: str) -> str | None:
    """Our key for another tool's spelling."""
    return ALIASES.get(name.lower().replace("-", "_"))


def near(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that ``name`` most resembles, if any does."""
    if len(name) > 100:
        return None
    candidates = list(known)
    folded = {candidate.lower(): candidate for candidate in reversed(candidates)}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), list(folded), 1, cutoff)
    return folded[found[0]] if found else None


def near_file(path: str) -> str | None:
    """A file beside ``path`` with a similar name."""
    folder = Path(path).parent
    try:
        names = [entry.name for entry, _ in zip(folder.iterdir(), range(_MAX_FILES), strict=False)]
    except (OSError, ValueError):
        return None
    found = difflib.get_close_matches(Path(path).name[:100], sorted(names), 1, 0.7)
    return str(folder / found[0]) if found else None
