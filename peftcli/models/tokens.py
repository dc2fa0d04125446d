"""The tokens of a run: the recipe's chat template and new special tokens, and rows of the model that hold them.

A new token's row starts as the mean of the others, so that it is neither likelier nor rarer than a token is on average
(https://nlp.stanford.edu/~johnhew/vocab-expansion.html). Only the new rows train. The adapter file holds them in full,
so whatever a reader puts into rows that the base model lacks is replaced.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftcli.core.config import AdapterConfig
from peftcli.core.layer import base_module, base_modules, model_ends
from peftcli.core.targets import find_modules, find_targets, shortest_names
from peftcli.errors import AdapterError, ModelError
from peftcli.guard.files import read_small
from peftcli.guard.safetensors_header import TensorEntry
from peftcli.schema import BaseModel
from peftcli.system.disk import write_file
from peftcli.system.outputs import expand_user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

START, END = "<|im_start|>", "<|im_end|>"
"""ChatML's marks around a turn."""
CHATML = (
    "{%- if tools %}{{ raise_exception('ChatML has no words for tools') }}{% endif %}"
    "{%- for message in messages %}"
    "{%- if message.tool_calls %}{{ raise_exception('ChatML has no words for tool calls') }}{% endif %}"
    f"{{{{- '{START}' + message['role'] + '\\n' + message['content'] + '{END}\\n' }}}}"
    "{%- endfor %}"
    f"{{%- if add_generation_prompt %}}{{{{- '{START}assistant\\n' }}}}{{% endif %}}"
)
_TEMPLATE, _TOKENS = "base_model.chat_template", "base_model.new_tokens"
_MAX_TEMPLATE_BYTES = 1_000_000
"""Bytes. Models' templates have up to 20,000."""
_MAX_GAP = 1024
"""The largest gap between the base model's rows and an adapter's tokens; tokens beyond it are rejected."""


def template_text(base: BaseModel) -> str | None:
    """Return the recipe's chat template, which replaces the tokenizer's own; None if the recipe has none.

    Raises:
        ModelError: no such file, or it is no template.
    """
    name = base.chat_template
    if name is None or name == "chatml":
        return CHATML if name else None
    path = expand_user(Path(name))
    if not path.is_file():
        raise ModelError("no such file", file=name, key=_TEMPLATE)
    try:
        text = read_small(path, _MAX_TEMPLATE_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {error}", file=name, key=_TEMPLATE) from None
    if not text.strip():
        raise ModelError("is empty", file=name, key=_TEMPLATE)
    _check_syntax(text, name)
    return text


def apply_recipe(tokenizer: PreTrainedTokenizerBase, base: BaseModel, template: str | None) -> None:
    """Give the base model's tokenizer the recipe's new tokens, and its template, which ``template_text`` found.

    Raises:
        ModelError: a token that is not new, or marks of the template that are not tokens.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    for token in base.new_tokens:
        if token in known:
            raise ModelError(
                f"{token!r} is a token of {base.name} already, number {known[token]}", key=_TOKENS, hint="leave it out"
            )
    if base.new_tokens:
        added = [AddedToken(token, special=True, normalized=False) for token in base.new_tokens]
        tokenizer.add_tokens(added, special_tokens=True)
    if template is not None:
        tokenizer.chat_template = template
    if base.chat_template == "chatml":
        _use_chatml(tokenizer, base)


def make_room(model: Any, tokenizer: PreTrainedTokenizerBase, config: AdapterConfig, base: BaseModel) -> None:
    """Let the model hold the recipe's new tokens, and have a new adapter train their rows; to be called before inject.

    Rows that the base model has to spare are used first. A head with a weight of its own gets rows, too. Its bias, as
    Phi's, stays as it is in spare rows: the adapter's file could not hold another. The config's setting for single
    rows, if it has one, will name the new tokens, which the tokenizer has already.

    Raises:
        ModelError: the model has no embedding of tokens.
        AdapterError: the method cannot train single rows, and does not train all of them.
    """
    if not base.new_tokens:
        return
    ids = _new_ids(tokenizer, base)
    ends = _vocabulary(model)
    if not ends:
        raise ModelError(f"{type(model).__name__} has no embedding of tokens", key=_TOKENS)
    known = min(ids[0], next(iter(ends.values())).weight.shape[0])
    grow_for(model, tokenizer, base)
    for module in _vocabulary(model).values():
        module.weight.data[ids] = _mean(module.weight.data[:known])  # spare rows may hold anything
    _train_rows(model, config, ids)


def grow_for(model: Any, tokenizer: PreTrainedTokenizerBase, base: BaseModel) -> None:
    """Let the model hold the recipe's new tokens, untrained."""
    if base.new_tokens:
        grow(model, max(len(tokenizer), _new_ids(tokenizer, base)[-1] + 1))


def fit_adapter(model: Any, config: AdapterConfig, header: Mapping[str, TensorEntry]) -> int | None:
    """Let the model hold the tokens that a saved adapter has rows for; to be called before it is loaded.

    Only rows of the model's width count; ``load_adapter`` refuses tensors of other shapes.

    Returns:
        How many rows there are now, if there are more than there were.
    """
    ends = _vocabulary(model)
    if not ends:
        return None
    rows = next(iter(ends.values())).weight.shape[0]
    wanted = [
        held.shape[0]
        for name, end in ends.items()
        for leaf in ("weight", "base_layer.weight")
        if (held := header.get(f"{config.file_prefix}{name}.{leaf}")) and held.shape[1:] == end.weight.shape[1:]
    ]
    named = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    trained = [token for tokens in named.values() for token in tokens] if isinstance(named, dict) else named
    more = max([*wanted, _plausible_rows(trained, rows)])
    grow(model, more)
    return more if more > rows else None


def fit_tokenizer(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Let the model hold every token of a saved adapter's own tokenizer, untrained.

    Raises:
        AdapterError: a token is numbered far beyond the others.
    """
    ends, ids = _vocabulary(model), tokenizer.get_vocab().values()
    if not ends or not ids:
        return
    rows, last = next(iter(ends.values())).weight.shape[0], max(ids)
    if last >= max(rows, _plausible_rows(ids, rows)):
        message = f"its tokenizer has a token {last:,}, far beyond the {rows:,} rows of the base model"
        raise AdapterError(message, file=str(folder))
    grow(model, last + 1)


def grow(model: Any, rows: int) -> None:
    """Let embedding and head have ``rows`` rows, if they have fewer; the new ones are the mean of the others."""
    before = {name: module.weight.shape[0] for name, module in _vocabulary(model).items()}
    if rows <= next(iter(before.values()), rows):
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for name, module in _vocabulary(model).items():
        for tensor in (module.weight, getattr(module, "bias", None)):
            if tensor is not None:
                tensor.data[before[name] :] = _mean(tensor.data[: before[name]])


def grown(value: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a tensor of an embedding or head with the rows that ``grow`` would add."""
    return torch.cat([value, _mean(value).expand(rows - len(value), *value.shape[1:])])


def settle_pad(tokenizer: PreTrainedTokenizerBase, model: Any) -> str | None:
    """Give the tokenizer a pad token that the model can read, where it has none. Padding never counts, whatever it is.

    Returns:
        What was chosen and why, for the log; None where there was nothing to choose.
    """
    pad, rows = tokenizer.pad_token_id, next((each.weight.shape[0] for each in _vocabulary(model).values()), math.inf)
    if pad is not None and 0 <= pad < rows:
        return None
    options = (tokenizer.eos_token_id, tokenizer.unk_token_id, 0)
    chosen = next(number for number in options if number is not None and 0 <= number < rows)
    reason = "has no pad token" if pad is None else f"pads with token {pad}, of which the model has no row"
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    return f"the tokenizer {reason}; {tokenizer.pad_token} is used, and does not count as padding"


def save_with_adapter(folder: Path, tokenizer: PreTrainedTokenizerBase, base: BaseModel) -> list[str]:
    """Write the files of the tokenizer, if the recipe made it another one than the base model's; return their names.

    Raises:
        StorageError: the folder cannot be written.
    """
    return save_processor(folder, tokenizer) if base.new_tokens or base.chat_template is not None else []


def save_processor(folder: Path, processor: Any) -> list[str]:
    """Write the files of a processor into a folder; return their names.

    Raises:
        StorageError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        processor.save_pretrained(scratch)
        config = Path(scratch) / "tokenizer_config.json"
        if config.exists():  # what prepares only pictures or sounds has none
            described = json.loads(config.read_bytes())
            for key in ("is_local", "local_files_only"):  # how it was loaded here
                described.pop(key, None)
            text = json.dumps(described, indent=2, sort_keys=True, ensure_ascii=False)
            config.write_text(text + "\n", encoding="utf-8")
        files = {str(path.relative_to(scratch)): path for path in sorted(Path(scratch).rglob("*")) if path.is_file()}
        for name, path in files.items():
            write_file(folder / name, path.read_bytes())
    return list(files)


def _new_ids(tokenizer: Any, base: BaseModel) -> list[int]:
    """Return the numbers of the recipe's new tokens, sorted."""
    return sorted(tokenizer.convert_tokens_to_ids(base.new_tokens))


def _check_syntax(text: str, file: str) -> None:
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        """The block that transformers knows, for masks of its own."""

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    Generation.tags = {"generation"}
    environment = jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    try:  # compiling would compute what is constant, which may be large
        tree = environment.parse(text)
        for kind, known in ((jinja2.nodes.Filter, environment.filters), (jinja2.nodes.Test, environment.tests)):
            for node in tree.find_all(kind):
                if node.name not in known:
                    message = f"No {kind.__name__.lower()} named {node.name!r}."
                    raise jinja2.TemplateSyntaxError(message, node.lineno)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(f"no chat template: {error.message}", file=file, line=error.lineno, key=_TEMPLATE) from None


def _use_chatml(tokenizer: PreTrainedTokenizerBase, base: BaseModel) -> None:
    missing = [mark for mark in (START, END) if mark not in tokenizer.get_added_vocab()]
    if missing:
        are = "is not a token" if len(missing) == 1 else "are not tokens"
        raise ModelError(
            f"chatml needs {' and '.join(missing)}, which {are} of {base.name}",
            key=_TEMPLATE,
            hint=f"add what is missing: base_model.new_tokens: [{', '.join(repr(mark) for mark in missing)}]",
        )
    tokenizer.eos_token = END
    if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:  # a model that is used to it
        tokenizer.chat_template = "{{- bos_token }}" + CHATML


def _vocabulary(model: Any) -> dict[str, Any]:
    """Return the input embedding and the head over the same tokens, by their names in the base model."""
    embedding, head = (end if end is None else base_module(end) for end in model_ends(model))
    if not isinstance(embedding, nn.Embedding):
        return {}
    ends = [embedding, *([head] if isinstance(head, nn.Linear) else [])]
    names = {id(module): name for name, module in base_modules(model).items()}
    return {names[id(end)]: end for end in ends}


def _plausible_rows(ids: Collection[int], rows: int) -> int:
    """Return how many rows the largest of an adapter's tokens needs; 0 if it is too far beyond the others."""
    beyond = sorted(token for token in set(ids) if token >= rows)
    return beyond[-1] + 1 if beyond and beyond[-1] < rows + len(beyond) + _MAX_GAP else 0


def _mean(rows: torch.Tensor) -> torch.Tensor:
    return rows.float().mean(dim=0, keepdim=True).to(rows.dtype)


def _train_rows(model: Any, config: Any, ids: list[int]) -> None:
    """Have the config name the rows ``ids`` of every end of the model that it does not train in full."""
    ends = _vocabulary(model)
    saved = find_modules(model, config.modules_to_save or (), "modules_to_save")
    one_weight = len({id(end.weight) for end in ends.values()}) == 1
    if any(name in saved for name in ends) and one_weight and getattr(config, "ensure_weight_tying", False):
        return
    left = [name for name in ends if name not in saved]
    if not left:
        return
    known = {entry.name for entry in fields(config) if not entry.metadata.get("unsupported")}
    if "trainable_token_indices" in known and not (one_weight and len(left) < len(ends)):
        _check_free(model, config, left)
        _name_rows(model, config, left[:1] if one_weight else left, ids)
    elif "token_indices" in known and len(left) == len(ends):
        config.token_indices = list(dict.fromkeys([*config.token_indices, *ids]))
        config.target_modules = config.target_modules or shortest_names(model, left[:1] if one_weight else left)
    else:
        shown = ", ".join(shortest_names(model, list(ends)))
        raise AdapterError(
            f"{config.peft_type} does not train the rows of new tokens in {', '.join(left)}",
            key=_TOKENS,
            hint=f"train all of it: method.modules_to_save: [{shown}]; method.type: lora can train single rows",
        )


def _check_free(model: Any, config: Any, names: list[str]) -> None:
    """Raise AdapterError if the adapter targets an embedding or head whose new rows are to train."""
    adapted = find_targets(model, config) if config.target_modules else []
    if taken := [name for name in names if name in adapted]:
        raise AdapterError(
            f"names {taken[0]}, whose new tokens need rows of their own",
            key="target_modules",
            hint="leave it out of target_modules, or put it into modules_to_save instead",
        )


def _name_rows(model: Any, config: Any, names: list[str], ids: list[int]) -> None:
    """Add ``ids`` to ``trainable_token_indices`` of the modules ``names``."""
    key, first = "trainable_token_indices", next(iter(_vocabulary(model)))
    given = config.trainable_token_indices or []
    if isinstance(given, list):
        given = {first: given}
    rows = {name: tokens for entry, tokens in given.items() for name in find_modules(model, [entry], key)}
    rows |= {name: list(dict.fromkeys([*rows.get(name, []), *ids])) for name in names}
    rows = {name: tokens for name, tokens in rows.items() if tokens}
    alone = list(rows) == [first]
    config.trainable_token_indices = (
        rows[first] if alone else {shortest_names(model, [name])[0]: tokens for name, tokens in rows.items()}
    )
