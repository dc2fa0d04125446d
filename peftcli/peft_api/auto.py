"""PEFT's classes that load an adapter and the base model that its config names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig

from peftcli.adapters.load import AdapterSource
from peftcli.core.config import AdapterConfig
from peftcli.errors import AdapterError
from peftcli.models.open import build_empty, label_options
from peftcli.models.tokens import fit_adapter
from peftcli.models.validate import find_initialised
from peftcli.peft_api.adding import Loading, find_by_options, load_into
from peftcli.peft_api.model import PeftModel, wrap
from peftcli.system.hub_requests import DOWNLOAD_OPTIONS
from peftcli.tasks import TASKS

_LABELS = {"config", "num_labels", "id2label", "label2id"}
_HUB_OPTIONS = {"cache_dir", "code_revision", "local_files_only", "revision", "token", "trust_remote_code"}
"""Arguments of ``from_pretrained`` that say where a model is."""


class AutoPeftModel:
    """Loads an adapter and, from what its config says, the base model below it."""

    task_type: ClassVar[str | None] = None
    """That of the adapters that the class loads, where their configs have one. None: of any."""

    def __init_subclass__(cls, task_type: str) -> None:
        cls.task_type = task_type

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        *,
        subfolder: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        torch_device: str | None = None,
        **base_options: Any,
    ) -> PeftModel:
        """Load the base model with the adapter in it.

        ``num_labels`` is that of the adapter's head, and ``use_safetensors`` is True, unless they are given.

        Most arguments are those of ``PeftModel.from_pretrained``. ``config`` may also be one of transformers, for the
        base model. ``revision`` and ``subfolder`` are the adapter's. ``import_allowlist`` names libraries beside
        transformers that may be those of the base model's class; they are not imported, since the class is found by the
        base model's config. ``torch_device`` changes nothing. ``base_options`` go to the base model's
        ``from_pretrained``; ``token``, ``cache_dir``, ``local_files_only`` and ``force_download`` count for the adapter
        too.

        Raises:
            AdapterError: the adapter cannot be read, is one for another task than the class, names no base model or one
                of another library, or does not fit it.
        """
        if "use_auth_token" in base_options:
            base_options.setdefault("token", base_options.pop("use_auth_token"))
        download = {key: base_options[key] for key in DOWNLOAD_OPTIONS if key in base_options}
        place = {"revision": revision, "subfolder": subfolder, **download}
        source = find_by_options(pretrained_model_name_or_path, place)
        own = config if isinstance(config, AdapterConfig) else source.config
        cls._check(own, source, import_allowlist)
        if config is not None and own is not config:
            base_options["config"] = config
        model, initialised = cls._load_base(source, base_options)
        how = Loading(is_trainable, autocast_adapter_dtype, key_mapping)
        fit = partial(fit_adapter, model, own)
        load_into(model, own, source, adapter_name, how, initialised=initialised, prepare=fit)
        loaded = wrap(model, own, adapter_name).train(is_trainable)
        loaded.prompt_form = source.recorded_form
        return loaded

    @classmethod
    def _check(cls, config: AdapterConfig, source: AdapterSource, import_allowlist: Sequence[str] | None) -> None:
        if cls.task_type is not None and config.task_type not in (None, cls.task_type):
            message = f"{config.task_type} is not the task of {cls.__name__}"
            hint = f"use Auto{PeftModel.class_of(config).__name__}"
            raise AdapterError(message, key="task_type", file=str(source.folder), hint=hint)
        noted = source.values.get("auto_mapping")
        library = str(noted.get("parent_library") or "") if isinstance(noted, dict) else ""
        known = ("", "transformers", "transformers_modules", *(import_allowlist or ()))
        if source.config.task_type is None and library.partition(".")[0] not in known and library not in known:
            raise AdapterError(
                f"the base model's class is one of {library!r}, which is not in the import allowlist",
                file=str(source.folder),
                hint="load the base model yourself, and use PeftModel.from_pretrained(model, ...)",
            )

    @classmethod
    def _load_base(cls, source: AdapterSource, options: dict[str, Any]) -> tuple[Any, Sequence[str]]:
        """Load the base model of an adapter; return it with the names of the parameters that its file does not hold."""
        name = source.config.base_model_name_or_path
        if not name:
            raise AdapterError(
                "names no base model; use PeftModel.from_pretrained(model, ...)", file=str(source.folder)
            )
        options.setdefault("revision", source.config.revision)
        read_config = partial(
            AutoConfig.from_pretrained, name, **{key: options[key] for key in _HUB_OPTIONS & options.keys()}
        )
        named = (row.auto_class for row in TASKS.values() if cls.task_type and row.task_type == cls.task_type)
        auto_class = next(named, None) or source.auto_class(read_config)
        if options.keys().isdisjoint(_LABELS):
            labels = source.recorded_options or label_options(
                lambda **labels: build_empty(auto_class, read_config(**labels)), source.saved_sizes
            )
            options |= labels and {**labels, "ignore_mismatched_sizes": True}
        options.setdefault("use_safetensors", True)  # a pickle can run code when it is read
        build = getattr(transformers, auto_class).from_pretrained
        model, info = build(name, **options, output_loading_info=True)
        initialised, _ = find_initialised(model, info, name, new_labels=True, complete=False)
        return model, initialised


for _kind in PeftModel.task_classes.values():
    _about = {"__module__": __name__, "__doc__": f"``AutoPeftModel`` for adapters of ``{_kind.__name__}``."}
    _name = f"Auto{_kind.__name__}"
    globals()[_name] = type(_name, (AutoPeftModel,), _about, task_type=_kind.default_task_type)
