"""Adapters and base models that look odd, and are as they may be: every command must take them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import trainkit
from adapter_folders import CONFIG, SETTINGS, WEIGHTS, Folder, change_json, from_base, generate, info, merge
from bad_adapter_cases import BOMBS, LOADED, MATCHES_NOTHING, Command
from bad_base_cases import EVIL, SINGLE, Evil
from safetensors.torch import load, save
from tables import cases

BOTH: tuple[Command, ...] = (info, generate)
ALL: tuple[Command, ...] = (info, generate, merge)
BASE: tuple[Command, ...] = (from_base,)


@dataclass(frozen=True)
class Valid:
    """An adapter that is as it may be."""

    change: Callable[[Folder], object]
    commands: tuple[Command, ...] = BOTH
    method: str = "lora"


def _peft(method: str, **settings: Any) -> Callable[[Folder], None]:
    """An adapter that PEFT wrote."""

    def change(folder: Folder) -> None:
        import warnings

        import peft

        class_name = {
            "lora": "LoraConfig",
            "ia3": "IA3Config",
            "vera": "VeraConfig",
            "prompt_tuning": "PromptTuningConfig",
        }
        config = getattr(peft, class_name[method])(**{**SETTINGS.get(method, {}), **settings}, task_type="CAUSAL_LM")
        shutil.rmtree(folder.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(trainkit.build("llama"), config)
            model.peft_config["default"].base_model_name_or_path = str(trainkit.base_folder())
            model.save_pretrained(str(folder.path))

    return change


def _old(**more: Any) -> Callable[[Folder], None]:
    """adapter_config.json as earlier versions of PEFT wrote it."""

    def change(folder: Folder) -> None:
        said = json.loads((folder.path / CONFIG).read_bytes())
        keep = ("base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules", "task_type")
        folder.raw(json.dumps({key: said[key] for key in keep} | more))

    return change


_OF_0_5 = {
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "revision": None,
}
_OF_0_18 = _OF_0_5 | {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_bias": False,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "peft_version": "0.18.0",
    "qalora_group_size": 16,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def _rewritten(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], notes: dict[str, str] | None = None
) -> Callable[[Folder], None]:
    """The same tensors in another file."""

    def apply(folder: Folder) -> None:
        path = folder.path / WEIGHTS
        path.write_bytes(save(change(load(path.read_bytes())), notes))

    return apply


def _all_to(dtype: torch.dtype) -> Callable[[Folder], None]:
    return _rewritten(lambda values: {name: value.to(dtype) for name, value in values.items()}, {"format": "pt"})


def _mixed(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    return {name: value.to(kinds[number % 4]) for number, (name, value) in enumerate(values.items())}


def _padded(folder: Folder) -> None:
    content = (folder.path / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    folder.weights(content[8 : 8 + size] + b" " * 5000, content[8 + size :])


def _turned_header(folder: Folder) -> None:
    def change(said: dict[str, Any]) -> None:
        for name in list(said)[::-1]:
            said[name] = said.pop(name)

    folder.header(change)


def _moved(name: str, link: bool = False) -> Callable[[Folder], None]:
    """The folder under another name, or a link of that name to it."""

    def change(folder: Folder) -> None:
        place = folder.place / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if link:
            place.symlink_to(folder.path)
        else:
            folder.path.rename(place)
        folder.names.append(name)

    return change


def _linked_files(folder: Folder) -> None:
    """As the hub's cache holds them."""
    blobs = folder.place / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.path.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")


def _among_others(folder: Folder) -> None:
    for name, content in (
        ("README.md", b"# Adapter\n"),
        (".gitattributes", b"* filter=lfs\n"),
        ("optimizer.pt", pickle.dumps(Evil())),
        ("adapter_model.bin", pickle.dumps(Evil())),
        ("training_args.bin", pickle.dumps(Evil())),
        ("modeling_evil.py", EVIL.encode()),
        ("trainer_state.json", b"{"),
        ("events.out.tfevents", b"\0"),
    ):
        (folder.path / name).write_bytes(content)
    (folder.path / "checkpoint-10").mkdir()
    os.mkfifo(folder.path / ".lock-of-somebody")


def _evil_mapping(folder: Folder) -> None:
    (folder.place / "evil_library.py").write_text(EVIL)
    folder.config(auto_mapping={"base_model_class": "Evil", "parent_library": "evil_library"})


def _own_tokenizer(folder: Folder) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(trainkit.base_folder() / name, folder.path / name)


def _base(**changes: Any) -> Valid:
    return Valid(lambda folder: folder.base_config(**changes), BASE)


def _base_file(name: str, content: bytes) -> Valid:
    return Valid(lambda folder: (folder.base / name).write_bytes(content), BASE)


def _base_in(dtype: torch.dtype) -> Callable[[Folder], None]:
    return lambda folder: shutil.copytree(trainkit.base_folder(dtype=dtype), folder.place / "base") and None


def _linked_base(folder: Folder) -> None:
    for path in list(folder.base.iterdir()):
        path.rename(folder.place / f"blob-{path.name}")
        path.symlink_to(folder.place / f"blob-{path.name}")


_OTHERS: dict[str, Valid] = {
    **{
        f"{method}, written here": Valid(lambda folder: None, BOTH, method)
        for method in ("lora", "ia3", "vera", "adalora", "prompt_tuning", "prefix_tuning", "trainable_tokens")
    },
    **{f"{method}, written by PEFT": Valid(_peft(method)) for method in ("lora", "ia3", "vera", "prompt_tuning")},
    **{
        f"{key}: {name}": Valid(
            lambda folder, key=key, bomb=BOMBS[name]: folder.config(**{key: {bomb: 4} if "pattern" in key else bomb}),
            LOADED,
        )
        for key, name in MATCHES_NOTHING
    },
    "names of tensors as in memory": Valid(
        lambda folder: folder.tensors(
            lambda values: [
                values.update({name.replace(".weight", ".default.weight"): values.pop(name)}) for name in list(values)
            ]
        ),
        LOADED,
    ),
    "50,000 names": Valid(lambda folder: folder.config(rank_pattern={f"l{n}_proj": 2 for n in range(50_000)}), LOADED),
    "the keys of PEFT 0.18": Valid(_old(**_OF_0_18), ALL),
    "a class of its base model that is code": Valid(_evil_mapping),
    "modules as whole names": Valid(
        lambda folder: folder.config(
            target_modules=[f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qv"]
        )
    ),
    "modules 70,000 times": Valid(lambda folder: folder.config(target_modules=["q_proj", "v_proj"] * 35_000)),
    "an r for every module": Valid(
        lambda folder: folder.config(
            r=8, rank_pattern={f"model.layers.{n}.self_attn.{p}_proj": 4 for n in (0, 1) for p in "qv"}
        )
    ),
    "indented by tabs, with carriage returns": Valid(
        lambda folder: folder.raw(
            json.dumps(json.loads((folder.path / CONFIG).read_bytes()), indent="\t").replace("\n", "\r\n")
        )
    ),
    "a byte order mark": Valid(lambda folder: folder.raw(b"\xef\xbb\xbf" + (folder.path / CONFIG).read_bytes())),
    "letters written as \\u": Valid(
        lambda folder: folder.raw((folder.path / CONFIG).read_text().replace("LORA", "\\u004cORA"))
    ),
    "a config of a megabyte": Valid(
        lambda folder: folder.raw(
            (folder.path / CONFIG).read_bytes() + b" " * ((1 << 20) - (folder.path / CONFIG).stat().st_size)
        )
    ),
    "no notes in the header": Valid(_rewritten(lambda values: values), ALL),
    "many notes in the header": Valid(
        _rewritten(lambda values: values, {"format": "pt", **{str(n): "x" for n in range(999)}})
    ),
    "a header padded with spaces": Valid(_padded, ALL),
    "a header turned round": Valid(_turned_header, ALL),
    "bfloat16": Valid(_all_to(torch.bfloat16), ALL),
    "float16": Valid(_all_to(torch.float16), ALL),
    "float64": Valid(_all_to(torch.float64), ALL),
    "8 bits": Valid(_all_to(torch.float8_e4m3fn)),
    "several number formats": Valid(_rewritten(_mixed), ALL),
    "zeros": Valid(_rewritten(lambda values: {name: torch.zeros_like(value) for name, value in values.items()}), ALL),
    "the largest float32": Valid(
        _rewritten(lambda values: {**values, next(iter(values)): torch.full_like(values[next(iter(values))], 3.4e38)}),
        (info,),
    ),
    "files that are links": Valid(_linked_files, ALL),
    "among files of other tools": Valid(_among_others, ALL),
    "with a tokenizer of its own": Valid(_own_tokenizer, ALL),
    "read-only": Valid(lambda folder: [path.chmod(0o444) for path in folder.path.iterdir()]),
    "a base model in several files": Valid(lambda folder: folder.several_files() and None, (from_base,)),
    "a base model in bfloat16": Valid(_base_in(torch.bfloat16), BASE),
    "a base model in float16": Valid(_base_in(torch.float16), BASE),
    "a base model of links": Valid(_linked_base, BASE),
    "a base model with code that is not needed": Valid(
        lambda folder: [
            (folder.base / "modeling_llama.py").write_text(EVIL),
            folder.base_config(
                auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM", "AutoConfig": "modeling_llama.C"}
            ),
        ],
        BASE,
    ),
    "a base model with infinity in its config": Valid(
        lambda folder: folder.base_config(time_step_limit=[0.0, float("inf")]), BASE
    ),
    "a base model with a key twice": Valid(
        lambda folder: (folder.base / "config.json").write_text(
            (folder.base / "config.json").read_text().replace("{", '{"model_type": "x",', 1)
        ),
        BASE,
    ),
    "a base model with the labels of a classifier": _base(id2label={str(n): f"l{n}" for n in range(20_000)}),
    "a base model without a generation config": Valid(
        lambda folder: (folder.base / "generation_config.json").unlink(), BASE
    ),
    "a base model with files of other tools": Valid(
        lambda folder: [(folder.base / "flax_model.msgpack").write_bytes(b"x"), (folder.base / "onnx").mkdir()], BASE
    ),
    "a base model with tensors that it does not use": Valid(
        lambda folder: (folder.base / SINGLE).write_bytes(
            save({**load((folder.base / SINGLE).read_bytes()), "extra.weight": torch.zeros(2)}, {"format": "pt"})
        ),
        BASE,
    ),
    "a generation config of one key": Valid(
        lambda folder: change_json(folder.base / "generation_config.json", transformers_version=..., eos_token_id=2),
        BASE,
    ),
}
VALID: dict[str, Valid] = cases("good_adapters", globals(), valid=_OTHERS)["valid"]
