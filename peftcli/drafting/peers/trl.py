"""TRL: the YAML files and the command lines of ``trl sft`` and its scripts."""

from __future__ import annotations

from pathlib import Path

from peftcli.drafting.peers.base import (
    COMMAND,
    By,
    Draft,
    Peer,
    Rule,
    To,
    bits_of,
    dataset_of,
    first_columns,
    if_true,
    is_there,
    modules,
    names,
    needless,
    number,
    reasons,
    renamed,
    truth,
    whole,
)
from peftcli.drafting.peers.preference import TABLE as COMPARED
from peftcli.drafting.peers.preference import loss_settings, preference, refuse_sampling
from peftcli.drafting.peers.training_arguments import DEFAULTS, LORA, attention, deepspeed
from peftcli.drafting.peers.training_arguments import TABLE as ARGUMENTS

_LOSSES = {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo", "cdpo": "dpo"}
_RATES = {"sft": 2e-5, "dpo": 1e-6, "kto": 1e-6, "orpo": 1e-6, "cpo": 1e-6, "reward": 1e-4}
"""Command -> the learning rate that TRL takes if none is given."""

TABLE: dict[str, Rule] = {
    **ARGUMENTS,
    **LORA,
    **COMPARED,
    **renamed("model_name_or_path model_revision lora_r lora_modules_to_save dataset_config dataset_streaming"),
    "model": To("base_model.name"),
    "trust_remote_code": To("base_model.trust_remote_code", truth),
    "torch_dtype": To("base_model.dtype"),
    "dtype": To("base_model.dtype"),
    "attn_implementation": To("base_model.attn_implementation", attention),
    "use_flash_attention_2": To("base_model.attn_implementation", if_true("flash_attention_2")),
    "load_in_4bit": By("base_model.quantization"),
    "load_in_8bit": By("base_model.quantization"),
    "bnb_4bit_quant_type": By("base_model.quantization"),
    "use_bnb_nested_quant": By("base_model.quantization"),
    "bnb_4bit_quant_storage": "how 4-bit weights are packed; it changes no value",
    "chat_template_path": By("base_model.chat_template"),
    "use_peft": By("method.type"),
    "lora_target_modules": To("method.target_modules", modules),
    "lora_target_parameters": To("method.target_parameters", names),
    "lora_task_type": "the task decides; it is found from the command",
    "dataset_name": By("dataset.train"),
    "dataset_train_split": By("dataset.split"),
    "dataset_test_split": By("dataset.eval_split"),
    "dataset_text_field": By("dataset.columns"),
    "datasets[].path": By("dataset.mix"),
    "datasets[].name": By("dataset.mix"),
    "datasets[].split": By("dataset.mix"),
    "datasets[].data_files": By("dataset.mix"),
    "datasets[].*": "a choice of files or columns of the dataset, which dataset.mix does not have",
    "streaming": To("dataset.streaming", if_true(True)),
    "test_split_size": To("dataset.eval_fraction", number),
    "max_length": To("dataset.max_length", whole),
    "max_seq_length": To("dataset.max_length", whole),
    "max_prompt_length": "a limit of prompts alone; peftcli limits prompt and answer together",
    "max_completion_length": "a limit of answers alone; peftcli limits prompt and answer together",
    "truncation_mode": By("dataset.overlong"),
    "packing": By("dataset.packing"),
    "packing_strategy": "peftcli packs by best fit, as bfd does, and an example sees no other one",
    "padding_free": "peftcli computes no padding in any case",
    "eval_packing": "the evaluation is computed as the training is",
    "assistant_only_loss": By("dataset.train_on"),
    "completion_only_loss": By("dataset.train_on"),
    "loss_type": By("task.loss"),
    "num_labels": By("task.type"),
    "model_init_kwargs": "further arguments of from_pretrained; see the section base_model",
    "model_init_kwargs.*": "further arguments of from_pretrained; see the section base_model",
    "sync_ref_model": "a reference model that moves; peftcli compares with the base model, adapter off",
    "disable_dropout": "peftcli trains with the adapter's lora_dropout in any case",
    "center_rewards_coefficient": "a term that keeps rewards near 0, which peftcli does not add",
    "dataset_kwargs": "arguments of TRL's own preparation of rows",
    "dataset_kwargs.*": "arguments of TRL's own preparation of rows",
    "eos_token": "the base model's tokenizer knows its end-of-turn token",
    "pad_token": "the base model's tokenizer knows its pad token",
    "shuffle_dataset": "peftcli shuffles all rows in each epoch",
    "gradient_checkpointing_use_reentrant": "how activations are recomputed; it changes no value",
    "config": By("the file that it names, which was read"),
    COMMAND: By("task.type"),
    **needless("wandb_project"),
    **reasons(
        workers="dataset_num_proc",
        speed=(
            "activation_offloading pad_to_multiple_of precompute_ref_log_probs precompute_ref_batch_size use_liger "
            "use_liger_loss ignore_bias_buffers dataset_batch_size"
        ),
        infer="generate_during_eval",
        process="accelerate_config config_file num_processes num_machines machine_rank mixed_precision",
        moe="router_aux_loss_coef",
    ),
}


def command_of(draft: Draft) -> str:
    """Return what is trained: the word of the command line, else what the keys show."""
    word = str(draft.get(COMMAND, default="")).lower()
    known = ("sft", "dpo", "kto", "orpo", "cpo", "reward", "grpo", "rloo", "ppo", "gkd", "online_dpo")
    found = next((name for name in sorted(known, key=len, reverse=True) if name in word), None)
    if found:
        return found
    if {"num_generations", "reward_funcs"} & {*draft.values}:
        return "grpo"
    if {"desirable_weight", "undesirable_weight"} & {*draft.values}:
        return "kto"
    compares = {*names(draft.get("loss_type", default=[]))} & {*_LOSSES}
    return "dpo" if compares or draft.get("beta") is not None else "sft"


def _build(draft: Draft) -> None:
    if not truth(draft.get("use_peft", default=False)):
        draft.refuse_full("use_peft is not set")
    what = command_of(draft)
    if what in ("grpo", "rloo", "ppo", "gkd", "online_dpo"):
        refuse_sampling(draft, what)
    draft.put("method.type", "lora", "use_peft")
    _task(draft, what)
    bits_of(draft, "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant")
    chat_template_path(draft)
    data(draft, supervised=what == "sft")
    if "training.learning_rate" not in draft.settings:
        draft.say("training.learning_rate", _RATES[what], f"TRL's default of {what}")
    deepspeed(draft)


def chat_template_path(draft: Draft) -> None:
    """Carry the file of a chat template; that of another tokenizer's folder is not."""
    given = draft.get("chat_template_path")
    if given is None:
        return
    if str(given).endswith((".jinja", ".jinja2")):
        draft.put("base_model.chat_template", draft.path(given), "chat_template_path")
    else:
        draft.drop(
            "chat_template_path", "another model's template; save it as a .jinja file for base_model.chat_template"
        )


def _task(draft: Draft, what: str) -> None:
    loss_type = ", ".join(names(draft.get("loss_type", default=[])))
    loss = _LOSSES.get(loss_type or "sigmoid") if what in ("dpo", "cpo") else what
    if what == "cpo" and loss != "simpo":
        draft.refuse("cpo cannot be imported", "The nearest are task.loss: simpo, which TRL's CPO has too, and dpo.")
    if loss is None:
        draft.refuse(f"loss_type: {loss_type} cannot be imported", "It imports sigmoid, ipo and, of cpo, simpo.")
    source = COMMAND if draft.get(COMMAND) else "the keys of the file"
    if what in ("sft", "reward"):
        draft.put("task.type", "causal_lm" if what == "sft" else "reward", source)
    else:
        preference(draft, loss, "loss_type" if loss_type else source, beta=0.1)
    loss_settings(draft, loss)
    if loss_type and what in ("sft", "kto", "orpo", "reward"):
        draft.drop("loss_type", "another form of the loss; peftcli's is the mean over the targets")


def data(draft: Draft, supervised: bool) -> None:
    """Write what is trained on: one dataset or a mix, its splits and columns, and which tokens count."""
    if (name := draft.get("dataset_name")) is not None:
        split = draft.get("dataset_train_split")
        draft.add_source("dataset_name", "dataset_train_split", train=draft.path(name), split=split)
    else:
        for entry in draft.entries("datasets"):
            given = draft.section(entry)
            found = dataset_of(draft, given.get("path"), given.get("data_files"), f"{entry}.data_files")
            draft.add_source(entry, train=found, name=given.get("name"), split=given.get("split"))
    path = draft.sources[0].get("train", "") if draft.sources else ""
    evaluates = str(draft.get("eval_strategy", "evaluation_strategy", default="no")).lower() not in ("no", "false")
    if evaluates and draft.get("test_split_size") is None:
        split = draft.get("dataset_test_split", default="test")
        if path and is_there(Path(path)):
            draft.notes.append("eval_strategy: evaluation rows of a local file are not a split; set dataset.eval")
            if "dataset_test_split" in draft.carried:
                draft.drop("dataset_test_split", "a local file has no splits; set dataset.eval")
        else:
            draft.say(
                "dataset.eval_split",
                split,
                "from: dataset_test_split"
                if "dataset_test_split" in draft.values
                else "TRL's default dataset_test_split",
            )
    elif "dataset_test_split" in draft.carried:
        draft.drop("dataset_test_split", "is not read while eval_strategy is no")
    _trained(draft, supervised)


def _trained(draft: Draft, supervised: bool) -> None:
    if draft.get("truncation_mode") == "keep_end":
        draft.drop("truncation_mode", "peftcli cuts a long example at its end")
    elif "truncation_mode" in draft.carried:
        draft.put("dataset.overlong", "truncate", "truncation_mode")
    field, packing = draft.get("dataset_text_field"), draft.get("packing")
    if packing is not None and truth(packing) and supervised:
        draft.put("dataset.packing", True, "packing")
    elif packing is not None and truth(packing):
        draft.drop("packing", "concerns supervised training; answers that are compared are not packed")
    if not supervised:
        for key in ("assistant_only_loss", "completion_only_loss", "dataset_text_field"):
            if key in draft.carried:
                draft.drop(key, "concerns supervised training; answers alone are compared")
        return
    columns = [name for each in draft.sources for name in first_columns(each.get("train", ""))]
    chat = "messages" in columns or "conversations" in columns
    if field is not None and not chat and "prompt" not in columns:
        if field != "text":
            draft.put("dataset.columns", {"text": field}, "dataset_text_field")
        draft.put("dataset.format", "text", "dataset_text_field")
    elif field is not None:
        draft.drop("dataset_text_field", "the rows have turns, or prompt and completion, and no text of this name")
    if truth(draft.get("assistant_only_loss", default=False)):
        draft.put("dataset.train_on", "answers", "assistant_only_loss")
    elif (only := draft.get("completion_only_loss")) is not None:
        draft.put("dataset.train_on", "answers" if truth(only) else "all", "completion_only_loss")
    elif chat:
        draft.say("dataset.train_on", "all", f"{draft.peer.label}'s default: every token of a conversation")
    elif columns:
        draft.say("dataset.train_on", "answers", f"{draft.peer.label}'s default: completions, and texts as a whole")
    else:
        draft.drop(
            "dataset.train_on (no key)",
            "of rows of messages TRL trains every token unless assistant_only_loss is set, "
            "peftcli the answers; the rows are not here to look at. Set dataset.train_on: all for the same",
        )


PEER = Peer(
    name="trl",
    label="TRL",
    table=TABLE,
    signs=(
        "use_peft",
        "dataset_name",
        "lora_target_modules",
        "dataset_train_split",
        "dataset_test_split",
        "assistant_only_loss",
        "completion_only_loss",
        "dataset_text_field",
    ),
    build=_build,
    defaults={
        **DEFAULTS,
        "method.r": 16,
        "method.lora_alpha": 32,
        "method.lora_dropout": 0.05,
        "dataset.max_length": 1024,
        "training.gradient_checkpointing": True,
        "training.logging_steps": 10,
    },
)
