"""Runs of diffusers' pipelines with tiny random networks: their folders, the noise that they drew, their images.

    .venv-oracle/bin/python tests/parity/pipelines.py --out tests/parity/golden/pipelines          the committed run
    .venv-oracle/bin/python tests/parity/pipelines.py --out FOLDER --seed 3 --count 2              random ones

Of the committed run the folder has no weights and no tokenizer: the weights are drawn from their names
(`networks.weight`), and the tokenizer is `golden/tokenizers/clip`. Each random case
is a folder that `save_pretrained` wrote. `run.npz` has every draw of unit noise in order, what the pipeline was asked
for (`facts`), and the images in [0, 1], all `[B, H, W, C]`. Networks are PyTorch's initial ones with N(0, 0.05) on top
of each parameter. The scheduler, the guidance and some options depend on the seed. Needs torch, diffusers and
transformers, not jax.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import networks
import numpy as np

TOKENIZERS = Path(__file__).parent / "golden" / "tokenizers"
PROMPTS = ["a photo of a horse on the beach", "three red apples"]
NEGATIVE = ["blurry", "a horse"]
SD_BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
# What published checkpoints of Stable Diffusion come with.
SCHEDULERS = (
    ("PNDMScheduler", dict(SD_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)),
    ("DDIMScheduler", dict(SD_BETAS, clip_sample=False, steps_offset=1, set_alpha_to_one=False)),
    ("DPMSolverMultistepScheduler", dict(SD_BETAS, steps_offset=1)),
    ("EulerDiscreteScheduler", dict(SD_BETAS, steps_offset=1, timestep_spacing="leading")),
    ("EulerAncestralDiscreteScheduler", dict(SD_BETAS, steps_offset=1, timestep_spacing="leading")),
    ("DDIMScheduler", dict(SD_BETAS, clip_sample=False, prediction_type="v_prediction")),
)
LEVELS = dict(block_out_channels=(8, 16), norm_num_groups=4)


def scheduler(rng):
    import diffusers

    name, config = SCHEDULERS[rng.integers(len(SCHEDULERS))]
    return getattr(diffusers, name)(**config)


def tokenizer(name="clip"):
    import transformers

    kind = transformers.AutoTokenizer if name.startswith("t5") else transformers.CLIPTokenizer
    return kind.from_pretrained(TOKENIZERS / name)


def clip(words, width=16, projection=0, act="quick_gelu"):
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=words.model_max_length, projection_dim=projection or width,
        hidden_act=act, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=1,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def t5(words, width=32):
    import transformers

    config = transformers.T5Config(
        vocab_size=len(words), d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config)


def vae(channels=4, **others):
    import diffusers

    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        latent_channels=channels, **LEVELS, **others,
    )  # fmt: skip


def unet(**others):
    import diffusers

    given = dict(
        sample_size=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    return diffusers.UNet2DConditionModel(**(given | LEVELS | others))


def call(rng, **others):
    given = dict(prompt=PROMPTS, guidance_scale=float(rng.choice([1.0, 3.0, 7.5])), num_inference_steps=4)
    return {**given, "height": 16, "width": 16, **others}


def sd(rng):
    import diffusers

    words = tokenizer()
    parts = dict(vae=vae(), text_encoder=clip(words), tokenizer=words, unet=unet(), scheduler=scheduler(rng))
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    asked = call(rng, guidance_scale=7.5, height=24, negative_prompt=NEGATIVE)  # not square
    return diffusers.StableDiffusionPipeline(**parts, **none), asked


def sd_inpaint(rng):
    import diffusers

    words = tokenizer()
    parts = dict(vae=vae(), text_encoder=clip(words), tokenizer=words, unet=unet(in_channels=9))
    parts["scheduler"] = scheduler(rng)
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    image = rng.uniform(size=(2, 3, 16, 16)).astype(np.float32)
    mask = np.zeros((2, 1, 16, 16), np.float32)
    mask[:, :, 4:12, 6:] = 1
    asked = call(rng, guidance_scale=5.0, strength=1.0, image=image, mask_image=mask)
    return diffusers.StableDiffusionInpaintPipeline(**parts, **none), asked


def sd_controlnet(rng):
    import diffusers

    words, network = tokenizer(), unet()
    control = diffusers.ControlNetModel.from_unet(network, conditioning_channels=3)
    # Pictures are of eight times the latents' sides there, so the autoencoder has four levels.
    levels = dict(block_out_channels=(8, 8, 8, 16), norm_num_groups=4, sample_size=64)
    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    encoder = diffusers.AutoencoderKL(latent_channels=4, **levels, **kinds)
    parts = dict(vae=encoder, text_encoder=clip(words), tokenizer=words, unet=network, scheduler=scheduler(rng))
    none = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    image = rng.uniform(size=(2, 3, 32, 32)).astype(np.float32)
    asked = call(rng, guidance_scale=4.0, height=32, width=32, image=image, controlnet_conditioning_scale=0.7)
    return diffusers.StableDiffusionControlNetPipeline(controlnet=control, **parts, **none), asked


def sdxl(rng):
    import diffusers

    words, other = tokenizer(), tokenizer("clip-xl")
    network = unet(
        cross_attention_dim=40, use_linear_projection=True, attention_head_dim=(2, 4),
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 12,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip
    parts = dict(
        vae=vae(scaling_factor=0.13025), text_encoder=clip(words), text_encoder_2=clip(other, 24, 12, "gelu"),
        tokenizer=words, tokenizer_2=other, unet=network, scheduler=scheduler(rng),
    )  # fmt: skip
    sizes = dict(original_size=(40, 32), crops_coords_top_left=(3, 5))
    negative = {} if rng.integers(2) else dict(negative_prompt=NEGATIVE)
    asked = call(rng, guidance_scale=6.0, **sizes, **negative)
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False), asked


def sd3(rng):
    import diffusers

    words, other, long = tokenizer(), tokenizer("clip-xl"), tokenizer("t5-json")
    newer = dict(qk_norm="rms_norm", dual_attention_layers=(0,)) if rng.integers(2) else {}
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=48, caption_projection_dim=16, pooled_projection_dim=10 + 12, out_channels=4,
        pos_embed_max_size=8, **newer,
    )  # fmt: skip
    with_t5 = bool(rng.integers(4))
    parts = dict(
        vae=vae(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(words, 16, 10), text_encoder_2=clip(other, 24, 12, "gelu"), tokenizer=words,
        tokenizer_2=other, text_encoder_3=t5(long, 48) if with_t5 else None, tokenizer_3=long, transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    asked = call(rng, guidance_scale=4.5, max_sequence_length=20, negative_prompt=NEGATIVE)
    return diffusers.StableDiffusion3Pipeline(**parts), asked


def flux(rng):
    import diffusers

    words, long = tokenizer(), tokenizer("t5-json")
    guided = bool(rng.integers(2))
    network = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, guidance_embeds=guided, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    parts = dict(
        vae=vae(shift_factor=0.1159, scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(words), text_encoder_2=t5(long), tokenizer=words, tokenizer_2=long, transformer=network,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0 if guided else 1.0, use_dynamic_shifting=guided),
    )  # fmt: skip
    return diffusers.FluxPipeline(**parts), call(rng, guidance_scale=3.5, max_sequence_length=24, height=24)


def plain_unet(**others):
    import diffusers

    given = dict(
        sample_size=8, layers_per_block=1, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
    )  # fmt: skip
    return diffusers.UNet2DModel(**(given | LEVELS | others))


def ddpm(rng):
    import diffusers

    kind = ("fixed_small", "fixed_large")[rng.integers(2)]
    asked = dict(batch_size=2, num_inference_steps=5)
    return diffusers.DDPMPipeline(plain_unet(), diffusers.DDPMScheduler(variance_type=kind)), asked


def ddim(rng):
    import diffusers

    eta = float(rng.choice([0.0, 0.6]))
    asked = dict(batch_size=2, num_inference_steps=5, eta=eta, use_clipped_model_output=bool(rng.integers(2)))
    return diffusers.DDIMPipeline(plain_unet(), diffusers.DDIMScheduler()), asked


def consistency(rng):
    import diffusers

    network = plain_unet(num_class_embeds=3, time_embedding_type="positional")
    steps = CM_STEPS[rng.integers(2)]
    pipeline = diffusers.ConsistencyModelPipeline(network, diffusers.CMStochasticIterativeScheduler())
    return pipeline, dict(batch_size=2, class_labels=[0, 2], num_inference_steps=len(steps), timesteps=steps)


CM_STEPS = ([22, 0], [33, 12, 5])


def dit(rng):
    import diffusers

    network = diffusers.DiTTransformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2, in_channels=4, out_channels=8,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    betas = dict(beta_start=1e-4, beta_end=0.02)
    steps = (diffusers.DDIMScheduler(clip_sample=False, **betas), diffusers.DPMSolverMultistepScheduler(**betas))
    parts = dict(transformer=network, vae=vae(), scheduler=steps[rng.integers(2)])
    asked = dict(class_labels=[207, 3], guidance_scale=float(rng.choice([1.0, 4.0])), num_inference_steps=5)
    return diffusers.DiTPipeline(**parts), asked


CASES = {
    "sd": sd, "sd_inpaint": sd_inpaint, "sd_controlnet": sd_controlnet, "sdxl": sdxl, "sd3": sd3, "flux": flux,
    "ddpm": ddpm, "ddim": ddim, "consistency": consistency, "dit": dit,
}  # fmt: skip


def watch(draws: list) -> None:
    """Notes each array of unit noise that diffusers draws from now on."""
    import torch
    from diffusers.utils import torch_utils

    def drawn(shape, generator=None, device=None, dtype=None, layout=None):
        draws.append(torch.randn(shape, dtype=dtype).numpy())
        return torch.from_numpy(draws[-1].copy())

    torch_utils.randn_tensor = drawn
    for name, module in list(sys.modules.items()):
        if name.startswith("diffusers.") and "randn_tensor" in vars(module):
            module.randn_tensor = drawn


def record(name: str, seed: int, folder: Path, committed: bool = False) -> None:
    """One run of a pipeline; see above for one that is committed."""
    import torch

    rng = networks.generator(f"pipelines/{name}/{seed}")
    torch.manual_seed(seed)
    pipeline, asked = CASES[name](rng)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for part in pipeline.components.values():
            # Built and not loaded, they are in training mode, with dropout in T5 and of labels.
            for key, parameter in part.eval().named_parameters() if isinstance(part, torch.nn.Module) else ():
                drawn = torch.from_numpy(networks.weight(key, tuple(parameter.shape)))
                parameter.copy_(drawn if committed else parameter + 0.05 * torch.randn_like(parameter))
    pipeline.save_pretrained(folder)
    for path in (*folder.glob("*/*.safetensors"), *folder.glob("tokenizer/*")) if committed else ():
        path.unlink()
    arrays = {f"in/{key}": value.transpose(0, 2, 3, 1) for key, value in asked.items() if isinstance(value, np.ndarray)}
    facts = {key: value for key, value in asked.items() if f"in/{key}" not in arrays}
    draws: list = []
    watch(draws)
    given = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in asked.items()}
    with torch.no_grad():
        images = pipeline(**given, output_type="np").images
    arrays |= {f"draw/{i}": draw.transpose(0, 2, 3, 1) for i, draw in enumerate(draws)}
    np.savez_compressed(folder / "run.npz", facts=json.dumps(facts), images=images, **arrays)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--count", type=int, default=0, help="runs of each pipeline; 0 for the one that is committed")
    parser.add_argument("--only", default="", help="cases, separated by commas; all by default")
    arguments = parser.parse_args()
    if not arguments.count:
        record("sd", arguments.seed, arguments.out / "sd-0", committed=True)
    chosen = [name for name in arguments.only.split(",") if name]
    for name in CASES:
        for i in range(arguments.count if not chosen or name in chosen else 0):
            record(name, arguments.seed + i, arguments.out / f"{name}-{i}")


if __name__ == "__main__":
    main()
