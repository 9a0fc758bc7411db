"""AutoencoderKL."""

from networks import Case, nchw, nhwc

DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


def _case(batch=1, size=(8, 8), **config):
    levels = len(config["block_out_channels"])
    config = {"down_block_types": DOWN[:1] * levels, "up_block_types": UP[:1] * levels} | config
    channels = config.get("in_channels", 3)
    return Case("AutoencoderKL", config, {"x": ("normal", (batch, *size, channels))}, gradients=True)


CASES = {
    "vae": _case(block_out_channels=[8, 16], layers_per_block=2, norm_num_groups=4, size=(8, 10)),
    "vae_flux": _case(
        block_out_channels=[8, 8], norm_num_groups=2, latent_channels=3, use_quant_conv=False,
        use_post_quant_conv=False, shift_factor=0.1159, mid_block_add_attention=False,
    ),
}  # fmt: skip


def theirs(module, given):
    x = nchw(given["x"])
    return {"moments": nhwc(module.encode(x).latent_dist.parameters), "out": nhwc(module(x).sample)}


def ours(model, params, given):
    return {"moments": model.apply(params, given["x"], method="moments"), "out": model.apply(params, given["x"])}


def random_case(rng):
    levels, groups = int(rng.integers(1, 4)), int(rng.choice([1, 2, 4]))
    return _case(
        batch=int(rng.integers(1, 3)),
        size=tuple(int(n) for n in rng.integers(8, 20, 2)),
        in_channels=int(rng.integers(1, 5)),
        out_channels=int(rng.integers(1, 5)),
        down_block_types=[str(rng.choice(DOWN)) for _ in range(levels)],
        up_block_types=[str(rng.choice(UP)) for _ in range(levels)],
        block_out_channels=[int(groups * n) for n in rng.integers(2, 8, levels)],
        layers_per_block=int(rng.integers(1, 3)),
        act_fn=str(rng.choice(["silu", "swish", "mish", "gelu", "relu"])),
        latent_channels=int(rng.integers(1, 6)),
        norm_num_groups=groups,
        sample_size=int(rng.choice([16, 32])),
        shift_factor=[None, 0.0609][rng.integers(2)],
        force_upcast=bool(rng.integers(2)),
        use_quant_conv=bool(rng.integers(2)),
        use_post_quant_conv=bool(rng.integers(2)),
        mid_block_add_attention=bool(rng.integers(2)),
    )
