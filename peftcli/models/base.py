"""A base model that has been found, checked and pinned; each of its files is read once."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from peftcli.core.layer import model_ends
from peftcli.core.quantised import is_quantised
from peftcli.errors import ModelError
from peftcli.guard.safetensors_header import TensorEntry
from peftcli.models import hub_files, quantization, tokens, validate
from peftcli.models.find import FoundBase
from peftcli.models.guarded import translated_errors
from peftcli.schema import BaseModel
from peftcli.system import hub_requests
from peftcli.system.outputs import expand_user

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

ProcessorKind = Literal["tokenizer", "image_processor", "feature_extractor", "processor"]
_PROCESSORS: dict[ProcessorKind, tuple[str, str, dict[str, Any]]] = {
    "tokenizer": ("AutoTokenizer", "tokenizer_config.json", {}),
    "image_processor": ("AutoImageProcessor", "preprocessor_config.json", {"backend": "pil"}),
    "feature_extractor": ("AutoFeatureExtractor", "preprocessor_config.json", {}),
    "processor": ("AutoProcessor", "processor_config.json", {}),
}
"""transformers' auto class, its file, and its options: torchvision's image processors differ from PIL's."""
_LABELS = {"num_labels", "id2label", "label2id", "vocab_size"}
"""Options by which a task sizes the head."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model with its weights."""

    model: PreTrainedModel
    initialised: tuple[str, ...] = ()
    """Names of the parameters that the checkpoint lacks and the loader drew: those of new heads."""
    note: str | None = None
    """What the user should know of the heads."""


class OpenBase:
    """An open base model: give ``open_base`` its spec."""

    is_pipeline = False
    """Whether it is made of several models, each in a folder of its own."""

    def __init__(self, spec: BaseModel, found: FoundBase, template: str | None, processors: Path | None = None):
        self.spec, self.name = spec, spec.name
        self._own_processors, self._on_hub = processors, found.on_hub
        self._template = template
        self._is_gguf = spec.name.endswith(".gguf")
        self.folder = found.folder
        """The folder on this machine: of a hub model, the cache's copy of one commit."""
        self._json: dict[Path, dict[str, Any]] = {}
        if not self._is_gguf or spec.trust_remote_code:  # code of a tokenizer beside a .gguf file
            self._json = validate.check_folder(self.folder, trusted=spec.trust_remote_code)
        self._processors: dict[str, Any] = {}

    def __enter__(self) -> OpenBase:
        return self

    def __exit__(self, *_: object) -> None:
        self._processors.clear()

    @property
    def commit(self) -> str | None:
        """The commit of a hub model; None for a folder or file."""
        return self.folder.name if self._on_hub else None

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The base model's config. Change a copy only.

        Raises:
            ModelError: it names code that is not run, or transformers cannot read it.
        """
        from transformers import AutoConfig

        if not self._is_gguf:
            validate.check_config(self._json, trusted=self.spec.trust_remote_code)
        with translated_errors(self.name):
            return AutoConfig.from_pretrained(**self._where)

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How the weights are quantised, as the folder stores them or as the recipe says; None: not at all.

        Raises:
            ModelError: the package for it is not installed; or both.
        """
        wanted, kind = self.spec.quantization, self.weight_type
        if self._stored_type and wanted:
            raise ModelError(
                f"{self.name} is stored quantised already ({self._stored_type}); it cannot become {wanted.type}",
                key="base_model.quantization",
                hint="leave it out, or name the full-precision model",
            )
        if kind is None:
            return None
        quantization.need_package(kind)
        return asdict(wanted) if wanted else {"type": kind, "stored": True}

    @property
    def weight_type(self) -> str | None:
        """How the weights are quantised, in a word of the recipe or of transformers; None: not at all."""
        wanted = self.spec.quantization
        return self._stored_type or (wanted.type if wanted else None)

    @cached_property
    def _stored_type(self) -> str | None:
        return None if self._is_gguf else quantization.stored_kind(self.config)

    @property
    def is_stored_quantised(self) -> bool:
        """Whether the folder's own weights are quantised."""
        return self.quantization is not None and self.spec.quantization is None

    def processor(self, kind: ProcessorKind = "tokenizer", **more: Any) -> Any:
        """Return the tokenizer, with the recipe's chat template and new tokens, or another processor of the model.

        ``more`` are options of its ``from_pretrained``.

        Raises:
            ModelError: the model has none, or it cannot be changed as the recipe says.
        """
        if more or kind not in self._processors:
            import transformers

            auto_class, file, options = _PROCESSORS[kind]
            options = {**options, **more}
            build, own = getattr(transformers, auto_class).from_pretrained, self._own_processors
            if own is not None and os.path.lexists(own / file):
                validate.check_folder(own)
                with translated_errors(str(own)):
                    loaded = build(own, trust_remote_code=False, **options)
            else:
                with translated_errors(self.name):
                    loaded = build(**self._where, **options)
                if kind == "tokenizer":
                    tokens.apply_recipe(loaded, self.spec, self._template)
            self._processors[kind] = loaded
        return self._processors[kind]

    def model(self, auto_class: str, dtype: torch.dtype | Literal["auto"] | None, **options: Any) -> LoadedModel:
        """Load the model, frozen parameters and all: on the CPU, or quantised on the device that computes.

        ``dtype`` is that of the weights that are not quantised; auto: that of the files. ``options`` are what a task
        sets in the config, as ``num_labels``. With labels, a head of the checkpoint for other labels is replaced by a
        new one.

        Raises:
            ModelError: the model is not of this class, or its weights are not those of its config.
            OutOfMemory: the machine's memory does not hold it.
        """
        import torch
        import transformers

        torch.backends.cuda.enable_cudnn_sdp(False)  # some GPUs prefer it, and it takes long at each new length of text
        arguments: dict[str, Any] = {"dtype": dtype, "use_kernels": False}  # which transformers fetches from the hub
        # a .gguf file is slow to parse, and transformers would do it once more for the config
        arguments |= {"config": self._config_with(options)} if self._is_gguf else options
        if self.spec.attn_implementation:
            arguments["attn_implementation"] = self.spec.attn_implementation
        how = self.quantization
        if self._is_gguf:
            arguments["quantization_config"] = quantization.unpacked_gguf()
        elif self.spec.quantization:
            assert dtype != "auto"
            arguments["quantization_config"] = self.quantization_config(auto_class, dtype, **options)
        if how:
            quantization.hush()
        if not self._is_gguf:
            # ignored: find_initialised names what differs
            arguments |= {"use_safetensors": True, "ignore_mismatched_sizes": True}
            missing = {name: value for name, value in options.items() if getattr(self.config, name, value) is None}
            self.check_weights(self.empty_model(auto_class, **missing))
        with translated_errors(self.name):
            build = getattr(transformers, auto_class).from_pretrained
            model, info = build(**self._where, **arguments, output_loading_info=True)
            initialised, note = validate.find_initialised(
                model, info, self.name, new_labels=not _LABELS.isdisjoint(options), complete=how is None
            )
        if auto_class == "AutoModel":  # its answer is the hidden states, which no pooler has a part in
            initialised = ()
        wanted = self.spec.quantization
        if wanted and not any(map(is_quantised, model.modules())):  # what is stored so may have been dequantised
            raise ModelError(f"{wanted.type} finds no linear layer in {self.name}", key="base_model.quantization")
        return LoadedModel(model, initialised, note)

    def empty_model(self, auto_class: str, **options: Any) -> PreTrainedModel:
        """Build the model on the meta device: its modules and shapes, no memory.

        Raises:
            ModelError: the model is not of this class.
        """
        config = self._config_with(options)
        with translated_errors(self.name):
            return build_empty(auto_class, config, trust_remote_code=self.spec.trust_remote_code)

    def quantization_config(self, auto_class: str, dtype: torch.dtype | None, **options: Any) -> Any:
        """Return transformers' config for the recipe's quantization, which leaves the model's heads out.

        Raises:
            ModelError: the model has layers that cannot be quantised so.
        """
        assert self.spec.quantization
        model = self.empty_model(auto_class, **options)
        self.check_groups(auto_class, model)
        return quantization.to_transformers(self.spec.quantization, dtype, model, _heads(auto_class, model))

    def check_groups(self, auto_class: str, model: PreTrainedModel) -> None:
        """Check that the recipe's quantization divides the layers of the model, which may be empty, into groups.

        Raises:
            ModelError: it does not.
        """
        if self.spec.quantization and self.spec.quantization.type == "int4_weight_only":
            quantization.check_groups(self.spec.quantization, model, _heads(auto_class, model))

    def _config_with(self, options: Mapping[str, Any]) -> PreTrainedConfig:
        config = copy.deepcopy(self.config)
        for key, value in options.items():
            setattr(config, key, value)
        return config

    def _check_prefix(self, model: PreTrainedModel) -> None:
        """Check that the files have the body's names, unlike those of a plain Llama for LlamaForQuestionAnswering."""
        family = next((each for each in type(model).__mro__ if each.__name__.endswith("PreTrainedModel")), type(model))
        own, usual = (getattr(each, "base_model_prefix", "") for each in (model, family))
        if own == usual:
            return
        first = {name.partition(".")[0] for header in self.shards.values() for name in header}
        if usual in first and own not in first:
            message = f"has weights of {usual}, and transformers looks for {own} in a {type(model).__name__}"
            raise ModelError(message, key="base_model", hint="name a base model of another architecture")

    def missing_poolers(self, model: PreTrainedModel) -> list[str]:
        """Return the names of parameters of the model, which may be empty: of poolers that the files do not hold.

        Raises:
            ModelError: one of the files is missing or damaged.
        """
        poolers = tuple(f"{name}." for name in validate.find_heads(model)[1] if name.rpartition(".")[2] == "pooler")
        if not poolers or not self.shards:
            return []
        if any("pooler" in key.split(".") for header in self.shards.values() for key in header):
            return []
        return [name for name, _ in model.named_parameters() if name.startswith(poolers)]

    def label_options(self, auto_class: str, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return ``num_labels`` if a head of these sizes is for other labels than the config says."""
        return label_options(partial(self.empty_model, auto_class), sizes)

    def file(self, name: str) -> Path | None:
        """Return the path of one of the model's small files, of its folders too; None if the model lacks it."""
        if "/" in name:
            return None if self._is_gguf else self._fetch(name)
        path = self.folder / name
        return path if not self._is_gguf and os.path.lexists(path) else None

    def stored_bytes(self) -> int:
        """Return the size of the files of weights that are on this machine already."""
        if self._is_gguf:
            return expand_user(Path(self.name)).stat().st_size
        names = self._weight_files(lambda name: path if (path := self.folder / name).exists() else None)
        return sum(path.stat().st_size for name in names if (path := self.folder / name).exists())

    @cached_property
    def shards(self) -> dict[Path, dict[str, TensorEntry]]:
        """The safetensors files, whole and on this machine, and their tensors; none if the model is stored otherwise.

        Raises:
            ModelError: one of them is missing or damaged.
            NetworkError: the hub cannot be reached.
        """
        if self.folder / "config.json" not in self._json:
            return {}
        if names := self._weight_files(self._fetch):
            self._fetch(*names)
        return {self.folder / name: validate.read_shard(self.folder / name) for name in names}

    @property
    def _own_weights(self) -> str | None:
        """The file of weights that the config names in place of the usual ones."""
        config = self.folder / "config.json"
        return validate.weights_name(self._json.get(config, {}), str(config))

    def _weight_files(self, find: Callable[[str], Path | None]) -> list[str]:
        """Return the names of the files of weights; ``find`` returns the path of a file, or None if it is missing."""
        own = self._own_weights
        found = next((file for name in ([own] if own else validate.WEIGHTS) if (file := find(name))), None)
        if found is None:
            return []
        return [found.name] if found.suffix == ".safetensors" else validate.listed_shards(found)

    def check_weights(self, model: PreTrainedModel, *, fetch: bool = True) -> None:
        """Check that the weights are whole safetensors files for this model, which may be empty.

        Without ``fetch``, the weights of a hub model are only looked for among the files that the hub has listed.

        Raises:
            ModelError: they are not.
            NetworkError: the hub cannot be reached.
        """
        if self._is_gguf:
            return
        names = (
            hub_requests.listed_files(self.folder) if self._on_hub else {each.name for each in self.folder.iterdir()}
        )
        own = self._own_weights
        if names is not None and names.isdisjoint([own] if own else validate.WEIGHTS):
            raise validate.no_weights(self.name, names)
        if self._on_hub and not fetch:
            return
        if not self.shards:  # it is not known which files the hub has
            hub_requests.refuse_partial_copy(self.folder, self.name, "base_model")
            raise validate.no_weights(self.name, ())
        self._check_prefix(model)
        if self.weight_type is None:
            validate.check_size(model, self.shards.values(), str(self.folder / "config.json"))

    @property
    def _where(self) -> dict[str, Any]:
        """The arguments of ``from_pretrained`` that say which model."""
        gguf = {"gguf_file": expand_user(Path(self.name)).name} if self._is_gguf else {}
        return {
            "pretrained_model_name_or_path": str(self.folder),
            "trust_remote_code": self.spec.trust_remote_code,
            **gguf,
        }

    def _fetch(self, *names: str) -> Path | None:
        """Make sure that files of the model are on this machine; return the first, or None if the model lacks it."""
        if self._on_hub:
            hub_files.fetch(self.spec, *names)
        path = self.folder / names[0]
        return path if os.path.lexists(path) else None


class BaseWeights:
    """Reads tensors of the checkpoint, before any quantisation, by the names that they have in the model."""

    def __init__(self, base: OpenBase, prefix: str):
        """Find the files.

        ``prefix`` is the model's ``base_model_prefix``; a checkpoint may lack it, or have it where the model does not.

        Raises:
            ModelError: the model is not stored in safetensors, or one of its files is damaged.
            NetworkError: the hub cannot be reached.
        """
        self.base, self.prefix = base, f"{prefix}."
        self.places = {name: shard for shard, header in base.shards.items() for name in header}
        if not self.places:
            raise ModelError(f"{base.name} has no safetensors files, whose weights are needed", key="base_model")

    def __call__(self, name: str) -> torch.Tensor:
        """Read the tensor called ``name`` in the model, onto the CPU.

        Raises:
            ModelError: the checkpoint lacks it, or stores it quantised.
        """
        spellings = (name, name.removeprefix(self.prefix), self.prefix + name)
        key = next((key for key in spellings if key in self.places), None)
        if key is None:
            raise ModelError(f"{self.base.name} has no tensor {name}", key="base_model")
        from safetensors import safe_open

        with safe_open(self.places[key], framework="pt") as file:
            value: torch.Tensor = file.get_tensor(key)
        if not value.is_floating_point():
            raise ModelError(f"{self.base.name} stores {name} quantised; its full weight is needed", key="base_model")
        return value


def _heads(auto_class: str, model: PreTrainedModel) -> list[str]:
    """Return the names of the heads, which are not quantised."""
    _, heads = validate.find_heads(model)
    if auto_class != "AutoModel":
        return heads
    return [name for name in heads if not validate.has_stack(model.get_submodule(name))]  # not one encoder of several


def build_empty(auto_class: str, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Build a model on the meta device; ``auto_class`` may be a model class, too."""
    import torch
    import transformers

    found: Any = getattr(transformers, auto_class)
    with torch.device("meta"):
        model: PreTrainedModel = (
            found.from_config(config, **options) if hasattr(found, "from_config") else found._from_config(config)
        )
    return model


def label_options(build: Callable[..., nn.Module], sizes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return ``num_labels`` if a head of these sizes is for other labels than the model's config says.

    ``build`` returns the model on the meta device, with such options in its config. ``sizes`` are of parameters, by
    name; those of the vocabulary may differ from the model's.
    """

    def differing(model: nn.Module) -> list[int]:
        ends = {id(value) for end in model_ends(model) if end is not None for value in end.parameters()}
        named = ((sizes[name], value) for name, value in model.named_parameters() if name in sizes)
        return [size[0] for size, value in named if size and size != tuple(value.shape) and id(value) not in ends]

    counts = sorted(set(differing(build()))) if sizes else []
    found = next((count for count in counts if not differing(build(num_labels=count))), None)
    return {} if found is None else {"num_labels": found}
