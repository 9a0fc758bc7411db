"""Attention over two kinds of tokens that have projections of their own (Esser et al. 2024, arXiv:2403.03206)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn.attention import attend
from diffjax.nn.blocks.attention import QK_NORMS, split_heads
from diffjax.nn.linear import Linear
from diffjax.nn.stack import Compute
from diffjax.nn.taps import tap


class JointAttention(nnx.Module):
    """Attention over the tokens of an image `x [B, T, C]` and a text `context [B, L, C]` together.

    Args:
      width: C.
      heads, head_width: number of heads and channels of each.
      qk_norm: one of `QK_NORMS`.
      last: the text only lends keys and values, and no result of its own comes back.
      context_first: in which order they stand in a sequence.

    Activations: `q`, `k`, `v` and `mixed`, `[B, T + L, N, d]` (with `last`, `q` and `mixed` are `[B, T, N, d]`); `out`
    and `context_out`.
    """

    def __init__(
        self, width: int, heads: int, head_width: int, *, qk_norm: str | None = None, last: bool = False,
        context_first: bool = False, compute: Compute, rngs,
    ):  # fmt: skip
        linear = lambda: Linear(width, width, dtype=compute.dtype, rngs=rngs)
        norm = lambda: QK_NORMS[qk_norm](head_width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.norm_q, self.norm_k = norm(), norm()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
        self.norm_added_q, self.norm_added_k = norm(), norm()
        self.to_out = nnx.Dict({"0": linear()})
        self.to_add_out = None if last else linear()
        self.heads, self.context_first, self.implementation = heads, context_first, compute.attention

    def __call__(
        self, x: jax.Array, context: jax.Array, turn: Callable[[jax.Array], jax.Array] = lambda a: a
    ) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
        """What both receive, `[B, T, C]` and `[B, L, C]`; `turn` is applied to queries and keys `[B, T + L, N, d]`."""
        q = [project_heads(self.to_q, self.norm_q, x, self.heads)]
        if self.to_add_out is not None:
            q.append(project_heads(self.add_q_proj, self.norm_added_q, context, self.heads))
        k = [
            project_heads(self.to_k, self.norm_k, x, self.heads),
            project_heads(self.add_k_proj, self.norm_added_k, context, self.heads),
        ]
        v = [
            project_heads(self.to_v, None, x, self.heads),
            project_heads(self.add_v_proj, None, context, self.heads),
        ]
        order = slice(None, None, -1 if self.context_first else 1)
        q, k, v = (jnp.concatenate(parts[order], axis=1) for parts in (q, k, v))
        q, k, v = tap("q", turn(q)), tap("k", turn(k)), tap("v", v)
        mixed = tap("mixed", attend(q, k, v, implementation=self.implementation))
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        if self.to_add_out is None:
            return tap("out", self.to_out["0"](mixed)), None
        bounds = [context.shape[1] if self.context_first else x.shape[1]]
        mine, others = jnp.split(mixed, bounds, axis=1)[order]
        return tap("out", self.to_out["0"](mine)), tap("context_out", self.to_add_out(others))


def project_heads(project: Linear, norm: nnx.Module | None, x: jax.Array, heads: int) -> jax.Array:
    """Queries, keys or values `[B, T, heads, d]` of tokens `[B, T, C]`, normalised head by head if there is a norm."""
    out = split_heads(project(x), heads)
    return out if norm is None else norm(out)
