"""Tiny diffusion pipelines of each kind, made from configs."""

from __future__ import annotations

import functools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from trainkit import scratch

SIDE = 32
"""Width and height of the pictures."""


def _clip_tokenizer(folder: Path) -> Any:
    """A tokenizer that knows letters, and those that end a word."""
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [*letters, *(f"{each}</w>" for each in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: at for at, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def _t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5Tokenizer(vocab=[(piece, 0.0 if at < 3 else -1.0) for at, piece in enumerate(pieces)], extra_ids=0)


def _clip(vocabulary: int, *, projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(width: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=30, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def _vae(channels: int = 4, stages: int = 2, **more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8,) * stages,
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        **more,
    )


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        **{"cross_attention_dim": 16, **more},
    )


def _sd(scheduler: str = "epsilon") -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = _clip_tokenizer(scratch() / f"clip-tokenizer-{scheduler}")
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(len(tokenizer)),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            steps_offset=1,
            set_alpha_to_one=False,
            prediction_type=scheduler,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizer = _clip_tokenizer(scratch() / "clip-tokenizer-xl")
    unet = _unet(
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 16,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0]),
        text_encoder=_clip(len(tokenizer)),
        text_encoder_2=_clip(len(tokenizer), projected=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        add_watermarker=False,
    )


def _sd3() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer = _clip_tokenizer(scratch() / "clip-tokenizer-3")
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 2,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=16,
    )
    return StableDiffusion3Pipeline(
        vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(len(tokenizer), projected=True),
        text_encoder_2=_clip(len(tokenizer), projected=True),
        text_encoder_3=_t5(32),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux(kind: str = "FluxPipeline") -> Any:
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    tokenizer = _clip_tokenizer(scratch() / f"clip-tokenizer-{kind}")
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    )
    return getattr(diffusers, kind)(
        vae=_vae(4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(len(tokenizer)),
        text_encoder_2=_t5(),
        tokenizer=tokenizer,
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if m.content is string else m.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _letters() -> Any:
    """A fast tokenizer of bytes, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|im_start|>", "<|im_end|>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=special[2:]
    )
    found.chat_template = _TEMPLATE
    return found


_LANGUAGE = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def _flow(**more: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**more)


def _flux2(*, klein: bool) -> Any:
    import diffusers
    import transformers

    if klein:
        config = transformers.Qwen3Config(**_LANGUAGE, num_hidden_layers=27)
        encoder: Any = transformers.Qwen3ForCausalLM(config)
    else:
        text = transformers.MistralConfig(**_LANGUAGE, num_hidden_layers=30)
        vision = transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28
        )
        both = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=4)
        encoder = transformers.Mistral3ForConditionalGeneration(both)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(2, 2, 2, 2),
        timestep_guidance_channels=16,
        guidance_embeds=not klein,
    )
    kind = diffusers.Flux2KleinPipeline if klein else diffusers.Flux2Pipeline
    scheduler = _flow(use_dynamic_shifting=True)
    return kind(vae=vae, text_encoder=encoder, tokenizer=_letters(), transformer=transformer, scheduler=scheduler)


def _qwen_image() -> Any:
    import diffusers
    import transformers

    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_LANGUAGE,
            "num_hidden_layers": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 1.0],
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    return diffusers.QwenImagePipeline(
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=_letters(),
        transformer=transformer,
        scheduler=_flow(use_dynamic_shifting=True, shift_terminal=0.02),
    )


def _z_image() -> Any:
    import diffusers
    import transformers

    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return diffusers.ZImagePipeline(
        vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_LANGUAGE, num_hidden_layers=2)),
        tokenizer=_letters(),
        transformer=transformer,
        scheduler=_flow(shift=3.0),
    )


def _gemma() -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_LANGUAGE, num_hidden_layers=2, query_pre_attn_scalar=8, sliding_window=4096))


def _sana() -> Any:
    import diffusers

    blocks = {f"{side}_block_out_channels": (8, 8) for side in ("encoder", "decoder")}
    layers = {f"{side}_layers_per_block": (1, 1) for side in ("encoder", "decoder")}
    scales = {f"{side}_qkv_multiscales": ((), ()) for side in ("encoder", "decoder")}
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=SIDE // 2,
    )
    return diffusers.SanaPipeline(
        vae=diffusers.AutoencoderDC(latent_channels=4, scaling_factor=0.4, **blocks, **layers, **scales),
        text_encoder=_gemma(),
        tokenizer=_letters(),
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _lumina2() -> Any:
    import diffusers

    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=4,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(300, 64, 64),
        cap_feat_dim=16,
    )
    return diffusers.Lumina2Pipeline(
        vae=_vae(stages=4, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_gemma(),
        tokenizer=_letters(),
        transformer=transformer,
        scheduler=_flow(shift=6.0),
    )


LARGE = {
    "qwen_image": _qwen_image,
    "sana": _sana,
    "flux2": functools.partial(_flux2, klein=False),
    "flux2_klein": functools.partial(_flux2, klein=True),
    "z_image": _z_image,
    "lumina2": _lumina2,
}
"""Kinds with a language model that reads the prompts."""
_KINDS = {
    **LARGE,
    "sd": _sd,
    "v": functools.partial(_sd, "v_prediction"),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "flux_kontext": functools.partial(_flux, "FluxKontextPipeline"),
}


@functools.cache
def pipeline_base(kind: str) -> Path:
    """The folder of a tiny pipeline."""
    folder = scratch() / f"pipeline-{kind}"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        _KINDS[kind]().save_pretrained(folder)
    return folder


@functools.cache
def picture_files(count: int = 6, shapes: tuple[tuple[int, int], ...] = ((SIDE, SIDE + 8),)) -> list[Path]:
    """Small pictures of noise around a colour, of these heights and widths in turn."""
    draw, folder = np.random.default_rng(0), scratch() / f"text-to-image-{count}-{len(shapes)}"
    folder.mkdir(exist_ok=True)
    files = []
    for number in range(count):
        colour = [(230, 40, 40), (40, 40, 230)][number % 2]
        pixels = np.clip(np.array(colour) + draw.normal(0, 20, (*shapes[number % len(shapes)], 3)), 0, 255).astype(
            np.uint8
        )
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files
