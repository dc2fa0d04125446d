"""PEFT's classes that load an adapter and the base model that its config names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from peftcli.adapters.load import find_adapter
from peftcli.core.files import load_adapter
from peftcli.errors import AdapterError
from peftcli.models.tokens import fit_adapter
from peftcli.peft_api.model import PeftModel, wrap


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
        """The adapted model; ``base_options`` go to the base model's ``from_pretrained``.

        Raises:
            AdapterError: the adapter cannot be read, names no base model, or does not fit it.
        """
        import transformers

        source = find_adapter(str(adapter), revision=revision)
        config, name = source.config, source.config.base_model_name_or_path
        if not name:
            raise AdapterError(
                "names no base model; use PeftModel.from_pretrained(model, ...)", file=str(source.folder)
            )
        base_options.setdefault("revision", config.revision)
        auto_class = cls.auto_class or source.auto_class(
            lambda: transformers.AutoConfig.from_pretrained(name, revision=config.revision)
        )
        model = getattr(transformers, auto_class).from_pretrained(name, **base_options)
        fit_adapter(model, config, source.folder)
        load_adapter(model, config, source.folder, trainable=is_trainable, adapter=adapter_name)
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
