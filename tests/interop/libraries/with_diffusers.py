"""diffusers with peftcli in the place of peft: LoRA in a UNet and in a pipeline, several of them, scaled."""

import tempfile
from typing import Any

import peftcli.peft_api

peftcli.peft_api.install(version="0.22.0")

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoKrConfig, LoraConfig
from peft.functional import delete_adapter
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel


def new_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=4,
    )


def new_pipeline() -> StableDiffusionPipeline:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=[4], norm_num_groups=2),
        text_encoder=CLIPTextModel(CLIPTextConfig(vocab_size=96, **sizes)),
        tokenizer=None,
        unet=new_unet(),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


image, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)


def output(unet: UNet2DConditionModel, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return unet(image, 1, text, **kwargs).sample


folder = tempfile.mkdtemp()
config = LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"])
unet = new_unet()
base = output(unet)
unet.add_adapter(config)
adapted = output(unet)
assert not torch.allclose(adapted, base)
assert all("lora" in name for name, value in unet.named_parameters() if value.requires_grad)
unet.disable_adapters()
torch.testing.assert_close(output(unet), base)
unet.enable_adapters()
torch.testing.assert_close(output(unet), adapted)
StableDiffusionPipeline.save_lora_weights(
    folder, unet_lora_layers=get_peft_model_state_dict(unet), unet_lora_adapter_metadata=config.to_dict()
)

pipe = new_pipeline()
pipe.load_lora_weights(folder, adapter_name="first")
torch.testing.assert_close(output(pipe.unet), adapted)
pipe.load_lora_weights(folder, adapter_name="second")
pipe.set_adapters(["first", "second"], [0.25, 0.75])  # two of the same, which add up to one
torch.testing.assert_close(output(pipe.unet), adapted)
pipe.set_adapters("first")
torch.testing.assert_close(output(pipe.unet), adapted)
torch.testing.assert_close(output(pipe.unet, cross_attention_kwargs={"scale": 0.0}), base)
torch.testing.assert_close(output(pipe.unet), adapted)
pipe.load_lora_weights(folder, adapter_name="first", hotswap=True)
torch.testing.assert_close(output(pipe.unet), adapted)

# merged, by name and by turns, and back
pipe.fuse_lora(components=["unet"], lora_scale=0.5, adapter_names=["first"])
assert pipe.fused_loras == {"first"}
half = output(pipe.unet)
assert not torch.allclose(half, adapted)
assert not torch.allclose(half, base)
pipe.unet.disable_adapters()
torch.testing.assert_close(output(pipe.unet), base, rtol=0, atol=0)
pipe.unet.enable_adapters()
torch.testing.assert_close(output(pipe.unet), half)
pipe.set_adapters(["first", "second"], [0.5, 0.5])
pipe.fuse_lora(components=["unet"])
assert pipe.fused_loras == {"first", "second"}
torch.testing.assert_close(output(pipe.unet), adapted)
pipe.set_adapters("second")
torch.testing.assert_close(output(pipe.unet), adapted)  # what is merged stays
pipe.unfuse_lora(components=["unet"])
pipe.disable_lora()
torch.testing.assert_close(output(pipe.unet), base, rtol=0, atol=0)
pipe.enable_lora()

# deleted: the one that is left becomes active
pipe.set_adapters(["first", "second"])  # at full weight again
pipe.set_adapters("second")
pipe.delete_adapters("second")
assert pipe.get_list_adapters() == {"unet": ["first"]}
assert pipe.get_active_adapters() == ["first"]
torch.testing.assert_close(output(pipe.unet), adapted)
pipe.load_lora_weights(folder, adapter_name="second")
pipe.set_adapters("first")
pipe.delete_adapters("first")
assert pipe.get_active_adapters() == ["second"]
torch.testing.assert_close(output(pipe.unet), adapted)
pipe.load_lora_weights(folder, adapter_name="first")
pipe.set_adapters(["first", "second"], [0.25, 0.75])
torch.testing.assert_close(output(pipe.unet), adapted)
pipe.delete_adapters(["first", "second"])
torch.testing.assert_close(output(pipe.unet), base)
pipe.load_lora_weights(folder, adapter_name="first")
delete_adapter(pipe.unet, "first")
assert {name for name, _ in pipe.unet.named_modules()} == {name for name, _ in new_unet().named_modules()}

# beside what is left of a deleted one, the scale of a call counts once
for name in ("first", "second"):
    pipe.load_lora_weights(folder, adapter_name=name)
pipe.delete_adapters("second")
pipe.set_adapters("first", 0.5)
half = output(pipe.unet)
pipe.set_adapters("first", 1.0)
torch.testing.assert_close(output(pipe.unet, cross_attention_kwargs={"scale": 0.5}), half)
pipe.unload_lora_weights()

# LoKr
lokr = new_unet()
lokr.add_adapter(LoKrConfig(r=2, alpha=2, init_weights=False, target_modules=["to_q", "to_v"]))
other = new_unet()
other.load_lora_adapter(get_peft_model_state_dict(lokr), prefix=None, adapter_name="lokr")
torch.testing.assert_close(output(other), output(lokr))
other.fuse_lora()
torch.testing.assert_close(output(other), output(lokr))
other.unload_lora()
other.load_lora_adapter(get_peft_model_state_dict(lokr), prefix=None, adapter_name="lokr")
other.set_adapters("lokr", 0.5)
assert not torch.allclose(output(other), output(lokr))

# unloaded: nothing is left of it, but for what is merged
pipe.load_lora_weights(folder, adapter_name="first")
pipe.unload_lora_weights()
torch.testing.assert_close(output(pipe.unet), base, rtol=0, atol=0)
pipe.load_lora_weights(folder, adapter_name="first")
pipe.fuse_lora(components=["unet"])
pipe.unload_lora_weights()
torch.testing.assert_close(output(pipe.unet), adapted)
assert {name for name, _ in pipe.unet.named_modules()} == {name for name, _ in new_unet().named_modules()}
