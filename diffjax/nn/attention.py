"""Self-attention over tokens and over the pixels of a feature map."""

from __future__ import annotations

import jax
from flax import nnx

from diffjax.nn.norm import GroupNorm


class SelfAttention(nnx.Module):
    """Multi-head self-attention of `x [B, T, C]` (Vaswani et al. 2017, arXiv:1706.03762), softmax in float32.

    Args:
      heads: must divide `width`.
      zero: start with a zero output projection, so that a residual branch starts as nothing.
      scale: what the products of queries and keys of d channels are multiplied by: "sqrt" for `1 / sqrt(d)`, "mup" for
        `8 / d`, which keeps its size when heads grow (Yang et al. 2022, arXiv:2203.03466, Definition 4.1; the 8 makes
        both equal at the usual d = 64).
    """

    def __init__(self, width: int, heads: int, *, zero: bool = False, scale: str = "sqrt", dtype, rngs):
        init = nnx.initializers.zeros_init() if zero else nnx.initializers.xavier_uniform()
        self.qkv = nnx.Linear(width, 3 * width, kernel_init=nnx.initializers.xavier_uniform(), dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, kernel_init=init, dtype=dtype, rngs=rngs)
        self.heads, self.scale = heads, {"sqrt": None, "mup": 8 * heads / width}[scale]

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        mixed = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], scale=self.scale)
        return self.out(mixed.reshape(x.shape))


class PixelAttention(nnx.Module):
    """`x + attention(group_norm(x))` over the pixels of `x [B, H, W, C]`, as in ADM; the identity at first."""

    def __init__(self, channels: int, heads: int, *, groups: int, dtype, rngs):
        self.norm = GroupNorm(channels, groups)
        self.attention = SelfAttention(channels, heads, zero=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.attention(tokens).reshape(x.shape)
