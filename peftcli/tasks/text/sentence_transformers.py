"""What a model's folder says to sentence-transformers: how a text's hidden states become its embedding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import ModelError
from peftcli.guard.files import read_errors, read_json_object, read_small, short_name
from peftcli.models.open import OpenBase

_MODULES, _POOLING, _TEXTS, _ABOUT = (
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)
_LARGEST = 1_000_000
"""Bytes."""
_NAMES = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken", "max": "max_tokens"}
"""Pooling -> how older releases name it after ``pooling_mode_``. The later ones read it too."""
_UNASKED = ("query", "document", "passage", "corpus")
"""Prompts of ``encode_query`` and ``encode_document``, which evaluators of searches call."""
_LATER = {"lasttoken": "last"}
"""How releases from 6 on name a pooling that has another name here."""


@dataclass(frozen=True)
class Pooling:
    """What follows the transformer in the modules of a folder."""

    mode: str
    """mean, cls, last or max."""
    normalize: bool


def read_pooling(base: OpenBase) -> Pooling | None:
    """Read how the base model's embeddings are made; None: its folder does not say it.

    Raises:
        ModelError: they are made in a way that is not known here.
    """
    path = base.file(_MODULES)
    if path is None:
        return None
    modules = _read_list(path)
    kinds = [str(each.get("type")).rpartition(".")[2] for each in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _unknown(f"modules.json of {base.name} has the modules {', '.join(kinds)[:200] or '(none)'}")
    folder = str(modules[1].get("path"))
    found = base.file(f"{folder}/config.json") if ".." not in folder.split("/") and folder[:1] != "/" else None
    if found is None:
        raise _unknown(f"modules.json of {base.name} names {short_name(folder)}, which has no config.json")
    config = _read(found)
    named = config.get("pooling_mode")
    known = {f"pooling_mode_{name}": mode for mode, name in _NAMES.items()}
    older = [known.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    modes = [str(each) for each in named] if isinstance(named, list) else [str(named)] if named else older
    if config.get("include_prompt") is False:
        raise _unknown(f"{short_name(folder)}/config.json of {base.name} leaves prompts out of the pooling")
    mode = _LATER.get(modes[0], modes[0]) if len(modes) == 1 else ""
    if mode not in _NAMES:
        raise _unknown(
            f"{short_name(folder)}/config.json of {base.name} pools by {', '.join(modes)[:200] or '(nothing)'}"
        )
    return Pooling(mode, len(kinds) > 2)


def longest(base: OpenBase) -> int | None:
    """The most tokens of a text that the folder wants the model to read, if it says it."""
    found = _read_file(base, _TEXTS).get("max_seq_length")
    return found if isinstance(found, int) and found > 0 else None


def lowers(base: OpenBase) -> bool:
    """Whether the folder wants texts in lower case."""
    return _read_file(base, _TEXTS).get("do_lower_case") is True


def prompts(base: OpenBase) -> list[str]:
    """The names of the prompts that sentence-transformers puts before texts without being asked."""
    about = _read_file(base, _ABOUT)
    known = about.get("prompts")
    held = [name for name in _UNASKED if isinstance(known, dict) and known.get(name)]
    if isinstance(default := about.get("default_prompt_name"), str):
        held.append(default)
    return [short_name(name) for name in dict.fromkeys(held)]


def write_modules(folder: Path, pooling: Pooling, *, size: int, max_length: int, base: OpenBase) -> None:
    """Make a folder of a transformers model one of sentence-transformers, in words that its older releases know too.

    ``size`` counts the numbers of an embedding. The prompts of the base model are kept, to be asked for by name.
    """
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")][
        : 3 if pooling.normalize else 2
    ]
    modules = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds)
    ]
    modes = {f"pooling_mode_{name}": mode == pooling.mode for mode, name in _NAMES.items()}
    for path, _ in kinds[1:]:
        (folder / path).mkdir()
    _write(folder / _MODULES, modules)
    _write(folder / _POOLING, {"word_embedding_dimension": size, **modes})
    _write(folder / _TEXTS, {"max_seq_length": max_length, "do_lower_case": lowers(base)})
    if about := _read_file(base, _ABOUT):
        _write(folder / _ABOUT, about | {"default_prompt_name": None})  # rows were trained as they are


def write_cross_encoder(folder: Path, max_length: int) -> None:
    """Make a folder of a transformers model with one output a CrossEncoder, whose scores are the output's sigmoid.

    Releases before 6 read ``config.json`` and the tokenizer's longest text; the later ones also read the other files,
    without which they would put the texts of a model with a chat template into a chat.
    """
    sigmoid, scores = "torch.nn.modules.activation.Sigmoid", {"method": "forward", "method_output_name": "logits"}
    config = _read(folder / "config.json")
    config.pop("sbert_ce_default_activation_function", None)
    _write(folder / "config.json", config | {"sentence_transformers": {"activation_fn": sigmoid}})
    if (path := folder / "tokenizer_config.json").is_file():
        _write(path, _read(path) | {"model_max_length": max_length})
    kind = "sentence_transformers.base.modules.transformer.Transformer"
    _write(folder / _MODULES, [{"idx": 0, "name": "0", "path": "", "type": kind}])
    described = {"transformer_task": "sequence-classification", "modality_config": {"text": scores}}
    _write(folder / _TEXTS, described | {"module_output_name": "scores", "max_seq_length": max_length})
    _write(folder / _ABOUT, {"model_type": "CrossEncoder", "activation_fn": sigmoid})


def _unknown(what: str) -> ModelError:
    return ModelError(
        f"{what}; known are Transformer, Pooling (mean, cls, last token, max) and Normalize",
        key="base_model",
        hint="To leave out what is not known: set task.pooling and task.normalize.",
    )


def _read_file(base: OpenBase, name: str) -> dict[str, Any]:
    """The object in a file of the base model; empty where it has no such file."""
    path = base.file(name)
    return _read(path) if path is not None else {}


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path, _LARGEST, ModelError, strict=False)


def _read_list(path: Path) -> list[dict[str, Any]]:
    """The JSON objects that a file lists."""
    with read_errors(path, ModelError):
        found = json.loads(read_small(path, _LARGEST))
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ModelError("holds no list of JSON objects", file=str(path), key="base_model")
    return found


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
