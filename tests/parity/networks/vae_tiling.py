"""AutoencoderKL on images larger than its tiles."""

from networks import Case, nchw, nhwc


def _case(size, small, batch=1, levels=2, latents=2, **config):
    config = {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [4] * levels,
        "latent_channels": latents,
        "norm_num_groups": 2,
        "mid_block_add_attention": False,
    } | config
    return Case(
        "AutoencoderKL", config, {"x": ("normal", (batch, *size, 3)), "z": ("normal", (batch, *small, latents))}
    )


# Tiles below each other of the image, beside each other of the latents.
CASES = {"vae_tiling": _case((15, 6), (3, 7), sample_size=8)}


def theirs(module, given):
    module.enable_tiling()
    moments = module.encode(nchw(given["x"])).latent_dist.parameters
    return {"moments": nhwc(moments), "image": nhwc(module.decode(nchw(given["z"])).sample)}


def ours(model, params, given):
    from diffjax.models.autoencoders import tiled_decode, tiled_moments

    return {"moments": tiled_moments(model, params, given["x"]), "image": tiled_decode(model, params, given["z"])}


def random_case(rng):
    levels, tile = int(rng.integers(1, 4)), int(rng.choice([8, 16, 20]))
    one = 2 ** (levels - 1)
    stride = int(tile * 0.75)
    # No tile of fewer pixels than make a latent.
    sizes = [n for n in range(5, 45) if all(min(tile, n - i) >= one for i in range(0, n, stride))]
    return _case(
        tuple(int(n) for n in rng.choice(sizes, 2)),
        tuple(int(n) for n in rng.integers(2, 3 * tile // one, 2)),
        batch=int(rng.integers(1, 3)),
        levels=levels,
        sample_size=tile,
        use_quant_conv=bool(rng.integers(2)),
        use_post_quant_conv=bool(rng.integers(2)),
        mid_block_add_attention=bool(rng.integers(2)),
    )
