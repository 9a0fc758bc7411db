"""Embeddings of times, labels, patches and pooled vectors."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.nn.conv import Conv
from diffjax.nn.embed import timestep_waves
from diffjax.nn.functional import Fixed
from diffjax.nn.linear import ACTIVATIONS, Linear
from diffjax.nn.norm import widen
from diffjax.nn.stack import Compute
from diffjax.nn.taps import tap


class Embedding(nnx.Module):
    """Rows of a table `[count, width]` by integers `[...]`: `[..., width]`."""

    def __init__(self, count: int, width: int, *, compute: Compute, rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (count, width), jnp.float32))
        self.dtype = compute.dtype

    def __call__(self, index: jax.Array) -> jax.Array:
        # Rows in the table's own type: the gradient of one is a sum over all that took it.
        return jnp.take(tap("table", self.embedding[...]), index, axis=0).astype(self.dtype)


class Projection(nnx.Module):
    """Two linear maps, `linear_1` and `linear_2`, with an activation of `diffjax.nn.ACTIVATIONS` between them.

    Args:
      post_activation: of the result; None for none.
      cond_width: of a second input, which a map without bias, `cond_proj`, adds to the first; None for none.
    """

    def __init__(
        self, width_in: int, width: int, *, activation: str = "silu", out_width: int | None = None,
        post_activation: str | None = None, cond_width: int | None = None, bias: bool = True, compute: Compute, rngs,
    ):  # fmt: skip
        settings = dict(dtype=compute.dtype, rngs=rngs)
        self.linear_1 = Linear(width_in, width, bias=bias, **settings)
        self.cond_proj = Linear(cond_width, width_in, bias=False, **settings) if cond_width else None
        self.linear_2 = Linear(width, out_width or width, bias=bias, **settings)
        self.activation = ACTIVATIONS[activation]
        self.post_activation = ACTIVATIONS[post_activation] if post_activation else None

    def __call__(self, x: jax.Array, cond: jax.Array | None = None) -> jax.Array:
        x = x if cond is None else x + self.cond_proj(cond)
        out = self.linear_2(self.activation(self.linear_1(x)))
        return out if self.post_activation is None else self.post_activation(out)


class Fourier(nnx.Module):
    """Waves of fixed random frequencies, which the checkpoint holds as `weight` (arXiv:2011.13456, appendix C.1).

    Args:
      log: of the logarithm of t and not of t.
    """

    def __init__(self, count: int, *, log: bool, cosines_first: bool, rngs):
        self.weight = Fixed(16.0 * jax.random.normal(rngs.params(), (count,)))
        self.log, self.cosines_first = log, cosines_first

    def __call__(self, t: jax.Array) -> jax.Array:
        """`[B, 2 count] float32` of `t [B]`."""
        frequencies = widen(jax.lax.stop_gradient(self.weight[...]))
        t = jnp.asarray(t, frequencies.dtype)
        phase = (jnp.log(t) if self.log else t)[:, None] * frequencies * 2 * math.pi
        waves = (jnp.sin(phase), jnp.cos(phase))
        return jnp.concatenate(waves[::-1] if self.cosines_first else waves, -1)


class LabelEmbedding(nnx.Module):
    """Rows of `embedding_table`, which has one more than there are classes: that of no label."""

    def __init__(self, num_classes: int, width: int, *, compute: Compute, rngs):
        self.embedding_table = Embedding(num_classes + 1, width, compute=compute, rngs=rngs)

    def __call__(self, y: jax.Array) -> jax.Array:
        return self.embedding_table(y)


class TimestepLabelEmbedding(nnx.Module):
    """The sum of an embedded time and label (DiT, arXiv:2212.09748), `[B, width]`; 256 waves, cosines first."""

    def __init__(self, num_classes: int, width: int, *, compute: Compute, rngs):
        self.timestep_embedder = Projection(256, width, compute=compute, rngs=rngs)
        self.class_embedder = LabelEmbedding(num_classes, width, compute=compute, rngs=rngs)

    def __call__(self, t: jax.Array, y: jax.Array) -> jax.Array:
        return self.timestep_embedder(timestep_waves(t, 256, shift=1.0)) + self.class_embedder(y)


class TimeTextEmbedding(nnx.Module):
    """The sum of an embedded time `t [B]`, a pooled text `[B, pooled_width]` and, with `guidance`, a scale of it `[B]`:
    `[B, width]`; 256 waves, cosines first."""

    def __init__(self, pooled_width: int, width: int, *, guidance: bool = False, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.timestep_embedder = Projection(256, width, **given)
        self.guidance_embedder = Projection(256, width, **given) if guidance else None
        self.text_embedder = Projection(pooled_width, width, **given)

    def __call__(self, t: jax.Array, pooled: jax.Array, guidance: jax.Array | None = None) -> jax.Array:
        out = self.timestep_embedder(timestep_waves(t, 256))
        if guidance is not None:
            out = out + self.guidance_embedder(timestep_waves(guidance, 256))
        return out + self.text_embedder(pooled)


class Modulation(nnx.Module):
    """`count` vectors `[B, width]` from the activated embedding `[B, width]`: shifts, scales and gates.

    Activations: `modulation [B, count width]`.
    """

    def __init__(self, width: int, count: int, *, compute: Compute, rngs):
        self.linear = Linear(width, count * width, dtype=compute.dtype, rngs=rngs)
        self.count = count

    def __call__(self, emb: jax.Array) -> list[jax.Array]:
        return jnp.split(tap("modulation", self.linear(emb)), self.count, axis=-1)


def grid_positions(dim: int, height: int, width: int, *, base: int, interpolation: float = 1.0) -> jax.Array:
    """Fixed positions `[height, width, dim] float32` of a grid: half of the channels for the column, half for the row.

    As `diffjax.nn.sincos_2d`, with coordinates scaled so that each side of the grid spans `base / interpolation`. Only
    the waves of one row and one column are constants of a traced program, which repeats them.
    """
    frequencies = 1.0 / 10_000.0 ** (np.arange(dim // 4, dtype=np.float64) / (dim / 4))

    def waves(n):
        places = np.arange(n, dtype=np.float32) / (n / base) / interpolation
        phases = places[:, None].astype(np.float64) * frequencies
        return np.concatenate([np.sin(phases), np.cos(phases)], 1).astype(np.float32)

    columns = jnp.broadcast_to(waves(width)[None], (height, width, dim // 2))
    rows = jnp.broadcast_to(waves(height)[:, None], (height, width, dim // 2))
    return jnp.concatenate([columns, rows], -1)


def patch_conv(channels: int, width: int, patch: int, *, zero: bool = False, compute: Compute, rngs) -> Conv:
    """The map from patches of an image to tokens; `zero` starts it at zero."""
    return Conv(channels, width, patch, stride=patch, padding=0, zero=zero, dtype=compute.dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Patches of `x [B, H, W, C]` as tokens `[B, (H / patch) (W / patch), width]`, row major, without positions."""

    def __init__(self, channels: int, width: int, patch: int, *, zero: bool = False, compute: Compute, rngs):
        self.proj = patch_conv(channels, width, patch, zero=zero, compute=compute, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.proj(x)
        return h.reshape(h.shape[0], -1, h.shape[-1])
