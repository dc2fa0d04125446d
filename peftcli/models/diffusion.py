"""Diffusion models as one module each: what is adapted, and around it what makes its inputs and reads its answers.

Latent diffusion: https://arxiv.org/abs/2112.10752; flow matching: https://arxiv.org/abs/2403.03206.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.generic import ModelOutput

from peftcli.errors import ModelError
from peftcli.models.diffusion_families import Family, Tensors
from peftcli.system.disk import write_file

if TYPE_CHECKING:
    from PIL.Image import Image

_CACHE_BYTES = 2 << 30
"""The size of each cache: of latents, and of the texts' embeddings. The others are computed each time."""
_COPIED = (".json", ".txt", ".model", ".safetensors")


@dataclass(frozen=True)
class Picture:
    """A picture that is read when it is needed."""

    read: Callable[[], torch.Tensor]
    """Returns its pixels (3, H, W), from -1 to 1."""
    key: str | None = None
    """Pictures of one key have the same pixels, whose latents are kept. None: they are not."""


@dataclass
class Denoised(ModelOutput):
    """A denoiser's prediction for noisy latents, and its target."""

    sample: torch.Tensor | None = None
    """(B, C, h, w); where pictures differ in size, zeros follow the smaller ones, as in the target."""
    target: torch.Tensor | None = None
    """(B, C, h, w): the noise, the velocity or the flow, as the scheduler is set."""
    errors: torch.Tensor | None = None
    """(B,): the mean squared error of each picture, times its weight."""


class DiffusionModel(nn.Module):
    """A pipeline's denoiser and maybe its texts' encoders, as one module; the other parts stay frozen beside it."""

    usual_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", "q_proj", "k_proj", "v_proj", "out_proj")

    def __init__(
        self,
        family: Family,
        trained: Mapping[str, nn.Module],
        pipeline: Any = None,
        folder: Path | None = None,
    ):
        """``OpenPipeline.model`` and ``empty_model`` call this.

        ``pipeline`` holds all parts; it is None where they are on the meta device.
        """
        super().__init__()
        self.family, self.pipeline, self.folder = family, pipeline, folder
        self.trained = tuple(trained)
        for name, part in trained.items():
            self.add_module(name, part)
        denoiser: Any = trained[family.denoiser]
        self.compute_dtype: torch.dtype = denoiser.dtype
        self._latents, self._texts = _Cache(), _Cache()
        if pipeline is not None:
            self._noise = noise_of(pipeline.scheduler)
            self._mean, self._std = family.statistics(pipeline.vae)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    def forward(
        self,
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        seeds: Sequence[int],
        times: torch.Tensor,
        sizes: torch.Tensor,
        sources: Sequence[Picture] | None = None,
        snr_gamma: float | None = None,
    ) -> Denoised:
        """Add noise to pictures and predict it. Those of one size are computed together.

        Args:
            pictures: B.
            prompts: What is on them.
            seeds: What the noise of each is drawn by, and what the autoencoder draws.
            times: (B,), from 0 to 1: which share of all steps is less noisy, as training draws them.
            sizes: See ``Family.predict``.
            sources: B, of the same sizes, that the pictures are made from, for a kind that edits.
            snr_gamma: Weigh the errors by the signal-to-noise ratio of their steps, clipped here.
        """
        of_size = defaultdict[tuple[int, ...], list[int]](list)
        for at, size in enumerate(sizes[:, 4:].tolist()):
            of_size[tuple(size)].append(at)

        def part(places: list[int]) -> Denoised:
            clean, noise = self._draw_latents([pictures[at] for at in places], [seeds[at] for at in places])
            noisy, steps, target = self._noise(clean, noise, times[places].to(self.device))
            given = {"sizes": sizes[places].to(self.device), **self._encode_cached([prompts[at] for at in places])}
            if sources is not None:
                found = self._found([sources[at] for at in places])
                given["source"] = self._normalised(torch.stack([each["mean"] for each in found]))
            sample = self.predict(noisy, steps, given).float()
            errors = (sample - target.float()).square().flatten(1).mean(1)
            if snr_gamma is not None:
                assert isinstance(self._noise, Discrete)
                errors = errors * self._noise.weights(steps, snr_gamma)
            return Denoised(sample, target, errors)

        return _in_order(
            [part(places) for places in of_size.values()], [at for each in of_size.values() for at in each]
        )

    def keep_latents(self, folder: Path) -> None:
        """Keep latents of pictures with a key in a folder: one for each autoencoder, by its content."""
        assert self.folder is not None
        digest = hashlib.sha256()
        for path in sorted((self.folder / "vae").iterdir()):
            if path.suffix in (".json", ".safetensors"):
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        self._latents.folder = folder / digest.hexdigest()

    def predict(self, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors) -> torch.Tensor:
        """Return the denoiser's prediction (B, C, h, w) of noisy latents at steps (B,) of the scheduler.

        ``given`` conditions it: see ``Family.predict``.
        """
        dtype = self.compute_dtype
        values = {name: each.to(dtype) if each.is_floating_point() else each for name, each in given.items()}
        denoiser = self.get_submodule(self.family.denoiser)
        return self.family.predict(self.pipeline, denoiser, noisy.to(self.compute_dtype), steps, values)

    def _draw_latents(self, pictures: Sequence[Picture], seeds: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents and noise (B, C, h, w) of pictures, drawn on the CPU: they depend on the seeds alone."""
        found = self._found(pictures)
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        means, logs = (torch.stack([each[name] for each in found]) for name in ("mean", "log"))
        extra, noise = (torch.stack([torch.randn(means.shape[1:], generator=draw) for draw in draws]) for _ in range(2))
        latents = means + torch.exp(0.5 * logs) * extra
        return self._normalised(latents), noise.to(self.device)

    def _found(self, pictures: Sequence[Picture]) -> list[Tensors]:
        return [self._latents.get(each.key, partial(self._moments, each)) for each in pictures]

    def _normalised(self, latents: torch.Tensor) -> torch.Tensor:
        return ((latents - self._mean) / self._std).to(self.device)

    @torch.no_grad()
    def _moments(self, picture: Picture) -> Tensors:
        """Return the mean of a picture's latents and the logarithm of their variance, (C, h, w) each."""
        pixels = picture.read()[None].to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            found = self.family.moments(self.pipeline, pixels)
        return dict(zip(("mean", "log"), (each[0].cpu().contiguous() for each in found), strict=True))

    def _encode_cached(self, prompts: Sequence[str]) -> Tensors:
        if len(self.trained) > 1:
            return self._encode(prompts)
        found = [self._texts.get(each, partial(self._encode_one, each)) for each in prompts]
        padded = {name: pad_sequence([each[name] for each in found], batch_first=True) for name in found[0]}
        return {name: value.to(self.device) for name, value in padded.items()}

    @torch.no_grad()
    def _encode_one(self, prompt: str) -> Tensors:
        return {name: value[0].cpu() for name, value in self._encode([prompt]).items()}

    def _encode(self, prompts: Sequence[str]) -> Tensors:
        with quiet_diffusers():  # prompts that are cut were found with the rows
            return self.family.encode(self.pipeline, prompts)

    def pictures(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        side: int,
        sources: Sequence[Image] | None = None,
        **options: Any,
    ) -> list[Image]:
        """Make a picture of each prompt. What it is depends on its seed, and not on the others.

        ``seeds`` draw the noise of each; ``side`` is in pixels; ``sources`` are squares to make them from; ``options``
        are the pipeline's: num_inference_steps, guidance_scale.
        """
        was_training, mixed = self.training, self.compute_dtype != torch.float32
        self.eval()
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        with torch.autocast(self.device.type, self.compute_dtype if mixed else torch.bfloat16, enabled=mixed):
            more = {} if sources is None else {"image": [*sources]}
            made = self.pipeline(generator=draws, **more, **self.family.arguments(prompts, side, options))
        self.train(was_training)
        images: list[Image] = made.images
        return images

    def gradient_checkpointing_enable(self, options: Mapping[str, Any] | None = None) -> None:
        """Keep fewer activations and compute them again."""
        for name in self.trained:
            part: Any = self.get_submodule(name)
            if hasattr(part, "enable_gradient_checkpointing"):
                part.enable_gradient_checkpointing()
            else:  # of transformers, under the name of 5.24 and later, or the one before
                getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)(options)

    def save_pretrained(self, folder: Path) -> None:
        """Write the whole pipeline: the parts that may be adapted as they are now, the others as they were read."""
        assert self.folder is not None
        index = json.loads((self.folder / "model_index.json").read_bytes())
        for name, value in index.items():
            source = self.folder / name
            if not isinstance(value, list) or value == [None, None]:
                continue
            if name in self.trained:
                part: Any = self.get_submodule(name)
                part.save_pretrained(folder / name)
            elif source.is_dir():
                for path in sorted(source.iterdir()):
                    if path.suffix in _COPIED and ".fp16." not in path.name:
                        (folder / name).mkdir(exist_ok=True)
                        shutil.copyfile(path, folder / name / path.name)
            if not (folder / name).is_dir():
                index[name] = [None, None]
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> DiffusionModel:
        """Move the frozen parts along."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in self.pipeline.components.items() if self.pipeline is not None else ():
            if isinstance(part, nn.Module) and name not in self.trained:
                part._apply(fn)
        return self


def _in_order(parts: Sequence[Denoised], places: Sequence[int]) -> Denoised:
    """Join parts of a batch, whose pictures have these places in it."""
    if len(parts) == 1:
        return parts[0]
    order = np.argsort(places).tolist()

    def joined(name: str) -> torch.Tensor:
        each = [value for part in parts for value in part[name]]
        high, wide = (max(value.shape[axis] for value in each) for axis in (1, 2))
        padded = [nn.functional.pad(value, (0, wide - value.shape[2], 0, high - value.shape[1])) for value in each]
        return torch.stack([padded[at] for at in order])

    return Denoised(joined("sample"), joined("target"), torch.cat([part["errors"] for part in parts])[order])


class _Cache:
    """Tensors that are computed once, up to a number of bytes; with a folder, once for all runs."""

    def __init__(self) -> None:
        self._values: dict[str, Tensors] = {}
        self._free_bytes = _CACHE_BYTES
        self.folder: Path | None = None

    def get(self, key: str | None, make: Callable[[], Tensors]) -> Tensors:
        """Return the value of a key, computed by ``make`` if it is not cached. None is never cached."""
        if key in self._values:
            return self._values[key]
        value = self._read(key, make)
        size = sum(each.numel() * each.element_size() for each in value.values())
        if key is not None and size <= self._free_bytes:
            self._free_bytes -= size
            self._values[key] = value
        return value

    def _read(self, key: str | None, make: Callable[[], Tensors]) -> Tensors:
        """Read a value from the folder, or compute it and write it there."""
        if self.folder is None or key is None:
            return make()
        path = self.folder / f"{key}.safetensors"
        with suppress(OSError, SafetensorError):  # it is not there, or damaged
            return load_file(path)
        value = make()
        write_file(path, save(value))
        return value


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence diffusers, and the part of transformers that it imports: no progress bars, no log below errors."""
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    logs = (logging, transformers_logging)
    levels, bars = [each.get_verbosity() for each in logs], logging.is_progress_bar_enabled()
    for each in logs:
        each.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        for each, level in zip(logs, levels, strict=True):
            each.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Discrete:
    """Noise of schedulers with betas."""

    scheduler: Any
    kind: str
    """What is predicted: epsilon, v_prediction or sample."""

    def __call__(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return noisy latents (B, C, h, w), steps (B,) and what is to be predicted (B, C, h, w), for times (B,)."""
        count = self.scheduler.config.num_train_timesteps
        steps = (times * count).long().clamp(max=count - 1)
        noisy = self.scheduler.add_noise(clean, noise, steps)
        if self.kind == "v_prediction":
            return noisy, steps, self.scheduler.get_velocity(clean, noise, steps)
        return noisy, steps, noise if self.kind == "epsilon" else clean

    def weights(self, steps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Return the Min-SNR weights (B,) of steps (https://arxiv.org/abs/2303.09556)."""
        alphas = self.scheduler.alphas_cumprod.to(steps.device)[steps].float()
        ratio = alphas / (1 - alphas)
        if self.kind == "epsilon":
            return (gamma / ratio).clamp(max=1)
        return ratio.clamp(max=gamma) / (ratio + 1 if self.kind == "v_prediction" else 1)


@dataclass(frozen=True)
class Flow:
    """Noise on straight lines: flow matching."""

    scheduler: Any

    def __call__(
        self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return what ``Discrete`` returns.

        The middle of the way from noise to picture is trained most: times are those of a logit-normal.
        """
        count = len(self.scheduler.timesteps)
        spread = torch.sigmoid(torch.special.ndtri(times.double().clamp(1e-6, 1 - 1e-6)))
        at = (spread * count).long().clamp(max=count - 1)
        sigmas = self.scheduler.sigmas.to(clean.device)[at][:, None, None, None]
        return (1 - sigmas) * clean + sigmas * noise, self.scheduler.timesteps.to(clean.device)[at], noise - clean


def noise_of(scheduler: Any) -> Discrete | Flow:
    """Return what adds noise as a scheduler's settings say, and gives the target of the prediction.

    Raises:
        ModelError: they say something that is not known.
    """
    import diffusers

    if scheduler.config.get("use_flow_sigmas"):
        shift = scheduler.config.get("flow_shift", 1.0)
        return Flow(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    if not hasattr(scheduler, "alphas_cumprod"):
        name = type(scheduler).__name__
        if not name.startswith("FlowMatch"):
            message = f"is {name}, which adds noise in a way that is not known"
            hint = "known are flow matching (FlowMatch...) and schedulers with betas, such as EulerDiscreteScheduler"
            raise ModelError(message, file="scheduler", key="base_model", hint=hint)
        return Flow(diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config))
    discrete: Any = diffusers.DDPMScheduler.from_config(scheduler.config)
    kind = discrete.config.prediction_type
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise ModelError(f"predicts {kind}, which is not known", file="scheduler", key="base_model")
    return Discrete(discrete, kind)
