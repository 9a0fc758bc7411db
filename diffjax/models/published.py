"""Settings of published checkpoints, by name: the `config.json` of each without what is the default of its class.

`from_config(published("sd15/unet"))` is the network of Stable Diffusion 1.5, without its weights: to plan with, to
count, or to train from the start. Folders of weights bring their own settings (`diffjax.convert.load`).
"""

from __future__ import annotations

import copy
from typing import Any


def _transformers(kind: str, **settings) -> dict[str, Any]:
    return {"architectures": [kind], **settings}


def _diffusers(kind: str, **settings) -> dict[str, Any]:
    return {"_class_name": kind, **settings}


def _levels(down: str, up: str, count: int, *, last: str | None = None, first: str | None = None) -> dict[str, Any]:
    """Types of blocks: `down` and `up`, `last` at the end of the way down and `first` at the start of the way up."""
    downs, ups = [down] * count, [up] * count
    return {
        "down_block_types": downs if last is None else [*downs[1:], last],
        "up_block_types": ups if first is None else [first, *ups[1:]],
    }


# Autoencoders. Rombach et al. 2022, arXiv:2112.10752; SD3 and Flux have no convolutions around the latents.
_VAE = _diffusers(
    "AutoencoderKL", block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512,
    **_levels("DownEncoderBlock2D", "UpDecoderBlock2D", 4),
)  # fmt: skip
_VAE_16 = {**_VAE, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
_TINY = _diffusers("AutoencoderTiny")
_MOVQ = _diffusers(
    "VQModel", block_out_channels=[128, 256, 256, 512], layers_per_block=2, latent_channels=4, norm_type="spatial",
    num_vq_embeddings=16384, vq_embed_dim=4,
    **_levels("DownEncoderBlock2D", "UpDecoderBlock2D", 4, last="AttnDownEncoderBlock2D", first="AttnUpDecoderBlock2D"),
)  # fmt: skip

# Text encoders: CLIP, arXiv:2103.00020; OpenCLIP, 2212.07143; T5 1.1, 1910.10683; UMT5, 2304.09151.
_CLIP_L = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768,
    bos_token_id=0, eos_token_id=2, pad_token_id=1,
)  # fmt: skip
_CLIP_H = {
    **_CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 512, "hidden_act": "gelu",
}  # fmt: skip
_CLIP_G = {
    **_CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
_CLIP_VISION_L = dict(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
    projection_dim=768,
)  # fmt: skip
_CLIP_VISION_H = {
    **_CLIP_VISION_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1024,
    "hidden_act": "gelu",
}  # fmt: skip
_T5_XXL = dict(
    d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False
)

# U-Nets. Stable Diffusion 1.x and 2.x; SDXL, arXiv:2307.01952; latent consistency, arXiv:2310.04378.
_SD15 = _diffusers("UNet2DConditionModel", sample_size=64, cross_attention_dim=768)
_SD21 = _diffusers(
    "UNet2DConditionModel", sample_size=96, cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20],
    use_linear_projection=True, upcast_attention=True,
)  # fmt: skip
_XL = dict(
    attention_head_dim=[5, 10, 20], block_out_channels=[320, 640, 1280], transformer_layers_per_block=[1, 2, 10],
    cross_attention_dim=2048, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)  # fmt: skip
_XL_DOWN = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
_SDXL = _diffusers(
    "UNet2DConditionModel", sample_size=128, **_XL, down_block_types=_XL_DOWN,
    up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
)  # fmt: skip
_REFINER = {
    **_SDXL, "attention_head_dim": [6, 12, 24, 24], "block_out_channels": [384, 768, 1536, 1536],
    "transformer_layers_per_block": 4, "cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560,
    "down_block_types": [*_XL_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
_UPSCALER = _diffusers(
    "UNet2DConditionModel", sample_size=128, in_channels=7, block_out_channels=[256, 512, 512, 1024],
    cross_attention_dim=1024, only_cross_attention=[True, True, True, False], num_class_embeds=1000,
    use_linear_projection=True, down_block_types=["DownBlock2D", *("CrossAttnDownBlock2D",) * 3],
    up_block_types=[*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"],
)  # fmt: skip
# Blocks of DeepFloyd IF and Kandinsky: resolution changes inside residual blocks, attention adds the text to its keys.
_SIMPLE = dict(
    layers_per_block=3, attention_head_dim=64, resnet_time_scale_shift="scale_shift",
    mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    down_block_types=["ResnetDownsampleBlock2D", *("SimpleCrossAttnDownBlock2D",) * 3],
    up_block_types=[*("SimpleCrossAttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"],
)  # fmt: skip
_IF = _diffusers(
    "UNet2DConditionModel", **_SIMPLE, sample_size=64, in_channels=3, out_channels=6, act_fn="gelu",
    block_out_channels=[704, 1408, 2112, 2816], cross_attention_dim=2816, cross_attention_norm="group_norm",
    encoder_hid_dim=4096, encoder_hid_dim_type="text_proj", addition_embed_type="text",
)  # fmt: skip
_KANDINSKY = _diffusers(
    "UNet2DConditionModel", **_SIMPLE, sample_size=64, out_channels=8, block_out_channels=[384, 768, 1152, 1536],
    cross_attention_dim=768,
)  # fmt: skip
# DDPM, arXiv:2006.11239; NCSN++, arXiv:2011.13456; consistency models, arXiv:2303.01469.
_DDPM = _diffusers(
    "UNet2DModel", flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6, attention_head_dim=None
)
_CIFAR = {
    **_DDPM, "sample_size": 32, "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
_DDPM_256 = {
    **_DDPM, "sample_size": 256, "block_out_channels": [128, 128, 256, 256, 512, 512],
    "down_block_types": [*("DownBlock2D",) * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *("UpBlock2D",) * 4],
}  # fmt: skip
_NCSNPP = _diffusers(
    "UNet2DModel", sample_size=256, block_out_channels=[128, 128, *(256,) * 5], time_embedding_type="fourier",
    norm_eps=1e-6, norm_num_groups=None, mid_block_scale_factor=2**0.5, attention_head_dim=None,
    down_block_types=[*("SkipDownBlock2D",) * 4, "AttnSkipDownBlock2D", *("SkipDownBlock2D",) * 2],
    up_block_types=[*("SkipUpBlock2D",) * 2, "AttnSkipUpBlock2D", *("SkipUpBlock2D",) * 4],
)  # fmt: skip
_CONSISTENCY = _diffusers(
    "UNet2DModel", sample_size=64, layers_per_block=3, num_class_embeds=1000, block_out_channels=[192, 384, 576, 768],
    attention_head_dim=64, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32, upsample_type="resnet",
    downsample_type="resnet", down_block_types=["ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3],
    up_block_types=[*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"],
)  # fmt: skip

# Transformers. DiT, arXiv:2212.09748; PixArt, arXiv:2310.00426 and 2403.04692; SD3, arXiv:2403.03206.
_DIT_XL = _diffusers("DiTTransformer2DModel", out_channels=8)
_PIXART = _diffusers("PixArtTransformer2DModel", caption_channels=4096)
_SD3 = _diffusers(
    "SD3Transformer2DModel", num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192
)
_SD35 = {**_SD3, "qk_norm": "rms_norm"}
_PRIOR = _diffusers("PriorTransformer")
# Sizes of U-ViT (arXiv:2209.12152, Table 1) and of EDM2 (arXiv:2312.02696, Table 2) on latents.
_UVIT = _diffusers("UViT", img_size=32, patch_size=2, in_chans=4, num_classes=1001, conv=False)
_EDM2 = _diffusers("EDM2UNet", img_resolution=64, img_channels=4, label_dim=1000)
_CONTROLNET = _diffusers("ControlNetModel", cross_attention_dim=768)

PUBLISHED: dict[str, dict[str, Any]] = {
    "sd15/unet": _SD15,
    "sd15/vae": _VAE,
    "sd15/text_encoder": _transformers("CLIPTextModel", **_CLIP_L),
    "sd15/controlnet": _CONTROLNET,
    "sd15/t2i_adapter": _diffusers("T2IAdapter", adapter_type="full_adapter"),
    "sd15_inpainting/unet": {**_SD15, "in_channels": 9},
    "lcm_dreamshaper/unet": {**_SD15, "time_cond_proj_dim": 256},
    "sd21/unet": _SD21,
    "sd21/text_encoder": _transformers("CLIPTextModel", **_CLIP_H),
    "sd_x4_upscaler/unet": _UPSCALER,
    "sdxl/unet": _SDXL,
    "sdxl/vae": {**_VAE, "sample_size": 1024, "scaling_factor": 0.13025},
    "sdxl/text_encoder": _transformers("CLIPTextModel", **_CLIP_L),
    "sdxl/text_encoder_2": _transformers("CLIPTextModelWithProjection", **_CLIP_G),
    "sdxl/controlnet": _diffusers("ControlNetModel", **_XL, down_block_types=_XL_DOWN),
    "sdxl/t2i_adapter": _diffusers("T2IAdapter", adapter_type="full_adapter_xl", downscale_factor=16),
    "sdxl_inpainting/unet": {**_SDXL, "in_channels": 9},
    "sdxl_lcm/unet": {**_SDXL, "time_cond_proj_dim": 256},
    "sdxl_refiner/unet": _REFINER,
    "if_i_xl/unet": _IF,
    "kandinsky21/prior": {**_PRIOR, "embedding_dim": 768},
    "kandinsky22/prior": {**_PRIOR, "embedding_dim": 1280},
    "kandinsky22/unet": {
        **_KANDINSKY, "encoder_hid_dim": 1280, "encoder_hid_dim_type": "image_proj", "addition_embed_type": "image",
    },
    "kandinsky22/movq": _MOVQ,
    "ddpm_cifar10/unet": _CIFAR,
    "ddpm_celebahq_256/unet": _DDPM_256,
    "ncsnpp_celebahq_256/unet": _NCSNPP,
    "consistency_imagenet64/unet": _CONSISTENCY,
    "sd3_medium/transformer": _SD3,
    "sd3_medium/vae": {**_VAE_16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "sd3_medium/text_encoder": _transformers("CLIPTextModelWithProjection", **_CLIP_L),
    "sd35_medium/transformer": {**_SD35, "pos_embed_max_size": 384, "dual_attention_layers": [*range(13)]},
    "sd35_large/transformer": {
        **_SD35, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432
    },
    "flux_dev/transformer": _diffusers("FluxTransformer2DModel", guidance_embeds=True),
    "flux_schnell/transformer": _diffusers("FluxTransformer2DModel"),
    "flux/vae": {**_VAE_16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    "dit_s_2/transformer": {**_DIT_XL, "num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 12},
    "dit_b_2/transformer": {**_DIT_XL, "num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 12},
    "dit_l_2/transformer": {**_DIT_XL, "num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 24},
    "dit_xl_2_256/transformer": _DIT_XL,
    "dit_xl_2_512/transformer": {**_DIT_XL, "sample_size": 64},
    "pixart_alpha_1024/transformer": _PIXART,
    "pixart_alpha_512/transformer": {**_PIXART, "sample_size": 64},
    "pixart_sigma_1024/transformer": {**_PIXART, "interpolation_scale": 2, "use_additional_conditions": False},
    "t5_xxl/text_encoder": _transformers("T5EncoderModel", **_T5_XXL),
    "umt5_xxl/text_encoder": _transformers("UMT5EncoderModel", **_T5_XXL, vocab_size=256384),
    "clip_l/vision": _transformers("CLIPVisionModelWithProjection", **_CLIP_VISION_L),
    "clip_h/vision": _transformers("CLIPVisionModelWithProjection", **_CLIP_VISION_H),
    "bert_base/text": _transformers("BertModel"),
    "gpt2/text": _transformers("GPT2Model"),
    "taesd/vae": _TINY,
    "taef1/vae": {**_TINY, "latent_channels": 16},
    "uvit_mid_2/transformer": {**_UVIT, "embed_dim": 768, "depth": 16, "num_heads": 12},
    "uvit_large_2/transformer": {**_UVIT, "embed_dim": 1024, "depth": 20, "num_heads": 16},
    "uvit_huge_2/transformer": {**_UVIT, "embed_dim": 1152, "depth": 28, "num_heads": 16},
    **{
        f"edm2_{size}/unet": {**_EDM2, "model_channels": width}
        for size, width in {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}.items()
    },
}  # fmt: skip


def published(name: str, **changes) -> dict[str, Any]:
    """A copy of the settings of the checkpoint `name`, such as "sdxl/unet", with `changes`.

    Raises:
      ValueError: for an unknown name; the message lists the known ones and the nearest.
    """
    if name not in PUBLISHED:
        # Only where it is needed: the table is read where there is no JAX as well.
        from diffjax.registry import nearest

        raise ValueError(f"unknown checkpoint {name!r}{nearest(name, PUBLISHED)}; known: {', '.join(PUBLISHED)}")
    return {**copy.deepcopy(PUBLISHED[name]), **changes}
