"""Adapters that are wrong, by hand: how each is spoilt, and words of the message that every command must give."""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import trainkit
from adapter_folders import CONFIG, WEIGHTS, Folder, from_base, generate, info, merge
from tables import cases

from peftcli.methods import NOT_HERE

Command = Callable[[Folder], list[object]]
BOTH: tuple[Command, ...] = (info, generate)
INFO, GENERATE = (info,), (generate,)
LOADED: tuple[Command, ...] = (generate, merge)
"""What needs the base model to be seen as wrong."""
Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"
STEER = "\x1b[31m\x1b]0;owned\x07\r\n\u202eerror: nothing is wrong"
"""Colours, a title for the window, a line of its own, and letters from right to left."""
NOT_ASKED = ("base_model_name_or_path", "revision")
"""What a reader that is given the base model does not need."""
HUGE = 10**12
GREATEST = 2**63 - 1


@dataclass(frozen=True)
class Case:
    """An adapter that is wrong."""

    spoil: Callable[[Folder], object]
    says: tuple[str, ...]
    """Words of the message."""
    commands: tuple[Command, ...] = BOTH
    code: int = 4
    method: str = "lora"
    anywhere: bool = True
    """Whether it is wrong for any reader; else only a limit or a choice of peftcli's."""


def here(case: Case) -> Case:
    """The case, as one that another reader may well take."""
    return replace(case, anywhere=False)


def config(says: str, commands: tuple[Command, ...] = BOTH, method: str = "lora", **changes: Any) -> Case:
    """Other settings in adapter_config.json, of which the message names the first."""
    key = next(iter(changes))
    return Case(lambda folder: folder.config(**changes), (CONFIG, f"{key}: ", says), commands, method=method)


def loaded(says: str, method: str = "lora", **changes: Any) -> Case:
    """Settings that only the base model or the tensors show to be wrong."""
    return Case(lambda folder: folder.config(**changes), ("adapter_", says), LOADED, method=method)


def raw(text: str | bytes, *says: str) -> Case:
    """Another adapter_config.json."""
    return Case(lambda folder: folder.raw(text), (CONFIG, *says))


def weights(*says: str, header: str | bytes, data: bytes = b"", size: int | None = None) -> Case:
    """A file of weights that was made by hand."""
    return Case(lambda folder: folder.weights(header, data, size), (WEIGHTS, *says))


def bytes_instead(content: bytes, *says: str) -> Case:
    """Another kind of file under the name of the weights."""
    return Case(lambda folder: (folder.path / WEIGHTS).write_bytes(content), (WEIGHTS, *says))


def tensors(change: Callable[[dict[str, torch.Tensor]], object], *says: str, commands: tuple[Command, ...]) -> Case:
    return Case(lambda folder: folder.tensors(change), (WEIGHTS, *says), commands)


def instead(name: str, make: Callable[[Path], object], says: str, commands: tuple[Command, ...] = BOTH) -> Case:
    """Something else in the place of one of the adapter's files."""
    return Case(lambda folder: folder.replace(folder.path / name, make), (name, says), commands)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        before = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(before)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _pipe_behind_link(path: Path) -> None:
    os.mkfifo(path.with_name(".pipe"))
    path.symlink_to(".pipe")


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "is a pipe, not a regular file"),
    "link to a pipe": (_pipe_behind_link, "is a pipe, not a regular file"),
    "socket": (_socket, "is a socket, not a regular file"),
    "folder": (Path.mkdir, "is a folder, not a regular file"),
    "link to a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "link to itself": (_loop, "cannot be read: Too many levels of symbolic links"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "cannot be read: No such file"),
}
"""What stands in the place of a file."""


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return file.getvalue()


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


def header(changes: dict[str, Any], size: int, says: str) -> Case:
    """A header whose one tensor is another than the ``size`` bytes after it."""
    return weights(says, header=json.dumps({"a": _entry(**changes)}), data=bytes(size))


def setting(key: str, value: Any, says: str) -> Case:
    """Another value of a setting, which is wrong for any reader unless it is out of range."""
    case = config(says, **{key: value})
    return replace(case, anywhere=key not in NOT_ASKED and not says.startswith("must be"))


NO_CONFIG = {
    "missing": Case(lambda folder: (folder.path / CONFIG).unlink(), (f"no {CONFIG} here",)),
    "empty folder": Case(lambda folder: [path.unlink() for path in folder.path.iterdir()], (f"no {CONFIG} here",)),
    **{f"{name} as the config": instead(CONFIG, make, says) for name, (make, says) in NO_FILES.items()},
    "only zeros": raw(bytes(100), ":1: not valid JSON"),
    "100 MB of nothing": here(Case(lambda folder: os.truncate(folder.path / CONFIG, 100 << 20), (CONFIG, "at most"))),
    "a strange key twice": raw(json.dumps({STEER: 1})[:-1] + "," + json.dumps({STEER: 2})[1:], "is given twice"),
}
"""adapter_config.json as a file."""

NO_METHOD = {
    **{name: config(f"{name} is not supported", peft_type=name) for name in NOT_HERE},
}
"""peft_type."""

NO_SETTING = {
    "an unknown key of 100,000 entries": here(config("is not supported", lora_magic=list(range(100_000)))),
    **{
        f"{key} is {json.dumps(value)[:30]}": setting(key, value, says)
        for key, value, says in (
            ("target_modules", ["q" * 100_000], "holds a name of 100,000 characters"),
            ("layer_replication", [[0, 2]] * 50_000, "makes more than 500 layers"),
            ("base_model_name_or_path", "a" * 100_000, "holds a name of 100,000 characters"),
        )
    },
}
"""Settings, of every type."""

BOMBS = {
    "stars in stars": "(a*)*b",
    "any in any": "(.*)*x",
    "or": "(a|a)*b",
    "deep": "(((((.*)*)*)*)*)*x",
    "counted": "(?:(?:(?:a?){30}){30}){30}b",
    "many": ".*" * 900 + "x",
    "classes": r"^(([a-z_.])+.)+[A-Z]([a-z])+$",
    "looking ahead": "(?:(?=(?:(?=(?:(?=.*a).)*).)*).)*z",
    "looking ahead, nested": "(?=" * 300 + "a" + ")" * 300,
    "any letter": "(?i)" + "[\\x01-\\U0010ffff]" * 100,
    "nothing, again and again": "(?:(?:){60000}){60000}b",
    "parentheses": "(" * 900 + "a" + ")" * 900,
}
MATCHES_NOTHING = [
    (key, name)
    for key in ("exclude_modules", "rank_pattern", "alpha_pattern")
    for name in ("stars in stars", "any in any", "or", "deep", "many", "classes", "looking ahead", "any letter")
    if (key, name) not in (("rank_pattern", "any letter"), ("alpha_pattern", "any letter"))
]
"""Settings with a bomb that is soon known to match no module, which an adapter's file may have there."""
PATTERNS = {
    **{
        f"{key}: {name}": Case(
            lambda folder, key=key, bomb=bomb: folder.config(**{key: {bomb: 4} if "pattern" in key else bomb}),
            (key,),
            LOADED,
        )
        for name, bomb in BOMBS.items()
        for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
        if (key, name) not in MATCHES_NOTHING
    },
    "10,000 bombs": Case(
        lambda folder: folder.config(rank_pattern={f"(.*)*{number}x": 2 for number in range(10_000)}),
        (CONFIG, "rank_pattern", "take too long to match"),
    ),
    "20,000 patterns": config("take too long to match", rank_pattern={f"l{n}.*_proj": 2 for n in range(20_000)}),
}
"""Regular expressions that take Python forever, or that are none."""

TARGETS = {
    "50,000 unknown names": loaded("target_modules: no module", target_modules=[f"layer_{n}" for n in range(50_000)]),
    "300,000 tokens": loaded("", trainable_token_indices=list(range(150_000))),
}
"""What the base model has not."""

NO_WEIGHTS = {
    "missing": Case(lambda folder: (folder.path / WEIGHTS).unlink(), (f"no {WEIGHTS}",)),
    "a pickle instead": Case(
        lambda folder: (folder.path / WEIGHTS).rename(folder.path / "adapter_model.bin"),
        ("pickle", "safe_serialization"),
    ),
    **{f"{name} as the weights": instead(WEIGHTS, make, says) for name, (make, says) in NO_FILES.items()},
    "zeros": bytes_instead(bytes(4096), "damaged"),
    "a name that steers": weights("damaged", header=json.dumps({STEER: _entry(dtype="F77")}), data=bytes(8)),
    "a name of 1 MB": weights("damaged", header=json.dumps({"a" * (1 << 20): _entry(dtype="F77")}), data=bytes(8)),
    **{
        f"{name} in the header": header(changes, size, says)
        for name, changes, size, says in (
            ("100 dimensions", {"shape": [1] * 99 + [2]}, 8, "a has the shape"),
            ("100,000 dimensions", {"shape": [1 << 62] * 100_000}, 8, "a has the shape"),
        )
    },
    "one byte too few": Case(
        lambda folder: os.truncate(folder.path / WEIGHTS, (folder.path / WEIGHTS).stat().st_size - 1),
        (WEIGHTS, "damaged"),
    ),
    "one byte too many": Case(
        lambda folder: (folder.path / WEIGHTS).write_bytes((folder.path / WEIGHTS).read_bytes() + b"\0"),
        (WEIGHTS, "damaged"),
    ),
    "half": Case(
        lambda folder: os.truncate(folder.path / WEIGHTS, (folder.path / WEIGHTS).stat().st_size // 2),
        (WEIGHTS, "damaged"),
    ),
    "a terabyte of nothing after it": Case(
        lambda folder: os.truncate(folder.path / WEIGHTS, 1 << 40), (WEIGHTS, "damaged")
    ),
}
"""adapter_model.safetensors as a file, and its header."""


def _set(value: float, dtype: torch.dtype, place: int = -1, name: str = Q) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[name] = values[name].to(dtype)
        values[name].view(-1)[place] = value

    return change


def _like(change: Callable[[torch.Tensor], torch.Tensor], name: str = Q) -> Callable[[dict[str, torch.Tensor]], None]:
    def apply(values: dict[str, torch.Tensor]) -> None:
        values[name] = change(values[name]).contiguous()

    return apply


def _everything(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda values: [tensor.fill_(value) for tensor in values.values()] and None


def _many(count: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda values: values.update({f"base_model.model.extra.{n}": torch.zeros(1) for n in range(count)})


NO_TENSORS = {
    **{
        f"{word} in {str(dtype).removeprefix('torch.')}": tensors(
            _set(value, dtype, place), f"not finite: {Q}", commands=(info, *LOADED)
        )
        for word, value, place in (("NaN last", torch.nan, -1), ("inf first", torch.inf, 0), ("-inf", -torch.inf, 17))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    },
    "NaN in 8 bits": tensors(_set(torch.nan, torch.float8_e4m3fn), f"not finite: {Q}", commands=(info, *LOADED)),
    "NaN everywhere": tensors(_everything(torch.nan), "not finite", commands=BOTH),
    "beyond what the model can hold": tensors(_set(1e300, torch.float64), f"not finite: {Q}", commands=LOADED),
    "one missing": tensors(lambda values: values.pop(Q), f"missing: {Q}", commands=LOADED),
    "a B missing": tensors(lambda values: values.pop(Q.replace("_A", "_B")), "missing", commands=BOTH),
    "all missing": tensors(lambda values: values.clear(), f"missing: {Q}", commands=LOADED),
    "one too many": tensors(lambda values: values.update(extra=torch.zeros(2)), "unexpected: extra", commands=LOADED),
    "one that steers": tensors(lambda values: values.update({STEER: torch.zeros(2)}), "unexpected: ", commands=LOADED),
    "20,000 too many": tensors(_many(20_000), "unexpected: base_model.model.extra.", "more", commands=LOADED),
    "20 million rows of no width": tensors(
        lambda values: values.update({EMBEDDING: torch.ones(20_000_000, 0)}),
        f"unexpected: {EMBEDDING}",
        commands=LOADED,
    ),
    "names without their prefix": tensors(
        lambda values: [values.update({name.removeprefix("base_model."): values.pop(name)}) for name in list(values)],
        f"missing: {Q}",
        commands=LOADED,
    ),
    "turned round": tensors(_like(torch.Tensor.t), f"shape: {Q} is (32, 4)", commands=LOADED),
    "of another width": tensors(_like(lambda value: value[:, :-1]), f"shape: {Q} is (4, 31)", commands=LOADED),
    "of another r": tensors(_like(lambda value: value[:3]), "3 rows; the config says 4", commands=(info,)),
    "of another r, loaded": tensors(_like(lambda value: value[:3]), f"shape: {Q} is (3, 32)", commands=LOADED),
    "of no dimension": tensors(_like(lambda value: value.sum()), f"{Q} ", commands=BOTH),
    "of one dimension": tensors(_like(lambda value: value.flatten()), f"{Q} ", commands=BOTH),
    "of three dimensions": tensors(_like(lambda value: value[None]), f"{Q} ", commands=BOTH),
    "without numbers": tensors(_like(lambda value: value[:0]), f"{Q} ", commands=BOTH),
    "a B of another r": tensors(
        _like(lambda value: value[:, :3], Q.replace("_A", "_B")), "do not go together", commands=(info,)
    ),
    "whole numbers": tensors(_like(torch.Tensor.int), f"type: {Q} is int32", commands=LOADED),
    "truth values": tensors(_like(torch.Tensor.bool), f"type: {Q} is bool", commands=LOADED),
    "complex numbers": tensors(
        _like(lambda value: value.to(torch.complex64)), f"type: {Q} is complex64", commands=LOADED
    ),
}
"""The tensors in it."""

SOFT_PROMPTS = {
    f"{method}: {name}": Case(spoil, says, commands, method=method)
    for method in ("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning")
    for name, spoil, says, commands in (
        ("another number", lambda folder: folder.config(num_virtual_tokens=5), ("prompt_embeddings",), (generate,)),
        ("10**12", lambda folder: folder.config(num_virtual_tokens=HUGE), ("num_virtual_tokens",), (generate,)),
        ("2**63 - 1", lambda folder: folder.config(num_virtual_tokens=GREATEST), ("num_virtual_tokens",), (generate,)),
        ("none", lambda folder: folder.config(num_virtual_tokens=0), (CONFIG, "num_virtual_tokens"), BOTH),
        ("a text", lambda folder: folder.config(num_virtual_tokens="8"), (CONFIG, "num_virtual_tokens"), BOTH),
        ("no tensor", lambda folder: folder.tensors(dict.clear), ("missing: prompt_embeddings",), (generate,)),
        (
            "NaN",
            lambda folder: folder.tensors(_everything(torch.nan)),
            (WEIGHTS, "not finite: prompt_embeddings"),
            BOTH,
        ),
        (
            "a narrower tensor",
            lambda folder: folder.tensors(_like(lambda value: value[..., :7], "prompt_embeddings")),
            ("prompt_embeddings",),
            (generate,),
        ),
        ("merged", lambda folder: None, ("virtual tokens cannot be merged",), (merge,)),
    )
}
"""Soft prompts."""


def _named(name: str | None) -> Callable[[Folder], None]:
    return lambda folder: folder.config(base_model_name_or_path=name)


def _beside(make: Callable[[Path], object]) -> Callable[[Folder], None]:
    """A base model of this kind, beside the adapter."""

    def spoil(folder: Folder) -> None:
        make(folder.place / "other")
        folder.config(base_model_name_or_path=str(folder.place / "other"))

    return spoil


BASES = {
    "a file": Case(_beside(lambda path: path.write_text("{}")), ("no model folder",), LOADED),
    "a pipe called .gguf": Case(
        lambda folder: [os.mkfifo(folder.place / "m.gguf"), _named(str(folder.place / "m.gguf"))(folder)],
        ("is a pipe",),
        LOADED,
    ),
    "itself": Case(lambda folder: _named(str(folder.path))(folder), ("contains an adapter",), LOADED),
}
"""The base model that it names."""


def _file(name: str, content: str | bytes) -> Callable[[Folder], None]:
    """A file of a tokenizer in the adapter's folder, beside the others."""

    def spoil(folder: Folder) -> None:
        _tokenizer(folder)
        (folder.path / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return spoil


def _write(name: str, text: str) -> Callable[[Folder], None]:
    return lambda folder: (folder.path / name).write_text(text) and None


def _tokenizer(folder: Folder) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(trainkit.base_folder() / name, folder.path / name)


def _in_tokenizer(name: str, make: Callable[[Path], object]) -> Callable[[Folder], None]:
    def spoil(folder: Folder) -> None:
        _tokenizer(folder)
        (folder.path / name).parent.mkdir(exist_ok=True)
        folder.replace(folder.path / name, make)

    return spoil


BESIDE = {
    **{
        f"{kind} as {name}": Case(_in_tokenizer(name, make), (name.rpartition("/")[2], says), (generate,))
        for kind, (make, says) in NO_FILES.items()
        for name in ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "special_tokens_map.json")
    },
    "a pipe as run.json, with --base": Case(
        lambda folder: [folder.base, os.mkfifo(folder.path / "run.json")], ("run.json", "is a pipe"), (from_base,)
    ),
    "run.json speaks of no quantisation": Case(
        lambda folder: (folder.path / "run.json").write_text(
            json.dumps({"recipe": {"base_model": {"quantization": {"type": STEER}}}})
        ),
        ("run.json", "recipe.base_model.quantization", "is not a known quantisation"),
        (generate,),
    ),
}
"""What stands beside it: a tokenizer, and what its run says."""

CLASSES: dict[str, dict[str, Case]] = cases(
    "bad_adapters",
    globals(),
    **{
        "adapter_config.json": NO_CONFIG,
        "peft_type": NO_METHOD,
        "settings": NO_SETTING,
        "patterns": PATTERNS,
        "targets": TARGETS,
        "adapter_model.safetensors": NO_WEIGHTS,
        "tensors": NO_TENSORS,
        "soft prompts": SOFT_PROMPTS,
        "base model": BASES,
        "beside it": BESIDE,
    },
)
