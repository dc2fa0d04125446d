"""ms-swift: the command lines ``swift sft``, ``swift pt`` and ``swift rlhf``, and their YAML files."""

from __future__ import annotations

import re
from math import ceil
from typing import Any

from peftcli.drafting.peers.base import (
    COMMAND,
    INTERLEAVED,
    By,
    Draft,
    NotCarried,
    Peer,
    Rule,
    To,
    first_columns,
    if_true,
    modules,
    names,
    number,
    quantise_bits,
    reasons,
    template,
    truth,
    whole,
)
from peftcli.drafting.peers.preference import TABLE as COMPARED
from peftcli.drafting.peers.preference import loss_settings, preference, refuse_sampling
from peftcli.drafting.peers.training_arguments import DEFAULTS, LORA, deepspeed
from peftcli.drafting.peers.training_arguments import TABLE as ARGUMENTS

_TYPE_KEYS = ("tuner_type", "train_type", "sft_type")


def _attention(value: Any) -> str:
    found = {
        "flash_attn": "flash_attention_2",
        "flash_attention_2": "flash_attention_2",
        "sdpa": "sdpa",
        "eager": "eager",
    }
    if str(value) not in found:
        raise NotCarried("peftcli has no such implementation of attention; transformers' default is used")
    return found[str(value)]


def _start(value: Any) -> Any:
    word = str(value).lower()
    return {"true": None, "false": False}.get(word, word)


TABLE: dict[str, Rule] = {
    **ARGUMENTS,
    **LORA,
    **COMPARED,
    COMMAND: By("task.type"),
    "model": To("base_model.name"),
    "model_id_or_path": To("base_model.name"),
    "model_type": "the class of model, which peftcli finds in its files",
    "model_revision": To("base_model.revision"),
    "torch_dtype": To("base_model.dtype"),
    "attn_impl": To("base_model.attn_implementation", _attention),
    "quant_bits": By("base_model.quantization"),
    "quant_method": By("base_model.quantization"),
    "bnb_4bit_quant_type": By("base_model.quantization"),
    "bnb_4bit_use_double_quant": By("base_model.quantization"),
    "bnb_4bit_compute_dtype": "the number format of unpacked weights; see base_model.quantization.compute_dtype",
    "new_special_tokens": To("base_model.new_tokens", names),
    "template": By("base_model.chat_template"),
    "chat_template": By("base_model.chat_template"),
    **{name: By("method.type") for name in _TYPE_KEYS},
    "lora_rank": To("method.r", whole),
    "lora_bias": To("method.bias"),
    "target_modules": To("method.target_modules", modules),
    "target_regex": To("method.target_modules", str),
    "target_parameters": To("method.target_parameters", names),
    "modules_to_save": To("method.modules_to_save", names),
    "init_weights": To("method.init_lora_weights", _start),
    "init_lora_weights": To("method.init_lora_weights", _start),
    "lorap_lr_ratio": To("training.loraplus_lr_ratio", number),
    "dataset": By("dataset.train"),
    "val_dataset": By("dataset.eval"),
    "split_dataset_ratio": By("dataset.eval_fraction"),
    "columns": By("dataset.columns"),
    "columns.*": By("dataset.columns"),
    "interleave_prob": By("dataset.mix"),
    "streaming": To("dataset.streaming", if_true(True)),
    "max_length": To("dataset.max_length", whole),
    "truncation_strategy": By("dataset.overlong"),
    "packing": By("dataset.packing"),
    "padding_free": "peftcli computes no padding in any case",
    "loss_scale": By("dataset.train_on"),
    "rlhf_type": By("task.loss"),
    "loss_type": "another form of the loss, which this importer does not carry",
    "system": "a system turn for rows without one; write it into the rows",
    "use_hf": "peftcli loads models and datasets from the Hugging Face hub, or from folders",
    "agent_template": "how tools are written; the base model's own template decides",
    "max_epochs": "a limit beside num_train_epochs",
    "task_type": "another task of ms-swift; name ours under task",
    "adapters": To("training.init_adapter_from", lambda value: names(value)[0]),
    "custom_register_path": "a program that describes models or datasets, which peftcli does not run",
    "custom_dataset_info": "descriptions of datasets; map columns under dataset.columns",
    "external_plugins": "programs that run inside ms-swift, which peftcli does not run",
    **reasons(
        cache="load_from_cache_file download_mode cached_dataset cached_val_dataset",
        workers="dataset_num_proc",
        speed="lazy_tokenize use_logits_to_keep sequence_parallel_size device_map max_memory attn_impl_vit use_liger",
        log="model_author model_name logging_first_step create_checkpoint_symlink add_version check_model acc_strategy",
        vision="max_pixels freeze_vit freeze_aligner freeze_llm vit_lr aligner_lr vit_gradient_checkpointing norm_bbox",
        method=(
            "lora_dtype freeze_parameters freeze_parameters_ratio trainable_parameters use_galore galore_* "
            "lisa_activated_layers tuner_backend neftune_backend"
        ),
        infer="max_new_tokens temperature top_k top_p num_beams infer_backend stop_words predict_with_generate",
        hub="hub_model_id use_ms_hub",
        check="strict ignore_args_error resume_only_model dataset_shuffle train_dataloader_shuffle",
        process="NPROC_PER_NODE CUDA_VISIBLE_DEVICES nproc_per_node",
        moe="router_aux_loss_coef",
    ),
}


def _build(draft: Draft) -> None:
    _method(draft)
    what = _task(draft)
    quantise_bits(draft, "quant_bits", "quant_method", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    template(draft, "template")
    template(draft, "chat_template")
    _data(draft, what)
    _trained(draft, what)
    deepspeed(draft)
    if "training.output_dir" not in draft.settings and "base_model.name" in draft.settings:
        model = str(draft.settings["base_model.name"].value).rstrip("/").rpartition("/")[2]
        draft.settings["training.output_dir"] = draft.default(f"output/{model}")
    if "training.gradient_accumulation_steps" not in draft.settings:
        size = draft.settings.get("training.per_device_train_batch_size")
        draft.say(
            "training.gradient_accumulation_steps",
            max(1, ceil(16 / int(size.value if size else 1))),
            "ms-swift's default: steps of 16 rows on one device",
        )
    if "training.eval_strategy" not in draft.settings and {"dataset.eval", "dataset.eval_fraction"} & {*draft.settings}:
        draft.say("training.eval_strategy", "steps", "ms-swift's default: as save_strategy")
        for key in ("save_steps", "eval_steps"):
            draft.settings.setdefault(
                f"training.{key}", draft.settings.get("training.save_steps") or draft.default(500)
            )


def _method(draft: Draft) -> None:
    key = next((key for key in _TYPE_KEYS if draft.get(key) is not None), None)
    kind = str(draft.get(key, default="lora")) if key else "lora"
    if kind == "full":
        draft.refuse_full(f"{key}: full")
    if kind not in ("lora",):
        draft.refuse(f"{key}: {kind} cannot be imported", "It imports lora; see `peftcli info methods`.")
    draft.say("method.type", "lora", f"from: {key}" if key else "ms-swift's default")


def _task(draft: Draft) -> str:
    word = str(draft.get(COMMAND, default="")).lower()
    kind = str(draft.get("rlhf_type", default="dpo" if "rlhf" in word else "")).lower()
    what = kind or ("pt" if word.split()[-1:] == ["pt"] else "sft")
    if what in ("grpo", "ppo", "gkd"):
        refuse_sampling(draft, f"rlhf_type: {what}")
    source = "rlhf_type" if kind and draft.get("rlhf_type") else COMMAND if word else "ms-swift: no rlhf_type"
    if what in ("dpo", "kto", "orpo", "simpo"):
        preference(draft, what, source, beta=2.0 if what == "simpo" else 0.1)
        if what == "simpo":
            draft.settings["task.simpo_gamma"] = draft.default(1.0)
    elif what in ("rm", "reward"):
        draft.put("task.type", "reward", source)
    elif what in ("sft", "pt"):
        draft.put("task.type", "causal_lm", source)
    else:
        draft.refuse(f"rlhf_type: {what} cannot be imported", "It imports dpo, kto, orpo, simpo and rm.")
    loss_settings(draft, what)
    return what


def _data(draft: Draft, what: str) -> None:
    given = draft.get("dataset", default=[])
    weights = [number(each) for each in names(draft.get("interleave_prob", default=[]))]
    if weights:
        draft.notes.append(f"interleave_prob: {INTERLEAVED}")
    for at, text in enumerate(given if isinstance(given, list) else str(given).split()):
        draft.add_source(
            f"dataset: {text}", weight=weights[at] if at < len(weights) else None, **_source(draft, str(text), what)
        )
    evaluation = draft.get("val_dataset", default=[])
    others = evaluation if isinstance(evaluation, list) else str(evaluation).split()
    if others:
        draft.put("dataset.eval", _source(draft, str(others[0]), what)["train"], "val_dataset")
    if len(others) > 1:
        draft.drop("val_dataset", f"peftcli evaluates on one dataset, here {others[0]}")
    share = draft.get("split_dataset_ratio")
    if share is not None and number(share) and not others:
        draft.put("dataset.eval_fraction", number(share), "split_dataset_ratio")


def _source(draft: Draft, text: str, what: str) -> dict[str, Any]:
    """Return our settings of a dataset, as in ``HF::owner/name:subset#500``."""
    name, _, limit = text.partition("#")
    hub = re.match(r"(?i)(hf|ms)::", name)
    name = name[hub.end() :] if hub else name
    path = draft.path(name)
    name, _, subset = (
        (path, "", "") if "/" not in name or path != name or name.startswith((".", "/")) else name.partition(":")
    )
    columns = {key.partition(".")[2]: value for key, value in draft.values.items() if key.startswith("columns.")}
    found = first_columns(path)
    form, mapped = _columns(columns, found, what)
    if (
        not found
        and not (hub and hub[1].lower() == "hf")
        and name == path
        and "/" in name
        and not name.startswith(("/", "."))
    ):
        draft.notes.append(f"dataset: {name}: an id of ModelScope's hub; peftcli reads Hugging Face's")
    return {
        "train": name or path,
        "name": subset,
        "limit": int(limit) if limit.isdigit() else None,
        "format": form,
        "columns": mapped,
    }


def _columns(given: dict[str, str], found: list[str], what: str) -> tuple[str | None, dict[str, str]]:
    """Return our format, and our columns, of ms-swift's rows: messages, or query and response."""
    named = {ours: theirs for theirs, ours in given.items()}  # their standard name -> the file's column
    if what == "pt":
        return ("text", {}) if "text" in found else (None, {})
    query = next(
        (named.get(each, each) for each in ("query", "prompt", "instruction") if named.get(each, each) in found), None
    )
    response = next((named.get(each, each) for each in ("response", "output") if named.get(each, each) in found), None)
    if what == "sft" and query and response and {query, response} != {"instruction", "output"}:
        return "alpaca", {"instruction": query, "output": response}
    if named.get("messages"):
        return "messages", {"messages": named["messages"]}
    return None, {}


def _trained(draft: Draft, what: str) -> None:
    supervised = what in ("sft", "pt")
    packing = draft.get("packing")
    if packing is not None and truth(packing):
        if supervised:
            draft.put("dataset.packing", True, "packing")
        else:
            draft.drop("packing", "concerns supervised training; answers that are compared are not packed")
    cut = str(draft.get("truncation_strategy", default="delete")).lower()
    source = (
        "from: truncation_strategy"
        if draft.get("truncation_strategy")
        else "ms-swift's default truncation_strategy: delete"
    )
    overlong = {"delete": "drop", "right": "truncate", "left": "truncate", "raise": "error", "split": "split"}.get(cut)
    if cut == "left":
        source += " (ms-swift cuts the start, peftcli the end)"
    if overlong:
        draft.say("dataset.overlong", overlong, source)
    if not draft.get("max_length"):
        draft.drop(
            "max_length (no value)",
            "without it ms-swift takes the longest input that the model can read; "
            "peftcli takes dataset.max_length: 1024",
        )
    scale = str(draft.get("loss_scale", default="default"))
    if not supervised:
        if draft.get("loss_scale") is not None:
            draft.drop("loss_scale", "concerns supervised training; answers alone are compared")
        return
    found = {"default": "answers", "last_round": "last_answer", "all": "all"}.get(scale)
    if found is None:
        draft.drop("loss_scale", "weights of parts of an answer; peftcli counts each target alike")
    draft.say(
        "dataset.train_on",
        "all" if what == "pt" else found or "answers",
        "from: loss_scale" if draft.get("loss_scale") is not None else "ms-swift's default loss_scale",
    )


PEER = Peer(
    name="ms-swift",
    label="ms-swift",
    table=TABLE,
    signs=(
        "train_type",
        "tuner_type",
        "sft_type",
        "rlhf_type",
        "split_dataset_ratio",
        "attn_impl",
        "quant_bits",
        "lora_rank",
        "loss_scale",
        "val_dataset",
    ),
    build=_build,
    defaults={
        **DEFAULTS,
        "method.r": 8,
        "method.lora_alpha": 32,
        "method.lora_dropout": 0.05,
        "method.target_modules": "all-linear",
        "training.per_device_train_batch_size": 1,
        "training.per_device_eval_batch_size": 1,
        "training.learning_rate": 1e-4,
        "training.lr_scheduler_type": "cosine",
        "training.weight_decay": 0.1,
        "training.adam_beta2": 0.95,
        "training.gradient_checkpointing": True,
        "training.logging_steps": 5,
    },
)
