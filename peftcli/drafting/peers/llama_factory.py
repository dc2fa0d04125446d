"""LLaMA-Factory: a YAML file, or arguments, that name datasets of a ``dataset_info.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.drafting.peers.base import (
    INTERLEAVED,
    By,
    Draft,
    NotCarried,
    Peer,
    Rule,
    To,
    if_true,
    modules,
    names,
    needless,
    number,
    quantise_bits,
    reasons,
    renamed,
    template,
    truth,
)
from peftcli.drafting.peers.preference import ONE_TURN, loss_settings, preference, refuse_sampling
from peftcli.drafting.peers.training_arguments import DEFAULTS, LORA, deepspeed
from peftcli.drafting.peers.training_arguments import TABLE as ARGUMENTS
from peftcli.errors import UsageError
from peftcli.guard.files import is_file, read_json_object

_INFO = "dataset_info.json"
_MAX_INFO = 4_000_000
_PAIRS = {"sigmoid": "dpo", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}


def _attention(value: Any) -> str | None:
    found = {"fa2": "flash_attention_2", "sdpa": "sdpa", "disabled": "eager", "auto": None}
    if str(value) not in found:
        raise NotCarried("peftcli has no such implementation of attention; transformers' default is used")
    return found[str(value)]


TABLE: dict[str, Rule] = {
    **ARGUMENTS,
    **LORA,
    **renamed("model_name_or_path lora_rank cutoff_len max_samples adapter_name_or_path"),
    "model_revision": To("base_model.revision"),
    "trust_remote_code": By("base_model.trust_remote_code"),
    "flash_attn": To("base_model.attn_implementation", _attention),
    "quantization_bit": By("base_model.quantization"),
    "quantization_method": By("base_model.quantization"),
    "quantization_type": By("base_model.quantization"),
    "double_quantization": By("base_model.quantization"),
    "add_tokens": To("base_model.new_tokens", names),
    "new_special_tokens": To("base_model.new_tokens", names),
    "add_special_tokens": To("base_model.new_tokens", names),
    "template": By("base_model.chat_template"),
    "stage": By("task.type"),
    "finetuning_type": By("method.type"),
    "lora_target": To("method.target_modules", modules),
    "additional_target": To("method.modules_to_save", names),
    "pissa_init": To("method.init_lora_weights", if_true("pissa")),
    "pissa_iter": "iterations of the fast PiSSA; see method.init_lora_weights: pissa_niter_16",
    "pissa_convert": "peftcli saves PiSSA as a plain LoRA in any case",
    "loraplus_lr_ratio": To("training.loraplus_lr_ratio", number),
    "loraplus_lr_embedding": To("training.loraplus_lr_embedding", number),
    "oft_rank": By("method.r"),
    "oft_block_size": By("method.oft_block_size"),
    "oft_target": By("method.target_modules"),
    "module_dropout": By("method.module_dropout"),
    "pref_loss": By("task.loss"),
    "pref_beta": By("task.beta"),
    "simpo_gamma": By("task.simpo_gamma"),
    "dpo_label_smoothing": By("task.label_smoothing"),
    "kto_chosen_weight": By("task.desirable_weight"),
    "kto_rejected_weight": By("task.undesirable_weight"),
    "pref_ftx": "a share of supervised loss beside DPO's, which peftcli does not add; orpo has one of its own",
    "pref_bco_weight": "a share of another loss beside DPO's, which peftcli does not add",
    "ref_model": "another reference model; peftcli compares with the base model, adapter off",
    "ref_model_adapters": "another reference model; peftcli compares with the base model, adapter off",
    "dataset": By("dataset.train"),
    "dataset_dir": By("dataset.train"),
    "eval_dataset": By("dataset.eval"),
    "val_size": By("dataset.eval_fraction"),
    "mix_strategy": By("dataset.mix"),
    "interleave_probs": By("dataset.mix"),
    "streaming": By("dataset.streaming"),
    "packing": By("dataset.packing"),
    "neat_packing": By("dataset.packing"),
    "train_on_prompt": By("dataset.train_on"),
    "mask_history": By("dataset.train_on"),
    "enable_liger_kernel": To("training.use_liger_kernel", truth),
    "pure_bf16": To("training.bf16", truth),
    "disable_gradient_checkpointing": To("training.gradient_checkpointing", lambda value: not truth(value)),
    "disable_shuffling": To("training.train_sampling_strategy", if_true("sequential")),
    "shift_attn": "another attention while training, which peftcli does not have",
    "resize_vocab": "the vocabulary follows base_model.new_tokens",
    "split_special_tokens": "how special tokens in texts are read; peftcli reads them as the tokenizer does",
    "use_swanlab": "peftcli reports to tensorboard, wandb, mlflow and trackio, not to SwanLab",
    "enable_thinking": "how the template treats thinking; the base model's own template decides",
    "default_system": "a system turn for rows without one; write it into the rows",
    "tool_format": "how tools are written; the base model's own template decides",
    "rope_scaling": "another way of counting positions, beyond the length of the base model",
    "create_new_adapter": "an adapter beside another one; peftcli trains one adapter of the base model",
    "buffer_size": "rows of a stream that are shuffled; peftcli shuffles all rows",
    "moe_aux_loss_coef": "a term of mixtures of experts in the loss; peftcli trains the loss of the targets alone",
    "compute_accuracy": "peftcli's evaluation has eval_token_accuracy in any case",
    "ignore_pad_token_for_loss": "padding never counts in the loss here",
    "tokenized_path": "where it keeps prepared data; peftcli has its own cache",
    **needless("plot_loss"),
    **reasons(
        cache="overwrite_cache cache_dir media_dir data_shared_file_system",
        workers="preprocessing_num_workers preprocessing_batch_size",
        speed=(
            "use_unsloth use_unsloth_gc use_cache upcast_layernorm upcast_lmhead_output "
            "low_cpu_mem_usage use_fast_tokenizer offload_folder"
        ),
        infer=(
            "predict_with_generate max_new_tokens temperature top_p top_k num_beams infer_backend infer_dtype "
            "eval_num_beams do_sample repetition_penalty length_penalty"
        ),
        vision=(
            "image_max_pixels image_min_pixels video_max_pixels video_min_pixels freeze_vision_tower "
            "freeze_multi_modal_projector freeze_language_model video_fps video_maxlen audio_sampling_rate"
        ),
        method=(
            "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules use_galore use_apollo use_badam "
            "use_llama_pro use_adam_mini use_muon ld_alpha"
        ),
        hub="hf_hub_token export_hub_model_id use_modelscope",
        log="include_effective_tokens_per_second eval_on_each_dataset swanlab_project swanlab_run_name",
        process="ray_run_name ray_storage_path ray_num_workers placement_strategy resources_per_worker",
    ),
}


def _build(draft: Draft) -> None:
    kind = str(draft.get("finetuning_type", default="lora"))
    if kind not in ("lora", "oft"):
        draft.refuse_full(f"finetuning_type: {kind}")
    _method(draft, kind)
    _task(draft)
    quantise_bits(draft, "quantization_bit", "quantization_method", "quantization_type", "double_quantization")
    if draft.get("trust_remote_code") is not None:
        draft.drop(
            "trust_remote_code",
            "runs the model's own code; few models need it. If yours does, set "
            "base_model.trust_remote_code with base_model.revision, the commit that you have read",
        )
    _template(draft)
    _data(draft)
    deepspeed(draft)


def _method(draft: Draft, kind: str) -> None:
    source = "finetuning_type" if draft.get("finetuning_type") else "LLaMA-Factory's default finetuning_type"
    draft.say("method.type", kind, f"from: {source}")
    own = {"oft": ("oft_rank", "oft_block_size", "oft_target", "module_dropout")}
    for key in own["oft"]:
        rule = draft.peer.table[key]
        if draft.get(key) is None or not isinstance(rule, By):
            continue
        if kind != "oft":
            draft.drop(key, "a setting of OFT, which the recipe does not choose")
        elif key != "oft_rank" or number(draft.get(key)):
            draft.put(rule.key, modules(draft.get(key)) if key == "oft_target" else number(draft.get(key)), key)
    if kind == "oft":
        draft.settings.setdefault(
            "method.target_modules", draft.settings.get("method.target_modules") or draft.default("all-linear")
        )
        return
    rank = draft.settings.get("method.r")
    for name, value in (("r", 8), ("target_modules", "all-linear"), ("lora_dropout", 0.0)):
        if f"method.{name}" not in draft.settings:
            draft.settings[f"method.{name}"] = draft.default(value)
    if "method.lora_alpha" not in draft.settings:
        twice = 2 * int(number(rank.value if rank else 8))
        draft.say("method.lora_alpha", twice, "LLaMA-Factory's default: twice lora_rank")


def _task(draft: Draft) -> None:
    stage = str(draft.get("stage", default="sft"))
    if stage == "ppo":
        refuse_sampling(draft, "stage: ppo")
    if stage in ("dpo", "kto"):
        loss = "kto" if stage == "kto" else _PAIRS.get(str(draft.get("pref_loss", default="sigmoid")))
        if loss is None:
            draft.refuse(
                f"pref_loss: {draft.get('pref_loss')} cannot be imported", "It imports sigmoid, ipo, orpo and simpo."
            )
        preference(draft, loss, "pref_loss" if draft.get("pref_loss") else "stage", beta=0.1)
    elif stage == "rm":
        draft.put("task.type", "reward", "stage")
    elif stage in ("sft", "pt"):
        draft.put("task.type", "causal_lm", "stage")
    else:
        draft.refuse(f"stage: {stage} cannot be imported", "It imports pt, sft, rm, dpo and kto.")
    loss = draft.settings["task.loss"].value if "task.loss" in draft.settings else None
    loss_settings(
        draft,
        loss,
        beta="pref_beta",
        label_smoothing="dpo_label_smoothing",
        desirable_weight="kto_chosen_weight",
        undesirable_weight="kto_rejected_weight",
    )
    if draft.get("pref_loss") is not None and stage != "dpo":
        draft.drop("pref_loss", "a loss of stage dpo, which the recipe does not choose")


def _template(draft: Draft) -> None:
    template(draft, "template")
    if draft.get("template") == "default":
        draft.drop(
            "template",
            "plain text around the turns; the base model's own chat template is used, or, without one, "
            "Alpaca's headings",
        )


def _data(draft: Draft) -> None:
    compared = draft.settings["task.type"].value != "causal_lm"
    if draft.get("stage") == "pt":
        draft.say("dataset.packing", True, "LLaMA-Factory packs texts in stage pt")
    for key in ("packing", "neat_packing"):
        if draft.get(key) is not None and truth(draft.get(key)):
            if compared:
                draft.drop(key, "concerns supervised training; answers that are compared are not packed")
            else:
                draft.put("dataset.packing", True, f"{key} (in peftcli an example sees no other one of its row)")
    if truth(draft.get("train_on_prompt", default=False)):
        draft.put("dataset.train_on", "all", "train_on_prompt")
    elif truth(draft.get("mask_history", default=False)):
        draft.put("dataset.train_on", "last_answer", "mask_history")
    elif not compared:
        draft.say("dataset.train_on", "answers", "LLaMA-Factory's default: prompts are masked")
    info, folder = _info(draft)
    given = names(draft.get("dataset", default=[]))
    weights = [number(each) for each in names(draft.get("interleave_probs", default=[]))]
    if str(draft.get("mix_strategy", default="concat")).startswith("interleave"):
        weights = weights or [1] * len(given)
        draft.notes.append(f"mix_strategy: {INTERLEAVED}")
    for at, name in enumerate(given):
        draft.add_source(
            f"dataset: {name}",
            weight=weights[at] if at < len(weights) else None,
            **_source(draft, name, info, folder, compared),
        )
    if len(draft.sources) > 1 and (limit := draft.settings.pop("dataset.limit", None)):
        draft.sources = [{**each, "limit": limit.value} for each in draft.sources]
        draft.carried["max_samples"] = "dataset.mix[].limit"
    if (others := names(draft.get("eval_dataset", default=[]))) and info is not None:
        draft.put("dataset.eval", _source(draft, others[0], info, folder, compared)["train"], "eval_dataset")
        if len(others) > 1:
            draft.drop("eval_dataset", f"peftcli evaluates on one dataset, here {others[0]}")
    if (size := draft.get("val_size")) is not None and number(size):
        if number(size) >= 1:
            draft.drop("val_size", "a number of rows; peftcli holds out a share: set dataset.eval_fraction")
        else:
            draft.put("dataset.eval_fraction", number(size), "val_size")


def _info(draft: Draft) -> tuple[dict[str, Any] | None, Path]:
    """Find ``dataset_info.json``; return its datasets and its folder, or None where the hub is read directly."""
    given = str(draft.get("dataset_dir", default="data"))
    if given == "ONLINE":
        return None, Path()
    here = draft.file.parent
    for folder in (Path(given), here / given, here):
        if is_file(folder / _INFO):
            return read_json_object(folder / _INFO, _MAX_INFO, UsageError), folder
    return draft.refuse(
        f"dataset: its datasets are described in {_INFO}, which is neither in {given} nor beside this file",
        f"Copy LLaMA-Factory's {_INFO} beside this file.",
    )


def _source(draft: Draft, name: str, info: dict[str, Any] | None, folder: Path, compared: bool) -> dict[str, Any]:
    """Return our settings of a dataset: file, form and columns."""
    if info is None:
        return {"train": name}
    entry = info.get(name)
    if not isinstance(entry, dict):
        draft.refuse(f"dataset: {name} is not described in {folder / _INFO}", "Correct the name, or add its entry.")
    path = entry.get("hf_hub_url") or entry.get("file_name") or entry.get("ms_hub_url")
    if path is None:
        draft.refuse(
            f"dataset: {name} is made by a script, which peftcli does not run",
            "Write its rows into a .jsonl file, and name that under dataset.train.",
        )
    hub = bool(entry.get("hf_hub_url")) or "file_name" not in entry
    columns = _mapping(entry, "columns")
    form, mapped = _columns(draft, name, entry, columns, compared)
    for key in entry:
        if key not in _ENTRY:
            draft.drop(f"{_INFO}: {name}.{key}", "unknown to this importer", entry[key])
    return {
        "train": path if hub else draft.path(path, folder),
        "name": entry.get("subset"),
        "split": entry.get("split"),
        "revision": entry.get("revision"),
        "limit": entry.get("num_samples"),
        "format": form,
        "columns": {ours: theirs for ours, theirs in mapped.items() if theirs and theirs != ours},
    }


def _mapping(entry: dict[str, Any], key: str) -> dict[str, Any]:
    found = entry.get(key)
    return found if isinstance(found, dict) else {}


_ENTRY = (
    *("hf_hub_url", "ms_hub_url", "om_hub_url", "file_name", "formatting", "ranking", "subset", "split", "revision"),
    *("num_samples", "columns", "tags", "folder", "file_sha1"),
)


def _columns(
    draft: Draft, name: str, entry: dict[str, Any], columns: dict[str, Any], compared: bool
) -> tuple[str | None, dict[str, Any]]:
    tags = _mapping(entry, "tags")
    sharegpt = entry.get("formatting") == "sharegpt"
    for key in ("images", "videos", "audios"):
        if key in columns:
            draft.drop(
                f"{_INFO}: {name}.columns.{key}",
                "pictures, videos and sounds; this importer carries texts",
                columns[key],
            )
    if compared:
        return None, _answers(draft, name, sharegpt, columns)
    if draft.get("stage") == "pt":
        return "text", {"text": columns.get("prompt", "text")}
    if not sharegpt:
        given = {
            "instruction": "prompt",
            "input": "query",
            "output": "response",
            "system": "system",
            "history": "history",
        }
        return "alpaca", {ours: columns.get(theirs) for ours, theirs in given.items()}
    messages, tools = (
        columns.get("messages", "conversations"),
        {"tools": columns.get("tools"), "system": columns.get("system")},
    )
    parts = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if parts == ("role", "content"):
        return "messages", {"messages": messages} | tools
    if parts != ("from", "value"):
        draft.drop(
            f"{_INFO}: {name}.tags", "names of a turn's parts; peftcli reads from and value, or role and content", tags
        )
    return "sharegpt", {"conversations": messages} | tools


def _answers(draft: Draft, name: str, sharegpt: bool, columns: dict[str, Any]) -> dict[str, Any]:
    """Return our columns of rows whose answers are compared."""
    prompt = columns.get("messages", "conversations") if sharegpt else columns.get("prompt", "instruction")
    if not sharegpt and "query" in columns:
        reason = "is joined to the prompt there; join the two columns in the file"
        draft.drop(f"{_INFO}: {name}.columns.query", reason, columns["query"])
    found = {"prompt": prompt, "system": columns.get("system")}
    if "kto_tag" in columns:
        return found | {"completion": columns.get("response", "output"), "label": columns["kto_tag"]}
    if sharegpt:
        draft.notes.append(f"dataset: {name}: {ONE_TURN}")
    return found | {key: columns.get(key, key) for key in ("chosen", "rejected")}


PEER = Peer(
    name="llama-factory",
    label="LLaMA-Factory",
    table=TABLE,
    signs=(
        "stage",
        "finetuning_type",
        "cutoff_len",
        "lora_target",
        "template",
        "dataset_dir",
        "lora_rank",
        "val_size",
        "overwrite_cache",
        "quantization_bit",
        "plot_loss",
    ),
    build=_build,
    defaults={
        **DEFAULTS,
        "dataset.max_length": 2048,
        "training.gradient_checkpointing": True,
    },
)
