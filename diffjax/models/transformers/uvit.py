"""U-ViT: time, label and text are tokens beside the patches, and long skips join the first blocks with the last.

Bao et al. 2023, "All are Worth Words: A ViT Backbone for Diffusion Models", arXiv:2209.12152. Parameters have the names
of the published checkpoints (baofff/U-ViT).
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
    Conv,
    LayerNorm,
    Linear,
    attend,
    plus,
    remat,
    run_stack,
    scope,
    stack,
    tap,
    timestep_waves,
    widen,
)
from diffjax.nn.blocks import Embedding, PatchEmbed
from diffjax.nn.linear import ACTIVATIONS

KIND = "UViT"
# Queries, keys and values are split by heads, which no split of their kernel's flat columns is: it lies split by rows.
RULES = (
    (r"^(in|out)_blocks/.*/qkv/kernel$", (None, ("tensor", "fsdp"), None)),
    (r"^(in|out)_blocks/.*/(fc1|skip_linear)/kernel$", (None, "fsdp", "tensor")),
    (r"^(in|out)_blocks/.*/(proj|fc2)/kernel$", (None, "tensor", "fsdp")),
    (r"^(in|out)_blocks/.*/fc1/bias$", (None, "tensor")),
    (r"^mid_block/attn/qkv/kernel$", (("tensor", "fsdp"), None)),
    (r"^(mid_block/mlp/fc1|time_embed/0)/kernel$", ("fsdp", "tensor")),
    (r"^(mid_block/(attn/proj|mlp/fc2)|time_embed/2)/kernel$", ("tensor", "fsdp")),
    (r"^patch_embed/proj/kernel$", (None, None, None, "fsdp")),
    (r"^(context_embed/kernel|label_emb/embedding)$", (None, "fsdp")),
    (r"^decoder_pred/kernel$", ("fsdp", None)),
    (r"^final_layer/kernel$", ()),
    (r"^pos_embed$", (None, None, "fsdp")),
    (r"(^|/)(bias|scale)$", ()),
)
_normal = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of the published `UViT`, with its defaults; those of text are of its variant for text to image."""

    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    qk_scale: float | None = None
    mlp_time_embed: bool = False
    num_classes: int = -1
    use_checkpoint: bool = False  # of nothing: `remat` tells what is kept for the backward pass
    conv: bool = True
    skip: bool = True
    clip_dim: int | None = None
    num_clip_token: int = 77


class Attention(nnx.Module):
    """Self-attention of tokens `[B, T, C]`. Activations: `q`, `k`, `v` and `mixed`, `[B, T, heads, C / heads]`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given = dict(kernel_init=_normal, dtype=compute.dtype, rngs=rngs)
        self.qkv = Linear(c.embed_dim, 3 * c.embed_dim, bias=c.qkv_bias, **given)
        self.proj = Linear(c.embed_dim, c.embed_dim, **given)
        self.heads, self.implementation = c.num_heads, compute.attention

    def __call__(self, x: jax.Array) -> jax.Array:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = (tap(name, qkv[:, :, i]) for i, name in enumerate("qkv"))
        mixed = tap("mixed", attend(q, k, v, implementation=self.implementation))
        return tap("out", self.proj(mixed.reshape(x.shape)))


class Mlp(nnx.Module):
    """Two linear maps with a GELU between them."""

    def __init__(self, width: int, hidden: int, *, compute: Compute, rngs):
        given = dict(kernel_init=_normal, dtype=compute.dtype, rngs=rngs)
        self.fc1, self.fc2 = Linear(width, hidden, **given), Linear(hidden, width, **given)

    def __call__(self, x: jax.Array) -> jax.Array:
        return tap("out", self.fc2(tap("hidden", ACTIVATIONS["gelu"](self.fc1(x)))))


class Block(nnx.Module):
    """Attention and a perceptron, each behind a norm; with `skip` an earlier block's tokens are joined in front."""

    def __init__(self, c: Settings, *, skip: bool = False, compute: Compute, rngs):
        width = c.embed_dim
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attn = Attention(c, compute=compute, rngs=rngs)
        self.mlp = Mlp(width, int(width * c.mlp_ratio), compute=compute, rngs=rngs)
        given = dict(kernel_init=_normal, dtype=compute.dtype, rngs=rngs)
        self.skip_linear = Linear(2 * width, width, **given) if skip else None

    def __call__(self, x: jax.Array, skip: jax.Array | None = None) -> jax.Array:
        if self.skip_linear is not None:
            x = self.skip_linear(jnp.concatenate([x, skip], axis=-1))
        with scope("attn"):
            x = x + self.attn(self.norm1(x))
        with scope("mlp"):
            return tap("out", x + self.mlp(self.norm2(x)))


class UViT(nnx.Module):
    """The module of `uvit`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.embed_dim, dict(compute=compute, rngs=rngs)
        linear = lambda a, b: Linear(a, b, kernel_init=_normal, dtype=compute.dtype, rngs=rngs)
        self.patch_embed = PatchEmbed(c.in_chans, width, c.patch_size, **given)
        time = lambda: nnx.Dict({"0": linear(width, 4 * width), "2": linear(4 * width, width)})
        self.time_embed = time() if c.mlp_time_embed else None
        self.label_emb = Embedding(c.num_classes, width, **given) if c.num_classes > 0 else None
        self.context_embed = linear(c.clip_dim, width) if c.clip_dim else None
        self.extras = 1 + (c.num_classes > 0) + (c.num_clip_token if c.clip_dim else 0)
        length = self.extras + (c.img_size // c.patch_size) ** 2
        self.pos_embed = nnx.Param(_normal(rngs.params(), (1, length, width), jnp.float32))
        self.in_blocks = stack(lambda rngs: Block(c, compute=compute, rngs=rngs), 0, c.depth // 2, rngs=rngs)
        self.mid_block = Block(c, **given)
        self.out_blocks = stack(
            lambda rngs: Block(c, skip=c.skip, compute=compute, rngs=rngs), 0, c.depth // 2, rngs=rngs
        )
        self.norm = LayerNorm(width)
        self.decoder_pred = linear(width, c.patch_size**2 * c.in_chans)
        self.final_layer = Conv(c.in_chans, c.in_chans, dtype=compute.dtype, rngs=rngs) if c.conv else None
        self.c, self.compute = c, compute

    def __call__(self, x, t, y=None, *, context=None, key=None):
        c = self.c
        settings.expect(KIND, "x", x, None, c.img_size, c.img_size, c.in_chans)
        h = jnp.concatenate([*self._extras(x, t, y, context), self.patch_embed(x)], axis=1)
        h = tap("tokens", plus(h, self.pos_embed[...]))

        def inward(block, h, i):
            with scope("in_blocks"):
                h = block(h)
            return h, h

        def outward(given, h, i):
            block, skip = given
            with scope("out_blocks"):
                return block(h, skip), None

        h, skips = run_stack(self.in_blocks, inward, h, self.compute)
        with scope("mid_block"):
            h = remat(Block.__call__, self.compute.remat)(self.mid_block, h)
        # The last of the first blocks is joined with the first of the last.
        joined = {name: (blocks, skips[::-1]) for name, blocks in self.out_blocks.items()}
        h, _ = run_stack(joined, outward, h, self.compute)
        out = self.decoder_pred(self.norm(h))[:, self.extras :]
        out = unpatchify(out, c.patch_size, (c.img_size, c.img_size, c.in_chans))
        return widen(out if self.final_layer is None else self.final_layer(out))

    def _extras(self, x, t, y, context):
        """The tokens in front of the patches: label, time, text, those that there are."""
        for name, given, wanted in (("y", y, self.label_emb), ("context", context, self.context_embed)):
            if (given is None) != (wanted is None):
                told = "needs" if given is None else "does not take"
                raise ValueError(f"{KIND}: this network {told} {name}; see num_classes and clip_dim among its settings")
        time = timestep_waves(settings.times_of(KIND, t, x), self.c.embed_dim).astype(self.compute.dtype)
        if self.time_embed is not None:
            time = self.time_embed["2"](nnx.silu(self.time_embed["0"](time)))
        parts = [time[:, None]]
        if y is not None:
            parts.insert(0, self.label_emb(jnp.broadcast_to(jnp.asarray(y), (len(x),)))[:, None])
        if context is not None:
            settings.expect(KIND, "context", context, len(x), self.c.num_clip_token, self.c.clip_dim)
            parts.append(self.context_embed(context))
        return parts


def uvit(config: Mapping[str, Any], **how) -> Model:
    """U-ViT (arXiv:2209.12152) by the arguments of its published class, with `_class_name` "UViT".

    Args:
      config: see `Settings`; with `clip_dim` the network for text to image.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, img_size, img_size, in_chans], t [B], y [B] int or None, *, context
      [B, num_clip_token, clip_dim] or None, key=None)`, x's shape, float32. Times are those of 1000 steps, fractions
      too. With `num_classes` above 0 it needs `y`; a network for classifier-free guidance has a class more, its last.
      There is no dropout that a key could turn on. Parameters start as published, apart from the table of labels, which
      starts as small as the rest.

    Raises:
      ValueError: for settings that are unknown, not supported or do not fit each other.
    """
    c = settings.read(KIND, Settings, config)
    settings.only(KIND, c, qk_scale=(None,))
    check_divides(KIND, "patch_size", c.patch_size, "img_size", c.img_size)
    check_divides(KIND, "num_heads", c.num_heads, "embed_dim", c.embed_dim)
    make = lambda compute, rngs: UViT(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
