"""The encoder and the decoder of convolutions that autoencoders of latent diffusion share.

Esser et al. 2021, "Taming Transformers", arXiv:2012.09841, as Rombach et al. 2022, arXiv:2112.10752, have them. Both
are built from the settings of an autoencoder, of which they read `in_channels`, `out_channels`, `latent_channels`,
`block_out_channels`, `down_block_types`, `up_block_types`, `layers_per_block`, `act_fn`, `norm_num_groups` and
`mid_block_add_attention`. Layers are not stacked: two or three of them are of one shape.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.models.checks import check_divides, check_least, check_name
from diffjax.nn import ACTIVATIONS, Compute, Conv, GroupNorm, numbered, remat, scope, tap
from diffjax.nn.blocks import Attention, Downsample, ResnetBlock, Upsample

EPS = 1e-6
# Whether there is attention behind each residual block.
DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
ACTIVATIONS_OF_BLOCKS = ("silu", "swish", "mish", "gelu", "relu")
RULES = (
    (r"/conv1/kernel$", (None, None, "fsdp", "tensor")),
    (r"/conv2/kernel$", (None, None, "tensor", "fsdp")),
    (r"/conv1/bias$", ("tensor",)),
    # One head of all channels, which is not split.
    (r"/(to_[qkv]|to_out/0)/kernel$", ("fsdp",)),
    (r"/(conv_out|conv|conv_shortcut)/kernel$", (None, None, "fsdp")),
    (r"/(conv_in|conv_[yb])/kernel$", (None, None, None, "fsdp")),
    (r"^(post_)?quant_conv/kernel$", ()),
    (r"/(bias|scale)$", ()),
)


def check(kind: str, c: Any) -> None:
    """Raises `ValueError` for settings that make no encoder and decoder."""
    levels = len(c.block_out_channels)
    for name, known in (("down_block_types", DOWN), ("up_block_types", UP)):
        for block in getattr(c, name):
            check_name(kind, name, block, known)
        if len(getattr(c, name)) != levels:
            raise ValueError(f"{kind}: {name} names {len(getattr(c, name))} blocks, block_out_channels {levels}")
    check_name(kind, "act_fn", c.act_fn, ACTIVATIONS_OF_BLOCKS)
    check_least(kind, 1, layers_per_block=c.layers_per_block, norm_num_groups=c.norm_num_groups)
    check_divides(kind, "norm_num_groups", c.norm_num_groups, "block_out_channels", *c.block_out_channels)


def least_side(c: Any) -> int:
    """How many pixels of a side become one of the latents."""
    return 2 ** (len(c.block_out_channels) - 1)


class SpatialNorm(nnx.Module):
    """A group normalisation of `x [B, H, W, C]`, scaled and shifted pixel by pixel by the latents `z [B, h, w, Z]`.

    Zheng et al. 2022, "MoVQ", arXiv:2209.09002. H and W are multiples of h and w; always 32 groups.
    """

    def __init__(self, channels: int, latents: int, *, compute: Compute, rngs):
        self.norm_layer = GroupNorm(channels, 32, eps=EPS)
        self.conv_y = Conv(latents, channels, 1, dtype=compute.dtype, rngs=rngs)
        self.conv_b = Conv(latents, channels, 1, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        # Of single pixels, so they are taken before these are copied.
        scale, shift = (self._copied(conv(z), x) for conv in (self.conv_y, self.conv_b))
        return self.norm_layer(x) * scale + shift

    @staticmethod
    def _copied(a, x):
        return jnp.repeat(jnp.repeat(a, x.shape[1] // a.shape[1], 1), x.shape[2] // a.shape[2], 2)


class SpatialResnetBlock(nnx.Module):
    """The residual block whose normalisations see the latents, `[B, H, W, C_in] -> [B, H, W, C_out]`."""

    def __init__(self, channels_in: int, channels_out: int, latents: int, *, activation: str, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        conv = dict(dtype=compute.dtype, rngs=rngs)
        self.norm1 = SpatialNorm(channels_in, latents, **given)
        self.conv1 = Conv(channels_in, channels_out, **conv)
        self.norm2 = SpatialNorm(channels_out, latents, **given)
        self.conv2 = Conv(channels_out, channels_out, **conv)
        self.conv_shortcut = Conv(channels_in, channels_out, 1, **conv) if channels_in != channels_out else None
        self.activation = ACTIVATIONS[activation]

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        h = tap("hidden", self.conv1(self.activation(self.norm1(x, z))))
        h = self.conv2(self.activation(self.norm2(h, z)))
        return tap("out", h + (x if self.conv_shortcut is None else self.conv_shortcut(x)))


class Blocks(nnx.Module):
    """Residual blocks at one resolution, each with attention behind it or none, and then another resolution.

    Args:
      channels_in, channels: of what comes and what goes.
      count: of residual blocks.
      attentions: behind how many of them is attention, over pixels and with one head of all channels.
      resample: "down", "up" or None.
      latents: channels of the latents that the normalisations see; None for plain ones.
    """

    def __init__(
        self, c: Any, channels_in: int, channels: int, count: int, *, attentions: int = 0, resample: str | None = None,
        latents: int | None = None, compute: Compute, rngs,
    ):  # fmt: skip
        given = dict(compute=compute, rngs=rngs)

        def resnet(channels_in):
            if latents is not None:
                return SpatialResnetBlock(channels_in, channels, latents, activation=c.act_fn, **given)
            return ResnetBlock(channels_in, channels, groups=c.norm_num_groups, activation=c.act_fn, **given)

        def attention():
            groups = c.norm_num_groups if latents is None else None
            layer = Attention(channels, 1, channels, bias=True, groups=groups, eps=EPS, **given)
            layer.spatial_norm = None if latents is None else SpatialNorm(channels, latents, **given)
            return layer

        self.resnets = nnx.Dict({str(i): resnet(channels if i else channels_in) for i in range(count)})
        self.attentions = nnx.Dict({str(i): attention() for i in range(attentions)})
        down, up = resample == "down", resample == "up"
        self.downsamplers = nnx.Dict({"0": Downsample(channels, padding=0, **given)}) if down else None
        self.upsamplers = nnx.Dict({"0": Upsample(channels, **given)}) if up else None
        self.remat = compute.remat

    def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
        for i, resnet in numbered(self.resnets):
            with scope(f"resnets/{i}"):
                x = remat(_run, self.remat)(resnet, x, z)
            if i in self.attentions:
                with scope(f"attentions/{i}"):
                    x = remat(_attended, self.remat)(self.attentions[i], x, z)
        for name, samplers in (("downsamplers", self.downsamplers), ("upsamplers", self.upsamplers)):
            if samplers is not None:
                with scope(f"{name}/0"):
                    x = samplers["0"](x)
        return x


def _run(resnet, x, z):
    return resnet(x, z)


def _attended(attention, x, z):
    h = x if attention.spatial_norm is None else attention.spatial_norm(x, z)
    return x + attention(h.reshape(x.shape[0], -1, x.shape[-1])).reshape(x.shape)


def _middle(c, latents=None, **given):
    width = c.block_out_channels[-1]
    return Blocks(c, width, width, 2, attentions=int(c.mid_block_add_attention), latents=latents, **given)


class Encoder(nnx.Module):
    """`x [B, H, W, in_channels]` to `[B, h, w, channels]`, where sides are halved, rounded down, between the levels."""

    def __init__(self, c: Any, channels: int, *, compute: Compute, rngs):
        given, conv = dict(compute=compute, rngs=rngs), dict(dtype=compute.dtype, rngs=rngs)
        widths = c.block_out_channels
        self.conv_in = Conv(c.in_channels, widths[0], **conv)
        self.down_blocks = nnx.Dict({
            str(i): Blocks(
                c, widths[max(i - 1, 0)], widths[i], c.layers_per_block, attentions=c.layers_per_block * DOWN[block],
                resample="down" if i < len(widths) - 1 else None, **given
            )
            for i, block in enumerate(c.down_block_types)
        })  # fmt: skip
        self.mid_block = _middle(c, **given)
        self.conv_norm_out = GroupNorm(widths[-1], c.norm_num_groups, eps=EPS)
        self.conv_out = Conv(widths[-1], channels, **conv)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.conv_in(x)
        for i, block in numbered(self.down_blocks):
            with scope(f"down_blocks/{i}"):
                h = block(h)
        with scope("mid_block"):
            h = self.mid_block(h)
        # Always this activation, whatever that of the blocks.
        return tap("out", self.conv_out(nnx.silu(self.conv_norm_out(h))))


class Decoder(nnx.Module):
    """`x [B, h, w, latent_channels]` to `[B, H, W, out_channels]`, with sides doubled between the levels.

    `latents` are the channels of the latents `z [B, h, w, latents]` that the normalisations see (`SpatialNorm`); None
    for plain ones.
    """

    def __init__(self, c: Any, *, latents: int | None = None, compute: Compute, rngs):
        given, conv = dict(compute=compute, rngs=rngs), dict(dtype=compute.dtype, rngs=rngs)
        widths, count = c.block_out_channels[::-1], c.layers_per_block + 1
        self.conv_in = Conv(c.latent_channels, widths[0], **conv)
        self.mid_block = _middle(c, latents, **given)
        self.up_blocks = nnx.Dict({
            str(i): Blocks(
                c, widths[max(i - 1, 0)], widths[i], count, attentions=count * UP[block],
                resample="up" if i < len(widths) - 1 else None, latents=latents, **given
            )
            for i, block in enumerate(c.up_block_types)
        })  # fmt: skip
        self.conv_norm_out = (
            GroupNorm(widths[-1], c.norm_num_groups, eps=EPS)
            if latents is None
            else SpatialNorm(widths[-1], latents, **given)
        )
        self.conv_out = Conv(widths[-1], c.out_channels, **conv)

    def __call__(self, x: jax.Array, z: jax.Array | None = None) -> jax.Array:
        h = self.conv_in(x)
        with scope("mid_block"):
            h = self.mid_block(h, z)
        for i, block in numbered(self.up_blocks):
            with scope(f"up_blocks/{i}"):
                h = block(h, z)
        h = self.conv_norm_out(h) if z is None else self.conv_norm_out(h, z)
        return tap("out", self.conv_out(nnx.silu(h)))
