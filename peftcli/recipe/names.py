"""Suggestions for unknown names: other tools' spellings of our keys, and similar names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from peftcli.system.outputs import expand_user

_OTHER_TOOLS = {
    "base_model": (
        "model model_name model_id model_path checkpoint_dir model_name_or_path base_model_name_or_path "
        "pretrained_model_name_or_path"
    ),
    "base_model.revision": "model_revision revision_of_model",
    "base_model.dtype": "torch_dtype model_dtype",
    "base_model.attn_implementation": "attn_impl flash_attn flash_attention use_flash_attention_2 xformers_attention",
    "base_model.quantization": (
        "load_in_4bit load_in_8bit quantize quantization_bit quant_bits quantization_config bnb_4bit_quant_type "
        "bnb_4bit_use_double_quant bnb_4bit_compute_dtype use_bnb_nested_quant"
    ),
    "base_model.name": (
        "base_model.path base_model.model base_model.model_name base_model.model_id base_model.model_path "
        "base_model.model_name_or_path base_model.base_model_name_or_path base_model.pretrained_model_name_or_path"
    ),
    "base_model.chat_template": "template chat_template_path chat_template_jinja chat_template_file",
    "base_model.new_tokens": "tokens add_tokens add_special_tokens new_special_tokens",
    "task": "task_type lora_task_type",
    "task.labels": "num_labels id2label label2id",
    "task.loss": "pref_loss rlhf_type rl",
    "task.beta": "pref_beta rl_beta dpo_beta",
    "method.type": (
        "adapter peft_type finetuning_type fine_tune_type peft_method train_type tuner_type sft_type training_type"
    ),
    "method.r": "lora_r lora_rank rank",
    "method.lora_alpha": "alpha",
    "method.lora_dropout": "dropout",
    "method.target_modules": "lora_target lora_target_modules lora_target_linear",
    "method.modules_to_save": "lora_modules_to_save additional_target",
    "method.bias": "lora_bias",
    "method.use_rslora": "use_rs_lora peft_use_rslora",
    "method.layers_to_transform": "peft_layers_to_transform",
    "method.init_lora_weights": "peft_init_lora_weights",
    "method.num_virtual_tokens": "prompt_length n_tokens",
    "dataset.train": (
        "data dataset.path dataset.file dataset.files data_path data_file data_files dataset_path "
        "dataset_name train_file train_files train_data train_dataset pretraining_dataset"
    ),
    "dataset.mix": (
        "datasets dataset_mixer dataset_mixture dataset_mixer_list mix_strategy interleave_probs probs probabilities"
    ),
    "dataset.name": "dataset_config dataset_config_name subset",
    "dataset.revision": "dataset_revision",
    "dataset.format": "dataset.type formatting",
    "dataset.columns": "column_mapping dataset_text_field text_column prompt_column response_column field_messages",
    "dataset.streaming": "dataset_streaming",
    "dataset.eval": "val_dataset eval_file eval_data eval_dataset test_datasets validation_file",
    "dataset.eval_fraction": "split_dataset_ratio val_size val_set_size test_size test_split_size",
    "dataset.eval_split": "test_split dataset_test_split eval_dataset_split validation_split",
    "dataset.split": "dataset_train_split dataset_splits train_split",
    "dataset.max_length": "sequence_len sequence_length cutoff_len max_seq_length max_seq_len model_max_length",
    "dataset.limit": "max_samples max_train_samples num_samples",
    "dataset.overlong": "excess_length_strategy truncation_mode truncation_strategy",
    "dataset.packing": "pack packed sample_packing packing_strategy packed_sequences neat_packing padding_free",
    "dataset.train_on": (
        "train_on_inputs train_on_input train_on_prompt mask_prompt roles_to_train train_on_responses_only loss_scale "
        "assistant_only_loss completion_only_loss"
    ),
    "dataset.train_on: last_answer": "mask_history",
    "training.output_dir": "output save_dir out_dir adapter_path",
    "training.init_adapter_from": "adapter_name_or_path lora_model_dir resume_adapter_file",
    "training.num_train_epochs": "epochs num_epochs",
    "training.max_steps": "iters max_iters",
    "training.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size",
    "training.per_device_eval_batch_size": "eval_batch_size",
    "training.gradient_accumulation_steps": "grad_accumulation_steps accumulation_steps",
    "training.learning_rate": "lr",
    "training.lr_scheduler_type": "lr_scheduler scheduler",
    "training.optim": "optimizer",
    "training.warmup_steps": "warmup warmup_iters num_warmup_steps",
    "training.max_grad_norm": "gradient_clipping max_norm clip_grad",
    "training.gradient_checkpointing": "grad_checkpoint use_gradient_checkpointing",
    "training.torch_compile": "compile",
    "training.bf16": "fp16 precision mixed_precision",
    "training.use_liger_kernel": "enable_liger_kernel",
    "training.train_sampling_strategy: group_by_length": "group_by_length",
    "training.seed": "random_state random_seed",
    "training.eval_strategy": "evaluation_strategy do_eval",
    "training.eval_steps": "steps_per_eval evals_per_epoch",
    "training.save_steps": "save_every saves_per_epoch",
    "training.logging_steps": "log_every steps_per_report",
    "training.dataloader_num_workers": "num_workers",
    "launch.strategy": "fsdp fsdp_config",
    "launch.deepspeed": "deepspeed_config deepspeed_config_file",
    "launch.num_processes": "devices num_gpus nproc_per_node",
    "launch.num_machines": "num_nodes nnodes",
    "launch.machine_rank": "node_rank",
    "launch.main_process_ip": "master_addr",
    "launch.main_process_port": "master_port",
}
"""Our key, or our key and value -> what axolotl, LLaMA-Factory, TRL, unsloth and others call it, some with their own
section. They are suggested, never accepted."""
ALIASES = {theirs: ours for ours, names in _OTHER_TOOLS.items() for theirs in names.split()}

SAME = {"training": {"activation_checkpointing": "gradient_checkpointing"}}
"""Section -> another spelling that is read too -> our key: transformers 6 has renamed it."""

_REMEDIES = {
    "leave it out": (
        "do_train do_predict save_only_model logging_first_step plot_loss ddp_timeout ddp_find_unused_parameters "
        "pad_to_sequence_len remove_unused_columns"
    ),
    "leave it out: it is found from the layers": "lora_fan_in_fan_out fan_in_fan_out",
    "leave it out: the base model's tokenizer knows its tokens": "special_tokens eos_token pad_token bos_token",
    "give --overwrite on the command line": "overwrite_output_dir overwrite_output",
    "leave it out: a run resumes by itself; see --resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "run `peftcli push` after the training": "push_to_hub hub_model_id",
    "set training.report_to: [wandb], and WANDB_PROJECT in the environment": "wandb_project use_wandb",
}
"""What to do -> keys of other tools that are no setting here."""
REMEDIES = {theirs: remedy for remedy, names in _REMEDIES.items() for theirs in names.split()}

_OTHER_TASKS = {
    "causal_lm": "text_generation sft pt clm",
    "seq2seq_lm": "text2text_generation translation summarization",
    "sequence_classification": "text_classification",
    "token_classification": "ner",
    "feature_extraction": "sentence_similarity",
    "reranker": "cross_encoder text_ranking rerank",
    "preference.loss: dpo": "dpo",
    "preference.loss: ipo": "ipo",
    "preference.loss: orpo": "orpo",
    "preference.loss: simpo": "simpo",
    "preference.loss: kto": "kto",
    "reward": "rm reward_modeling",
    "semantic_segmentation": "image_segmentation",
    "speech_recognition": "automatic_speech_recognition asr",
}
"""Our task, or one of its settings with a value -> what the hub and other tools call it. They are suggested, too."""
TASK_ALIASES = {theirs: ours for ours, names in _OTHER_TASKS.items() for theirs in names.split()}

METHOD_ALIASES = {"qlora": "{type: lora} with base_model.quantization: nf4"}
"""Other tools' method -> the recipe that does the same."""

_OTHER_VALUES = {
    "float32": "fp32 float",
    "bfloat16": "bf16",
    "float16": "fp16 half",
    "flash_attention_2": "flash_attn flash_attention fa2",
    "nf4": "4bit",
    "int8": "8bit",
    "messages": "chat openai chat_template conversational",
    "prompt_completion": "completion input_output",
    "alpaca": "instruction",
    "text": "pretrain pretraining",
    "error": "raise fail stop",
    "skip": "ignore continue",
    "truncate": "cut truncation keep_start",
    "drop": "filter remove discard",
    "split": "chunk wrap wrapped",
    "answers": "assistant completions response responses",
    "last_answer": "last last_turn",
    "all": "everything full",
}
"""Our value -> theirs, for settings that accept ours."""
VALUES = {theirs: ours for ours, names in _OTHER_VALUES.items() for theirs in names.split()}

_MAX_FILES = 2000


def find_alias(name: str, section: str) -> str | None:
    """Return our key for another tool's spelling in a section, with ``: value`` if theirs means one value of it."""
    spelled = _normalise(name)
    return ALIASES.get(f"{section}.{spelled}") or ALIASES.get(spelled)


def find_task_alias(name: str) -> str | None:
    """Return our task for another tool's name, with ``.setting: value`` if theirs means one value of a setting."""
    return TASK_ALIASES.get(_normalise(name))


def suggest_task(name: str, tasks: Iterable[str]) -> str | None:
    """Return the task that another tool calls ``name``, as a recipe gives it, or a similar one."""
    task, _, setting = (find_task_alias(name) or "").partition(".")
    return f"{{type: {task}, {setting}}}" if setting else task or closest(name, tasks)


def suggest_value(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that another tool calls ``text``, or that ``text`` resembles."""
    found = VALUES.get(_normalise(text))
    return found if found in choices else closest(text, choices)


def _normalise(name: str) -> str:
    return name.lower().replace("-", "_")


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name most similar to ``name``, or None."""
    if len(name) > 100:
        return None
    candidates = list(known)
    folded = {candidate.lower(): candidate for candidate in reversed(candidates)}
    spelled = _normalise(name)
    found = difflib.get_close_matches(spelled, list(folded), 3, cutoff)
    found.sort(key=lambda each: sorted(each) != sorted(spelled))  # letters in another order first, as lroa for lora
    return folded[found[0]] if found else None


def closest_file(path: str) -> str | None:
    """Return a file with a similar name in the same folder, or None."""
    folder = expand_user(Path(path)).parent
    try:
        names = [entry.name for entry, _ in zip(folder.iterdir(), range(_MAX_FILES), strict=False)]
    except (OSError, ValueError):
        return None
    own = Path(path).name  # a broken link has this name, and is no suggestion
    found = difflib.get_close_matches(own[:100], sorted(set(names) - {own}), 1, 0.7)
    return str(folder / found[0]) if found else None
