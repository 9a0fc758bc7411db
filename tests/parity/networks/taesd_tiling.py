"""AutoencoderTiny on images larger than its tiles."""

from networks import Case, nchw, nhwc

# Sides of the tiles of images and latents, and how far they overlap.
TILES = (16, 8, 0.25)


def _case(size, small, batch=1, **config):
    config = {
        "encoder_block_out_channels": [4, 4],
        "decoder_block_out_channels": [4, 4],
        "num_encoder_blocks": [0, 1],
        "num_decoder_blocks": [1, 0],
    } | config
    # PyTorch's class makes tensors of 4 and 3 channels for the parts.
    inputs = {"x": ("normal", (batch, *size, 3)), "z": ("normal", (batch, *small, 4))}
    return Case("AutoencoderTiny", config, inputs)


CASES = {"taesd_tiling": _case((26, 8), (5, 13))}


def theirs(module, given):
    module.enable_tiling()
    # It reads the pixels of a latent off the number of colours, 2^3 a side; here there are 2.
    module.spatial_scale_factor, module.tile_overlap_factor = 2, TILES[2]
    module.tile_sample_min_size, module.tile_latent_min_size = TILES[:2]
    latents, image = module.encode(nchw(given["x"])).latents, module.decode(nchw(given["z"])).sample
    return {"latents": nhwc(latents), "image": nhwc(image)}


def ours(model, params, given):
    from diffjax.models.autoencoders import Tiles, tiled_decode, tiled_encode

    tiles = Tiles(*TILES)
    return {
        "latents": tiled_encode(model, params, given["x"], tiles=tiles),
        "image": tiled_decode(model, params, given["z"], tiles=tiles),
    }


def random_case(rng):
    return _case(
        tuple(2 * int(n) for n in rng.integers(1, 20, 2)),
        tuple(int(n) for n in rng.integers(1, 20, 2)),
        batch=int(rng.integers(1, 3)),
        act_fn=str(rng.choice(["gelu", "relu"])),
    )
