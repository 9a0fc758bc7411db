"""Tiny autoencoders, `AutoencoderTiny`: TAESD, TAESDXL, TAESD3 and TAEF1.

Bohan 2023, https://github.com/madebyollin/taesd. Their latents are at the scale of the network that denoises them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.autoencoders.blocks import ACTIVATIONS_OF_BLOCKS
from diffjax.models.checks import check_least, check_name
from diffjax.nn import ACTIVATIONS, Compute, Conv, numbered, remat, scope, tap, widen

KIND = "AutoencoderTiny"
RULES = (
    (r"/conv/0/kernel$", (None, None, "fsdp", "tensor")),
    (r"/conv/2/kernel$", (None, None, "tensor", "fsdp")),
    (r"/conv/4/kernel$", (None, None, "fsdp")),
    (r"/conv/0/bias$", ("tensor",)),
    (r"^(encoder|decoder)/layers/\d+/kernel$", (None, None, "fsdp")),
    (r"/bias$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of an `AutoencoderTiny`, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    upsample_fn: str = "nearest"
    latent_channels: int = 4
    upsampling_scaling_factor: int = 2
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3.0
    latent_shift: float = 0.5
    force_upcast: bool = False
    scaling_factor: float = 1.0
    shift_factor: float = 0.0


class Block(nnx.Module):
    """Three convolutions beside an identity, `[B, H, W, C]` to the same."""

    def __init__(self, width: int, activation: str, *, compute: Compute, rngs):
        self.conv = nnx.Dict({str(i): Conv(width, width, dtype=compute.dtype, rngs=rngs) for i in (0, 2, 4)})
        self.activation, self.remat = ACTIVATIONS[activation], compute.remat

    def __call__(self, x: jax.Array) -> jax.Array:
        return remat(Block._run, self.remat)(self, x)

    def _run(self, x):
        h = tap("hidden", self.activation(self.conv["0"](x)))
        h = self.conv["4"](self.activation(self.conv["2"](h)))
        # Always this activation, whatever that between the convolutions.
        return tap("out", nnx.relu(x + h))


class Encoder(nnx.Module):
    """Levels of blocks, each behind a convolution, those but the first with stride 2."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, conv = c.encoder_block_out_channels[0], dict(dtype=compute.dtype, rngs=rngs)
        layers: list[nnx.Module] = []
        for i, count in enumerate(c.num_encoder_blocks):
            layers.append(
                Conv(width, width, stride=2, padding=1, bias=False, **conv) if i else Conv(c.in_channels, width, **conv)
            )
            layers += [Block(width, c.act_fn, compute=compute, rngs=rngs) for _ in range(count)]
        layers.append(Conv(width, c.latent_channels, **conv))
        self.layers = nnx.Dict({str(i): layer for i, layer in enumerate(layers)})

    def __call__(self, x: jax.Array) -> jax.Array:
        h = (x + 1) / 2
        for i, layer in numbered(self.layers):
            with scope(f"layers/{i}"):
                h = layer(h)
        return h


class Decoder(nnx.Module):
    """Levels of blocks, with copies of pixels and a convolution behind each."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, conv = c.decoder_block_out_channels[0], dict(dtype=compute.dtype, rngs=rngs)
        layers: dict[int, nnx.Module] = {0: Conv(c.latent_channels, width, **conv)}
        # Activations and changes of resolution have numbers too.
        number, upsampled, last = 2, [], len(c.num_decoder_blocks) - 1
        for i, count in enumerate(c.num_decoder_blocks):
            for _ in range(count):
                layers[number] = Block(width, c.act_fn, compute=compute, rngs=rngs)
                number += 1
            if i < last:
                number += 1
                upsampled.append(str(number))
            layers[number] = Conv(width, width if i < last else c.out_channels, bias=i == last, **conv)
            number += 1
        self.layers = nnx.Dict({str(i): layer for i, layer in layers.items()})
        self.activation, self.upsampled = ACTIVATIONS[c.act_fn], tuple(upsampled)
        self.factor = c.upsampling_scaling_factor

    def __call__(self, z: jax.Array) -> jax.Array:
        # Soft limits, of what a denoising network may overshoot.
        h = 3 * jnp.tanh(z / 3)
        for name, layer in numbered(self.layers):
            h = _copies(h, self.factor) if name in self.upsampled else h
            with scope(f"layers/{name}"):
                h = layer(h)
            h = self.activation(h) if name == "0" else h
        return 2 * h - 1


def _copies(x, factor):
    return jnp.repeat(jnp.repeat(x, factor, 1), factor, 2)


class AutoencoderTiny(nnx.Module):
    """The module of `autoencoder_tiny`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        self.encoder = Encoder(c, compute=compute, rngs=rngs)
        self.decoder = Decoder(c, compute=compute, rngs=rngs)
        self.c = c

    def __call__(self, x: jax.Array) -> jax.Array:
        config = dataclasses.asdict(self.c)
        return self.decode(from_bytes(config, to_bytes(config, self.encode(x))))

    def encode(self, x: jax.Array) -> jax.Array:
        settings.expect(KIND, "x", x, None, None, None, self.c.in_channels)
        with scope("encoder"):
            return widen(self.encoder(x))

    def decode(self, z: jax.Array) -> jax.Array:
        settings.expect(KIND, "z", z, None, None, None, self.c.latent_channels)
        with scope("decoder"):
            return widen(self.decoder(z))


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings in a config; raises `ValueError` for what is unknown or makes no network."""
    # Written by PyTorch's class beside its settings; the same as those of the decoder.
    c = settings.read(KIND, Settings, config, frozenset({"block_out_channels"}))
    settings.only(KIND, c, upsample_fn=("nearest",))
    check_name(KIND, "act_fn", c.act_fn, ACTIVATIONS_OF_BLOCKS)
    check_least(KIND, 1, upsampling_scaling_factor=c.upsampling_scaling_factor)
    for part in ("encoder", "decoder"):
        widths, counts = getattr(c, f"{part}_block_out_channels"), getattr(c, f"num_{part}_blocks")
        if len(widths) != len(counts) or len(set(widths)) != 1:
            raise ValueError(
                f"{KIND}: {part}_block_out_channels={widths}: expected one width, {len(counts)} times as by "
                f"num_{part}_blocks={counts}"
            )
    return c


def to_bytes(config: Mapping[str, Any], z: jax.Array) -> jax.Array:
    """Latents as bytes, `uint8`, to be kept as an image; values further than `latent_magnitude` from 0 are cut off.

    Args:
      config: of an `AutoencoderTiny`.
    """
    c = settings_of(config)
    return jnp.round(jnp.clip(z / (2 * c.latent_magnitude) + c.latent_shift, 0, 1) * 255).astype(jnp.uint8)


def from_bytes(config: Mapping[str, Any], stored: jax.Array) -> jax.Array:
    """The latents of `to_bytes`, float32, each at most `latent_magnitude / 255` away."""
    c = settings_of(config)
    return (stored.astype(jnp.float32) / 255 - c.latent_shift) * (2 * c.latent_magnitude)


def autoencoder_tiny(config: Mapping[str, Any], **how) -> Model:
    """`AutoencoderTiny` (TAESD) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `method="encode"`: of images `x [B, H, W, in_channels]` in [-1, 1], latents `[B, h, w,
      latent_channels] float32`; `method="decode"`: of latents, images. `apply(params, x)` decodes what it has encoded
      and stored as bytes (`to_bytes`), and has no gradient for the encoder.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings_of(config)
    make = lambda compute, rngs: AutoencoderTiny(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
