"""Load a base model, its config and its tokenizer: from the hub, a folder or a .gguf file."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftcli.core.quantised import is_quantised
from peftcli.errors import ModelError, NetworkError, OutOfMemory, PeftcliError
from peftcli.guard.files import cut, irregular, is_folder, read_object, shown_name
from peftcli.models import hub_files, quantization, tokens, validate
from peftcli.schema import BaseModel, Quantization

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"}
"""Errors of a network that is not there."""
_MOST_LINES = 16
"""Of another library's log."""


def load_model(base: BaseModel, auto_class: str, dtype: torch.dtype) -> PreTrainedModel:
    """The base model, in ``dtype``, frozen parameters and all: on the CPU, or quantised on the device that computes.

    Args:
        base: which model.
        auto_class: transformers' auto class of the task, as ``AutoModelForCausalLM``.
        dtype: number format of the weights that are not quantised.

    Raises:
        ModelError: no such model, or not one of this class.
        NetworkError: the hub cannot be reached.
        OutOfMemory: the machine's memory does not hold it.
    """
    import transformers

    options: dict[str, Any] = {"dtype": dtype}
    if base.attn_implementation:
        options["attn_implementation"] = base.attn_implementation
    how = stored_or_asked(base)
    if base.name.endswith(".gguf"):
        options["quantization_config"] = quantization.unpacked_gguf()
    elif base.quantization:
        options["quantization_config"] = quantization.to_transformers(base.quantization, dtype)
    if how:
        quantization.hush()
    if not base.name.endswith(".gguf"):
        # ignored: what it would do then is said by check_loaded, with the names
        options |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
        _check_weights(base, auto_class, stored=how is not None)

    def load() -> PreTrainedModel:
        build = getattr(transformers, auto_class).from_pretrained
        model, said = build(**_where(base), **options, output_loading_info=True)
        if not how:
            validate.check_loaded(model, said, base.name)
        return model

    model = _guarded(base, load)
    if how and not any(map(is_quantised, model.modules())):
        raise ModelError(f"{how['type']} finds no linear layer in {base.name}", key="base_model.quantization")
    return model


def stored_or_asked(base: BaseModel) -> dict[str, Any] | None:
    """How the base model's weights are quantised, as its folder stores them or as the recipe asks; None: not at all.

    Raises:
        ModelError: the package for it is not installed; or both.
    """
    asked = base.quantization
    stored = None if base.name.endswith(".gguf") else quantization.stored_kind(load_config(base))
    if stored and asked:
        raise ModelError(
            f"{base.name} is stored quantised already ({stored}); it cannot become {asked.type}",
            key="base_model.quantization",
            hint="leave it out, or name the full-precision model",
        )
    how: dict[str, Any] | None = {"type": stored, "stored": True} if stored else asdict(asked) if asked else None
    if how:
        quantization.need_package(how["type"])
    return how


def empty_model(base: BaseModel, auto_class: str) -> PreTrainedModel:
    """The base model on the meta device: its modules and shapes, no memory.

    Raises:
        ModelError: no such model, or not one of this class.
        NetworkError: the hub cannot be reached.
    """
    import torch
    import transformers

    config = load_config(base)
    build = getattr(transformers, auto_class).from_config
    with torch.device("meta"):
        return _guarded(base, lambda: build(config, trust_remote_code=base.trust_remote_code))


def load_config(base: BaseModel) -> PreTrainedConfig:
    """The base model's config.

    Raises:
        ModelError: no such model.
        NetworkError: the hub cannot be reached.
    """
    from transformers import AutoConfig

    def load() -> PreTrainedConfig:
        if file := base_file(base, "config.json"):
            validate.check_config(file, trusted=base.trust_remote_code)
        return AutoConfig.from_pretrained(**_where(base))

    return _guarded(base, load)


def load_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, with the chat template and the new tokens that the recipe gives it.

    Raises:
        ModelError: the model has none, or it cannot be changed as the recipe says.
        NetworkError: the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    template = tokens.template_text(base)
    tokenizer: PreTrainedTokenizerBase = _guarded(base, lambda: AutoTokenizer.from_pretrained(**_where(base)))
    tokens.apply_recipe(tokenizer, base, template)
    return tokenizer


def load_adapter_tokenizer(folder: Path, base: BaseModel) -> PreTrainedTokenizerBase:
    """The tokenizer that an adapter was trained with: the one in its folder, else the base model's.

    Raises:
        ModelError: there is none, or it cannot be read.
        NetworkError: the hub cannot be reached.
    """
    from transformers import AutoTokenizer

    validate.check_folder(folder)
    if not has_tokenizer(folder):
        return load_tokenizer(base)
    own = base_of(str(folder))
    tokenizer: PreTrainedTokenizerBase = _guarded(
        own, lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    )
    return tokenizer


def has_tokenizer(folder: Path) -> bool:
    """Whether an adapter folder holds a tokenizer of its own."""
    return (folder / "tokenizer_config.json").is_file()


def base_file(base: BaseModel, name: str) -> Path | None:
    """A file of the base model, fetched from the hub if need be; None where the model has none of that name.

    Raises:
        ModelError: no such model, or one of its small files is damaged.
        HubError: the hub has no such model, or refuses it.
        NetworkError: the hub cannot be reached.
    """
    where = _where(base, name)
    path = Path(where["pretrained_model_name_or_path"]) / name
    return path if "gguf_file" not in where and path.exists() else None


def base_files(base: BaseModel) -> list[Path]:
    """The base model's safetensors files on this machine, in order; empty when it is stored otherwise.

    Raises:
        ModelError: no such model, or one of its files is damaged.
        NetworkError: the hub cannot be reached.
    """

    def listed() -> list[Path]:
        if (config := base_file(base, "config.json")) is None:
            return []
        values = read_object(config, 1 << 24, ModelError, strict=False)
        own = validate.weights_name(values, str(config))
        names = [own] if own else [validate.WEIGHTS, validate.INDEX]
        file = next((file for name in names if (file := base_file(base, name))), None)
        if file is None or file.name.endswith(".safetensors"):
            return [file] if file else []
        shards = validate.listed_shards(file)
        folder = Path(_where(base, *shards)["pretrained_model_name_or_path"])
        return [folder / name for name in shards]

    files = _guarded(base, listed)
    validate.count_stored(files)
    return files


def _check_weights(base: BaseModel, auto_class: str, *, stored: bool) -> None:
    """Raises ModelError unless the base model's weights are whole safetensors files, as large as its config says.

    Args:
        base: which model.
        auto_class: transformers' auto class of the task.
        stored: whether the model is quantised, so that its files hold other numbers than the model.
    """
    shards = base_files(base)
    if not shards:
        folder = _expanded(base.name)
        names = [path.name for path in folder.iterdir()] if is_folder(folder) else []
        raise validate.no_weights(base.name, names)
    numbers = validate.count_stored(shards)
    if not stored:
        validate.check_size(empty_model(base, auto_class), numbers, str(base_file(base, "config.json")))


def base_of(name: str, revision: str | None = None, quantised: Quantization | None = None) -> BaseModel:
    """The base model that an adapter's config or a command line names."""
    return BaseModel(name=name, revision=revision, quantization=quantised)


def _where(base: BaseModel, *names: str) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that say which model: a folder here, with its small files and ``names``."""
    path = _expanded(base.name)
    where: dict[str, Any] = {"trust_remote_code": base.trust_remote_code}
    if base.name.endswith(".gguf"):
        if (wrong := irregular(path)) or not path.exists():
            raise ModelError(wrong or "no such file", file=shown_name(base.name), key="base_model")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("reading .gguf needs the package gguf", hint="pip install 'peftcli[gguf]'")
        if base.trust_remote_code:  # of a tokenizer beside it
            validate.check_folder(path.parent, trusted=True)
        return {**where, "pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if is_folder(path):
        _refuse_adapter(path)
        if not os.path.lexists(path / "config.json"):
            raise ModelError(f"{shown_name(base.name)} holds no config.json: no model folder", key="base_model")
        validate.check_folder(path, trusted=base.trust_remote_code)
        return {**where, "pretrained_model_name_or_path": str(path)}
    if base.name.startswith((".", "/", "~")) or base.name.count("/") > 1 or os.path.lexists(path):
        raise ModelError(f"no model folder {shown_name(base.name)}", key="base_model")
    if base.trust_remote_code and not _COMMIT.fullmatch(base.revision or ""):
        raise ModelError(
            "code of the hub is run at a commit only, which nobody can change",
            key="base_model.revision",
            hint="give the 40 digits of the commit whose code you have read",
        )
    folder = hub_files.fetch(base, *names)
    if not (folder / "config.json").exists():
        raise ModelError(f"{base.name} on the hub holds no config.json: no model", key="base_model")
    _refuse_adapter(folder)  # one that was fetched as an adapter; the base model's own is not
    validate.check_folder(folder, trusted=base.trust_remote_code)
    return {**where, "pretrained_model_name_or_path": str(folder)}


def _refuse_adapter(folder: Path) -> None:
    if validate.is_adapter(folder):
        raise ModelError(
            "holds an adapter, which transformers would load too",
            file=str(folder),
            key="base_model",
            hint="name the base model of the adapter",
        )


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~name, of a user that this machine does not know
        return Path(name)


def _guarded(base: BaseModel, load: Callable[[], T]) -> T:
    """``load()``, with whatever transformers raises said in one line."""
    try:
        with _quiet():
            return load()
    except PeftcliError:
        raise
    except MemoryError:
        raise OutOfMemory(f"this machine's memory does not hold {base.name}") from None
    except BaseException as error:
        # a panic of a library in Rust is no Exception, and no request to stop either
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        name = shown_name(base.name)
        if any(type(cause).__name__ in _UNREACHABLE for cause in _causes(error)):  # by the model's own code
            raise NetworkError(
                f"cannot load {name}: the hub cannot be reached", key="base_model", hint="try again with a network"
            ) from error
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"cannot load {name}: {cut(text)}", key="base_model") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers draws no progress bars of its own; what is loaded is said by whoever loads it.

    What it logs may repeat what is in the files: ``_harmless`` makes something of it that is shown if nothing failed.
    """
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        held.append(record)
        return False

    handlers = logging.getLogger("transformers").handlers
    for handler in handlers:
        handler.addFilter(hold)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(hold)
        if bars:
            transformers_logging.enable_progress_bar()
    for record in held:
        record.msg, record.args = _harmless(record.getMessage()), None
        logging.getLogger(record.name).handle(record)


def _harmless(text: str) -> str:
    """Some lines of what another library logs, without what could steer a terminal."""
    lines = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()  # transformers' own bold letters
    more = [f"and {len(lines) - _MOST_LINES} lines more"] if len(lines) > _MOST_LINES else []
    return "\n".join([*map(cut, lines[:_MOST_LINES]), *more])


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
