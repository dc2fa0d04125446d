"""PEFT's guide to DreamBooth, from training to several adapters: UNet and text encoder adapted with peftcli's names."""

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from peftcli.peft_api import LoraConfig, PeftModel, get_peft_model

UNET_TARGET_MODULES = ["to_q", "to_v"]
TEXT_ENCODER_TARGET_MODULES = ["q_proj", "v_proj"]
ROOT = Path(tempfile.mkdtemp())


class Words:
    """A tokenizer of whole words, as far as the pipeline asks for one."""

    model_max_length = 8
    added_tokens_encoder: ClassVar[dict[str, int]] = {}
    words = ("<pad>", "a", "photo", "of", "sks", "dog", "toy", "in", "the", "park", "low", "quality")

    def __call__(self, texts: Any, **_: Any) -> Any:
        rows = [
            [self.words.index(word) for word in text.split()] for text in ([texts] if isinstance(texts, str) else texts)
        ]
        ids = torch.tensor([row + [0] * (self.model_max_length - len(row)) for row in rows])
        return type("Tokens", (), {"input_ids": ids, "attention_mask": (ids > 0).long()})()

    def tokenize(self, text: str) -> list[str]:
        return text.split()

    def batch_decode(self, ids: torch.Tensor) -> list[str]:
        return [" ".join(self.words[each] for each in row) for row in ids.tolist()]


def new_pipeline() -> StableDiffusionPipeline:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=[4], norm_num_groups=2, latent_channels=4, sample_size=8),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=len(Words.words), max_position_embeddings=8, **sizes)),
        tokenizer=Words(),
        unet=UNet2DConditionModel(
            block_out_channels=(4, 8),
            layers_per_block=1,
            sample_size=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            norm_num_groups=2,
            attention_head_dim=4,
        ),
        scheduler=DDPMScheduler(num_train_timesteps=20, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train(output_dir: Path, instance_prompt: str, picture: torch.Tensor, prior_loss_weight: float = 1.0) -> None:
    """The script's loop, with prior preservation: instance and class pictures in one batch."""
    pipe, draw = new_pipeline(), torch.Generator().manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=7, target_modules=UNET_TARGET_MODULES, lora_dropout=0.0, bias="none")
    unet = get_peft_model(pipe.unet, config)
    unet.print_trainable_parameters()
    config = LoraConfig(r=4, lora_alpha=5, target_modules=TEXT_ENCODER_TARGET_MODULES, lora_dropout=0.0, bias="none")
    text_encoder = get_peft_model(pipe.text_encoder, config)
    text_encoder.print_trainable_parameters()
    pipe.vae.requires_grad_(False)
    trained = [value for model in (unet, text_encoder) for value in model.parameters() if value.requires_grad]
    assert all("lora_" in name for name, value in unet.named_parameters() if value.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=1e-1)
    pixels = torch.stack([picture, torch.zeros_like(picture)])
    ids = pipe.tokenizer([instance_prompt, "a photo of dog"]).input_ids
    losses = []
    for _ in range(12):
        unet.train()
        text_encoder.train()
        latents = pipe.vae.encode(pixels).latent_dist.mean * 0.18215
        noise = torch.randn(latents.shape, generator=draw)
        timesteps = torch.randint(0, 20, (2,), generator=draw)
        noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
        hidden = text_encoder(ids)[0]
        found, prior = unet(noisy, timesteps, hidden).sample.chunk(2)
        target, prior_target = noise.chunk(2)
        loss = F.mse_loss(found, target) + prior_loss_weight * F.mse_loss(prior, prior_target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    unet.save_pretrained(output_dir / "unet", state_dict=unet.state_dict())
    text_encoder.save_pretrained(output_dir / "text_encoder", state_dict=text_encoder.state_dict())


def get_lora_sd_pipeline(ckpt_dir: Path, adapter_name: str) -> StableDiffusionPipeline:
    pipe = new_pipeline()
    pipe.unet = PeftModel.from_pretrained(pipe.unet, ckpt_dir / "unet", adapter_name=adapter_name)
    pipe.text_encoder = PeftModel.from_pretrained(
        pipe.text_encoder, ckpt_dir / "text_encoder", adapter_name=adapter_name
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cpu")


def load_adapter(pipe: Any, ckpt_dir: Path, adapter_name: str) -> None:
    pipe.unet.load_adapter(ckpt_dir / "unet", adapter_name=adapter_name)
    pipe.text_encoder.load_adapter(ckpt_dir / "text_encoder", adapter_name=adapter_name)


def set_adapter(pipe: Any, adapter_name: str) -> None:
    pipe.unet.set_adapter(adapter_name)
    if isinstance(pipe.text_encoder, PeftModel):
        pipe.text_encoder.set_adapter(adapter_name)


def create_weighted_lora_adapter(pipe: Any, adapters: list[str], weights: list[float], adapter_name: str) -> Any:
    pipe.unet.add_weighted_adapter(adapters, weights, adapter_name)
    if isinstance(pipe.text_encoder, PeftModel):
        pipe.text_encoder.add_weighted_adapter(adapters, weights, adapter_name)
    return pipe


def image(pipe: Any, prompt: str = "a photo of sks dog in the park") -> np.ndarray:
    with torch.no_grad():
        found = pipe(
            prompt,
            num_inference_steps=3,
            guidance_scale=7,
            negative_prompt="low quality",
            output_type="np",
            generator=torch.Generator().manual_seed(0),
        )
    return found.images[0]


train(ROOT / "dog", "a photo of sks dog", torch.ones(3, 8, 8))
train(ROOT / "toy", "a photo of sks toy", -torch.ones(3, 8, 8))
for part in ("unet", "text_encoder"):
    assert {each.name for each in (ROOT / "dog" / part).iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }

pipe = get_lora_sd_pipeline(ROOT / "dog", adapter_name="dog")
dog = image(pipe)
assert not np.allclose(dog, image(new_pipeline()))
load_adapter(pipe, ROOT / "toy", adapter_name="toy")
np.testing.assert_allclose(image(pipe), dog)
pipe = create_weighted_lora_adapter(pipe, ["toy", "dog"], [1.0, 1.05], adapter_name="toy_dog")
set_adapter(pipe, adapter_name="toy")
toy = image(pipe)
np.testing.assert_allclose(toy, image(get_lora_sd_pipeline(ROOT / "toy", adapter_name="toy")), atol=1e-6)
set_adapter(pipe, adapter_name="dog")
np.testing.assert_allclose(image(pipe), dog, atol=1e-6)
set_adapter(pipe, adapter_name="toy_dog")
both = image(pipe)
assert not np.allclose(both, dog)
assert not np.allclose(both, toy)
pipe.unet, pipe.text_encoder = pipe.unet.merge_and_unload(), pipe.text_encoder.merge_and_unload()
np.testing.assert_allclose(image(pipe), both, atol=1e-4)
