"""PEFT's classes that load an adapter and the base model that its config names."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import transformers
from transformers import AutoConfig

from peftcli.adapters.load import find_adapter
from peftcli.core.files import load_adapter
from peftcli.errors import AdapterError
from peftcli.models.open import build_empty, label_options
from peftcli.models.tokens import fit_adapter
from peftcli.models.validate import find_initialised
from peftcli.peft_api.model import PeftModel, wrap

_LABELS = {"config", "num_labels", "id2label", "label2id"}
_HUB_OPTIONS = {"cache_dir", "code_revision", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"}
"""Arguments of ``from_pretrained`` that say where a model is."""


class AutoPeftModel:
    """Loads an adapter and, from what its config says, the base model below it."""

    auto_class: ClassVar[str | None] = None
    """transformers' auto class of the base model. None: by the config's task type, or the base model's own class."""

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        revision: str | None = None,
        **base_options: Any,
    ) -> PeftModel:
        """Load the base model with the adapter in it; ``base_options`` go to the base model's ``from_pretrained``.

        ``num_labels`` is that of the adapter's head, and ``use_safetensors`` is True, unless they are given.

        Raises:
            AdapterError: the adapter cannot be read, names no base model, or does not fit it.
        """
        source = find_adapter(str(adapter), revision=revision)
        config, name = source.config, source.config.base_model_name_or_path
        if not name:
            raise AdapterError(
                "names no base model; use PeftModel.from_pretrained(model, ...)", file=str(source.folder)
            )
        base_options.setdefault("revision", config.revision)
        read_config = partial(
            AutoConfig.from_pretrained, name, **{key: base_options[key] for key in _HUB_OPTIONS & base_options.keys()}
        )
        auto_class = cls.auto_class or source.auto_class(read_config)
        if base_options.keys().isdisjoint(_LABELS):
            labels = source.recorded_options or label_options(
                lambda **labels: build_empty(auto_class, read_config(**labels)), source.saved_sizes
            )
            base_options |= labels and {**labels, "ignore_mismatched_sizes": True}
        base_options.setdefault("use_safetensors", True)  # a pickle can run code when it is read
        build = getattr(transformers, auto_class).from_pretrained
        model, info = build(name, **base_options, output_loading_info=True)
        initialised, _ = find_initialised(model, info, name, new_labels=True, complete=False)
        load_adapter(
            model,
            config,
            source.folder,
            trainable=is_trainable,
            adapter=adapter_name,
            initialised=initialised,
            prepare=lambda header: fit_adapter(model, config, header),
        )
        return wrap(model, config, adapter_name).train(is_trainable)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """The same, for causal language models."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """The same, for encoder-decoder language models."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """The same, for models that classify texts."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """The same, for models that classify each token."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """The same, for models that find answers in texts."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """The same, for models without a head."""

    auto_class = "AutoModel"
