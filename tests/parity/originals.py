"""Original checkpoints as diffusers converts them, and the names that their authors' code gives to tensors.

    .venv-oracle/bin/python tests/parity/originals.py --out tests/parity/golden/originals
    .venv-oracle/bin/python tests/parity/originals.py --out tests/parity/golden/originals --code FOLDER

No original checkpoint is needed. With `--code`, a folder with the repositories `generative-models` and `sd3.5`
(github.com/Stability-AI) and `flux` (github.com/black-forest-labs), their networks are built without memory, tiny ones
and those that were published, and `names.json.gz` gets `{case: {name: shape}}` of the state dicts. Without it that file
is read. Then the tiny ones are filled with weights drawn from their names (`networks.weight`) and converted by
diffusers: `converted.json.gz` has `{case: {name: [shape, hash of the bytes]}}`. The published ones are converted by
name and shape alone, and must give what diffusers' class has in the published config.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import json
import sys
import types
from collections import OrderedDict
from pathlib import Path

import networks

SD = dict(attention_resolutions=[4, 2, 1], num_res_blocks=2, channel_mult=[1, 2, 4, 4], transformer_depth=1)
HEADS = dict(num_head_channels=64, use_linear_in_transformer=True)
XL = dict(num_classes="sequential", attention_resolutions=[4, 2], num_res_blocks=2, **HEADS)
UNETS = {
    "sd": dict(SD, in_channels=4, model_channels=320, num_heads=8, context_dim=768),
    "sd-inpaint": dict(SD, in_channels=9, model_channels=320, num_heads=8, context_dim=768),
    "sd2": dict(SD, in_channels=4, model_channels=320, context_dim=1024, **HEADS),
    "sdxl": dict(
        XL, in_channels=4, model_channels=320, adm_in_channels=2816, channel_mult=[1, 2, 4],
        transformer_depth=[1, 2, 10], context_dim=2048,
    ),
    "refiner": dict(
        XL, in_channels=4, model_channels=384, adm_in_channels=2560, channel_mult=[1, 2, 4, 4], transformer_depth=4,
        context_dim=1280,
    ),
    "tiny-sd": dict(
        in_channels=4, model_channels=32, num_heads=2, attention_resolutions=[1], num_res_blocks=1, channel_mult=[1, 2],
        transformer_depth=1, context_dim=8,
    ),
    "tiny-sdxl": dict(
        in_channels=4, model_channels=32, num_head_channels=8, use_linear_in_transformer=True, num_classes="sequential",
        adm_in_channels=12, attention_resolutions=[4, 2], num_res_blocks=2, channel_mult=[1, 1, 2],
        transformer_depth=[1, 1, 2], context_dim=8,
    ),
}  # fmt: skip
MMDITS = {
    "sd3": dict(depth=24, pos_embed_max_size=192),
    "sd35-large": dict(depth=38, pos_embed_max_size=192, qk_norm="rms"),
    "sd35-medium": dict(depth=24, pos_embed_max_size=384, qk_norm="rms", x_block_self_attn_layers=list(range(13))),
    "tiny-sd3": dict(
        depth=2, pos_embed_max_size=4, adm_in_channels=6, context=10, qk_norm="rms", x_block_self_attn_layers=[0]
    ),
}  # fmt: skip
FLUXES = {
    "flux-schnell": dict(guidance_embed=False), "flux-dev": {}, "flux-fill": dict(in_channels=384),
    "tiny-flux": dict(
        in_channels=8, out_channels=8, vec_in_dim=6, context_in_dim=10, hidden_size=32, num_heads=2, depth=2,
        depth_single_blocks=2, axes_dim=[4, 6, 6],
    ),
}  # fmt: skip
VAES = {
    "vae-sd": dict(z_channels=4), "vae-flux": dict(z_channels=16),
    "tiny-vae": dict(z_channels=4, ch=32, ch_mult=[1, 2], num_res_blocks=1),
}  # fmt: skip
# Width, layers, vocabulary and positions of OpenCLIP's text towers: ViT-H/14 of Stable Diffusion 2, ViT-bigG/14 of XL.
TOWERS = {"openclip-sd2": (1024, 24, 49408, 77), "openclip-sdxl": (1280, 32, 49408, 77), "tiny-openclip": (8, 3, 20, 5)}


def package(name: str, folder: Path) -> None:
    """A package whose modules are found and whose own code, with all that it would import, is not run."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)]
    sys.modules[name] = module


def shapes_of(module) -> dict:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


def write_names(code: Path) -> dict:
    """Names and shapes of all cases, from the authors' code."""
    import torch

    for name in ("sgm", "sgm.modules", "sgm.modules.diffusionmodules"):
        package(name, code / "generative-models" / name.replace(".", "/"))
    sys.path[:0] = [str(code / "sd3.5"), str(code / "flux" / "src")]
    package("flux", code / "flux" / "src" / "flux")
    package("flux.modules", code / "flux" / "src" / "flux" / "modules")
    from flux.model import Flux, FluxParams
    from flux.modules.autoencoder import AutoEncoder, AutoEncoderParams
    from mmditx import MMDiTX
    from sgm.modules.diffusionmodules.openaimodel import UNetModel

    names = {}
    with torch.device("meta"):
        for name, given in UNETS.items():
            prefix = "model.diffusion_model."
            shapes = shapes_of(UNetModel(out_channels=4, use_checkpoint=False, **given))
            names[name] = {prefix + key: shape for key, shape in shapes.items()}
        for name, given in MMDITS.items():
            given = dict(given)
            width, linear = 64 * given["depth"], given.pop("context", 4096)
            given = dict(adm_in_channels=2048, num_patches=given["pos_embed_max_size"] ** 2) | given
            context = {"target": "torch.nn.Linear", "params": {"in_features": linear, "out_features": width}}
            module = MMDiTX(input_size=None, in_channels=16, context_embedder_config=context, **given)
            names[name] = {f"model.diffusion_model.{key}": shape for key, shape in shapes_of(module).items()}
        for name, given in FLUXES.items():
            common = dict(in_channels=64, out_channels=64, vec_in_dim=768, context_in_dim=4096, hidden_size=3072)
            common |= dict(mlp_ratio=4.0, num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56])
            common |= dict(theta=10_000, qkv_bias=True, guidance_embed=True)
            names[name] = shapes_of(Flux(FluxParams(**(common | given))))
        for name, given in VAES.items():
            common = dict(resolution=256, in_channels=3, ch=128, out_ch=3, ch_mult=[1, 2, 4, 4], num_res_blocks=2)
            module = AutoEncoder(AutoEncoderParams(**(common | dict(scale_factor=1.0, shift_factor=0.0) | given)))
            names[name] = shapes_of(module)
            if given["z_channels"] == 4:  # Stable Diffusion 1 to XL: two convolutions more
                names[name] |= {"quant_conv.weight": [8, 8, 1, 1], "quant_conv.bias": [8]}
                names[name] |= {"post_quant_conv.weight": [4, 4, 1, 1], "post_quant_conv.bias": [4]}
                names[name] = {f"first_stage_model.{key}": shape for key, shape in names[name].items()}
        for name, sizes in TOWERS.items():
            prefix = "conditioner.embedders.1.model." if name == "openclip-sdxl" else "cond_stage_model.model."
            names[name] = {prefix + key: shape for key, shape in shapes_of(tower(*sizes)).items()}
    return names


def tower(width: int, layers: int, vocabulary: int, positions: int):
    """The text tower of OpenCLIP's `CLIP`, whose parts are PyTorch's own."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), nn.MultiheadAttention(width, 1), nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
            )

    whole = nn.Module()
    whole.positional_embedding = nn.Parameter(torch.empty(positions, width))
    whole.text_projection, whole.logit_scale = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(()))
    whole.token_embedding, whole.ln_final = nn.Embedding(vocabulary, width), nn.LayerNorm(width)
    whole.transformer = nn.Module()
    whole.transformer.resblocks = nn.ModuleList(Block() for _ in range(layers))
    return whole


CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
TINY_UNET = dict(cross_attention_dim=8, up_block_types=None, sample_size=8)
CONFIGS = {
    "sd": dict(cross_attention_dim=768, attention_head_dim=8),
    "sd-inpaint": dict(cross_attention_dim=768, attention_head_dim=8, in_channels=9),
    "sd2": dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
    "sdxl": dict(
        cross_attention_dim=2048, attention_head_dim=[5, 10, 20], use_linear_projection=True,
        block_out_channels=[320, 640, 1280], down_block_types=[PLAIN, CROSS, CROSS],
        transformer_layers_per_block=[1, 2, 10], addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "refiner": dict(
        cross_attention_dim=1280, attention_head_dim=[6, 12, 24, 24], use_linear_projection=True,
        block_out_channels=[384, 768, 1536, 1536], down_block_types=[PLAIN, CROSS, CROSS, PLAIN],
        transformer_layers_per_block=4, addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2560,
    ),
    "tiny-sd": dict(
        cross_attention_dim=8, attention_head_dim=2, block_out_channels=[32, 64], down_block_types=[CROSS, PLAIN],
        layers_per_block=1,
    ),
    "tiny-sdxl": dict(
        cross_attention_dim=8, attention_head_dim=[4, 4, 8], use_linear_projection=True,
        block_out_channels=[32, 32, 64], down_block_types=[PLAIN, CROSS, CROSS], transformer_layers_per_block=[1, 1, 2],
        addition_embed_type="text_time", addition_time_embed_dim=2, projection_class_embeddings_input_dim=12,
    ),
    "sd3": dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=192),
    "sd35-large": dict(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm",
    ),
    "sd35-medium": dict(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=list(range(13)),
    ),
    "tiny-sd3": dict(
        num_layers=2, num_attention_heads=2, caption_projection_dim=128, pos_embed_max_size=4, qk_norm="rms_norm",
        dual_attention_layers=[0], joint_attention_dim=10, pooled_projection_dim=6,
    ),
    "flux-schnell": {}, "flux-dev": dict(guidance_embeds=True),
    "flux-fill": dict(guidance_embeds=True, in_channels=384, out_channels=64),
    "tiny-flux": dict(
        guidance_embeds=True, in_channels=8, attention_head_dim=16, num_attention_heads=2, num_layers=2,
        num_single_layers=2, joint_attention_dim=10, pooled_projection_dim=6, axes_dims_rope=[4, 6, 6],
    ),
    "vae-sd": dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2, sample_size=512),
    "vae-flux": dict(
        block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=16, sample_size=1024,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    ),
    "tiny-vae": dict(block_out_channels=[32, 64], layers_per_block=1, sample_size=16),
    "openclip-sd2": dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu",
        projection_dim=1024,
    ),
    "openclip-sdxl": dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280,
    ),
    "tiny-openclip": dict(
        hidden_size=8, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu",
        projection_dim=8, vocab_size=20, max_position_embeddings=5,
    ),
}  # fmt: skip


def kind_of(case: str) -> str:
    """The class of diffusers or transformers that a case is converted to."""
    if "openclip" in case:
        return "CLIPTextModelWithProjection" if case == "openclip-sdxl" else "CLIPTextModel"
    if case in UNETS:
        return "UNet2DConditionModel"
    return "AutoencoderKL" if case in VAES else "SD3Transformer2DModel" if case in MMDITS else "FluxTransformer2DModel"


def config_of(case: str) -> dict:
    """The config of a case in full, with the name of its class."""
    kind, config = kind_of(case), dict(CONFIGS[case])
    if kind.startswith("CLIP"):
        return {"architectures": [kind], "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, **config}
    if kind == "UNet2DConditionModel":
        down = config.get("down_block_types", [CROSS, CROSS, CROSS, PLAIN])
        config |= {"down_block_types": down, "up_block_types": [k.replace("Down", "Up") for k in reversed(down)]}
    if kind == "AutoencoderKL":
        levels = len(config["block_out_channels"])
        config |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return {"_class_name": kind, **config}


def build(config: dict):
    """PyTorch's network of a config."""
    import diffusers
    import transformers

    kind = config.get("_class_name") or config["architectures"][0]
    given = {k: v for k, v in config.items() if k not in ("_class_name", "architectures")}
    if kind.startswith("CLIP"):
        return getattr(transformers, kind)(transformers.CLIPTextConfig(**given))
    return getattr(diffusers, kind)(**given)


def converted(case: str, tensors: dict, module) -> dict:
    """What diffusers makes of an original checkpoint."""
    from diffusers.loaders import single_file_utils as utils

    if case in UNETS:
        return utils.convert_ldm_unet_checkpoint(tensors, module.config)
    if case in VAES:
        return utils.convert_ldm_vae_checkpoint(tensors, module.config)
    if case in MMDITS:
        return utils.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    if case in TOWERS:
        first = "positional_embedding"
        prefix = next(name for name in tensors if name.endswith(first)).removesuffix(first)
        drop = TOWERS[case][1] - 1 if prefix.startswith("cond_stage") else -1
        ignored = [name for name in tensors if f"resblocks.{drop}." in name or (drop >= 0 and "projection" in name)]
        utils.SD_2_TEXT_ENCODER_KEYS_TO_IGNORE[:] = ignored
        out = utils.convert_open_clip_checkpoint(module, tensors, prefix=prefix)
        inside = hasattr(module, "text_model")
        return {name if inside else name.removeprefix("text_model."): value for name, value in out.items()}
    # The width of the published network is a constant in that function.
    source = inspect.getsource(utils.convert_flux_transformer_checkpoint_to_diffusers)
    names = dict(vars(utils))
    exec(source.replace("inner_dim = 3072", f"inner_dim = {module.inner_dim}"), names)
    return names["convert_flux_transformer_checkpoint_to_diffusers"](tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--code", type=Path, help="folder with the authors' repositories; writes names.json.gz")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    import torch

    file = arguments.out / "names.json.gz"
    if arguments.code:
        store(file, write_names(arguments.code))
    names, result = json.loads(gzip.decompress(file.read_bytes())), {}
    for case, shapes in names.items():
        config, tiny = config_of(case), case.startswith("tiny")
        with torch.device("meta"):
            module = build(config)
            tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
        if tiny:
            tensors = {name: torch.from_numpy(networks.weight(name, tuple(s))) for name, s in shapes.items()}
        out = converted(case, tensors, module)
        wanted = {name: value.shape for name, value in module.state_dict().items() if value.is_floating_point()}
        wrong = {name for name in wanted.keys() ^ out.keys()} or {n for n in wanted if wanted[n] != out[n].shape}
        if wrong:
            raise SystemExit(f"{case}: diffusers' own conversion does not fit its class: {sorted(wrong)[:5]}")
        rows = {n: [list(v.shape), digest(v)] for n, v in out.items()} if tiny else {}
        result[case] = {"config": config, "tensors": rows}
    store(arguments.out / "converted.json.gz", result)


def digest(tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def store(file: Path, value) -> None:
    file.write_bytes(gzip.compress(json.dumps(value, sort_keys=True).encode(), 9, mtime=0))


if __name__ == "__main__":
    main()
