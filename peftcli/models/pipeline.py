"""A base model that is a pipeline of diffusers: several models, each in a folder of its own, and model_index.json."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from peftcli.errors import ModelError
from peftcli.guard.adapter_folder import DTYPES
from peftcli.guard.files import first_of, short_repr
from peftcli.models import hub_files, validate
from peftcli.models.base import LoadedModel, OpenBase
from peftcli.models.diffusion import DiffusionModel, quiet_diffusers
from peftcli.models.diffusion_families import FAMILIES, Family
from peftcli.models.find import FoundBase
from peftcli.models.guarded import translated_errors
from peftcli.models.hub_files import PIPELINE_FILE
from peftcli.schema import BaseModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_LIBRARIES = ("diffusers", "transformers")
"""Where the classes of parts may be from: a part of any other name is code."""
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are not loaded: they read pictures."""
_DEFAULT_SAMPLE_SIZE = 128
"""Of a transformer that takes pictures of any size, as Flux: pictures of 1024 pixels."""


_STAGES = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
"""Where the config of an autoencoder lists its stages; between two, the sides of a picture are halved."""


class OpenPipeline(OpenBase):
    """An open pipeline: give ``open_base`` its spec.

    What is adapted of it is its denoiser and, if asked for, its encoders of texts, as one module.
    """

    is_pipeline = True

    def __init__(self, spec: BaseModel, found: FoundBase, template: str | None, processors: Path | None = None):
        super().__init__(spec, found, template, processors)
        if importlib.util.find_spec("diffusers") is None:
            raise ModelError("a pipeline needs the package diffusers: pip install 'peftcli[diffusion]'")
        index = validate.read_config(self.folder / PIPELINE_FILE)
        self.family = self._family(index)
        self.parts = dict(self._parts(index))
        """Name of a part that is loaded -> library and class."""
        if spec.quantization:
            message = f"{self.name} is a pipeline, whose parts are not quantised here"
            raise ModelError(message, key="base_model.quantization", hint="leave it out")
        if self._on_hub:
            hub_files.fetch_parts(spec, self.parts)
        for name in self.parts:
            if not (self.folder / name).is_dir():
                raise ModelError(f"has no folder {name}", file=self.name, key="base_model")
            validate.check_config(validate.check_folder(self.folder / name), trusted=False)

    def _family(self, index: Mapping[str, Any]) -> Family:
        name = index.get("_class_name")
        if not isinstance(name, str) or name not in FAMILIES:
            message = f"is a pipeline of the kind {short_repr(name)}; known: {', '.join(FAMILIES)}"
            raise ModelError(message, file=str(self.folder / PIPELINE_FILE), key="base_model")
        return FAMILIES[name]

    def _parts(self, index: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
        for name, value in index.items():
            if not isinstance(value, list) or value == [None, None] or name in _LEFT_OUT:
                continue
            library, kind = value if len(value) == 2 else (None, None)
            if library not in _LIBRARIES or not (isinstance(kind, str) and kind.isidentifier()):
                message = f"is {short_repr(value)}; a class of {' or '.join(_LIBRARIES)} is wanted"
                raise ModelError(message, file=str(self.folder / PIPELINE_FILE), key=name)
            yield name, (library, kind)

    @cached_property
    def config(self) -> PreTrainedConfig:
        import torch
        from transformers import PreTrainedConfig

        shards = sorted((self.folder / self.family.denoiser).glob("*.safetensors"))
        config = PreTrainedConfig(architectures=["DiffusionPipeline"])
        if shards:
            largest = max(validate.read_shard(shards[0]).values(), key=lambda entry: entry.numel)
            config.dtype = getattr(torch, DTYPES[largest.dtype])
        return config

    @cached_property
    def _stored_type(self) -> str | None:
        return None

    @property
    def pixels_per_latent(self) -> int:
        """How many pixels of a picture's side one latent stands for."""
        config = self._config_of("vae")
        stages = next((config[name] for name in _STAGES if name in config), [0])
        return int(2 ** (len(stages) - 1))

    @property
    def resolution(self) -> int:
        """The side of the pictures that the pipeline was made for, in pixels."""
        size = self._config_of(self.family.denoiser).get("sample_size") or _DEFAULT_SAMPLE_SIZE
        return self.pixels_per_latent * int(size if isinstance(size, (int, float)) else min(size))

    @property
    def resolution_step(self) -> int:
        """The side of a picture is a multiple of these pixels, because transformers read patches of latents."""
        return self.pixels_per_latent * self.family.patch

    def _config_of(self, part: str) -> dict[str, Any]:
        return validate.read_config(self.folder / part / "config.json")

    def part(self, name: str) -> Any:
        """Load one part without weights.

        Raises:
            ModelError: it cannot be loaded.
        """
        with translated_errors(self.name):
            return self._load(name, None)

    def model(
        self,
        auto_class: str,
        dtype: torch.dtype | Literal["auto"] | None,
        *,
        train_text_encoder: bool = False,
        **options: Any,
    ) -> LoadedModel:
        """Load the pipeline as one module, frozen, on the CPU. The autoencoder computes in float32.

        With ``train_text_encoder`` the texts' encoders are among what may be adapted.

        Raises:
            ModelError: a part lacks weights, or is not what its config says.
            OutOfMemory: the machine's memory does not hold it.
        """
        import torch

        assert dtype != "auto"
        if self._on_hub:
            hub_files.fetch_parts(self.spec, self.parts, weights=True)
        empty = self.empty_model(auto_class, train_text_encoder=train_text_encoder)
        self.check_weights(empty)
        with translated_errors(self.name), quiet_diffusers():
            loaded = {name: self._load(name, torch.float32 if name == "vae" else dtype) for name in self.parts}
            import diffusers

            kind = getattr(diffusers, self.family.name)
            others = {name: None for name in _LEFT_OUT if name in signature(kind).parameters}
            more = {"requires_safety_checker": False} if "safety_checker" in others else {}
            pipeline = kind.from_pretrained(self.folder, local_files_only=True, **loaded, **others, **more)
            pipeline.set_progress_bar_config(disable=True)
        model = DiffusionModel(self.family, {name: loaded[name] for name in empty.trained}, pipeline, self.folder)
        return LoadedModel(cast(Any, model))

    def check_weights(self, model: Any, *, fetch: bool = True) -> None:
        if self._on_hub and not fetch:
            return
        for name in filter(self._has_weights, self.parts):
            shards = self._shards_of(name)
            if name in model.trained:
                headers = map(validate.read_shard, shards)
                validate.check_size(model.get_submodule(name), headers, str(self.folder / name / "config.json"))

    def _has_weights(self, name: str) -> bool:
        return name in ("vae", self.family.denoiser) or name.startswith("text_encoder")

    def _shards_of(self, name: str) -> list[Path]:
        """The safetensors files of a part."""
        folder = self.folder / name
        if not (found := sorted(folder.glob("*.safetensors"))):
            raise validate.no_weights(str(folder), [path.name for path in folder.iterdir()])
        return found

    def _load(self, name: str, dtype: torch.dtype | None) -> Any:
        folder, kind = self.folder / name, self._class(name)
        if not self._has_weights(name):
            return kind.from_pretrained(folder, local_files_only=True)
        self._shards_of(name)
        key = "torch_dtype" if self.parts[name][0] == "diffusers" else "dtype"
        options = {key: dtype, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        if key == "dtype":
            options["use_kernels"] = False
        part, info = kind.from_pretrained(folder, **options)
        damage = [f"{key} is missing" for key in sorted(info["missing_keys"])]
        if damage:
            message = f"the weights of {name} are not those of its config.json: {', '.join(first_of(damage))}"
            raise ModelError(message, file=self.name, key="base_model")
        return part.requires_grad_(False).eval()

    def _class(self, name: str) -> Any:
        library, kind = self.parts[name]
        found = getattr(importlib.import_module(library), kind, None)
        if not hasattr(found, "from_pretrained"):
            message = f"{library} has no class {short_repr(kind)}"
            raise ModelError(message, file=str(self.folder / PIPELINE_FILE), key=name)
        return found

    def empty_model(self, auto_class: str, *, train_text_encoder: bool = False, **options: Any) -> Any:
        """Build what may be adapted on the meta device, as one module.

        Raises:
            ModelError: diffusers or transformers cannot build a part.
        """
        import torch

        texts = [name for name in self.family.adapted_texts if train_text_encoder]
        if train_text_encoder and not texts:
            message = f"{self.family.name} reads prompts with a language model, which is not adapted here"
            raise ModelError(message, key="task.train_text_encoder", hint="leave it out")
        with translated_errors(self.name), quiet_diffusers(), torch.device("meta"):
            parts = {name: self._build(name) for name in (self.family.denoiser, *texts)}
        return DiffusionModel(self.family, parts)

    def _build(self, name: str) -> Any:
        kind = self._class(name)
        if self.parts[name][0] == "diffusers":
            return kind.from_config(kind.load_config(self.folder / name, local_files_only=True))
        return kind(kind.config_class.from_pretrained(self.folder / name))
