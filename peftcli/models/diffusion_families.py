"""Kinds of diffusion pipelines, a row each: what their parts are, and how their denoisers are called.

A row holds what differs between them; the adapter, the noise and the loss are the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

Tensors = dict[str, torch.Tensor]
_GUIDANCE = 3.5
"""The guidance scale that distilled models train with, as in Flux's published recipes."""


class Family(ABC):
    """Pipelines of one kind. The base class has the rules that hold for most."""

    name: ClassVar[str]
    """The class in diffusers."""
    denoiser: ClassVar[str] = "transformer"
    """The part that is trained."""
    adapted_texts: ClassVar[Sequence[str]] = ()
    """The text encoders that may be trained: those of CLIP."""
    longest: ClassVar[int] = 512
    """Maximum number of tokens of a prompt, for a text encoder other than CLIP's; without the words around it."""
    patch: ClassVar[int] = 2
    """The latents' sides are multiples of it."""
    edits: ClassVar[bool] = False
    """Whether pictures are made from others, and what should change on them."""

    @abstractmethod
    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        """Encode prompts into the tensors (B, ...) that condition the denoiser.

        Prompts may be encoded one by one: shorter tensors are then padded with zeros at their end.
        """

    @abstractmethod
    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        """Return the denoiser's prediction (B, C, h, w).

        Args:
            pipeline: Holds the helpers that the kind's own loop uses.
            denoiser: The part to call.
            noisy: Latents (B, C, h, w).
            steps: Of the scheduler (B,).
            given: The tensors of ``encode``; ``sizes`` of the pictures (B, 6): height and width before they were cut,
                top and left of the cut, and height and width; if the kind edits, the latents of each ``source``.
        """

    def arguments(self, prompts: Sequence[str], side: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for squares of ``side`` pixels.

        ``options``: num_inference_steps, guidance_scale.
        """
        return {"prompt": [*prompts], "height": side, "width": side, **options}

    def moments(self, pipeline: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and log-variance (B, C, h, w) of the latents of pixels (B, 3, H, W)."""
        found = pipeline.vae.encode(pixels)
        if hasattr(found, "latent"):  # an autoencoder that draws nothing
            return found.latent, torch.full_like(found.latent, -torch.inf)
        return found.latent_dist.mean, found.latent_dist.logvar

    def statistics(self, vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and deviation of the latents, which the denoiser sees normalised by them."""

        def value(name: str, default: float) -> torch.Tensor:
            found = getattr(vae.config, name, None)
            each = torch.as_tensor(default if found is None else found)
            return each.view(1, -1, 1, 1)

        mean = value("latents_mean", 0.0) + value("shift_factor", 0.0)
        return mean, value("latents_std", 1.0) / value("scaling_factor", 1.0)


class _StableDiffusion(Family):
    name = "StableDiffusionPipeline"
    denoiser = "unet"
    adapted_texts = ("text_encoder",)
    patch = 1

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        return {"states": pipeline.encode_prompt(list(prompts), pipeline.device, 1, False)[0]}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        return denoiser(noisy, steps, given["states"]).sample


class _StableDiffusionXL(Family):
    name = "StableDiffusionXLPipeline"
    denoiser = "unet"
    adapted_texts = ("text_encoder", "text_encoder_2")
    patch = 1

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        states, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=pipeline.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        more = {"text_embeds": given["pooled"], "time_ids": given["sizes"].to(noisy.dtype)}
        return denoiser(noisy, steps, given["states"], added_cond_kwargs=more).sample


class _StableDiffusion3(Family):
    name = "StableDiffusion3Pipeline"
    adapted_texts = ("text_encoder", "text_encoder_2")
    longest = 256

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        states, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), None, None, device=pipeline.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        return denoiser(noisy, given["states"], given["pooled"], steps).sample


class _Flux(Family):
    name = "FluxPipeline"
    adapted_texts = ("text_encoder",)

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        states, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=pipeline.device)
        return {"states": states, "pooled": pooled}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        like: dict[str, Any] = {"device": noisy.device, "dtype": noisy.dtype}
        seen = [noisy, given["source"]] if self.edits else [noisy]
        tokens = [pipeline._pack_latents(each, *each.shape) for each in seen]
        sides = [(each.shape[2] // 2, each.shape[3] // 2) for each in seen]
        places = [pipeline._prepare_latent_image_ids(len(noisy), *each, **like) for each in sides]
        places[-1][:, 0] = len(places) - 1  # a source is told apart by its first number
        found = denoiser(
            torch.cat(tokens, 1),
            given["states"],
            given["pooled"],
            steps / 1000,
            img_ids=torch.cat(places),
            txt_ids=torch.zeros(given["states"].shape[1], 3, **like),
            guidance=_guidance(denoiser, noisy),
        ).sample
        scale, (height, width) = pipeline.vae_scale_factor, noisy.shape[2:]
        return pipeline._unpack_latents(found[:, : tokens[0].shape[1]], height * scale, width * scale, scale)


class _FluxKontext(_Flux):
    name = "FluxKontextPipeline"
    edits = True

    def arguments(self, prompts: Sequence[str], side: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().arguments(prompts, side, options), "max_area": side**2, "_auto_resize": False}


class _Flux2(Family):
    name = "Flux2Pipeline"
    longest = 440  # of 512, which begin with a message of the system

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        states, positions = pipeline.encode_prompt(list(prompts), device=pipeline.device)
        return {"states": states, "positions": positions}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        packed = denoiser(
            pipeline._pack_latents(noisy),
            given["states"],
            steps / 1000,
            img_ids=pipeline._prepare_latent_ids(noisy).to(noisy.device),
            txt_ids=given["positions"],
            guidance=_guidance(denoiser, noisy),
        ).sample
        return packed.transpose(1, 2).reshape_as(noisy)

    def moments(self, pipeline: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log = super().moments(pipeline, pixels)
        return pipeline._patchify_latents(mean), pipeline._patchify_latents(log)

    def statistics(self, vae: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mean, variance = (each.detach().cpu().view(1, -1, 1, 1) for each in (vae.bn.running_mean, vae.bn.running_var))
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


class _Flux2Klein(_Flux2):
    name = "Flux2KleinPipeline"
    longest = 500


class _QwenImage(Family):
    name = "QwenImagePipeline"
    longest = 507

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        longest = signature(pipeline.__call__).parameters["max_sequence_length"].default
        states, mask = pipeline.encode_prompt(list(prompts), pipeline.device, max_sequence_length=longest)
        return {"states": states, "mask": torch.ones_like(states[..., 0]).bool() if mask is None else mask.bool()}

    def arguments(self, prompts: Sequence[str], side: int, options: Mapping[str, Any]) -> dict[str, Any]:
        given = {"true_cfg_scale" if name == "guidance_scale" else name: value for name, value in options.items()}
        given["negative_prompt"] = [" "] * len(prompts)  # without one it is not guided
        return super().arguments(prompts, side, given)

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        count, channels, height, width = noisy.shape
        mask = given["mask"]
        packed = denoiser(
            pipeline._pack_latents(noisy, count, channels, height, width),
            given["states"],
            None if mask.all() else mask,
            steps / 1000,
            [[(1, height // 2, width // 2)]] * count,
            guidance=_guidance(denoiser, noisy),
        ).sample
        scale = pipeline.vae_scale_factor
        return pipeline._unpack_latents(packed, height * scale, width * scale, scale)[:, :, 0]

    def moments(self, pipeline: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log = super().moments(pipeline, pixels[:, :, None])  # a video of one frame
        return mean[:, :, 0], log[:, :, 0]


class _ZImage(Family):
    name = "ZImagePipeline"
    longest = 504

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        texts, _ = pipeline.encode_prompt(list(prompts), pipeline.device, do_classifier_free_guidance=False)
        masks = [torch.ones_like(each[:, 0]).bool() for each in texts]
        return {"states": pad_sequence(texts, True), "mask": pad_sequence(masks, True)}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        texts = [each[mask] for each, mask in zip(given["states"], given["mask"], strict=True)]
        found = denoiser(list(noisy[:, :, None]), 1 - steps / 1000, texts).sample
        return -torch.stack(found)[:, :, 0]


class _Sana(Family):
    name = "SanaPipeline"
    longest = 299
    patch = 1

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        instruction = signature(pipeline.__call__).parameters["complex_human_instruction"].default
        states, mask, _, _ = pipeline.encode_prompt(
            list(prompts), False, device=pipeline.device, complex_human_instruction=instruction
        )
        return {"states": states, "mask": mask}

    def arguments(self, prompts: Sequence[str], side: int, options: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().arguments(prompts, side, options), "use_resolution_binning": False}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        times = steps * denoiser.config.timestep_scale
        found = denoiser(noisy, given["states"], times, encoder_attention_mask=given["mask"]).sample
        return found[:, : noisy.shape[1]]


class _Lumina2(Family):
    name = "Lumina2Pipeline"
    longest = 216  # of 256, which begin with a message of the system

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> Tensors:
        states, mask, _, _ = pipeline.encode_prompt(list(prompts), False, device=pipeline.device)
        return {"states": states, "mask": mask.bool()}

    def predict(
        self, pipeline: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, given: Tensors
    ) -> torch.Tensor:
        return -denoiser(noisy, 1 - steps / 1000, given["states"], given["mask"]).sample


def _guidance(denoiser: Any, noisy: torch.Tensor) -> torch.Tensor | None:
    """The guidance scale of each picture, for a denoiser that is told it."""
    return noisy.new_full((len(noisy),), _GUIDANCE) if denoiser.config.guidance_embeds else None


_ROWS = (
    _StableDiffusion(),
    _StableDiffusionXL(),
    _StableDiffusion3(),
    _Flux(),
    _FluxKontext(),
    _Flux2(),
    _Flux2Klein(),
    _QwenImage(),
    _ZImage(),
    _Sana(),
    _Lumina2(),
)
FAMILIES: dict[str, Family] = {each.name: each for each in _ROWS}
"""By the name of the class in diffusers."""
