"""Load a base model, its config and its tokenizer: from the hub, a folder or a .gguf file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from peftcli.core.quantised import is_quantised
from peftcli.errors import ModelError, NetworkError, OutOfMemory, PeftcliError
from peftcli.models import quantization, tokens
from peftcli.schema import BaseModel, Quantization

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


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
    model = _guarded(base, lambda: getattr(transformers, auto_class).from_pretrained(**_where(base), **options))
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
    with torch.device("meta"):
        return _guarded(base, lambda: getattr(transformers, auto_class).from_config(config))


def load_config(base: BaseModel) -> PreTrainedConfig:
    """The base model's config.

    Raises:
        ModelError: no such model.
        NetworkError: the hub cannot be reached.
    """
    from transformers import AutoConfig

    return _guarded(base, lambda: AutoConfig.from_pretrained(**_where(base)))


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


def base_files(base: BaseModel) -> list[Path]:
    """The base model's safetensors files on this machine, in order; empty when it is stored otherwise.

    Raises:
        ModelError: no such model.
        NetworkError: the hub cannot be reached.
    """
    from transformers.utils.hub import cached_file

    def found(name: str) -> Path | None:
        where = _where(base)
        if "gguf_file" in where:
            return None
        source, revision = where["pretrained_model_name_or_path"], where.get("revision")
        path = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        return Path(path) if path else None

    def listed() -> list[Path]:
        if single := found("model.safetensors"):
            return [single]
        if (index := found("model.safetensors.index.json")) is None:
            return []
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [path for name in names if (path := found(name))]

    return _guarded(base, listed)


def base_of(name: str, revision: str | None = None, quantised: Quantization | None = None) -> BaseModel:
    """The base model that an adapter's config or a command line names."""
    return BaseModel(name=name, revision=revision, quantization=quantised)


def _where(base: BaseModel) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that say which model."""
    path = Path(base.name).expanduser()
    where: dict[str, Any] = {"trust_remote_code": base.trust_remote_code}
    if base.name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"no such file: {base.name}", key="base_model")
        if importlib.util.find_spec("gguf") is None:
            raise ModelError("reading .gguf needs the package gguf", hint="pip install 'peftcli[gguf]'")
        return {**where, "pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{base.name} holds no config.json: no model folder", key="base_model")
        return {**where, "pretrained_model_name_or_path": str(path)}
    if base.name.startswith((".", "/", "~")) or base.name.count("/") > 1 or path.exists():
        raise ModelError(f"no model folder {base.name}", key="base_model")
    return {**where, "pretrained_model_name_or_path": base.name, "revision": base.revision}


def _guarded(base: BaseModel, load: Callable[[], T]) -> T:
    """``load()``, with whatever transformers and huggingface_hub raise said in one line."""
    try:
        with _quiet():
            return load()
    except PeftcliError:
        raise
    except MemoryError:
        raise OutOfMemory(f"this machine's memory does not hold {base.name}") from None
    except Exception as error:
        chain = _causes(error)
        names = {type(cause).__name__ for cause in chain}
        refused = {"RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "HFValidationError"}
        if names & refused:
            reason = (
                "it is not on the hub, or private, or gated" if "HFValidationError" not in names else "no such folder"
            )
            raise ModelError(
                f"cannot load {base.name}: {reason}", key="base_model", hint="`hf auth login` if you have access"
            ) from error
        unreachable = {
            "ConnectionError",
            "ConnectError",
            "LocalEntryNotFoundError",
            "OfflineModeIsEnabled",
            "ConnectTimeout",
        }
        if names & unreachable or "offline" in str(error).lower() or "couldn't connect" in str(error).lower():
            raise NetworkError(
                f"cannot load {base.name}: no such folder here, and the hub cannot be reached",
                key="base_model",
                hint="give a local folder as base_model, or try again with a network",
            ) from error
        text = str(error).strip() or type(error).__name__
        raise ModelError(f"cannot load {base.name}: {text.splitlines()[0][:300]}", key="base_model") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers draws no progress bars of its own; what is loaded is said by whoever loads it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
