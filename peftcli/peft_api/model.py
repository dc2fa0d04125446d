"""PEFT's model: a model with adapters in it, which are added, switched, merged, saved and loaded."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from peftcli.adapters.card import complete_card, has_own_card, write_card
from peftcli.adapters.push import push
from peftcli.core.config import AdapterConfig
from peftcli.core.files import write_adapter
from peftcli.core.inject import shallow_copy
from peftcli.core.layer import TrainedCopy, adapter_layers, plain_dtype
from peftcli.core.weights import adapter_state
from peftcli.errors import AdapterError, PeftWarning
from peftcli.methods._task_ids import generate
from peftcli.models.conversions import warn_of_peft
from peftcli.peft_api.adding import (
    Loading,
    LoadResult,
    add_new,
    check_config,
    find_by_options,
    load_into,
    name_adapters,
    replace_adapter,
    replacing,
    start_adapter,
)
from peftcli.peft_api.for_libraries import (
    HeadForTrl,
    SavedByTrainer,
    ShowsArguments,
    find_in_checkpoint,
    find_trained_outside,
    limit_state_to_adapters,
    start_reference,
    write_for_trainer,
)
from peftcli.peft_api.layers import cast_weights, count_parameters, get_layer_status, get_model_status
from peftcli.peft_api.soft_prompts import get_prompt, get_prompt_embedding_to_save, prompt_encoder
from peftcli.peft_api.state_dicts import copy_with_state, embedding_layers, refuse_pickle, remove_start
from peftcli.peft_api.training import (
    is_checkpointing,
    prepare_model_for_gradient_checkpointing,
    require_input_gradients,
)
from peftcli.peft_api.tuner import Tuner
from peftcli.system.hub_requests import full_repo_id
from peftcli.system.outputs import expand_user
from peftcli.tasks.text.prompts import PromptForm


class PeftModel(SavedByTrainer):
    """A model with adapters in it, of which one or some are active.

    ``state_dict()`` holds the adapters' weights only: what is saved in the middle of training, by Accelerate or by
    ``transformers.Trainer``, is small and free of tied weights. ``base_model.state_dict()`` holds everything.

    What it does not have itself, such as ``set_adapter`` and ``merge_and_unload``, is the tuner's, ``base_model``.
    ``forward`` and ``generate`` take ``adapter_names``, one a row: the adapter of that row, or ``__base__`` for none.
    """

    task_classes: ClassVar[dict[str, type[PeftModel]]] = {}
    """The class of each task_type; filled by the subclasses."""
    default_task_type: ClassVar[str | None] = None
    """That of an adapter whose config has none."""
    prompt_form: PromptForm | None = None
    """How a text is asked, where an ``AutoPeftModel`` class has found it beside the adapter."""
    arguments: ClassVar[tuple[str, ...]] = ()
    """What ``forward`` takes without names, in PEFT's order; without a task, what the base model takes."""
    get_layer_status, get_model_status = get_layer_status, get_model_status
    get_nb_trainable_parameters = count_parameters
    prompt_encoder = property(prompt_encoder)
    get_prompt, get_prompt_embedding_to_save = get_prompt, get_prompt_embedding_to_save
    prepare_model_for_gradient_checkpointing = staticmethod(prepare_model_for_gradient_checkpointing)
    prefix_in_state: str
    """What the model's names begin with in the state that is being loaded: its place in the module that loads it."""

    def __init_subclass__(cls, task_type: str | None = None) -> None:
        if task_type is not None:
            PeftModel.task_classes[task_type] = cls
            cls.default_task_type = task_type

    @classmethod
    def class_of(cls, config: AdapterConfig) -> type[PeftModel]:
        """Return the class for an adapter: that of its task_type, or this one where it has none."""
        if config.task_type is None:
            return cls
        if config.task_type not in PeftModel.task_classes:
            known = ", ".join(PeftModel.task_classes)
            raise AdapterError(f"{config.task_type!r} is not supported; known: {known}", key="task_type")
        return PeftModel.task_classes[config.task_type]

    def __init__(
        self,
        model: nn.Module,
        peft_config: AdapterConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ):
        """Put a new adapter into ``model``, in place, and wrap it. ``get_peft_model`` does the same.

        An adapter of this name that the model holds already is replaced, with a warning; others are switched off.

        Raises:
            AdapterError: the config does not fit the model.
        """
        peft_config = self._with_task_type(peft_config)
        add_new(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        self._hold(model, peft_config, adapter_name)

    @classmethod
    def _with_task_type(cls, config: AdapterConfig) -> AdapterConfig:
        """The config, or a copy with the class's task_type where it has none: another model may get the same config."""
        check_config(config)
        if config.task_type is None and cls.default_task_type is not None:
            config = copy.copy(config)
            config.task_type = cls.default_task_type
        return config

    def _hold(self, model: nn.Module, peft_config: AdapterConfig, adapter_name: str) -> None:
        """Wrap ``model``, which holds the adapter already."""
        super().__init__()
        self.base_model = Tuner(model, {adapter_name: peft_config})
        self.train(model.training)
        if is_checkpointing(model, default=True):
            self.base_model.gradient_hook = require_input_gradients(model)
        limit_state_to_adapters(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: a copy in the making
                raise
            return getattr(self.base_model, name)

    @ShowsArguments
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes with its active adapters."""
        given = dict(**dict(zip(self.arguments, args, strict=False)), **kwargs)
        optional = self.arguments[1:]  # not every model has all of them
        kwargs = {name: value for name, value in given.items() if value is not None or name not in optional}
        return self.base_model(*args[len(self.arguments) :], **kwargs)

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """The adapters' configs, by name."""
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are active."""
        return list(self.base_model.active_adapters)

    @property
    def active_peft_config(self) -> AdapterConfig:
        """The config of the active adapter, of several the first."""
        if not self.active_adapters:
            raise AdapterError("no adapter is active")
        return self.peft_config[self.active_adapters[0]]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter adapts what the model computes."""
        return bool(self.active_adapters) and not self.base_model.disabled

    @property
    def peft_type(self) -> str | None:
        """PEFT's name of the method of the adapter that was there first; None without adapters."""
        return next((config.peft_type for config in self.peft_config.values()), None)

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that the adapters train in full, or None."""
        return {name for config in self.peft_config.values() for name in config.modules_to_save or ()} or None

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype. The base model itself states that of its first weight, which may be an adapter's."""
        return plain_dtype(self.get_base_model())

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, if it states one."""
        return self.dtype if hasattr(self.get_base_model(), "dtype") else None

    @property
    def generation_config(self) -> Any:
        """The base model's, which ``generate`` uses."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.get_base_model().generation_config = config

    def get_base_model(self) -> nn.Module:
        """The transformers model, adapter layers and all."""
        return self.base_model.model

    @ShowsArguments
    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What ``generate`` of transformers returns, virtual tokens left out."""
        model: Any = self.get_base_model()
        copies = 1
        if adapter_names is not None:  # generate makes several rows of each: beams, or samples
            settings = kwargs.get("generation_config") or model.generation_config
            counts = (kwargs.get(key) or getattr(settings, key) for key in ("num_beams", "num_return_sequences"))
            copies = max(count or 1 for count in counts)
        with self.base_model.by_row(adapter_names, args, kwargs, copies):
            return generate(model, *args, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Put another new adapter into the model, of any method. It is neither active nor trained: ``set_adapter``.

        For the last two arguments see ``get_peft_model``.

        Raises:
            AdapterError: the name is taken, or the config does not fit the model. Nothing is changed then.
        """
        self.base_model.check_new(adapter_name)
        model, config = self.get_base_model(), self._with_task_type(peft_config)
        start_adapter(model, config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        start_reference(model, adapter_name, peft_config, self.peft_config)
        self.base_model.register_adapter(adapter_name, config, trainable=False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model computes what the base model computes.

        Warns where some of the active adapters' layers are disabled already: afterwards all are enabled.
        """
        tuner = self.base_model
        if not tuner.disabled and any(layer.disable_adapters for layer in adapter_layers(tuner.model).values()):
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled; "
                "disable_adapter enables all of them afterwards",
                stacklevel=3,
            )
        before, merged = tuner.disabled, tuner.merged_adapters
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            if not before:
                tuner.enable_adapter_layers()
            if merged:
                tuner.merge_adapter(merged)

    def print_trainable_parameters(self) -> None:
        """Print both counts and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
        *,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        save_function: Any = None,
        **options: Any,
    ) -> None:
        """Write each adapter's folder: config, weights, model card. Never the base model.

        A folder that is called as Trainer calls its checkpoints also gets what Trainer reads again. Warns of weights
        that train and belong to no adapter, and of layers that PEFT does not load.

        Args:
            save_directory: the folder of the adapter called ``default``; the others get a folder of their name in it.
            safe_serialization: PEFT's; pickles are not written, and each file is written whole or not at all.
            selected_adapters: which adapters; None: all.
            save_embedding_layers: whether to write embedding and head too. ``auto``: if they are targets, or resized.
            is_main_process: whether to write at all.
            path_initial_model_for_weight_conversion: the folder of a LoRA before it was trained that starts by PiSSA,
                OLoRA, CorDA or LoRA-GA. Those made here need none: they are saved as a plain LoRA.
            state_dict: the model's state, where it is gathered from several devices; None: what the model holds.
            save_function: transformers'; changes nothing.
            options: transformers', such as ``max_shard_size``; they change nothing, with a warning.

        Raises:
            AdapterError: an unknown name or option, a weight is not finite, or ``state_dict`` lacks one.
            StorageError: the folder cannot be written.
        """
        refuse_pickle(safe_serialization)
        if options:
            warnings.warn(f"save_pretrained of an adapter ignores {', '.join(options)}", PeftWarning, stacklevel=2)
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        self.base_model.check_known(names, "selected_adapters")
        if is_main_process:
            if outside := sorted(find_trained_outside(self)):
                shown = ", ".join(outside[:3]) + (f" and {len(outside) - 3} more" if len(outside) > 3 else "")
                text = f"trains beside the adapters and is in none of their files: {shown}; see modules_to_save"
                warnings.warn(text, PeftWarning, stacklevel=2)
            model = self if state_dict is None else self._with_state(state_dict)
            top = expand_user(Path(save_directory))
            for name in names:
                folder = top / ("" if name == "default" else name)
                model._save(name, folder, path_initial_model_for_weight_conversion, save_embedding_layers)
            write_for_trainer(top, model.state_dict())

    def _with_state(self, state: Mapping[str, torch.Tensor]) -> PeftModel:
        """Return a copy that holds the tensors of ``state``."""
        copied: Any = shallow_copy(self)
        copied.base_model.model = copy_with_state(self.get_base_model(), state)
        return copied

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write the model card of a saved adapter's folder, or add to that of somebody else what it lacks.

        A card that cannot be read stays as it is, with a warning.
        """
        folder, tags = expand_user(Path(output_dir)), self._card_tags()
        if has_own_card(folder, tags):
            write_card(folder, tags)
            return
        try:
            complete_card(folder, tags)
        except AdapterError as error:
            warnings.warn(f"the model card stays as it is: {error}", stacklevel=2)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
        tags: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        """Save the adapters and push them to the hub, private by default.

        The adapter called ``default``, or without one the active adapter, goes to the top of the repository; each other
        one to a folder of its name. ``max_shard_size`` is PEFT's; each adapter is one file. A ``repo_id`` without a
        namespace is one of the token's user. See ``peftcli.adapters.push.push`` for the other arguments, of which
        ``options`` are more.

        Raises:
            AdapterError: no adapter is called ``default``, and not exactly one is active.
            HubError: the hub refused.
            NetworkError: the hub cannot be reached.
        """
        options = {"message": commit_message, "private": private, "token": token, "revision": revision, **options}
        options |= {"description": commit_description, "create_pr": create_pr, "tags": tags or ()}
        first = "default" if "default" in self.peft_config else self.base_model.single_active_adapter()
        others = [name for name in self.peft_config if name != first]
        with tempfile.TemporaryDirectory() as folder:
            for name in (first, *others):
                self._save(name, Path(folder) / ("" if name == first else name))
            return push(Path(folder), full_repo_id(repo_id, token), subfolders=others, **options)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        adapters: Mapping[str, str] | None = None,
        **options: Any,
    ) -> PeftModel:
        """``model`` with the adapter of a folder or hub repository in it, frozen unless ``is_trainable``.

        Args:
            model: the base model.
            model_id: the folder or repository.
            adapter_name: the adapter's name in the model.
            is_trainable: whether its weights take gradients.
            config: a config to use in place of the adapter's own.
            autocast_adapter_dtype: see ``get_peft_model``.
            ephemeral_gpu_offload: PEFT's; changes nothing here.
            low_cpu_mem_usage: PEFT's; changes nothing here.
            key_mapping: patterns of names in the file, without ``base_model.model.``, and what takes their place.
            ignore_mismatched_sizes: whether weights of another shape start as those of a new adapter, with a warning.
            adapters: of X-LoRA, where its LoRA adapters are by now: a name each, and its folder or repository.
            options: ``revision``, ``subfolder``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``,
                as in huggingface_hub; others of its warn. What PEFT takes for a base model that is offloaded or loaded
                with the adapter (``device_map``, ``dtype`` and others) changes nothing.

        Raises:
            AdapterError: the adapter cannot be read or does not fit the model, or an option is unknown.
        """
        source = find_by_options(model_id, options)
        config = config or source.config
        if adapters is not None:
            name_adapters(config, adapters)
        how = Loading(is_trainable, autocast_adapter_dtype, key_mapping, ignore_mismatched_sizes)
        with replacing(model, adapter_name):
            load_into(model, config, source, adapter_name, how)
        return wrap(model, config, adapter_name, cls).train(is_trainable)

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str | None = None,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        *,
        ignore_mismatched_sizes: bool = False,
        **options: Any,
    ) -> LoadResult:
        """Load the adapter of a folder or hub repository beside the others, or in the place of the one of its name.

        A new one is not active: ``set_adapter``. Without a name the active one is replaced. An old one is replaced in
        place when the configs say the same. Weights go to the device of the layer that they adapt, not to
        ``torch_device``. The other arguments are those of ``from_pretrained``; ``ignore_mismatched_sizes`` means
        nothing where an adapter is replaced.

        Returns:
            Names that are missing or unexpected: none, since these are errors.

        Raises:
            AdapterError: it does not fit, or an option is unknown. The model is as it was then.
        """
        tuner, model = self.base_model, self.get_base_model()
        tuner.check_unmerged()
        name = tuner.single_active_adapter() if adapter_name is None else adapter_name
        if name in self.peft_config and not options.get("subfolder"):
            model_id = find_in_checkpoint(model_id, name)
        source = find_by_options(model_id, options)
        how = Loading(is_trainable, autocast_adapter_dtype, key_mapping, ignore_mismatched_sizes)
        if name in self.peft_config:
            try:
                if replace_adapter(model, name, self.peft_config[name], source, how):
                    self.peft_config[name] = source.config
            finally:
                tuner.switch()
            cast_weights(model, name, as_base=not autocast_adapter_dtype)
        else:
            tuner.check_new(name)
            load_into(model, source.config, source, name, how)
            tuner.register_adapter(name, source.config, trainable=is_trainable)
        if not is_trainable:
            self.eval()
        return LoadResult([], [])

    def _save(self, name: str, folder: Path, start: str | Path | None = None, embedding: bool | str = "auto") -> None:
        tensors: Mapping[str, torch.Tensor]
        config, tensors = copy.copy(self.peft_config[name]), adapter_state(self.get_base_model(), name)
        beside = embedding_layers(self.get_base_model(), config, name, embedding)
        if start is not None:
            config, tensors = remove_start(config, tensors, start)
        warn_of_peft(self.get_base_model(), config, tensors)
        tags = self._card_tags()
        own = has_own_card(folder, tags)
        config.note_base_class(self.get_base_model())
        write_adapter({**tensors, **beside}, config, folder)
        if own:
            write_card(folder, tags)
        else:
            self.create_or_update_model_card(folder)

    def _card_tags(self) -> list[str]:
        """The base model's own tags, and its library's."""
        model: Any = self.get_base_model()
        return [*(getattr(model, "model_tags", None) or []), *(["transformers"] * hasattr(model, "base_model_prefix"))]


def wrap(model: nn.Module, config: AdapterConfig, adapter_name: str, kind: type[PeftModel] = PeftModel) -> PeftModel:
    """Wrap a model that holds an adapter already in ``kind``'s class for the adapter."""
    found = kind.class_of(config)
    wrapped = found.__new__(found)
    wrapped._hold(model, config, adapter_name)
    return wrapped


class PeftModelForCausalLM(PeftModel, task_type="CAUSAL_LM"):
    """A causal language model with an adapter."""

    arguments = ("input_ids", "attention_mask", "inputs_embeds", "labels")

    def get_output_embeddings(self) -> Any:
        """The base model's head."""
        model: Any = self.get_base_model()
        head = model.get_output_embeddings()
        return HeadForTrl(head) if isinstance(head, TrainedCopy) else head


_TEXTS = ("input_ids", "attention_mask", "inputs_embeds")
_DECODER = ("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds")
_SPANS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
for _name, _task, _arguments in (
    ("Seq2SeqLM", "SEQ_2_SEQ_LM", (*_TEXTS, *_DECODER, "labels")),
    ("SequenceClassification", "SEQ_CLS", (*_TEXTS, "labels")),
    ("TokenClassification", "TOKEN_CLS", (*_TEXTS, "labels")),
    ("QuestionAnswering", "QUESTION_ANS", (*_SPANS, "start_positions", "end_positions")),
    ("FeatureExtraction", "FEATURE_EXTRACTION", _TEXTS),
):
    _about = {"arguments": _arguments, "__module__": __name__, "__doc__": f"A model with an adapter of {_task}."}
    _name = f"{PeftModel.__name__}For{_name}"
    globals()[_name] = type(_name, (PeftModel,), _about, task_type=_task)


class PeftMixedModel(PeftModel):
    """A model with adapters of any methods, whatever their task types.

    Every ``PeftModel`` takes adapters of several methods. This class calls the model with what it is given, and unlike
    PEFT's it is saved, and has a status, as any other.
    """

    @classmethod
    def class_of(cls, config: AdapterConfig) -> type[PeftModel]:
        """This class."""
        return cls
