"""AutoencoderTiny."""

from networks import Case, nchw, nhwc


def _case(batch=1, size=(8, 8), small=(3, 2), **config):
    channels, latents = config.get("in_channels", 3), config.get("latent_channels", 4)
    inputs = {"x": ("normal", (batch, *size, channels)), "z": ("normal", (batch, *small, latents))}
    return Case("AutoencoderTiny", config, inputs, gradients=True)


CASES = {
    "taesd": _case(
        encoder_block_out_channels=[8, 8],
        decoder_block_out_channels=[4, 4],
        num_encoder_blocks=[1, 2],
        num_decoder_blocks=[2, 1],
    ),
    # As many layers as published ones have: more than ten.
    "taesd-deep": _case(small=(2, 1), encoder_block_out_channels=[4] * 4, decoder_block_out_channels=[4] * 4),
}


def theirs(module, given):
    x, z = nchw(given["x"]), nchw(given["z"])
    # What a byte stands for, since those of two encoders may lie on either side of a half.
    stored = module.unscale_latents(module.scale_latents(z.float()).mul(255).round().byte() / 255)
    return {
        "latents": nhwc(module.encode(x).latents),
        "image": nhwc(module.decode(z).sample),
        "stored": nhwc(stored),
    }


def ours(model, params, given):
    from diffjax.models.autoencoders import from_bytes, to_bytes

    return {
        "latents": model.apply(params, given["x"], method="encode"),
        "image": model.apply(params, given["z"], method="decode"),
        "stored": from_bytes(model.config, to_bytes(model.config, given["z"])),
    }


def random_case(rng):
    down, up = (int(n) for n in rng.integers(1, 4, 2))
    return _case(
        batch=int(rng.integers(1, 3)),
        size=tuple(int(n) for n in rng.integers(7, 20, 2)),
        in_channels=int(rng.integers(1, 5)),
        out_channels=int(rng.integers(1, 5)),
        encoder_block_out_channels=[int(rng.integers(4, 17))] * down,
        decoder_block_out_channels=[int(rng.integers(4, 17))] * up,
        act_fn=str(rng.choice(["silu", "mish", "gelu", "relu"])),
        latent_channels=int(rng.integers(1, 6)),
        upsampling_scaling_factor=int(rng.integers(1, 4)),
        num_encoder_blocks=[int(n) for n in rng.integers(0, 3, down)],
        num_decoder_blocks=[int(n) for n in rng.integers(0, 3, up)],
        latent_magnitude=int(rng.integers(1, 4)),
        latent_shift=float(rng.choice([0.5, 0.4])),
        scaling_factor=float(rng.choice([1.0, 0.5])),
    )
