"""Attention with separate projections of queries, keys and values."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.attention import attend
from diffjax.nn.linear import Linear
from diffjax.nn.norm import GroupNorm, LayerNorm, RMSNorm, dropout
from diffjax.nn.stack import Compute
from diffjax.nn.taps import tap

# Of queries and keys, over the channels of a head.
QK_NORMS = {
    None: lambda width, eps: None,
    "layer_norm": LayerNorm,
    "fp32_layer_norm": partial(LayerNorm, scale=False),
    "rms_norm": RMSNorm,
}


# What the score of a masked token is lowered by: it is seen where all are masked, and masks can be added up.
MASKED = -10_000.0


def mask_bias(mask: jax.Array | None, masked: float = MASKED) -> jax.Array | None:
    """What `mask [B, S]` (1 = seen, 0 = lowered by `masked`) adds to scores: `[B, 1, 1, S] float32`, None for None."""
    return None if mask is None else ((1 - jnp.asarray(mask, jnp.float32)) * masked)[:, None, None]


class Pictured(NamedTuple):
    """A context and, beside it, pictures that attention looks at (`diffjax.adapters.ip_adapter`).

    Attributes:
      context: `[B, S, D]`.
      pictures: for each adapter its tokens `[B, L, D]` and their weight.
    """

    context: jax.Array
    pictures: tuple[tuple[jax.Array, Any], ...]


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, T, N d] -> [B, T, N, d]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


class Attention(nnx.Module):
    """Multi-head attention of `x [B, T, C]` to itself or to `context [B, S, context_width]`: `[B, T, C]`.

    Args:
      width: C.
      heads, head_width: number of heads and channels of each.
      context_width: None for self-attention.
      bias, out_bias: of the three projections, and of the last one.
      qk_norm: one of `QK_NORMS`, of queries and keys, head by head.
      groups: of a group normalisation of x in front; None for none.
      dropout_rate: of the result, in calls with a key.

    Activations: `q [B, T, N, d]`, `k` and `v [B, S, N, d]`, `mixed [B, T, N, d]`, `out [B, T, C]`.
    """

    def __init__(
        self, width: int, heads: int, head_width: int, *, context_width: int | None = None, bias: bool = False,
        out_bias: bool = True, qk_norm: str | None = None, qk_eps: float = 1e-5,
        groups: int | None = None, eps: float = 1e-5, dropout_rate: float = 0.0, compute: Compute, rngs,
    ):  # fmt: skip
        inner, settings = heads * head_width, dict(dtype=compute.dtype, rngs=rngs)
        context_width = width if context_width is None else context_width
        self.group_norm = GroupNorm(width, groups, eps=eps) if groups else None
        self.to_q = Linear(width, inner, bias=bias, **settings)
        self.to_k = Linear(context_width, inner, bias=bias, **settings)
        self.to_v = Linear(context_width, inner, bias=bias, **settings)
        self.norm_q, self.norm_k = (QK_NORMS[qk_norm](head_width, eps=qk_eps) for _ in range(2))
        self.to_out = nnx.Dict({"0": Linear(inner, width, bias=out_bias, **settings)})
        self.heads, self.dropout_rate, self.implementation = heads, dropout_rate, compute.attention
        # `(q, mixed, pictures) -> mixed`: put here by adapters.
        self.processor: nnx.Module | None = None

    def __call__(
        self, x: jax.Array, context: jax.Array | Pictured | None = None, *, bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`bias [B or 1, N or 1, T or 1, S]` is added to the scores (`diffjax.nn.attend`)."""
        context, pictures = context if isinstance(context, Pictured) else (context, ())
        x = x if self.group_norm is None else self.group_norm(x)
        context = x if context is None else context
        given = (self.to_q, x), (self.to_k, context), (self.to_v, context)
        q, k, v = (split_heads(project(a), self.heads) for project, a in given)
        q = q if self.norm_q is None else self.norm_q(q)
        k = k if self.norm_k is None else self.norm_k(k)
        q, k, v = tap("q", q), tap("k", k), tap("v", v)
        mixed = attend(q, k, v, bias=bias, implementation=self.implementation)
        mixed = mixed if self.processor is None else self.processor(q, mixed, pictures)
        mixed = tap("mixed", mixed)
        out = self.to_out["0"](mixed.reshape(*mixed.shape[:2], -1))
        return tap("out", dropout(out, self.dropout_rate, key))

