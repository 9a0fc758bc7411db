"""DiT as diffusers stores it, `DiTTransformer2DModel`: every block embeds the time and the label by itself.

Peebles & Xie 2023, "Scalable Diffusion Models with Transformers", arXiv:2212.09748. `diffjax.models.dit` is the same
network with one embedding for all blocks, as the paper has it.
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
from diffjax.models.checks import check_divides
from diffjax.models.dit import unpatchify
from diffjax.nn import (
    Compute,
    LayerNorm,
    Linear,
    fold_key,
    layer_norm,
    modulate,
    run_stack,
    scope,
    split_key,
    stack,
    tap,
    times,
    widen,
)
from diffjax.nn.blocks import FEEDFORWARDS, Attention, FeedForward, PatchEmbed, TimestepLabelEmbedding, grid_positions

KIND = "DiTTransformer2DModel"
RULES = (
    (r"^transformer_blocks/.*/(to_[qkv]|proj|linear|linear_1)/kernel$", (None, "fsdp", "tensor")),
    (r"^transformer_blocks/.*/(to_out/0|net/2|linear_2)/kernel$", (None, "tensor", "fsdp")),
    (r"/embedding_table/embedding$", (None, None, "fsdp")),
    (r"^proj_out_1/kernel$", ("fsdp", "tensor")),
    (r"^proj_out_2/kernel$", ("tensor", "fsdp")),
    (r"^pos_embed/proj/kernel$", (None, None, None, "fsdp")),
    (r"/(to_[qkv]|net/0/proj)/bias$", (None, "tensor")),
    (r"(^|/)(bias|scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `DiTTransformer2DModel`, with its defaults."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = None
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32  # of nothing: a relic in the files
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int = 1000
    upcast_attention: bool = False
    norm_type: str = "ada_norm_zero"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-5


class AdaLayerNormZero(nnx.Module):
    """Shift, scale and gate for both branches of a block, from the embedded time and label."""

    def __init__(self, num_classes: int, width: int, *, compute: Compute, rngs):
        self.emb = TimestepLabelEmbedding(num_classes, width, compute=compute, rngs=rngs)
        self.linear = Linear(width, 6 * width, dtype=compute.dtype, rngs=rngs)

    def __call__(self, t: jax.Array, y: jax.Array) -> list[jax.Array]:
        return jnp.split(tap("modulation", self.linear(nnx.silu(self.emb(t, y)))), 6, axis=-1)


class Block(nnx.Module):
    """Attention and a perceptron, each modulated and gated."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width = c.num_attention_heads * c.attention_head_dim
        given = dict(compute=compute, rngs=rngs)
        self.norm1 = AdaLayerNormZero(c.num_embeds_ada_norm, width, **given)
        self.attn1 = Attention(
            width, c.num_attention_heads, c.attention_head_dim, bias=c.attention_bias, dropout_rate=c.dropout, **given
        )
        self.norm3 = LayerNorm(width, eps=c.norm_eps, scale=c.norm_elementwise_affine)
        self.ff = FeedForward(width, activation=c.activation_fn, dropout_rate=c.dropout, **given)

    def __call__(self, x, t, y, key):
        keys = split_key(key)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(t, y)
        with scope("attn1"):
            h = self.attn1(modulate(layer_norm(x, eps=1e-6), shift, scale), key=keys[0])
        x = x + times(h, gate[:, None])
        with scope("ff"):
            h = self.ff(modulate(self.norm3(x), shift_mlp, scale_mlp), key=keys[1])
        return tap("out", x + times(h, gate_mlp[:, None]))


class DiTTransformer(nnx.Module):
    """The module of `dit_transformer`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width = c.num_attention_heads * c.attention_head_dim
        self.pos_embed = PatchEmbed(c.in_channels, width, c.patch_size, compute=compute, rngs=rngs)
        self.transformer_blocks = stack(lambda rngs: Block(c, compute=compute, rngs=rngs), 0, c.num_layers, rngs=rngs)
        self.proj_out_1 = Linear(width, 2 * width, dtype=compute.dtype, rngs=rngs)
        self.proj_out_2 = Linear(width, c.patch_size**2 * settings.channels_out(c), dtype=compute.dtype, rngs=rngs)
        self.c, self.width, self.compute = c, width, compute

    def __call__(
        self, x: jax.Array, t: jax.Array, y: jax.Array, *, key: jax.Array | None = None
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, out_channels] float32`; `dit_transformer` tells what the arguments are."""
        c, compute = self.c, self.compute
        settings.expect(KIND, "x", x, None, None, None, c.in_channels)
        check_divides(KIND, "patch_size", c.patch_size, "the sides of x,", *x.shape[1:3])
        if y is None:
            raise ValueError(f"{KIND}: this network needs y; the label {c.num_embeds_ada_norm} is no class")
        settings.expect(KIND, "y", y, len(x))
        t = settings.times_of(KIND, t, x)
        height, breadth = (n // c.patch_size for n in x.shape[1:3])
        positions = grid_positions(self.width, height, breadth, base=c.sample_size // c.patch_size)
        h = self.pos_embed(x)
        h = tap("tokens", h + jnp.asarray(positions.reshape(-1, self.width), h.dtype))

        def body(block, h, i):
            with scope("transformer_blocks"):
                return block(h, t, y, fold_key(key, i)), None

        h, _ = run_stack(self.transformer_blocks, body, h, compute)
        # The first block's embedding serves the last modulation.
        first = jax.tree.map(lambda a: a[0], next(iter(self.transformer_blocks.values())).norm1.emb)
        shift, scale = jnp.split(self.proj_out_1(nnx.silu(first(t, y))), 2, axis=-1)
        out = self.proj_out_2(modulate(layer_norm(h, eps=1e-6), shift, scale))
        return widen(unpatchify(out, c.patch_size, (*x.shape[1:3], settings.channels_out(c))))


def dit_transformer(config: Mapping[str, Any], **how) -> Model:
    """`DiTTransformer2DModel` (DiT, arXiv:2212.09748) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels], t [B], y [B] int, *, key=None)`, `[B, H, W, out_channels]
      float32`. Times are those of 1000 steps; the label `num_embeds_ada_norm` is no class; a key turns dropout on.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    settings.only(KIND, c, norm_type=("ada_norm_zero",), activation_fn=tuple(FEEDFORWARDS))
    make = lambda compute, rngs: DiTTransformer(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
