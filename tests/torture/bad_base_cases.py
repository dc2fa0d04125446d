"""Base models that are wrong, by hand, under a good adapter."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapter_folders import Folder, change_json, from_base, merge_base
from bad_adapter_cases import HUGE, NO_FILES, STEER, Case, Command
from safetensors.torch import load_file, save_file
from tables import cases

BOTH: tuple[Command, ...] = (from_base, merge_base)
TOKENS: tuple[Command, ...] = (from_base,)
"""What merging only finds once it copies the tokenizer."""
SINGLE, INDEX, MARK = "model.safetensors", "model.safetensors.index.json", "was-run"


class Evil:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(MARK),)


EVIL = f"from pathlib import Path\nPath({MARK!r}).touch()\n"


def setting(*says: str, commands: tuple[Command, ...] = BOTH, **changes: Any) -> Case:
    """Other settings in config.json."""
    return Case(lambda folder: folder.base_config(**changes), says, commands)


def file(name: str, content: str | bytes, *says: str, commands: tuple[Command, ...] = BOTH) -> Case:
    """Another file of the base model."""
    raw = content.encode() if isinstance(content, str) else content
    return Case(lambda folder: (folder.base / name).write_bytes(raw), says, commands)


def instead(name: str, make: Callable[[Path], object], *says: str, commands: tuple[Command, ...] = BOTH) -> Case:
    """Something else in the place of a file."""
    return Case(lambda folder: folder.replace(folder.base / name, make), says, commands)


def with_code(*says: str, **changes: Any) -> Case:
    """Settings that name Python code, which stands beside them."""

    def spoil(folder: Folder) -> None:
        for name in ("evil.py", "modeling_evil.py", "configuration_evil.py"):
            (folder.base / name).write_text(EVIL)
        folder.base_config(**changes)

    return Case(spoil, says, BOTH)


def _pickled(names: tuple[str, ...], keep: bool = False) -> Callable[[Folder], None]:
    """Weights as pickles, which leave a mark where they are read."""

    def spoil(folder: Folder) -> None:
        if not keep:
            (folder.base / SINGLE).unlink()
        for name in names:
            content = json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model.bin"}}).encode()
            (folder.base / name).write_bytes(content if name.endswith(".json") else pickle.dumps(Evil()))

    return spoil


def _weights(change: Callable[[dict[str, Any]], object]) -> Callable[[Folder], None]:
    def spoil(folder: Folder) -> None:
        tensors = load_file(folder.base / SINGLE)
        change(tensors)
        save_file(tensors, folder.base / SINGLE, {"format": "pt"})

    return spoil


def _cut(name: str, share: float) -> Callable[[Folder], None]:
    def spoil(folder: Folder) -> None:
        path = folder.base / name
        os.truncate(path, int(path.stat().st_size * share))

    return spoil


def _shards(change: Callable[[Path, list[str]], object]) -> Callable[[Folder], None]:
    """Spoils one of several files: the change is given the folder and their names."""

    def spoil(folder: Folder) -> None:
        change(folder.base, sorted(set(folder.several_files().values())))

    return spoil


def _index(**changes: Any) -> Callable[[Folder], None]:
    def spoil(folder: Folder) -> None:
        folder.several_files()
        change_json(folder.base / INDEX, **changes)

    return spoil


def _mapped(name: str) -> Callable[[Folder], None]:
    """An index whose first tensor is in the file ``name``."""

    def spoil(folder: Folder) -> None:
        names = folder.several_files()
        shutil.copy(folder.base / next(iter(names.values())), folder.place / SINGLE)
        change_json(folder.base / INDEX, weight_map={**names, next(iter(names)): name})

    return spoil


FILES = {
    **{
        f"{kind} as {name}": instead(name, make, name, says)
        for kind, (make, says) in NO_FILES.items()
        for name in ("config.json", SINGLE)
    },
    **{
        f"{kind} as {name}": instead(name, make, name, says, commands=TOKENS)
        for kind, (make, says) in NO_FILES.items()
        for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    },
    "no config.json": Case(lambda folder: (folder.base / "config.json").unlink(), ("has no config.json",), BOTH),
    "config.json of a terabyte": Case(
        lambda folder: os.truncate(folder.base / "config.json", 1 << 40), ("config.json", "at most"), BOTH
    ),
    "tokenizer.json of 2 GB": Case(
        lambda folder: os.truncate(folder.base / "tokenizer.json", 2 << 30), ("tokenizer.json", "has"), TOKENS
    ),
    "no tokenizer": Case(
        lambda folder: [(folder.base / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        ("cannot load",),
        TOKENS,
    ),
    "a pipe among its files": Case(
        lambda folder: os.mkfifo(folder.base / "vocab.bpe"), ("vocab.bpe: is a pipe",), BOTH
    ),
}
"""The base model's files."""

CODE = {
    "a tokenizer of its own": Case(
        lambda folder: [
            (folder.base / "evil.py").write_text(EVIL),
            change_json(
                folder.base / "tokenizer_config.json",
                tokenizer_class="Evil",
                auto_map={"AutoTokenizer": ["evil.Evil", None]},
            ),
            folder.base_config(model_type="unheard"),
        ],
        ("cannot load",),
        TOKENS,
    ),
    **{
        f"a pickle as {' and '.join(names)}": Case(
            _pickled(names), ("can run code when it is read", "save it again"), BOTH
        )
        for names in (
            ("pytorch_model.bin",),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
            ("pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"),
            ("model.pt",),
            ("consolidated.00.pth",),
        )
    },
}
"""What would run code."""

CONFIGS = {
    **{
        f"the type {json.dumps(kind)[:20]}": setting("cannot load", model_type=kind)
        for kind in ("unheard", 3, None, ["llama"], {}, "", STEER, "m" * 100_000)
    },
    **{
        f"{key} is {json.dumps(value)[:20]}": setting(
            "config.json" if "num_hidden" in key and value == HUGE else "base", **{key: value}
        )
        for key, values in {
            "hidden_size": ("32", -1, 0, 33, 10**6, HUGE, 2**63, None, [], 32.5),
            "intermediate_size": ("48", -1, 47, HUGE),
            "num_hidden_layers": ("2", -1, 3, 501, HUGE, None, [], 2.5),
            "num_attention_heads": ("4", 0, -4, 3, 8, None),
            "num_key_value_heads": (0, 3, "2"),
            "head_dim": (0, -8, 7, HUGE),
            "vocab_size": ("300", -1, 299, 301, HUGE, None),
            "num_labels": (HUGE,),
            "id2label": ("x",),
            "hidden_act": ("os.system", 3),
            "dtype": ("float99", 3),
            "rope_parameters": ("x", [1]),
            "quantization_config": ("x", [1], {"quant_method": "magic"}, {"quant_method": ["x"]}),
        }.items()
        for value in values
    },
}
"""Settings of config.json."""

WEIGHTS = {
    "none": Case(lambda folder: (folder.base / SINGLE).unlink(), ("contains neither model.safetensors",), BOTH),
    "a tensor too few": Case(
        _weights(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight")),
        ("model.layers.1.mlp.up_proj.weight is missing",),
        BOTH,
    ),
    "no head": Case(_weights(lambda tensors: tensors.pop("lm_head.weight")), ("lm_head.weight is missing",), BOTH),
    "a tensor of another shape": Case(
        _weights(lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:7].clone()})),
        ("model.norm.weight is (7,), not (32,)",),
        BOTH,
    ),
    "other names": Case(
        _weights(lambda tensors: [tensors.update({f"x.{name}": tensors.pop(name)}) for name in list(tensors)]),
        ("is missing",),
        BOTH,
    ),
    "a file too few of several": Case(
        _shards(lambda folder, names: (folder / names[1]).unlink()), ("00002-of-",), BOTH
    ),
    "one of several cut": Case(
        _shards(lambda folder, names: os.truncate(folder / names[1], 100)), ("00002-of-", "damaged"), BOTH
    ),
    "one of several empty": Case(
        _shards(lambda folder, names: os.truncate(folder / names[0], 0)), ("00001-of-", "damaged"), BOTH
    ),
    "one of several is a pipe": Case(
        _shards(lambda folder, names: [(folder / names[0]).unlink(), os.mkfifo(folder / names[0])]),
        ("00001-of-", "is a pipe"),
        BOTH,
    ),
    "one of several is a folder": Case(
        _shards(lambda folder, names: [(folder / names[0]).unlink(), (folder / names[0]).mkdir()]), ("00001-of-",), BOTH
    ),
    "one of several twice": Case(
        _shards(lambda folder, names: shutil.copy(folder / names[0], folder / names[1])), ("is missing",), BOTH
    ),
    "the index is no JSON": Case(
        lambda folder: [folder.several_files(), (folder.base / INDEX).write_text("{")],
        (f"{INDEX}:1", "not valid JSON"),
        BOTH,
    ),
    "the index is a list": Case(
        lambda folder: [folder.several_files(), (folder.base / INDEX).write_text("[]")], (INDEX, "no JSON object"), BOTH
    ),
    "the index is nested": Case(
        lambda folder: [folder.several_files(), (folder.base / INDEX).write_text('{"a":' * 100_000)],
        (INDEX, "nested"),
        BOTH,
    ),
    "the index is a pipe": Case(
        lambda folder: [folder.several_files(), folder.replace(folder.base / INDEX, os.mkfifo)],
        (INDEX, "is a pipe"),
        BOTH,
    ),
    **{
        f"the index lists {name}": Case(
            _mapped(name), (f"{INDEX}: weight_map", "is not a safetensors file in the same folder"), BOTH
        )
        for name in (
            f"../{SINGLE}",
            f"/etc/{SINGLE}",
            f"a/../../{SINGLE}",
            "..",
            "",
            ".",
            "/dev/zero",
            "a\0.safetensors",
        )
    },
}
"""The base model's weights."""

CLASSES: dict[str, dict[str, Case]] = cases(
    "bad_bases",
    globals(),
    **{
        "base model's files": FILES,
        "base model's code": CODE,
        "base model's config.json": CONFIGS,
        "base model's weights": WEIGHTS,
    },
)
