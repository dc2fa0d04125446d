"""axolotl: a YAML file whose data are a list of paths, each with a ``type`` that names the form of its rows."""

from __future__ import annotations

from typing import Any

from peftcli.drafting.peers.base import (
    By,
    Draft,
    Peer,
    Rule,
    To,
    bits_of,
    dataset_of,
    if_true,
    modules,
    names,
    needless,
    number,
    reasons,
    renamed,
    template,
    truth,
    whole,
)
from peftcli.drafting.peers.preference import CPO_SHARE, ONE_TURN, preference, refuse_sampling
from peftcli.drafting.peers.training_arguments import (
    OPTIMIZERS,
    attention,
    deepspeed,
    optimizer,
    schedule,
)
from peftcli.drafting.peers.training_arguments import (
    TABLE as ARGUMENTS,
)

_COMPARED = {
    "argilla": {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
    "argilla_chat": {},
    "icr": {"prompt": "input"},
    "intel": {"prompt": "question"},
    "prompt_pairs": {},
    "ultra": {},
    "default": {},
}
"""End of a preference dataset's type -> our columns of its rows."""
_HEADINGS = "axolotl writes Alpaca's headings; peftcli does so only where the base model has no chat template"


TABLE: dict[str, Rule] = {
    **ARGUMENTS,
    **renamed("sequence_len lora_r lora_model_dir peft_use_rslora peft_layers_to_transform peft_init_lora_weights"),
    "base_model": To("base_model.name"),
    "base_model_config": "the tokenizer and config of the base model are used",
    "revision_of_model": To("base_model.revision"),
    "trust_remote_code": To("base_model.trust_remote_code", truth),
    "torch_dtype": To("base_model.dtype"),
    "adapter": By("method.type"),
    "load_in_4bit": By("base_model.quantization"),
    "load_in_8bit": By("base_model.quantization"),
    "lora_alpha": To("method.lora_alpha", number),
    "lora_dropout": To("method.lora_dropout", number),
    "lora_target_modules": By("method.target_modules"),
    "lora_target_linear": By("method.target_modules"),
    "lora_target_parameters": To("method.target_parameters", names),
    "lora_modules_to_save": To("method.modules_to_save", names),
    "peft_use_dora": To("method.use_dora", truth),
    "peft_layers_pattern": To("method.layers_pattern", names),
    "peft_layer_replication": To("method.layer_replication"),
    "peft_trainable_token_indices": To("method.trainable_token_indices"),
    "loraplus_lr_ratio": To("training.loraplus_lr_ratio", number),
    "loraplus_lr_embedding": To("training.loraplus_lr_embedding", number),
    "attn_implementation": To("base_model.attn_implementation", attention),
    "flash_attention": To("base_model.attn_implementation", if_true("flash_attention_2")),
    "sdp_attention": To("base_model.attn_implementation", if_true("sdpa")),
    "eager_attention": To("base_model.attn_implementation", if_true("eager")),
    "flex_attention": To("base_model.attn_implementation", if_true("flex_attention")),
    "s2_attention": "another attention while training, which peftcli does not have",
    "float16": "the whole model in float16; see base_model.dtype",
    "bfloat16": To("base_model.dtype", if_true("bfloat16")),
    "xformers_attention": "xformers' attention is not here; transformers' default is used",
    "chat_template": By("base_model.chat_template"),
    "chat_template_jinja": By("base_model.chat_template"),
    "tokens": To("base_model.new_tokens", names),
    "datasets[].path": By("dataset.train"),
    "datasets[].data_files": By("dataset.train"),
    "datasets[].type": By("dataset.format"),
    "datasets[].type.field_system": By("dataset.columns"),
    "datasets[].type.field_instruction": By("dataset.columns"),
    "datasets[].type.field_input": By("dataset.columns"),
    "datasets[].type.field_output": By("dataset.columns"),
    "datasets[].type.field_prompt": By("dataset.columns"),
    "datasets[].type.field_chosen": By("dataset.columns"),
    "datasets[].type.field_rejected": By("dataset.columns"),
    "datasets[].type.field_completion": By("dataset.columns"),
    "datasets[].type.field_label": By("dataset.columns"),
    "datasets[].type.*": "the text around a prompt; peftcli uses the chat template, or Alpaca's headings without one",
    "datasets[].split": By("dataset.split"),
    "datasets[].name": By("dataset.name"),
    "datasets[].revision": By("dataset.revision"),
    "datasets[].field": By("dataset.columns"),
    "datasets[].field_messages": By("dataset.columns"),
    "datasets[].field_tools": By("dataset.columns"),
    "datasets[].field_chosen": By("dataset.columns"),
    "datasets[].field_rejected": By("dataset.columns"),
    "datasets[].message_property_mappings.role": By("dataset.format"),
    "datasets[].message_property_mappings.content": By("dataset.format"),
    "datasets[].message_property_mappings.*": "another name of a turn's part, which peftcli reads under its usual name",
    "datasets[].message_field_role": By("dataset.format"),
    "datasets[].message_field_content": By("dataset.format"),
    "datasets[].roles_to_train": By("dataset.train_on"),
    "datasets[].train_on_eos": By("dataset.train_on"),
    "datasets[].roles.*": "names of roles; peftcli reads human and user, gpt and assistant, system, tool",
    "datasets[].chat_template": "the base model's own chat template is used; see base_model.chat_template",
    "datasets[].ds_type": "the kind of file, which peftcli finds from its name",
    "datasets[].shards": "a part of the dataset; see dataset.limit",
    "datasets[].shards_idx": "a part of the dataset; see dataset.limit",
    "datasets[].conversation": "a form of FastChat's; peftcli uses the chat template",
    "datasets[].drop_system_message": "peftcli trains with the system turns of the rows",
    "datasets[].message_field_training": "peftcli reads a turn's `train`; another name is not read",
    "datasets[].trust_remote_code": "peftcli runs no code of a dataset",
    "datasets": "expected a list of datasets with path and type",
    "test_datasets[].path": By("dataset.eval"),
    "test_datasets[].data_files": By("dataset.eval"),
    "test_datasets[].split": By("dataset.eval_split"),
    "test_datasets[].*": "evaluation rows have the form of the training rows here",
    "pretraining_dataset": By("dataset.train"),
    "pretraining_dataset[].path": By("dataset.train"),
    "pretraining_dataset[].name": By("dataset.name"),
    "pretraining_dataset[].split": By("dataset.split"),
    "pretraining_dataset[].text_column": By("dataset.columns"),
    "pretraining_dataset[].type": By("dataset.format"),
    "pretraining_dataset[].*": "how the stream begins; see dataset.limit",
    "val_set_size": By("dataset.eval_fraction"),
    "train_on_inputs": By("dataset.train_on"),
    "sample_packing": To("dataset.packing", truth),
    "excess_length_strategy": By("dataset.overlong"),
    "rl": By("task.loss"),
    "rl_beta": By("task.beta"),
    "trl.beta": By("task.beta"),
    "cpo_alpha": CPO_SHARE,
    "dpo_beta": By("task.beta"),
    "orpo_alpha": By("task.beta"),
    "simpo_gamma": To("task.simpo_gamma", number),
    "kto_desirable_weight": To("task.desirable_weight", number),
    "kto_undesirable_weight": To("task.undesirable_weight", number),
    "dpo_label_smoothing": To("task.label_smoothing", number),
    "reward_model": By("task.type"),
    "micro_batch_size": To("training.per_device_train_batch_size", whole),
    "eval_batch_size": To("training.per_device_eval_batch_size", whole),
    "batch_size": "the size of a whole step; micro_batch_size and gradient_accumulation_steps decide here",
    "num_epochs": To("training.num_train_epochs", number),
    "optimizer": To("training.optim", optimizer),
    "lr_scheduler": To("training.lr_scheduler_type", schedule),
    "optim_args.*": "arguments of the optimizer; write them under training.optim_args",
    "evals_per_epoch": By("training.eval_strategy"),
    "saves_per_epoch": By("training.save_strategy"),
    "wandb_project": By("training.report_to"),
    "wandb_name": By("training.run_name"),
    "wandb_run_id": "a run of Weights & Biases to continue",
    "deepspeed": By("launch.deepspeed"),
    "fsdp": By("launch.strategy"),
    "fsdp_config.fsdp_offload_params": To("launch.cpu_offload", truth),
    "fsdp_config.offload_params": To("launch.cpu_offload", truth),
    "fsdp_config.fsdp_cpu_ram_efficient_loading": To("launch.cpu_ram_efficient_loading", truth),
    "fsdp_config.cpu_ram_efficient_loading": To("launch.cpu_ram_efficient_loading", truth),
    "fsdp_config.reshard_after_forward": To("launch.reshard_after_forward", truth),
    "fsdp_config.*": "details of FSDP; see the section launch",
    "fsdp_version": "details of FSDP; see the section launch",
    "plugins": By("training.use_liger_kernel"),
    "liger_rope": By("training.use_liger_kernel"),
    "liger_rms_norm": By("training.use_liger_kernel"),
    "liger_glu_activation": By("training.use_liger_kernel"),
    "liger_layer_norm": By("training.use_liger_kernel"),
    "liger_fused_linear_cross_entropy": By("training.use_liger_kernel"),
    **needless("lora_fan_in_fan_out pad_to_sequence_len hub_model_id auto_resume_from_checkpoints"),
    "cosine_min_lr_ratio": "peftcli's cosine ends at 0",
    "cosine_constant_lr_ratio": "peftcli's cosine ends at 0",
    "loss_watchdog_threshold": "peftcli stops when the loss is NaN or Inf; see also the gates",
    "loss_watchdog_patience": "peftcli stops when the loss is NaN or Inf; see also the gates",
    "shuffle_merged_datasets": "peftcli shuffles all rows in each epoch",
    "curriculum_sampling": "peftcli shuffles; see training.train_sampling_strategy: sequential",
    "dataset_exact_deduplication": "`peftcli inspect` lists duplicates; remove them from the file",
    "save_first_step": "a checkpoint after the first step; see training.save_steps",
    "unfrozen_parameters": "parameters to train in full; see method.modules_to_save",
    "default_system_message": "a system turn for rows without one; write it into the rows",
    **reasons(
        cache="dataset_prepared_path push_dataset_to_hub hf_use_auth_token skip_prepare_dataset",
        workers="dataset_processes dataset_num_proc",
        kind="model_type tokenizer_type tokenizer_config processor_type is_llama_derived_model",
        log=(
            "wandb_entity wandb_watch wandb_log_model wandb_mode mlflow_experiment_name mlflow_tracking_uri "
            "use_tensorboard use_wandb eval_table_size include_tkps"
        ),
        infer="eval_max_new_tokens eval_causal_lm_metrics do_causal_lm_eval",
        speed=(
            "eval_sample_packing sample_packing_group_size sample_packing_bin_size sample_packing_sequentially "
            "multipack_real_batches low_cpu_mem_usage lora_mlp_kernel lora_qkv_kernel lora_o_kernel "
            "lora_embedding_kernel flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp unsloth_lora_mlp "
            "unsloth_lora_qkv unsloth_lora_o activation_offloading embeddings_skip_upcast gc_steps "
            "torch_compile_backend cut_cross_entropy sequence_parallel_degree context_parallel_size "
            "experimental_skip_move_to_device lora_on_cpu tiled_mlp"
        ),
        tokens="special_tokens special_tokens.*",
        check="strict debug dataset_shuffle_seed",
        process="local_rank ddp use_ray ray_num_workers resources_per_worker world_size",
    ),
}


def _build(draft: Draft) -> None:
    _method(draft)
    bits_of(draft, "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "-", default_double=True)
    _task(draft)
    _data(draft)
    _schedule(draft)
    _machines(draft)
    jinja = draft.get("chat_template_jinja")
    if draft.get("chat_template") == "jinja":
        draft.carried["chat_template"] = "base_model.chat_template"
    else:
        template(draft, "chat_template")
    if jinja is not None:
        template(draft, "chat_template_jinja")


def _method(draft: Draft) -> None:
    adapter = draft.get("adapter")
    if adapter is None:
        draft.refuse_full("adapter is not set")
    if str(adapter) not in ("lora", "qlora"):
        draft.refuse(f"adapter: {adapter} cannot be imported", "It imports lora and qlora; see `peftcli info methods`.")
    draft.put("method.type", "lora", "adapter")
    linear = draft.get("lora_target_linear")
    if linear is not None and truth(linear):
        draft.put("method.target_modules", "all-linear", "lora_target_linear")
        if draft.get("lora_target_modules") is not None:
            draft.drop("lora_target_modules", "lora_target_linear adapts every linear layer, these among them")
    elif (given := draft.get("lora_target_modules")) is not None:
        draft.put("method.target_modules", modules(given), "lora_target_modules")


def _task(draft: Draft) -> None:
    kind = str(draft.get("rl", default="")).lower()
    if kind in ("grpo", "gdpo", "ebft", "ppo"):
        refuse_sampling(draft, f"rl: {kind}")
    if kind in ("dpo", "ipo", "orpo", "simpo", "kto"):
        preference(draft, kind, "rl", beta=0.1)
        for key in ("orpo_alpha", "dpo_beta", "rl_beta", "trl.beta"):
            if (beta := draft.get(key)) is not None:
                draft.put("task.beta", number(beta), key)
    elif kind:
        draft.refuse(f"rl: {kind} cannot be imported", "It imports dpo, ipo, orpo, simpo and kto.")
    elif truth(draft.get("reward_model", default=False)):
        draft.put("task.type", "reward", "reward_model")
    else:
        draft.say("task.type", "causal_lm", "axolotl: neither rl nor reward_model")


def _data(draft: Draft) -> None:
    for entry in draft.entries("datasets"):
        given = draft.section(entry)
        form, columns = _form(draft, entry, given)
        draft.add_source(
            f"{entry}",
            train=dataset_of(draft, given.get("path"), given.get("data_files"), f"{entry}.data_files"),
            split=given.get("split"),
            name=given.get("name"),
            revision=given.get("revision"),
            format=form,
            columns={ours: theirs for ours, theirs in columns.items() if theirs and ours != theirs},
        )
    _pretraining(draft)
    _evaluation(draft)
    _trained(draft)
    _overlong(draft)


def _form(draft: Draft, entry: str, given: dict[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return our format and columns for the rows of a dataset; of preferences the columns alone."""
    kind = str(given.get("type", ""))
    fields = {key.removeprefix("type.field_"): value for key, value in given.items() if key.startswith("type.field_")}
    if "task.loss" in draft.settings or draft.settings["task.type"].value == "reward":
        columns = dict(_COMPARED.get(kind.rpartition(".")[2], {})) | fields
        if draft.get("rl") == "kto":
            columns = {key: columns[key] for key in ("prompt", "completion", "label", "system") if key in columns}
        columns |= {key: given.get(f"field_{key}") for key in ("chosen", "rejected") if given.get(f"field_{key}")}
        messages = given.get("field_messages")
        if kind.startswith("chat_template"):
            messages = messages or "messages"
            draft.notes.append(f"{entry}: {ONE_TURN}")
        return None, columns | ({"prompt": messages} if messages else {})
    if kind.startswith("chat_template") or kind == "sharegpt":
        return _turns(kind, given)
    if kind == "completion":
        return "text", {"text": given.get("field")}
    if fields or kind.split(".")[0].split(":")[0] in ("alpaca", "alpaca_chat", "alpaca_w_system", "instruct"):
        draft.carried.setdefault(f"{entry}.type", f"dataset.format ({_HEADINGS})")
        draft.notes.append(f"{entry}.type: {kind or 'own fields'}: {_HEADINGS}")
        columns = {"system": fields.get("system"), "instruction": fields.get("instruction")}
        return "alpaca", columns | {"input": fields.get("input"), "output": fields.get("output")}
    if kind:
        draft.drop(f"{entry}.type", f"peftcli has no form of rows {kind}; it is found from the columns")
    return None, {}


def _turns(kind: str, given: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    role = given.get("message_property_mappings.role", given.get("message_field_role"))
    messages = given.get("field_messages", "conversations" if kind == "sharegpt" else "messages")
    tools = {"tools": given.get("field_tools")}
    if role == "from" or kind == "sharegpt":
        return "sharegpt", {"conversations": messages} | tools
    return "messages", {"messages": messages} | tools


def _pretraining(draft: Draft) -> None:
    text, entries = draft.get("pretraining_dataset"), draft.entries("pretraining_dataset")
    for entry in entries or (["pretraining_dataset"] if text else []):
        given = draft.section(entry)
        column = given.get("text_column", "text")
        draft.add_source(
            entry,
            train=draft.path(given.get("path", text)),
            name=given.get("name"),
            split=given.get("split"),
            format="text",
            columns={"text": column} if column != "text" else {},
            streaming=True,
        )


def _evaluation(draft: Draft) -> None:
    entries, size = draft.entries("test_datasets"), draft.get("val_set_size")
    if entries:
        given = draft.section(entries[0])
        found = dataset_of(draft, given.get("path"), given.get("data_files"), f"{entries[0]}.data_files")
        draft.put("dataset.eval", found, entries[0])
        if given.get("split"):
            draft.put("dataset.eval_split", given["split"], entries[0])
        for entry in entries[1:]:
            draft.drop(f"{entry}.path", "peftcli evaluates on one dataset")
    if size is None or number(size) == 0:
        return
    if number(size) >= 1:
        draft.drop("val_set_size", "a number of rows; peftcli holds out a share: set dataset.eval_fraction")
    else:
        draft.put("dataset.eval_fraction", number(size), "val_set_size")


def _trained(draft: Draft) -> None:
    """Write which tokens count in the loss."""
    if draft.settings["task.type"].value != "causal_lm":
        for key in ("train_on_inputs", "sample_packing"):
            if truth(draft.get(key, default=False)):
                draft.drop(key, "concerns supervised training; answers alone are compared")
                draft.settings.pop("dataset.packing", None)
        return
    inputs, others = draft.get("train_on_inputs"), []
    for entry in draft.entries("datasets"):
        if {*names(draft.get(f"{entry}.roles_to_train", default=[]))} - {"assistant", "gpt"}:
            others.append(f"{entry}.roles_to_train")
        if draft.get(f"{entry}.train_on_eos", default="turn") != "turn":
            draft.drop(f"{entry}.train_on_eos", "peftcli trains the end of each trained turn")
    if inputs is not None and truth(inputs):
        draft.put("dataset.train_on", "all", "train_on_inputs")
    elif others:
        draft.put("dataset.train_on", "all", ", ".join(others))
        draft.notes.append(f"{', '.join(others)}: dataset.train_on: all trains every turn of every dataset")
    elif inputs is not None:
        draft.put("dataset.train_on", "answers", "train_on_inputs")
    else:
        default = "axolotl's default: train_on_inputs false, and only the assistant's turns of conversations"
        draft.say("dataset.train_on", "answers", default)


def _overlong(draft: Draft) -> None:
    """Write what becomes of rows that are too long, compared answers among them."""
    word = str(draft.get("excess_length_strategy", default="drop")).lower()
    given = draft.get("excess_length_strategy") is not None
    draft.say(
        "dataset.overlong",
        {"truncate": "truncate", "raise": "error"}.get(word, "drop"),
        "from: excess_length_strategy" if given else "axolotl's default: longer rows are left out",
    )


def _schedule(draft: Draft) -> None:
    for what, key in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        count = draft.get(key)
        if count is None:
            continue
        draft.put(f"training.{what}_strategy", "epoch", key)
        if number(count) != 1:
            draft.drop(
                key, f"peftcli counts steps or whole epochs; set training.{what}_steps. Once an epoch is written"
            )
    for what in ("eval", "save"):
        if f"training.{what}_steps" in draft.settings:
            draft.settings.setdefault(f"training.{what}_strategy", draft.settings[f"training.{what}_steps"])
            draft.say(f"training.{what}_strategy", "steps", f"from: {what}_steps")
    if draft.get("wandb_project"):
        draft.put("training.report_to", ["wandb"], "wandb_project")
        draft.carried["wandb_project"] = "training.report_to (the project's name is WANDB_PROJECT in the environment)"
        if draft.get("wandb_name"):
            draft.put("training.run_name", draft.get("wandb_name"), "wandb_name")
    elif "wandb_name" in draft.carried:
        draft.drop("wandb_name", "a name in Weights & Biases, which the recipe does not use")
    if "optimizer" in draft.values and str(draft.get("optimizer")) not in OPTIMIZERS:
        draft.notes.append(f"optimizer: {draft.get('optimizer')}: adamw_torch is used")


def _machines(draft: Draft) -> None:
    if found := [key for key in draft.values if key.partition(".")[0] in ("fsdp", "fsdp_config") and draft.get(key)]:
        within_machine = any("hybrid" in str(draft.get(key)).lower() for key in found)
        draft.put("launch.strategy", "hybrid" if within_machine else "fsdp", found[0])
    deepspeed(draft)
    liger = [key for key in draft.carried if key.startswith("liger_")]
    if any(truth(draft.get(key)) for key in liger):
        draft.put("training.use_liger_kernel", True, liger[0])
    plugins = draft.get("plugins")
    if plugins and (other := [each for each in names(plugins) if "liger" not in each.lower()]):
        draft.drop("plugins", f"programs that run inside axolotl, which peftcli does not: {', '.join(other)}")


PEER = Peer(
    name="axolotl",
    label="axolotl",
    table=TABLE,
    signs=(
        *("sequence_len", "micro_batch_size", "datasets[].type", "sample_packing", "adapter", "lora_target_linear"),
        *("val_set_size", "dataset_prepared_path", "pad_to_sequence_len", "rl", "num_epochs"),
    ),
    build=_build,
    defaults={
        "method.lora_dropout": 0.0,
        "dataset.max_length": 512,
        "training.per_device_train_batch_size": 1,
        "training.gradient_accumulation_steps": 1,
        "training.num_train_epochs": 1,
        "training.optim": "adamw_torch_fused",
        "training.lr_scheduler_type": "cosine",
        "training.warmup_ratio": 0.03,
        "training.weight_decay": 0.0,
        "training.max_grad_norm": 1.0,
        "training.seed": 42,
        "training.output_dir": "model-out",
    },
)
