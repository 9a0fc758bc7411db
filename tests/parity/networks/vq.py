"""VQModel: VQGAN, and MoVQ with the spatial norm."""

from networks import Case, nchw, nhwc

DOWN = "DownEncoderBlock2D", "AttnDownEncoderBlock2D"
UP = "UpDecoderBlock2D", "AttnUpDecoderBlock2D"


def _case(batch=1, size=(4, 6), small=(2, 2), **config):
    levels = len(config["block_out_channels"])
    config = {"down_block_types": DOWN[:1] * levels, "up_block_types": UP[:1] * levels} | config
    config.setdefault("num_vq_embeddings", 11)
    width = config.get("vq_embed_dim") or config.get("latent_channels", 3)
    inputs = {"x": ("normal", (batch, *size, config.get("in_channels", 3))), "z": ("normal", (batch, *small, width))}
    if config.get("lookup_from_codebook"):
        inputs["indices"] = ("integers", (batch, *small), config["num_vq_embeddings"])
    return Case("VQModel", config, inputs, gradients=True)


CASES = {
    "vq": _case(block_out_channels=[8, 4], norm_num_groups=2, vq_embed_dim=2),
    "movq": _case(
        block_out_channels=[32], norm_type="spatial", latent_channels=4, lookup_from_codebook=True,
        down_block_types=DOWN[1:], up_block_types=UP[1:],
    ),
}  # fmt: skip


def theirs(module, given):
    from unittest import mock

    import torch

    # PyTorch has no distances in bfloat16 on CPU.
    wide = lambda a, b, cdist=torch.cdist: cdist(a.float(), b.float())
    with mock.patch.object(torch, "cdist", wide):
        return _theirs(module, given)


def _theirs(module, given):
    import torch

    latents = module.encode(nchw(given["x"])).latents
    z = nchw(given["z"])
    _, loss, (_, _, indices) = module.quantize(z)
    # The sample that is quantised is given, since that of two encoders may lie on either side of a border between rows;
    # the gradient goes on to the encoder all the same.
    z = z + (latents - latents.detach()).mean((2, 3), keepdim=True)
    raw, shape = z, None
    if "indices" in given:
        raw, shape = given["indices"].long().flatten(), (*given["indices"].shape, z.shape[1])
    return {
        "latents": nhwc(latents),
        "image": nhwc(module.decode(z).sample),
        "raw": nhwc(module.decode(raw, force_not_quantize=True, shape=shape).sample),
        "indices": indices.reshape(z.shape[0], *z.shape[2:]).to(torch.float32),
        "loss": torch.stack([loss, 2 * loss]),
    }


def ours(model, params, given):
    import jax
    import jax.numpy as jnp

    latents = model.apply(params, given["x"], method="encode")
    quantized = model.apply(params, given["z"], method="quantize")
    z = given["z"] + (latents - jax.lax.stop_gradient(latents)).mean((1, 2), keepdims=True)
    raw = given.get("indices", z)
    return {
        "latents": latents,
        "image": model.apply(params, z, method="decode"),
        "raw": model.apply(params, raw, method="decode", quantize=False),
        "indices": quantized.indices.astype(jnp.float32),
        "loss": jnp.stack([quantized.loss, 2 * quantized.loss]),
    }


def random_case(rng):
    levels, spatial = int(rng.integers(1, 3)), bool(rng.integers(2))
    groups, latents = int(rng.choice([1, 2, 4])), int(rng.integers(2, 5))
    # Of 32 channels each is a group of the spatial norm by itself, so that biases before it have no gradient: what both
    # find there is rounding alone.
    widths = 64 * rng.integers(1, 3, levels) if spatial else groups * rng.integers(2, 6, levels)
    return _case(
        batch=int(rng.integers(1, 3)),
        size=tuple(int(n) for n in rng.integers(4, 12, 2)),
        small=tuple(int(n) for n in rng.integers(1, 5, 2)),
        in_channels=int(rng.integers(1, 5)),
        out_channels=int(rng.integers(1, 5)),
        down_block_types=[str(rng.choice(DOWN)) for _ in range(levels)],
        up_block_types=[str(rng.choice(UP)) for _ in range(levels)],
        block_out_channels=[int(n) for n in widths],
        layers_per_block=int(rng.integers(1, 3)),
        act_fn=str(rng.choice(["silu", "swish", "mish", "gelu", "relu"])),
        latent_channels=latents,
        num_vq_embeddings=int(rng.integers(2, 40)),
        norm_num_groups=groups,
        vq_embed_dim=latents if spatial else [None, 2, 5][rng.integers(3)],
        norm_type="spatial" if spatial else "group",
        mid_block_add_attention=bool(rng.integers(2)),
        lookup_from_codebook=bool(rng.integers(2)),
    )
