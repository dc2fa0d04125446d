"""unsloth: the YAML file and options of its command, and the calls of a notebook or script, which is never executed."""

from __future__ import annotations

from typing import Any

from peftcli.drafting.peers.base import (
    COMMAND,
    By,
    Draft,
    Peer,
    Rule,
    Setting,
    To,
    bits_of,
    dataset_of,
    first_columns,
    modules,
    names,
    needless,
    number,
    reasons,
    truth,
    whole,
)
from peftcli.drafting.peers.preference import preference, refuse_sampling
from peftcli.drafting.peers.training_arguments import DEFAULTS, LORA, attention, checkpointing
from peftcli.drafting.peers.training_arguments import TABLE as ARGUMENTS

_TRAINERS = ("SFT", "DPO", "KTO", "ORPO", "CPO", "Reward", "GRPO", "Unsloth")
_SECTIONS = (
    *("data", "training", "lora", "logging"),
    *("from_pretrained", "get_peft_model", "load_dataset", "get_chat_template", "train_on_responses_only"),
    *("TrainingArguments", "UnslothTrainingArguments", "LoraConfig"),
    *(f"{name}{kind}" for name in _TRAINERS for kind in ("Trainer", "Config")),
)
"""Sections of the YAML file, and calls of a program."""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

_OWN: dict[str, Rule] = {
    **LORA,
    COMMAND: By("task.type"),
    "model": To("base_model.name"),
    "model_name": To("base_model.name"),
    "revision": To("base_model.revision"),
    "dtype": To("base_model.dtype", lambda value: None if str(value) in ("None", "auto") else value),
    "load_in_4bit": By("base_model.quantization"),
    "load_in_8bit": By("base_model.quantization"),
    "load_in_16bit": "the base model is in 16 bits where the device is fast with them; see training.bf16",
    "full_finetuning": By("method.type"),
    "training_type": By("method.type"),
    "r": To("method.r", whole),
    "lora_r": To("method.r", whole),
    "bias": To("method.bias"),
    "target_modules": To("method.target_modules", modules),
    "modules_to_save": To("method.modules_to_save", names),
    "layers_to_transform": To("method.layers_to_transform"),
    "init_lora_weights": To("method.init_lora_weights"),
    "loftq_config": "a start for quantised weights; see method.init_lora_weights: loftq",
    "loftq_config.*": "a start for quantised weights; see method.init_lora_weights: loftq",
    "use_loftq": "a start for quantised weights; see method.init_lora_weights: loftq",
    "use_gradient_checkpointing": To("training.gradient_checkpointing", checkpointing),
    "max_seq_length": To("dataset.max_length", whole),
    "max_length": To("dataset.max_length", whole),
    "dataset": By("dataset.train"),
    "local_dataset": By("dataset.train"),
    "format_type": By("dataset.format"),
    "path": By("dataset.train"),
    "data_files": By("dataset.train"),
    "name": By("dataset.name"),
    "split": By("dataset.split"),
    "dataset_text_field": By("dataset.columns"),
    "packing": By("dataset.packing"),
    "train_on_completions": By("dataset.train_on"),
    "instruction_part": By("dataset.train_on"),
    "response_part": By("dataset.train_on"),
    "beta": By("task.beta"),
    "chat_template": "unsloth's own name of a template; the base model's own is used. See base_model.chat_template",
    "mapping.*": "names of a turn's parts; peftcli reads from and value, or role and content",
    "num_epochs": To("training.num_train_epochs", number),
    "batch_size": To("training.per_device_train_batch_size", whole),
    "random_seed": To("training.seed", whole),
    "enable_wandb": By("training.report_to"),
    "enable_tensorboard": By("training.report_to"),
    "wandb_project": "the project's name is WANDB_PROJECT in the environment",
    "trust_remote_code": "runs the model's own code; see base_model.trust_remote_code",
    "attn_implementation": To("base_model.attn_implementation", attention),
    "dataset_kwargs": "arguments of TRL's own preparation of rows",
    "dataset_kwargs.*": "arguments of TRL's own preparation of rows",
    "embedding_learning_rate": "a rate of its own for embeddings; see training.loraplus_lr_embedding",
    "args": By("the arguments inside"),
    **needless("push_to_hub"),
    **reasons(
        secret="token hf_token wandb_token hub_token",
        workers="dataset_num_proc",
        speed=("fast_inference gpu_memory_utilization max_lora_rank float8_kv_cache device_map use_exact_model_name"),
        log="tensorboard_dir logging_steps_first",
        export=(
            "save_model save_method save_gguf save_path quantization quantization_method push_model push_gguf hub_path "
            "adapter_file"
        ),
        kind=(
            "tokenizer processing_class data_collator train_dataset eval_dataset peft_config callbacks formatting_func "
            "compute_metrics"
        ),
        vision=(
            "vision_all_linear finetune_vision_layers finetune_language_layers finetune_attention_modules "
            "finetune_mlp_modules"
        ),
        infer="max_new_tokens temperature use_cache min_p",
    ),
    "random_state": To("training.seed", whole),
    "max_prompt_length": "a limit of prompts alone; peftcli limits prompt and answer together",
    "gradient_checkpointing": To("training.gradient_checkpointing", checkpointing),
    "max_steps": To("training.max_steps", lambda value: whole(value) if whole(value) > 0 else None),
    "save_steps": To("training.save_steps", lambda value: whole(value) if whole(value) > 0 else None),
}
_FLAT: dict[str, Rule] = ARGUMENTS | _OWN
TABLE: dict[str, Rule] = {
    **_FLAT,
    **{f"{section}.{key}": rule for section in _SECTIONS for key, rule in _FLAT.items()},
}


def _flat(draft: Draft) -> dict[str, str]:
    """The last part of each key -> the key: sections and calls hold no name twice that means two things."""
    return {key.rpartition(".")[2]: key for key in draft.values}


def _build(draft: Draft) -> None:
    keys = _flat(draft)

    def value(*wanted: str, default: Any = None) -> Any:
        return draft.get(*(keys[each] for each in wanted if each in keys), default=default)

    full = value("full_finetuning", default=False)
    if truth(full) or str(value("training_type", default="lora")).lower() == "full":
        draft.refuse_full(keys.get("training_type", keys.get("full_finetuning", "full_finetuning")))
    draft.say("method.type", "lora", "unsloth trains a LoRA")
    _task(draft, value, keys)
    four = keys.get("load_in_4bit", "load_in_4bit")
    command = str(draft.get(COMMAND, default=""))
    if four not in draft.values and not command.startswith("unsloth-cli"):
        draft.say("base_model.quantization", "nf4", "unsloth's default: load_in_4bit")
    bits_of(draft, four, keys.get("load_in_8bit", "load_in_8bit"), "-", "-")
    name = draft.settings.get("base_model.name")
    if name and str(name.value).endswith("-bnb-4bit"):
        draft.notes.append(
            f"{name.value}: its weights are stored in 4 bits; the same name without -bnb-4bit has them whole"
        )
    _data(draft, value, keys)
    _defaults(draft, command, keys)
    for tracker in ("wandb", "tensorboard"):
        if truth(value(f"enable_{tracker}", default=False)):
            draft.put("training.report_to", [tracker], keys[f"enable_{tracker}"])


def _defaults(draft: Draft, command: str, keys: dict[str, str]) -> None:
    """Write defaults that only some of unsloth's ways to train have."""
    if command.startswith("script"):
        config = next((key.partition(".")[0] for key in keys.values() if key.endswith("learning_rate")), "")
        rate = 2e-5 if not config or config.endswith("Config") else DEFAULTS["training.learning_rate"]
        for key, value in (DEFAULTS | {"training.learning_rate": rate}).items():
            if key == "training.num_train_epochs" and "training.max_steps" in draft.settings:
                continue
            draft.settings.setdefault(key, Setting(value, "default of the trainer's arguments"))
    elif command.startswith("unsloth-cli"):
        if "training.num_train_epochs" not in draft.settings:
            draft.settings.setdefault("training.max_steps", draft.default(400))
    else:
        draft.settings.setdefault("method.r", draft.default(64))
        if "training.max_steps" not in draft.settings:
            draft.settings.setdefault("training.num_train_epochs", draft.default(3))


def _task(draft: Draft, value: Any, keys: dict[str, str]) -> None:
    word = str(value(COMMAND, default="")).lower()
    if "grpo" in word or "num_generations" in keys:
        refuse_sampling(draft, "GRPO")
    loss = next((each for each in ("dpo", "orpo", "kto") if each in word), None)
    if loss:
        preference(draft, loss, COMMAND, beta=0.1)
        if value("beta") is not None:
            draft.put("task.beta", number(value("beta")), keys["beta"])
    else:
        draft.say("task.type", "causal_lm", "unsloth: supervised training")
        if "beta" in keys:
            draft.drop(keys["beta"], "a setting of a preference loss, which this does not choose")


def _data(draft: Draft, value: Any, keys: dict[str, str]) -> None:
    files = value("data_files", "local_dataset")
    source = next((keys[key] for key in ("data_files", "local_dataset", "dataset", "path") if key in keys), "dataset")
    path = dataset_of(draft, value("dataset", "path"), files, source)
    if path is not None:
        draft.add_source(source, keys.get("split", ""), train=path, name=value("name"), split=value("split"))
    form = str(value("format_type", default="auto")).lower()
    ours = {
        "alpaca": "alpaca",
        "sharegpt": "sharegpt",
        "chatml": "messages",
        "conversational": "messages",
        "raw": "text",
    }
    if form in ours:
        draft.put("dataset.format", ours[form], keys["format_type"])
    supervised = draft.settings["task.type"].value == "causal_lm"
    if not supervised:
        for key in ("packing", "dataset_text_field", "train_on_completions", "instruction_part", "response_part"):
            if key in keys:
                draft.drop(keys[key], "concerns supervised training; answers alone are compared")
        return
    if truth(value("packing", default=False)):
        draft.put("dataset.packing", True, keys["packing"])
    only = truth(value("train_on_completions", default=False)) or "response_part" in keys
    found = keys.get("train_on_completions") or keys.get("response_part")
    draft.say(
        "dataset.train_on",
        "answers" if only else "all",
        f"from: {found}" if found else "unsloth's default: every token of the text",
    )
    field = value("dataset_text_field")
    if field is None:
        return
    columns = first_columns(path) if path is not None else []
    if field in columns:
        draft.put("dataset.format", "text", keys["dataset_text_field"])
        if field != "text":
            draft.put("dataset.columns", {"text": field}, keys["dataset_text_field"])
    else:
        draft.drop(
            keys["dataset_text_field"],
            "a column that the script makes; the rows' own columns are read, by the chat template",
        )


PEER = Peer(
    name="unsloth",
    label="unsloth",
    table=TABLE,
    signs=(
        "training.training_type",
        "lora.lora_r",
        "data.format_type",
        "data.dataset",
        "data.local_dataset",
        "training.max_seq_length",
        "lora.target_modules",
        "random_state",
        "use_gradient_checkpointing",
        "instruction_part",
        "training.load_in_4bit",
        "training.num_epochs",
    ),
    build=_build,
    defaults={
        **DEFAULTS,
        "method.r": 16,
        "method.lora_alpha": 16,
        "method.lora_dropout": 0.0,
        "method.target_modules": TARGETS,
        "dataset.max_length": 2048,
        "training.per_device_train_batch_size": 2,
        "training.gradient_accumulation_steps": 4,
        "training.learning_rate": 2e-4,
        "training.warmup_steps": 5,
        "training.weight_decay": 0.01,
        "training.seed": 3407,
        "training.gradient_checkpointing": True,
        "training.output_dir": "outputs",
    },
)
