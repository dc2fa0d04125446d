"""Seeded mutations of good adapters, and an opinion of its own on whether what is left is sound."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import trainkit
from adapter_folders import CONFIG, WEIGHTS, Folder, adapter, generate, harmless, info, listing, timed

from peftcli.core.files import load_adapter, read_config
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError
from peftcli.methods import METHODS, config_from_dict

MUTATED = ("lora", "ia3", "vera", "adalora", "prompt_tuning", "oft", "vblora", "trainable_tokens")
GROUP, LOADED_EACH = 10, 20
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        4,
        2**31,
        2**63,
        10**30,
        0.5,
        -0.0,
        1e308,
        "",
        "a",
        "q_proj",
        "LORA",
        ".*",
        "(.*)*x",
    ),
    *("\0", "\x1b[2J", "é", "x" * 5000, [], [[]], ["q_proj"], [0], [None], {}, {"a": 1}, {"q_proj": 2}),
)
_WORDS = (
    b"null",
    b"true",
    b"NaN",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b",",
    b":",
    b"\\",
    b"\0",
    b"\xff",
    b"-",
    b"1e9",
    b"\\ud800",
)


def mutated(number: int, place: Path) -> None:
    """Some mutations: the commands refuse each, or it is sound."""
    for index in range(number * GROUP, (number + 1) * GROUP):
        _one(index, place / str(index))


def _one(index: int, place: Path) -> None:
    place.mkdir()
    chance, folder = random.Random(index), Folder(place)
    method = chance.choice(MUTATED)
    folder.write(adapter(method))
    done = [chance.choice(_MUTATIONS)(folder, chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    what, before = f"mutation {index} of {method}: {'; '.join(done)}", listing(place)
    try:
        ran = timed(*info(folder), "--json")
        assert ran.code in (0, 4), f"ended with {ran.code}: {ran.err[-500:]!r}"
        harmless(ran)
        said = json.loads(ran.out)
        assert ("error" in said) == (ran.code == 4), ran.out[:300]
        if ran.code == 0:
            _check_sound(folder)
        if ran.code == 0 or index % LOADED_EACH == 0:
            _check_loaded(folder, ran.code == 0)
        assert listing(place) == before, "something was made"
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


def _check_sound(folder: Folder) -> None:
    """What was accepted is what other readers take it for."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs), f"a key twice among {pairs[:9]}"
        return dict(pairs)

    values = json.loads((folder.path / CONFIG).read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    assert values["peft_type"] in {method.peft_type for method in METHODS.values()}
    try:
        tensors = safetensors.torch.load_file(folder.path / WEIGHTS)
    except Exception as error:
        raise AssertionError(f"was accepted, but safetensors says: {error}") from None
    for name, value in tensors.items():
        assert not value.is_floating_point() or bool(torch.isfinite(value.float()).all()), f"{name} is not finite"


def _check_loaded(folder: Folder, sound: bool) -> None:
    """Loaded into the base model, it is refused, or the model then holds the file's numbers, and answers."""
    ran = timed(*generate(folder))
    assert ran.code in (0, 4, 5), f"generate ended with {ran.code}: {ran.err[-500:]!r}"
    harmless(ran)
    if ran.code != 0:
        return
    assert sound, "generate took what info refused"
    model = trainkit.build("llama")
    load_adapter(model, config_from_dict(read_config(folder.path)), folder.path)
    held, stored = adapter_state(model), safetensors.torch.load_file(folder.path / WEIGHTS)
    for name in held.keys() & stored.keys():
        assert torch.equal(held[name], stored[name].to(held[name].dtype).view_as(held[name])), f"{name} is another one"


def absurd(method: str, place: Path) -> None:
    """Numbers without measure in every setting of a method: refused, or harmless."""
    folder = Folder(place)
    for key, value in _absurd(method):
        folder.write(adapter(method))
        folder.config(**{key: value})
        ran = timed(*generate(folder))
        assert ran.code in (0, 4), f"{key}={str(value)[:60]}: ended with {ran.code}: {ran.err[-500:]!r}"
        harmless(ran)


def _absurd(method: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for entry in fields(METHODS[method].config_class()):
        kind = str(entry.type)
        if not entry.metadata.get("file", True) or not ("int" in kind or "float" in kind):
            continue
        for number in (10**9, 2**62, -1, 0, *((1e38, 1e-38) if "float" in kind else ())):
            if "dict[str" in kind:
                found.append((entry.name, {"q_proj": number}))
            elif "list[list" in kind:
                found.append((entry.name, [[0, number]]))
            elif "list" in kind:
                found.append((entry.name, [number]))
            else:
                found.append((entry.name, number))
        if "list[int]" in kind and "list[list" not in kind:
            found.append((entry.name, list(range(100_000))))
    return found


def wrong_types(method: str, place: Path) -> None:
    """A value of another type in every setting of a method: refused, with the file and the key."""
    folder = Folder(place)
    folder.write(adapter(method))
    config = json.loads((folder.path / CONFIG).read_bytes())
    for entry in fields(METHODS[method].config_class()):
        kind = str(entry.type)
        if not entry.metadata.get("file", True):
            continue
        wrong: list[Any] = [[{}], [[["a"]]], *([] if "dict[str, Any]" in kind else [{"a": {"b": [None]}}])]
        wrong += [
            value for name, value in (("str", "x y"), ("bool", True)) if name not in kind and "Literal" not in kind
        ]
        wrong += [] if "int" in kind or "float" in kind else [7]
        for value in wrong:
            if kind.endswith("Config | None") and entry.name not in config:
                continue  # PEFT writes the settings of other starts too
            error = _refusal({**config, entry.name: value})
            assert error is not None, f"{entry.name}={value!r} is taken for {kind}"
            assert error.file == CONFIG
            assert (error.key or "").startswith(entry.name), f"{entry.name}={value!r}: {error}"
            assert len(str(error)) < 1000


def _refusal(config: dict[str, Any]) -> AdapterError | None:
    try:
        config_from_dict(config, CONFIG)
    except AdapterError as error:
        return error
    return None


# --- mutations


def _of_bytes(
    name: str, change: Callable[[bytearray, random.Random], object]
) -> Callable[[Folder, random.Random], str]:
    def mutate(folder: Folder, chance: random.Random) -> str:
        path = folder.path / chance.choice((CONFIG, WEIGHTS))
        content = bytearray(path.read_bytes())
        change(content, chance)
        path.write_bytes(content)
        return f"{name} in {path.name}"

    return mutate


def _flip(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 1, 2, 9))):
        if content:
            content[_place(content, chance)] ^= 1 << chance.randrange(8)


def _cut(content: bytearray, chance: random.Random) -> None:
    start = _place(content, chance) if content else 0
    del content[start : start + chance.choice((1, 2, 8, 100, 1 << 30))]


def _insert(content: bytearray, chance: random.Random) -> None:
    start = _place(content, chance) if content else 0
    content[start:start] = chance.choice((*_WORDS, chance.randbytes(3)))


def _repeat(content: bytearray, chance: random.Random) -> None:
    start = _place(content, chance) if content else 0
    content[start:start] = content[start : start + chance.choice((1, 9, 80))]


def _place(content: bytearray, chance: random.Random) -> int:
    """More often among the first bytes, where a header is."""
    return chance.randrange(len(content) if chance.random() < 0.3 else min(len(content), chance.choice((8, 16, 400))))


def _of_config(folder: Folder, chance: random.Random) -> str:
    try:
        values = json.loads((folder.path / CONFIG).read_bytes())
        key = chance.choice([*values, *(entry.name for entry in fields(METHODS["lora"].config_class())), "a key"])
    except (ValueError, TypeError):
        return "nothing: the config is no object any more"
    value = chance.choice(_VALUES)
    if chance.random() < 0.15:
        values.pop(key, None)
    elif isinstance(values.get(key), list) and values[key] and chance.random() < 0.5:
        values[key][chance.randrange(len(values[key]))] = value
    else:
        values[key] = value
    folder.raw(json.dumps(values))
    return f"{key} = {str(value)[:20]!r}"


def _of_header(folder: Folder, chance: random.Random) -> str:
    content = (folder.path / WEIGHTS).read_bytes()
    try:
        size = struct.unpack("<Q", content[:8])[0]
        said = json.loads(content[8 : 8 + size])
        name = chance.choice([name for name in said if name != "__metadata__"])
        entry = said[name]
        kind = chance.randrange(6)
        if kind == 0:
            entry[chance.choice(("dtype", "shape", "data_offsets"))] = chance.choice(_VALUES)
        elif kind == 1:
            entry["dtype"] = chance.choice(("F64", "F32", "F16", "BF16", "I32", "I64", "F8_E4M3", "U8", "BOOL", "C64"))
        elif kind == 2:
            part = entry[chance.choice(("shape", "data_offsets"))]
            part[chance.randrange(len(part))] += chance.choice((-4, -1, 1, 4, 1 << 40, 1 << 62))
        elif kind == 3:
            said[chance.choice((name[:-1], name.upper(), "x", "\x1b[2J", name + ".weight"))] = said.pop(name)
        elif kind == 4:
            entry["shape"] = [1, *entry["shape"]] if chance.random() < 0.5 else entry["shape"][::-1]
        else:
            del said[name]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error):
        return "nothing: the header is none any more"
    folder.weights(json.dumps(said), content[8 + size :])
    return f"the header of {name}"


def _of_numbers(folder: Folder, chance: random.Random) -> str:
    """A number of the file becomes NaN, or infinite, or merely another one."""
    path = folder.path / WEIGHTS
    content = bytearray(path.read_bytes())
    if len(content) < 16:
        return "nothing: the file is too short"
    value = chance.choice((float("nan"), float("inf"), float("-inf"), 0.0, 3.4e38, 1e-45))
    start = len(content) - 4 * chance.randrange(1, 1 + min(50, len(content) // 4))
    content[start : start + 4] = struct.pack("<f", value)
    path.write_bytes(content)
    return f"{value} at byte {start}"


_MUTATIONS: tuple[Callable[[Folder, random.Random], str], ...] = (
    _of_bytes("bits turned", _flip),
    _of_bytes("a part cut out", _cut),
    _of_bytes("a part put in", _insert),
    _of_bytes("a part twice", _repeat),
    _of_config,
    _of_config,
    _of_header,
    _of_header,
    _of_numbers,
)
