"""The autoencoder of latent diffusion, `AutoencoderKL`: Stable Diffusion 1 to 3, SDXL, Flux and others.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
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
from diffjax.models.autoencoders.blocks import RULES, Decoder, Encoder, check, least_side
from diffjax.nn import Compute, Conv, scope, tap, widen

KIND = "AutoencoderKL"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of an `AutoencoderKL`, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32  # of the tiles of `tiling`
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True  # whether half precision overflows: a hint for the choice of `dtype`
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True


class AutoencoderKL(nnx.Module):
    """The module of `autoencoder_kl`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given, conv = dict(compute=compute, rngs=rngs), dict(dtype=compute.dtype, rngs=rngs)
        self.encoder = Encoder(c, 2 * c.latent_channels, **given)
        self.decoder = Decoder(c, **given)
        moments, latents = 2 * c.latent_channels, c.latent_channels
        self.quant_conv = Conv(moments, moments, 1, **conv) if c.use_quant_conv else None
        self.post_quant_conv = Conv(latents, latents, 1, **conv) if c.use_post_quant_conv else None
        self.c = c

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return self.decode(self.encode(x, key=key))

    def moments(self, x: jax.Array) -> jax.Array:
        settings.expect(KIND, "x", x, None, None, None, self.c.in_channels)
        least = least_side(self.c)
        if min(x.shape[1:3]) < least:
            raise ValueError(f"{KIND}: x has shape {x.shape}; expected at least {least} pixels a side")
        with scope("encoder"):
            h = self.encoder(x)
        return tap("moments", widen(h if self.quant_conv is None else self.quant_conv(h)))

    def encode(self, x: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        return posterior(self.moments(x), key=key)

    def decode(self, z: jax.Array) -> jax.Array:
        settings.expect(KIND, "z", z, None, None, None, self.c.latent_channels)
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        with scope("decoder"):
            return widen(self.decoder(z))


def posterior(moments: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
    """The mean of a diagonal Gaussian, or with a key a sample of it, `[B, h, w, C]`.

    Args:
      moments: `[B, h, w, 2 C]`, mean and log-variance; the second is clipped to [-30, 20] here.
    """
    mean, logvar = jnp.split(moments, 2, axis=-1)
    if key is None:
        return mean
    std = jnp.exp(0.5 * jnp.clip(logvar, -30.0, 20.0))
    return mean + std * jax.random.normal(key, mean.shape, mean.dtype)


def kl_divergence(moments: jax.Array) -> jax.Array:
    """The divergence of the posterior of `moments [B, h, w, 2 C]` from the unit Gaussian, `[B]`, in nats."""
    mean, logvar = jnp.split(moments, 2, axis=-1)
    logvar = jnp.clip(logvar, -30.0, 20.0)
    return 0.5 * (mean**2 + jnp.expm1(logvar) - logvar).sum((1, 2, 3))


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings in a config; raises `ValueError` for what is unknown or makes no network."""
    c = settings.read(KIND, Settings, config)
    check(KIND, c)
    return c


def autoencoder_kl(config: Mapping[str, Any], **how) -> Model:
    """`AutoencoderKL` (arXiv:2112.10752) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels])` encodes images, which are in [-1, 1], and decodes them,
      `[B, H', W', out_channels] float32`; H' and W' are the multiples of 2^(levels - 1) below. Its methods:
      `method="moments"`: of images, `[B, h, w, 2 latent_channels]`, mean and log-variance of their posterior;
      `method="encode"`: their mean, with `key=` a sample of the posterior (`posterior`);
      `method="decode"`: of latents `z [B, h, w, latent_channels]`, images.
      `to_latents` and `from_latents` are between these and a network that denoises.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings_of(config)
    make = lambda compute, rngs: AutoencoderKL(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
