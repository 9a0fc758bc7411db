"""Normalisation in at least float32, written so that it is fast on CPU too, sums in float32, and dropout."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


def widen(x: jax.Array) -> jax.Array:
    """`x` in float32, or in its own type if that is wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def plus(x: jax.Array, a: jax.Array) -> jax.Array:
    """`x + a`, of x's shape and dtype, for an `a` that broadcasts to it.

    The gradient of `a` is a sum, taken in at least float32. Differentiation by itself adds in the type of x, and a sum
    in bfloat16 stops growing at some 256 like terms.
    """
    return x + _spread(a, x)


@jax.custom_jvp
def times(x: jax.Array, a: jax.Array) -> jax.Array:
    """`x * a`, of x's shape and dtype, for an `a` that broadcasts to it; the gradient of `a` is summed as in `plus`."""
    return x * a.astype(x.dtype)


@times.defjvp
def _(primals, tangents):
    # Only the tangent is spread: an `a` of x's shape would be kept for the backward pass.
    (x, a), (dx, da) = primals, tangents
    return times(x, a), times(dx, a) + x * _spread(da, x)


def _spread(a, x):
    return jnp.broadcast_to(widen(a), x.shape).astype(x.dtype)


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, *, groups: int, eps: float = 1e-5) -> jax.Array:
    """Group normalisation (Wu & He 2018, arXiv:1803.08494) of `x [B, ..., C]`, of x's shape and dtype.

    Args:
      scale, bias: `[C]`, or `[B, C]` to modulate each sample.
      groups: must divide `C`.

    Statistics are sums per channel first and per group afterwards, in at least float32: no reshape of the large array,
    which XLA's CPU back end turns into slow reductions.
    """
    batch, channels = x.shape[0], x.shape[-1]
    space = tuple(range(1, x.ndim - 1))
    f = widen(x)

    def per_group(mean):
        return jnp.repeat(mean.reshape(batch, groups, -1).mean(-1), channels // groups, axis=-1)

    mean, square = per_group(f.mean(space)), per_group((f * f).mean(space))
    # Rounding can leave the difference slightly below zero on constant inputs.
    a = jax.lax.rsqrt(jnp.maximum(square - mean * mean, 0.0) + eps) * scale
    b = bias - mean * a
    shape = (batch,) + (1,) * len(space) + (channels,)
    return (f * a.reshape(shape) + b.reshape(shape)).astype(x.dtype)


def layer_norm(
    x: jax.Array, scale: jax.Array | None = None, bias: jax.Array | None = None, *, eps: float = 1e-6
) -> jax.Array:
    """Layer normalisation (Ba et al. 2016, arXiv:1607.06450) over the last axis of `x [..., C]`; x's shape and dtype.

    Args:
      scale, bias: `[C]`; None for 1 and 0.

    The means are matrix-vector products: XLA's CPU back end is slow at reducing a minor axis. Their precision is pinned
    because accelerators round the inputs of float32 products by default.
    """
    f = widen(x)
    centred = f - _mean(f)
    out = centred * jax.lax.rsqrt(_mean(centred * centred) + eps)
    out = out if scale is None else times(out, scale)
    return (out if bias is None else plus(out, bias)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array | None = None, *, eps: float = 1e-6) -> jax.Array:
    """`x / sqrt(mean(x^2) + eps)` over the last axis, times `scale [C]` if given (Zhang & Sennrich 2019,
    arXiv:1910.07467); x's shape and dtype."""
    f = widen(x)
    out = f * jax.lax.rsqrt(_mean(f * f) + eps)
    return (out if scale is None else times(out, scale)).astype(x.dtype)


def _mean(a):
    weights = jnp.full((a.shape[-1],), 1.0 / a.shape[-1], a.dtype)
    return jnp.dot(a, weights, precision=jax.lax.Precision.HIGHEST)[..., None]


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """`x (1 + scale) + shift` with `shift, scale [B, C]` broadcast over the middle axes of `x [B, ..., C]`."""
    shape = (x.shape[0],) + (1,) * (x.ndim - 2) + (-1,)
    return plus(times(x, 1 + scale.reshape(shape)), shift.reshape(shape))


class GroupNorm(nnx.Module):
    """`group_norm` with a learned scale and bias; `shift, scale [B, C]` in the call modulate them (AdaGN).

    AdaGN: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
    """

    def __init__(self, channels: int, groups: int, *, eps: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array, shift: jax.Array | None = None, scale: jax.Array | None = None) -> jax.Array:
        a, b = self.scale[...], self.bias[...]
        if shift is not None:
            # One affine map of the normalised input instead of two passes over it.
            a, b = a * (1 + widen(scale)), b * (1 + widen(scale)) + widen(shift)
        return group_norm(x, a, b, groups=self.groups, eps=self.eps)


class LayerNorm(nnx.Module):
    """`layer_norm` with a learned scale and bias, or without one or both."""

    def __init__(self, channels: int, *, eps: float = 1e-5, scale: bool = True, bias: bool = True):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32)) if scale else None
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32)) if scale and bias else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, *(a if a is None else a[...] for a in (self.scale, self.bias)), eps=self.eps)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale, or without."""

    def __init__(self, channels: int, *, eps: float = 1e-6, scale: bool = True):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32)) if scale else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, None if self.scale is None else self.scale[...], eps=self.eps)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with entries zeroed with probability `rate` and the others divided by `1 - rate`; `x` itself without a key.

    The rate is rounded to a multiple of 2**-16: one 32-bit draw serves two entries.
    """
    if key is None or rate == 0.0:
        return x
    if x.shape[-1] % 2:
        keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
        return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
    words = jax.random.bits(key, x.shape[:-1] + (x.shape[-1] // 2,), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(x.shape)
    cut = round(rate * 2**16)
    return jnp.where(halves >= cut, x / (1.0 - cut / 2**16), 0).astype(x.dtype)
