"""PEFT's names over the core, so that code written for PEFT runs with its import changed."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from peftcli.card import write_card
from peftcli.core import prompt
from peftcli.core.config import AdapterConfig
from peftcli.core.files import WEIGHTS_FILE, load_adapter, read_config, read_tensors, save_adapter
from peftcli.core.inject import disabled, inject, set_trainable, unload
from peftcli.core.merge import merge
from peftcli.core.quantised import num_weights
from peftcli.core.weights import adapter_state, holds_its_file, load_state, named_tensors
from peftcli.errors import AdapterError
from peftcli.hub import local_folder, push
from peftcli.methods import METHODS, config_from_dict
from peftcli.models.load import base_of, load_tokenizer
from peftcli.models.quantization import forget
from peftcli.tasks import TASKS


class TaskType(str, Enum):
    """PEFT's names of the tasks."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


PeftType = Enum("PeftType", {method.peft_type: method.peft_type for method in METHODS.values()}, type=str)  # type: ignore[misc]
"""PEFT's names of the methods."""


class PromptTuningInit(str, Enum):
    """How virtual tokens start."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class PeftConfig:
    """Reads any method's config from an adapter folder."""

    @staticmethod
    def from_pretrained(adapter: str | Path, revision: str | None = None) -> AdapterConfig:
        """The config in a folder or hub repository.

        Raises:
            AdapterError: it cannot be read, or names a method or setting that is not supported.
        """
        folder = local_folder(str(adapter), revision=revision)
        return config_from_dict(read_config(folder), file=str(folder / "adapter_config.json"))


class _Tuner(nn.Module):
    """Holds the model as ``base_model.model``, so that parameters are called what the adapter file calls them."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class PeftModel(nn.Module):
    """A model with an adapter in it.

    ``state_dict()`` holds the adapter's weights only: what is saved in the middle of training, by Accelerate or by
    ``transformers.Trainer``, is small and free of tied weights. ``base_model.state_dict()`` holds everything.
    """

    def __init__(self, model: nn.Module, peft_config: AdapterConfig, adapter_name: str = "default"):
        super().__init__()
        self.base_model = _Tuner(model)
        self.peft_config = {adapter_name: peft_config}
        self.active_adapter = adapter_name
        self.train(model.training)
        self.register_state_dict_post_hook(_keep_adapter)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_expect_adapter)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: a copy in the making
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with its adapter."""
        return self.base_model(*args, **kwargs)

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The config of the adapter."""
        return self.peft_config[self.active_adapter]

    @property
    def active_adapters(self) -> list[str]:
        """The adapter's name, as a list."""
        return [self.active_adapter]

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the model takes the number of targets of the global batch, which Trainer asks."""
        model = self.get_base_model()
        if hasattr(model, "accepts_loss_kwargs"):
            return bool(model.accepts_loss_kwargs)
        kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
        return inspect.Parameter.VAR_KEYWORD in kinds

    def get_base_model(self) -> nn.Module:
        """The transformers model, adapter layers and all."""
        model = self.base_model.model
        assert isinstance(model, nn.Module)
        return model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate`` of transformers returns, virtual tokens left out."""
        return prompt.generate(self.get_base_model(), *args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model computes what the base model computes."""
        with disabled(self.get_base_model()):
            yield

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Parameters that train, and all of them."""
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trained, num_weights(self)

    def print_trainable_parameters(self) -> None:
        """Print both counts and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **_unused: Any) -> None:
        """Write the adapter folder: config, weights, model card. Never the base model.

        Raises:
            AdapterError: a weight is not finite.
            StorageError: the folder cannot be written.
        """
        if is_main_process:
            save_adapter(self.get_base_model(), self.active_peft_config, Path(save_directory))
            write_card(Path(save_directory))

    def push_to_hub(self, repo_id: str, *, private: bool = True, **options: Any) -> Any:
        """Save the adapter and push it to the hub, private unless told otherwise. See ``peftcli.hub.push``."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push(Path(folder), repo_id, private=private, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        revision: str | None = None,
    ) -> PeftModel:
        """``model`` with the adapter of a folder or hub repository in it, frozen unless ``is_trainable``.

        Raises:
            AdapterError: the adapter cannot be read or does not fit the model.
        """
        folder = local_folder(str(model_id), revision=revision)
        if config is None:
            config = PeftConfig.from_pretrained(folder)
        load_adapter(model, config, folder, trainable=is_trainable)
        return _wrapped(model, config, adapter_name).train(is_trainable)

    def load_adapter(self, model_id: str | Path, adapter_name: str | None = None, is_trainable: bool = False) -> None:
        """Replace the adapter by the one of a folder; in place, when their configs say the same.

        Raises:
            AdapterError: it does not fit, or ``adapter_name`` is not this adapter's: the model holds one adapter. The
                old adapter stays then.
        """
        if adapter_name not in (None, self.active_adapter):
            raise AdapterError(f"the model holds one adapter, {self.active_adapter!r}; it cannot take {adapter_name!r}")
        folder = local_folder(str(model_id))
        config, model, old = PeftConfig.from_pretrained(folder), self.get_base_model(), self.active_peft_config
        if _content(config) == _content(old) and holds_its_file(
            model
        ):  # an optimizer may hold the weights: they stay the same objects
            load_state(model, read_tensors(folder), file=str(folder / WEIGHTS_FILE))
            set_trainable(model, is_trainable)
            return
        kept, trained = adapter_state(model), any(parameter.requires_grad for parameter in self.parameters())
        unload(model)
        try:
            load_adapter(model, config, folder, trainable=is_trainable)
        except AdapterError:
            inject(model, old)
            load_state(model, kept)
            set_trainable(model, trained)
            raise
        self.peft_config = {self.active_adapter: config}

    def merge_and_unload(self, *, dequantize: bool = False, **_unused: Any) -> nn.Module:
        """The base model with the adapter folded in, and no adapter layer left.

        ``dequantize`` makes a quantised base model's weights dense, so that they can be merged into.

        Raises:
            AdapterError: the method cannot be merged, the base model is quantised, or a merged weight is not finite.
        """
        model = self.get_base_model()
        untied = merge(model, self.active_peft_config, dequantise=dequantize)
        if dequantize:
            forget(model)  # type: ignore[arg-type]
        if untied:
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        return model

    def unload(self) -> nn.Module:
        """The base model as it was before the adapter."""
        model = self.get_base_model()
        unload(model)
        return model


class PeftModelForCausalLM(PeftModel):
    """A causal language model with an adapter. Names its arguments, which Trainer reads."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "labels": labels}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model with an adapter. Names its arguments, which Trainer reads."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        given = {
            "inputs_embeds": inputs_embeds,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
            "labels": labels,
        }
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return self.base_model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


_CLASSES: dict[str | None, type[PeftModel]] = {
    None: PeftModel,
    "FEATURE_EXTRACTION": PeftModel,
    "CAUSAL_LM": PeftModelForCausalLM,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
}


def get_peft_model(model: nn.Module, peft_config: AdapterConfig, adapter_name: str = "default") -> PeftModel:
    """Put a new adapter into ``model``, in place, and wrap it.

    Raises:
        AdapterError: the config does not fit the model.
    """
    if peft_config.base_model_name_or_path is None:
        peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    peft_config.prepare(lambda name: load_tokenizer(base_of(name or _name_of(model))))
    inject(model, peft_config)
    set_trainable(model, not peft_config.inference_mode)
    return _wrapped(model, peft_config, adapter_name)


def get_peft_model_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names of the adapter file."""
    return adapter_state(model.get_base_model() if isinstance(model, PeftModel) else model)


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
        folder = local_folder(str(adapter), revision=revision)
        config = PeftConfig.from_pretrained(folder)
        if not config.base_model_name_or_path:
            raise AdapterError("names no base model; use PeftModel.from_pretrained(model, ...)", file=str(folder))
        base_options.setdefault("revision", config.revision)
        model = cls._base_class(config).from_pretrained(config.base_model_name_or_path, **base_options)
        return PeftModel.from_pretrained(model, folder, adapter_name, is_trainable, config)

    @classmethod
    def _base_class(cls, config: AdapterConfig) -> Any:
        import transformers

        by_task = {row.task_type: row.auto_class for row in TASKS.values()}
        name = cls.auto_class or by_task.get(config.task_type or "")
        if name is None:
            assert config.base_model_name_or_path is not None
            described = transformers.AutoConfig.from_pretrained(
                config.base_model_name_or_path, revision=config.revision
            )
            name = (described.architectures or ["AutoModel"])[0]
        found = getattr(transformers, name, None)
        if found is None or not hasattr(found, "from_pretrained"):
            raise AdapterError(f"transformers has no class {name}, which the base model's config names")
        return found


class AutoPeftModelForCausalLM(AutoPeftModel):
    """The same, for causal language models."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """The same, for encoder-decoder language models."""

    auto_class = "AutoModelForSeq2SeqLM"


def _wrapped(model: nn.Module, config: AdapterConfig, adapter_name: str) -> PeftModel:
    if config.task_type not in _CLASSES:
        known = ", ".join(name for name in _CLASSES if name)
        raise AdapterError(f"{config.task_type!r} is not supported; known: {known}", key="task_type")
    return _CLASSES[config.task_type](model, config, adapter_name)


def _content(config: AdapterConfig) -> dict[str, Any]:
    """The config without what says where the adapter belongs."""
    place = ("task_type", "base_model_name_or_path", "revision", "inference_mode")
    return {key: value for key, value in config.to_dict().items() if key not in place}


def _name_of(model: nn.Module) -> str:
    name = getattr(model, "name_or_path", None)
    if not name:
        raise AdapterError("the model does not say which tokenizer is its own", key="tokenizer_name_or_path")
    return str(name)


def _adapter_names(model: PeftModel) -> set[str]:
    """The names that the adapter's parameters have in ``model``."""
    owned = {id(parameter) for _, _, parameter in named_tensors(model.get_base_model()).values()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owned}


def _keep_adapter(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    assert isinstance(model, PeftModel)
    names = {prefix + name for name in _adapter_names(model)}
    for name in [name for name in state if name.startswith(prefix) and name not in names]:
        del state[name]


def _expect_adapter(model: nn.Module, keys: Any) -> None:
    assert isinstance(model, PeftModel)
    names = _adapter_names(model)
    keys.missing_keys[:] = [name for name in keys.missing_keys if any(name.endswith(own) for own in names)]
