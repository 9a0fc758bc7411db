"""Autoencoders with a codebook, `VQModel`: VQGAN of latent diffusion, and MoVQ of Kandinsky.

van den Oord et al. 2017, arXiv:1711.00937; Esser et al. 2021, arXiv:2012.09841; MoVQ: Zheng et al. 2022,
arXiv:2209.09002.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.autoencoders import blocks
from diffjax.models.autoencoders.blocks import Decoder, Encoder
from diffjax.models.checks import check_least
from diffjax.nn import Compute, Conv, scope, tap, widen

KIND = "VQModel"
BETA = 0.25
RULES = ((r"^quantize/embedding/embedding$", ("fsdp",)), *blocks.RULES)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `VQModel`, with its defaults."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 3
    sample_size: int | tuple[int, ...] = 32
    num_vq_embeddings: int = 256
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    scaling_factor: float = 0.18215
    norm_type: str = "group"
    mid_block_add_attention: bool = True
    lookup_from_codebook: bool = False
    force_upcast: bool = False


class Quantized(NamedTuple):
    """Latents at the nearest rows of the codebook.

    Attributes:
      latents: `[B, h, w, D] float32`; their gradient is that of the latents that were quantised.
      indices: of the rows, `[B, h, w] int32`.
      loss: a scalar: the mean square between rows and latents, with the gradient of the latents, and `BETA` times that
        with the gradient of the rows. The paper has `BETA` at the other term; PyTorch's class has it here.
    """

    latents: jax.Array
    indices: jax.Array
    loss: jax.Array


class Codebook(nnx.Module):
    """The rows that latents are rounded to, under the checkpoint's name."""

    def __init__(self, count: int, width: int, *, rngs):
        init = nnx.initializers.uniform(2.0 / count)
        rows = init(rngs.params(), (count, width), jnp.float32) - 1.0 / count
        self.embedding = nnx.Dict(embedding=nnx.Param(rows))

    def rows(self, indices: jax.Array) -> jax.Array:
        return widen(jnp.take(self._table(), indices, axis=0))

    def __call__(self, z: jax.Array) -> Quantized:
        z, table = widen(z), widen(self._table())
        # Squares of distances, without those of z, which all rows have in common.
        products = jnp.einsum("bhwd,kd->bhwk", z, table, precision=jax.lax.Precision.HIGHEST)
        indices = jnp.argmin((table * table).sum(-1) - 2 * products, axis=-1)
        rows = self.rows(indices)
        fixed = jax.lax.stop_gradient
        loss = jnp.mean((fixed(rows) - z) ** 2) + BETA * jnp.mean((rows - fixed(z)) ** 2)
        return Quantized(z + fixed(rows - z), indices, loss)

    def _table(self):
        return tap("table", self.embedding["embedding"][...])


class VQModel(nnx.Module):
    """The module of `vq_model`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given, conv = dict(compute=compute, rngs=rngs), dict(dtype=compute.dtype, rngs=rngs)
        width = _width(c)
        self.encoder = Encoder(c, c.latent_channels, **given)
        self.quant_conv = Conv(c.latent_channels, width, 1, **conv)
        self.quantize = Codebook(c.num_vq_embeddings, width, rngs=rngs)
        self.post_quant_conv = Conv(width, c.latent_channels, 1, **conv)
        self.decoder = Decoder(c, latents=width if c.norm_type == "spatial" else None, **given)
        self.c, self.width = c, width

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        quantized = self.quantize(self.encode(x))
        return self._decoded(quantized.latents), quantized.loss

    def encode(self, x: jax.Array) -> jax.Array:
        settings.expect(KIND, "x", x, None, None, None, self.c.in_channels)
        least = blocks.least_side(self.c)
        if min(x.shape[1:3]) < least:
            raise ValueError(f"{KIND}: x has shape {x.shape}; expected at least {least} pixels a side")
        with scope("encoder"):
            h = self.encoder(x)
        return tap("latents", widen(self.quant_conv(h)))

    def decode(self, z: jax.Array, *, quantize: bool = True) -> jax.Array:
        if not quantize and self.c.lookup_from_codebook:
            settings.expect(KIND, "indices", z, None, None, None)
            return self._decoded(self.quantize.rows(z))
        settings.expect(KIND, "z", z, None, None, None, self.width)
        return self._decoded(self.quantize(z).latents if quantize else z)

    def _decoded(self, z):
        with scope("decoder"):
            return widen(self.decoder(self.post_quant_conv(z), z if self.c.norm_type == "spatial" else None))


def _width(c: Settings) -> int:
    return c.latent_channels if c.vq_embed_dim is None else c.vq_embed_dim


def settings_of(config: Mapping[str, Any]) -> Settings:
    """The settings in a config; raises `ValueError` for what is unknown or makes no network."""
    c = settings.read(KIND, Settings, config)
    settings.only(KIND, c, norm_type=("group", "spatial"))
    blocks.check(KIND, c)
    check_least(KIND, 1, num_vq_embeddings=c.num_vq_embeddings)
    if c.norm_type == "spatial":
        if any(width % 32 for width in c.block_out_channels):
            raise ValueError(
                f"{KIND}: block_out_channels={c.block_out_channels}: norm_type='spatial' has 32 groups; take multiples"
            )
        if _width(c) != c.latent_channels:
            raise ValueError(
                f"{KIND}: vq_embed_dim={c.vq_embed_dim}: norm_type='spatial' has latent_channels={c.latent_channels}"
            )
    return c


def vq_model(config: Mapping[str, Any], **how) -> Model:
    """`VQModel` (arXiv:2012.09841; with `norm_type="spatial"` arXiv:2209.09002) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels])` encodes images, quantises and decodes them: `(image
      [B, H', W', out_channels] float32, loss)`, with the gradient of what was quantised passed on to the encoder
      (`Quantized`). Its methods:
      `method="encode"`: of images, latents `[B, h, w, D] float32` that are not quantised, D being `vq_embed_dim`;
      `method="quantize"`: of latents, `Quantized`;
      `method="decode"`: of latents, images; with `quantize=False` of latents as they are or, with
      `lookup_from_codebook`, of the indices of rows, `[B, h, w] int`.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings_of(config)
    make = lambda compute, rngs: VQModel(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
