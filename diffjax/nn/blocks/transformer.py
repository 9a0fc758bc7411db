"""A transformer between layers of a U-Net: tokens are the pixels of a feature map."""

from __future__ import annotations

import jax
from flax import nnx

from diffjax.nn.blocks.attention import Attention, Pictured
from diffjax.nn.blocks.feedforward import FeedForward
from diffjax.nn.conv import Conv
from diffjax.nn.keys import fold_key, split_key
from diffjax.nn.linear import Linear
from diffjax.nn.norm import GroupNorm, LayerNorm
from diffjax.nn.stack import Compute, run_stack, stack
from diffjax.nn.taps import scope, tap


class TransformerBlock(nnx.Module):
    """Self-attention, attention to a context, and a perceptron, each behind a layer normalisation and added.

    Vaswani et al. 2017, arXiv:1706.03762, with the norms in front.

    Args:
      context_width: of the states that the second attention looks at; None for a block without one.
      only_cross: whether the first attention looks at the context as well, whatever is masked there.

    Activations: those of `Attention` under `attn1/` and `attn2/`, of `FeedForward` under `ff/`, `out [B, T, C]`.
    """

    def __init__(
        self, width: int, heads: int, head_width: int, *, context_width: int | None = None, only_cross: bool = False,
        compute: Compute, rngs,
    ):  # fmt: skip
        given = dict(compute=compute, rngs=rngs)
        self.norm1 = LayerNorm(width)
        first = context_width if only_cross else None
        self.attn1 = Attention(width, heads, head_width, context_width=first, **given)
        crossed = context_width is not None
        self.norm2 = LayerNorm(width) if crossed else None
        self.attn2 = Attention(width, heads, head_width, context_width=context_width, **given) if crossed else None
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width, **given)
        self.only_cross = only_cross

    def __call__(
        self, x: jax.Array, context: jax.Array | Pictured | None = None, *, bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`bias` is added to the scores of the context in the second attention (`diffjax.nn.attend`)."""
        keys = split_key(key, 3)
        with scope("attn1"):
            x = x + self.attn1(self.norm1(x), context if self.only_cross else None, key=keys[0])
        if self.attn2 is not None:
            with scope("attn2"):
                x = x + self.attn2(self.norm2(x), context, bias=bias, key=keys[1])
        with scope("ff"):
            return tap("out", x + self.ff(self.norm3(x), key=keys[2]))


class PixelTransformer(nnx.Module):
    """`x [B, H, W, C]` plus what a stack of `TransformerBlock` makes of its pixels (Rombach et al. 2022,
    arXiv:2112.10752).

    Args:
      linear: the maps in front and behind are `Linear`, not convolutions of one pixel: the same numbers under another
        shape.
    """

    def __init__(
        self, channels: int, heads: int, head_width: int, depth: int, *, context_width: int | None, groups: int,
        linear: bool, only_cross: bool = False, compute: Compute, rngs,
    ):  # fmt: skip
        width, settings = heads * head_width, dict(dtype=compute.dtype, rngs=rngs)
        self.norm = GroupNorm(channels, groups, eps=1e-6)
        maps = (Linear, Linear) if linear else (_pixelwise, _pixelwise)
        self.proj_in, self.proj_out = maps[0](channels, width, **settings), maps[1](width, channels, **settings)
        block = dict(context_width=context_width, only_cross=only_cross, compute=compute)
        self.transformer_blocks = stack(
            lambda rngs: TransformerBlock(width, heads, head_width, **block, rngs=rngs), 0, depth, rngs=rngs
        )
        self.compute = compute

    def __call__(
        self, x: jax.Array, context: jax.Array | Pictured | None = None, *, bias: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, C]` of `x`, `context [B, L, context_width]` and `bias [B, 1, 1, L]` of its scores."""
        shape = x.shape
        h = self.proj_in(self.norm(x))
        h = h.reshape(shape[0], -1, h.shape[-1])

        def body(block, h, i):
            with scope("transformer_blocks"):
                return block(h, context, bias=bias, key=fold_key(key, i)), None

        h, _ = run_stack(self.transformer_blocks, body, h, self.compute)
        h = self.proj_out(h.reshape(*shape[:3], -1))
        return tap("out", x + h)


def _pixelwise(channels_in, channels_out, **settings):
    return Conv(channels_in, channels_out, 1, **settings)
