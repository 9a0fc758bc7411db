"""The prior of unCLIP: from the embedding of a text to that of an image, by diffusion.

Ramesh et al. 2022, "Hierarchical Text-Conditional Image Generation with CLIP Latents", arXiv:2204.06125, as diffusers
stores those of Karlo, Kandinsky and, with many tokens for one vector, Shap-E (arXiv:2305.02463).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.nn import (
    Compute,
    LayerNorm,
    Linear,
    fold_key,
    plus,
    run_stack,
    scope,
    split_key,
    stack,
    tap,
    timestep_waves,
    widen,
)
from diffjax.nn.blocks import MASKED, Attention, FeedForward, Projection, mask_bias

KIND = "PriorTransformer"
RULES = (
    (r"^transformer_blocks/.*/(to_[qkv]|proj)/kernel$", (None, "fsdp", "tensor")),
    (r"^transformer_blocks/.*/(to_out/0|net/2)/kernel$", (None, "tensor", "fsdp")),
    (r"^transformer_blocks/.*/(to_[qkv]|proj)/bias$", (None, "tensor")),
    (r"^time_embedding/linear_1/kernel$", ("fsdp", "tensor")),
    (r"^time_embedding/linear_2/kernel$", ("tensor", "fsdp")),
    (r"^(proj_in|embedding_proj|encoder_hidden_states_proj)/kernel$", (None, "fsdp")),
    (r"^proj_to_clip_embeddings/kernel$", ("fsdp", None)),
    (r"^(positional|prd)_embedding$", (None, None, "fsdp")),
    (r"^clip_(mean|std)$", ()),
    (r"(^|/)(bias|scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `PriorTransformer`, with its defaults."""

    num_attention_heads: int = 32
    attention_head_dim: int = 64
    num_layers: int = 20
    embedding_dim: int = 768
    num_embeddings: int = 77
    additional_embeddings: int = 4
    dropout: float = 0.0
    time_embed_act_fn: str = "silu"
    norm_in_type: str | None = None
    embedding_proj_norm_type: str | None = None
    encoder_hid_proj_type: str | None = "linear"
    added_emb_type: str | None = "prd"
    time_embed_dim: int | None = None
    embedding_proj_dim: int | None = None
    clip_embed_dim: int | None = None


class Block(nnx.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float, *, compute: Compute, rngs):
        given = dict(dropout_rate=dropout, compute=compute, rngs=rngs)
        self.norm1, self.norm3 = LayerNorm(width), LayerNorm(width)
        self.attn1 = Attention(width, heads, head_width, bias=True, **given)
        self.ff = FeedForward(width, activation="gelu", **given)

    def __call__(self, x: jax.Array, bias: jax.Array | None, key: jax.Array | None) -> jax.Array:
        keys = split_key(key)
        with scope("attn1"):
            x = x + self.attn1(self.norm1(x), bias=bias, key=keys[0])
        with scope("ff"):
            return tap("out", x + self.ff(self.norm3(x), key=keys[1]))


class Prior(nnx.Module):
    """The module of `prior_transformer`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width = c.num_attention_heads * c.attention_head_dim
        linear = lambda a, b: Linear(a, b, dtype=compute.dtype, rngs=rngs)
        pooled, out = c.embedding_proj_dim or c.embedding_dim, c.clip_embed_dim or c.embedding_dim
        self.time_embedding = Projection(
            width, c.time_embed_dim or width, out_width=width, activation=c.time_embed_act_fn, compute=compute,
            rngs=rngs,
        )
        self.proj_in = linear(c.embedding_dim, width)
        self.embedding_proj_norm = LayerNorm(pooled) if c.embedding_proj_norm_type else None
        self.embedding_proj = linear(pooled, width)
        self.encoder_hidden_states_proj = linear(c.embedding_dim, width) if c.encoder_hid_proj_type else None
        zeros = lambda *shape: nnx.Param(jnp.zeros(shape, jnp.float32))
        self.positional_embedding = zeros(1, c.num_embeddings + c.additional_embeddings, width)
        self.prd_embedding = zeros(1, 1, width) if c.added_emb_type else None
        sizes = (width, c.num_attention_heads, c.attention_head_dim, c.dropout)
        make = lambda rngs: Block(*sizes, compute=compute, rngs=rngs)
        self.transformer_blocks = stack(make, 0, c.num_layers, rngs=rngs)
        self.norm_in = LayerNorm(width) if c.norm_in_type else None
        self.norm_out = LayerNorm(width)
        self.proj_to_clip_embeddings = linear(width, out)
        self.clip_mean, self.clip_std = zeros(1, out), zeros(1, out)
        self.c, self.width, self.pooled_width, self.compute = c, width, pooled, compute

    def __call__(self, x, t, pooled, context=None, *, mask=None, key=None):
        t, x, pooled = self._checked(x, t, pooled, context)
        seen = 0 if context is None else context.shape[1]
        h = tap("tokens", self._tokens(x, t, pooled, context))
        first = seen + pooled.shape[1] + 1  # the first of x
        h = self._placed(h, first)
        h = h if self.norm_in is None else self.norm_in(h)
        bias = None if mask is None else self._bias(mask, seen, *h.shape[:2])

        def body(block, h, i):
            with scope("transformer_blocks"):
                return block(h, bias, fold_key(key, i)), None

        h, _ = run_stack(self.transformer_blocks, body, h, self.compute)
        h = self.norm_out(h)
        h = h[:, first:] if self.prd_embedding is None else h[:, -1]
        return widen(self.proj_to_clip_embeddings(h))

    def unscale(self, x: jax.Array) -> jax.Array:
        """Embeddings of CLIP from those that are denoised, whose mean is 0 and whose deviation is 1."""
        return widen(x) * self.clip_std[...] + self.clip_mean[...]

    def _checked(self, x, t, pooled, context):
        """`t [B]`, `x` and `pooled` with an axis of tokens."""
        x, pooled = (a[:, None] if jnp.ndim(a) == 2 else a for a in (x, pooled))
        settings.expect(KIND, "x", x, None, None, self.c.embedding_dim)
        settings.expect(KIND, "pooled", pooled, len(x), None, self.pooled_width)
        if self.c.encoder_hid_proj_type and context is None:
            raise ValueError(f"{KIND}: it needs context, the states of a text (encoder_hid_proj_type='linear')")
        if context is not None:
            width = self.c.embedding_dim if self.c.encoder_hid_proj_type else self.width
            settings.expect(KIND, "context", context, len(x), None, width)
        return settings.times_of(KIND, t, x), x, pooled

    def _tokens(self, x, t, pooled, context):
        """Text, its pooled vector, the time, the noisy embedding, and a place for the answer: `[B, T, width]`."""
        dtype = self.compute.dtype
        pooled = pooled if self.embedding_proj_norm is None else self.embedding_proj_norm(pooled)
        time = self.time_embedding(timestep_waves(t, self.width))
        parts = [self.embedding_proj(pooled), time[:, None], self.proj_in(x)]
        if context is not None:
            project = self.encoder_hidden_states_proj
            parts = [context.astype(dtype) if project is None else project(context), *parts]
        if self.prd_embedding is not None:
            answer = self.prd_embedding[...].astype(dtype)
            parts.append(jnp.broadcast_to(answer, (len(x), *answer.shape[1:])))
        return jnp.concatenate(parts, axis=1)

    def _placed(self, h, first):
        """`h` with positions; a table that is too short holds those of x alone."""
        table = self.positional_embedding[...]
        behind = 0 if self.prd_embedding is None else 1
        if table.shape[1] < h.shape[1]:
            table = jnp.pad(table, ((0, 0), (first, behind), (0, 0)))
        if table.shape[1] != h.shape[1]:
            raise ValueError(
                f"{KIND}: {h.shape[1]} tokens of text, time and embeddings, but there are positions for "
                f"{self.c.num_embeddings} + {self.c.additional_embeddings}"
            )
        return plus(h, table)

    def _bias(self, mask, seen, batch, length):
        """What is added to the scores, `[B, 1, T, T]`: text that is padding, and what comes later, is not seen."""
        settings.expect(KIND, "mask", mask, batch, seen)
        if seen + self.c.additional_embeddings != length:
            raise ValueError(
                f"{KIND}: with a mask there must be {self.c.additional_embeddings} tokens besides those of the text, "
                f"not {length - seen}"
            )
        padding = jnp.pad(mask_bias(mask), ((0, 0), (0, 0), (0, 0), (0, length - seen)))
        return padding + np.triu(np.full((length, length), MASKED, np.float32), 1)


def prior_transformer(config: Mapping[str, Any], **how) -> Model:
    """`PriorTransformer` (unCLIP, arXiv:2204.06125) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x, t [B], pooled, context=None, *, mask=None, key=None)`. `x [B, embedding_dim]` is the
      noisy embedding of an image, or `[B, N, embedding_dim]`; `pooled [B, embedding_proj_dim]` that of the text, and
      `context [B, num_embeddings, embedding_dim]` its states, of which `mask [B, num_embeddings]` tells those to be
      seen (1). With a mask attention is causal as well, without one it is not. Returns
      `[B, clip_embed_dim] float32`, or `[B, N, clip_embed_dim]` if `added_emb_type` is None. Times are those of 1000
      steps; a key turns dropout on.
      `apply(params, x, method="unscale")` brings what was sampled to the scale of CLIP.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    layer = (None, "layer")
    settings.only(
        KIND, c, norm_in_type=layer, embedding_proj_norm_type=layer, encoder_hid_proj_type=("linear", None),
        added_emb_type=("prd", None), time_embed_act_fn=("silu", "swish", "mish", "gelu", "relu"),
    )  # fmt: skip
    make = lambda compute, rngs: Prior(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
