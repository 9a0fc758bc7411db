"""ControlNet for FLUX.1: a shorter copy of the transformer that reads a picture and steers the blocks of the large one.

Zhang et al. 2023, arXiv:2302.05543. The union variant embeds which kind of picture it is given (InstantX); networks
with `conditioning_embedding_channels` read the picture itself and not its latents (XLabs).
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
from diffjax.models.transformers.flux import (
    STREAM_RULES,
    blocks_of,
    check_axes,
    conditions,
    rotations,
    run_double,
    run_single,
)
from diffjax.nn import Compute, Conv, Linear, scope, stack, tap
from diffjax.nn.blocks import Embedding, TimeTextEmbedding
from diffjax.nn.conv import unshuffle
from diffjax.nn.linear import zeros

KIND = "FluxControlNetModel"
RULES = (
    *STREAM_RULES,
    (r"^controlnet_(single_)?blocks/.*/kernel$", (None, "fsdp", "tensor")),
    (r"^controlnet_mode_embedder/embedding$", (None, "fsdp")),
    (r"^input_hint_block/.*/kernel$", ()),
    (r"(^|/)(bias|scale)$", ()),
)
HINT_WIDTH = 16


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `FluxControlNetModel`, with its defaults."""

    patch_size: int = 1
    in_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    num_mode: int | None = None
    conditioning_embedding_channels: int | None = None


class Hint(nnx.Module):
    """Convolutions from a picture `[B, H, W, 3]` to `[B, H/8, W/8, channels]`; the last one starts at zero."""

    def __init__(self, channels: int, *, compute: Compute, rngs):
        given = dict(dtype=compute.dtype, rngs=rngs)
        self.conv_in = Conv(3, HINT_WIDTH, **given)
        self.blocks = nnx.Dict(
            {str(i): Conv(HINT_WIDTH, HINT_WIDTH, stride=1 + i % 2, padding=1, **given) for i in range(6)}
        )
        self.conv_out = Conv(HINT_WIDTH, channels, zero=True, **given)

    def __call__(self, picture: jax.Array) -> jax.Array:
        h = nnx.silu(self.conv_in(picture))
        for i in range(len(self.blocks)):
            h = nnx.silu(self.blocks[str(i)](h))
        return tap("out", self.conv_out(h))


class FluxControlNet(nnx.Module):
    """The module of `flux_controlnet`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.num_attention_heads * c.attention_head_dim, dict(dtype=compute.dtype, rngs=rngs)
        self.time_text_embed = TimeTextEmbedding(
            c.pooled_projection_dim, width, guidance=c.guidance_embeds, compute=compute, rngs=rngs
        )
        self.context_embedder = Linear(c.joint_attention_dim, width, **given)
        self.x_embedder = Linear(c.in_channels, width, **given)
        self.transformer_blocks, self.single_transformer_blocks = blocks_of(c, compute=compute, rngs=rngs)
        zero = lambda rngs: Linear(width, width, kernel_init=zeros, dtype=compute.dtype, rngs=rngs)
        self.controlnet_blocks = stack(zero, 0, c.num_layers, rngs=rngs)
        self.controlnet_single_blocks = stack(zero, 0, c.num_single_layers, rngs=rngs)
        modes, channels = c.num_mode, c.conditioning_embedding_channels
        self.controlnet_mode_embedder = None if modes is None else Embedding(modes, width, compute=compute, rngs=rngs)
        self.input_hint_block = None if channels is None else Hint(channels, compute=compute, rngs=rngs)
        init = {} if channels is not None else dict(kernel_init=zeros)
        self.controlnet_x_embedder = Linear(c.in_channels, width, **init, **given)
        self.c, self.compute = c, compute

    def __call__(
        self, x: jax.Array, t: jax.Array, context: jax.Array, pooled: jax.Array, *, cond: jax.Array,
        positions: jax.Array, context_positions: jax.Array | None = None, mode: jax.Array | int | None = None,
        scale: jax.Array | float = 1.0, guidance: jax.Array | None = None, key: jax.Array | None = None,
    ) -> tuple[jax.Array | None, jax.Array | None]:  # fmt: skip
        """The residuals of both stacks of blocks; `flux_controlnet` tells what the arguments are."""
        c = self.c
        places = dict(positions=positions, context_positions=context_positions)
        given = conditions(KIND, c, x=x, t=t, context=context, pooled=pooled, guidance=guidance, **places)
        emb, places = nnx.silu(self.time_text_embed(given.t, pooled, given.guidance)), given.places
        h = tap("tokens", self.x_embedder(x) + self.controlnet_x_embedder(self._hint(cond, x)))
        context = tap("context", self.context_embedder(context))
        if (mode is None) != (c.num_mode is None):
            wanted = "takes no mode" if c.num_mode is None else f"needs mode, [B] int below {c.num_mode}"
            raise ValueError(f"{KIND}: this network {wanted} (num_mode={c.num_mode})")
        if mode is not None:
            mode = jnp.broadcast_to(jnp.asarray(mode), (len(x),))
            context = jnp.concatenate([self.controlnet_mode_embedder(mode)[:, None], context], axis=1)
            places = jnp.concatenate([places[:1], places])
        how = dict(emb=emb, waves=rotations(places, c.axes_dims_rope), compute=self.compute, keep=True)
        (h, context), double = run_double(self.transformer_blocks, h, context, **how)
        _, single = run_single(self.single_transformer_blocks, h, context, **how)
        with scope("controlnet_blocks"):
            double = _projected(self.controlnet_blocks, double, scale)
        with scope("controlnet_single_blocks"):
            return double, _projected(self.controlnet_single_blocks, single, scale)

    def _hint(self, cond, x):
        c = self.c
        if self.input_hint_block is None:
            settings.expect(KIND, "cond", cond, len(x), x.shape[1], c.in_channels)
            return cond
        settings.expect(KIND, "cond", cond, len(x), None, None, 3)
        with scope("input_hint_block"):
            cond = self.input_hint_block(cond)
        _, height, width, _ = cond.shape
        p = c.patch_size
        if height % p or width % p:
            raise ValueError(f"{KIND}: cond becomes {height} x {width} pixels, which patch_size={p} does not divide")
        cond = unshuffle(cond, p)
        cond = cond.reshape(len(cond), -1, cond.shape[-1])
        settings.expect(KIND, "cond, cut into tokens,", cond, len(x), x.shape[1], c.in_channels)
        return cond


def _projected(layers, kept, scale):
    """The tokens `[n, B, T, C]` behind n blocks, each through its own projection, times `scale`."""
    if kept is None:
        return None
    (layer,) = layers.values()
    out = jax.vmap(lambda layer, h: layer(h))(layer, kept)
    return tap("out", out * jnp.asarray(scale, out.dtype))


def flux_controlnet(config: Mapping[str, Any], **how) -> Model:
    """`FluxControlNetModel`: what it returns is for the `residuals` and `single_residuals` of `flux_transformer`.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x, t, context, pooled, *, cond, positions, context_positions=None, mode=None, scale=1.0,
      guidance=None, key=None)`, `(residuals [num_layers, B, T, width], single_residuals [num_single_layers, B, T,
      width])` in the type of the computation, None for one without layers. The inputs are those of the transformer;
      `cond` is `[B, T, in_channels]`, packed latents of the picture, or with `conditioning_embedding_channels` the
      picture `[B, H, W, 3]` itself, in [-1, 1]; `mode` its kind, one integer or `[B]`, for a network of `num_mode`
      kinds; `scale` a factor of the results. As `init` makes it, it does not change the transformer.

    Raises:
      ValueError: for settings that are unknown or do not fit each other.
    """
    c = settings.read(KIND, Settings, config)
    check_axes(KIND, c)
    channels = c.conditioning_embedding_channels
    if channels is not None and channels * c.patch_size**2 != c.in_channels:
        raise ValueError(
            f"{KIND}: conditioning_embedding_channels={channels} times patch_size={c.patch_size} squared must be "
            f"in_channels={c.in_channels}"
        )
    make = lambda compute, rngs: FluxControlNet(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
