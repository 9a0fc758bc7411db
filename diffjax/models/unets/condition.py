"""What a conditional U-Net or a ControlNet knows besides its image: time, text, labels, sizes, images.

The parts are attributes of the network itself, under the checkpoint's names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.nn import Compute, Conv, LayerNorm, Linear, attend, timestep_waves
from diffjax.nn.blocks import Embedding, Fourier, Projection
from diffjax.nn.blocks.attention import split_heads

PROJECTIONS = (None, "text_proj", "text_image_proj", "image_proj")
ADDITIONS = (None, "text", "text_image", "text_time", "image", "image_hint")
CLASSES = (None, "timestep", "identity", "projection", "simple_projection")
# Convolutions of a hint: channels and stride, an activation behind each but the last.
_HINT = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2), (4, 1))


class Given(NamedTuple):
    """The conditions of a call; what the network has no use for is None.

    Attributes:
      context: `[B, L, D]`, the states of a text.
      y: labels `[B]`, or what the class embedding takes instead.
      pooled: `[B, P]`, a text in one vector.
      time_ids: `[B, n]`, the sizes and crops of SDXL.
      image: `[B, D]`, an embedded image.
      hint: `[B, 8 H, 8 W, 3]`, a picture to follow.
      cond: `[B, time_cond_proj_dim]`, the embedded guidance of LCM.
    """

    context: jax.Array | None = None
    y: jax.Array | None = None
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None
    image: jax.Array | None = None
    hint: jax.Array | None = None
    cond: jax.Array | None = None


def temb_width(c: Any) -> int:
    """The width of the embedded time."""
    if c.time_embedding_dim:
        return c.time_embedding_dim
    return c.block_out_channels[0] * (2 if c.time_embedding_type == "fourier" else 4)


def parts(c: Any, *, compute: Compute, rngs) -> dict[str, nnx.Module | None]:
    """The modules that embed the conditions, by name."""
    given, width = dict(compute=compute, rngs=rngs), temb_width(c)
    fourier = c.time_embedding_type == "fourier"
    waves = width if fourier else c.block_out_channels[0]
    cross = c.cross_attention_dim
    return {
        "time_proj": Fourier(width // 2, log=False, cosines_first=c.flip_sin_to_cos, rngs=rngs) if fourier else None,
        "time_embedding": Projection(
            waves, width, activation=c.act_fn, post_activation=c.timestep_post_act, cond_width=c.time_cond_proj_dim,
            **given,
        ),
        "encoder_hid_proj": {
            None: lambda: None,
            "text_proj": lambda: Linear(c.encoder_hid_dim, cross, dtype=compute.dtype, rngs=rngs),
            "text_image_proj": lambda: TextImageTokens(c.encoder_hid_dim, cross, **given),
            "image_proj": lambda: ImageTokens(c.encoder_hid_dim, cross, **given),
        }[projection_of(c)](),
        "class_embedding": {
            None: lambda: None if c.num_class_embeds is None else Embedding(c.num_class_embeds, width, **given),
            "timestep": lambda: Projection(waves, width, activation=c.act_fn, **given),
            "identity": lambda: None,
            "projection": lambda: Projection(c.projection_class_embeddings_input_dim, width, **given),
            "simple_projection": lambda: Linear(
                c.projection_class_embeddings_input_dim, width, dtype=compute.dtype, rngs=rngs
            ),
        }[c.class_embed_type](),
        "add_embedding": {
            None: lambda: None,
            "text": lambda: TextPool(c.encoder_hid_dim or cross, width, c.addition_embed_type_num_heads, **given),
            "text_image": lambda: TextImageVector(cross, width, **given),
            "text_time": lambda: Projection(c.projection_class_embeddings_input_dim, width, **given),
            "image": lambda: ImageVector(c.encoder_hid_dim, width, hint=False, **given),
            "image_hint": lambda: ImageVector(c.encoder_hid_dim, width, hint=True, **given),
        }[c.addition_embed_type](),
    }  # fmt: skip


def projection_of(c: Any) -> str | None:
    """What is done to the context: older files give its width alone."""
    return "text_proj" if c.encoder_hid_dim_type is None and c.encoder_hid_dim else c.encoder_hid_dim_type


def check(kind: str, c: Any, given: Given) -> None:
    """Raises `ValueError` for a condition that the network needs and did not get."""
    image = projection_of(c) in ("text_image_proj", "image_proj") or c.addition_embed_type in (
        "text_image", "image", "image_hint",
    )  # fmt: skip
    needed = {
        "context": projection_of(c) != "image_proj",
        "y": c.class_embed_type is not None or c.num_class_embeds is not None,
        "pooled": c.addition_embed_type in ("text_time", "text_image"),
        "time_ids": c.addition_embed_type == "text_time",
        "image": image,
        "hint": c.addition_embed_type == "image_hint",
    }
    for name, wanted in needed.items():
        if wanted and getattr(given, name) is None:
            raise ValueError(f"{kind}: this network needs {name}; see its docstring for what that is")
    if given.cond is not None and c.time_cond_proj_dim is None:
        raise ValueError(f"{kind}: cond is given, but time_cond_proj_dim is null: the network has no use for it")


def embed(net: Any, c: Any, t: jax.Array, given: Given) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The embedded time `[B, C]`, the context `[B, L, D]` for the blocks, and the embedded hint."""
    temb = net.time_embedding(_waves(net, c, t), given.cond)
    y = _labels(net, c, given.y)
    if y is not None:
        temb = jnp.concatenate([temb, y.astype(temb.dtype)], -1) if c.class_embeddings_concat else temb + y
    temb, hint = _add(net, c, temb, given)
    return temb, _context(net, c, given), hint


def _waves(net, c, t):
    if net.time_proj is not None:
        return net.time_proj(t)
    return timestep_waves(t, c.block_out_channels[0], cosines_first=c.flip_sin_to_cos, shift=c.freq_shift)


def _labels(net, c, y):
    if c.class_embed_type == "identity":
        return y
    if net.class_embedding is None:
        return None
    return net.class_embedding(_waves(net, c, y) if c.class_embed_type == "timestep" else y)


def _add(net, c, temb, given):
    """The embedded time with the added vector, and the embedded hint."""
    kind, add = c.addition_embed_type, net.add_embedding
    if kind is None:
        return temb, None
    if kind == "text":
        return temb + add(given.context), None
    if kind == "text_image":
        return temb + add(given.pooled, given.image), None
    if kind == "text_time":
        sizes = timestep_waves(
            given.time_ids.reshape(-1), c.addition_time_embed_dim, cosines_first=c.flip_sin_to_cos, shift=c.freq_shift
        )
        sizes = sizes.reshape(len(temb), -1)
        return temb + add(jnp.concatenate([given.pooled.astype(sizes.dtype), sizes], -1)), None
    return temb + add(given.image), add.hint(given.hint) if kind == "image_hint" else None


def _context(net, c, given):
    kind = projection_of(c)
    if kind is None:
        return given.context
    if kind == "text_proj":
        return net.encoder_hid_proj(given.context)
    if kind == "image_proj":
        return net.encoder_hid_proj(given.image)
    return net.encoder_hid_proj(given.context, given.image)


class ImageTokens(nnx.Module):
    """An embedded image as 32 tokens (Kandinsky 2.2)."""

    def __init__(self, width_in: int, width: int, *, count: int = 32, compute: Compute, rngs):
        self.image_embeds = Linear(width_in, count * width, dtype=compute.dtype, rngs=rngs)
        self.norm, self.count = LayerNorm(width), count

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.norm(self.image_embeds(image).reshape(len(image), self.count, -1))


class TextImageTokens(nnx.Module):
    """An embedded image as 10 tokens, before those of a text (Kandinsky 2.1)."""

    def __init__(self, width_in: int, width: int, *, count: int = 10, compute: Compute, rngs):
        self.image_embeds = Linear(width, count * width, dtype=compute.dtype, rngs=rngs)
        self.text_proj, self.count = Linear(width_in, width, dtype=compute.dtype, rngs=rngs), count

    def __call__(self, context: jax.Array, image: jax.Array) -> jax.Array:
        tokens = self.image_embeds(image).reshape(len(image), self.count, -1)
        return jnp.concatenate([tokens, self.text_proj(context)], 1)


class TextImageVector(nnx.Module):
    """The sum of an embedded text and image (Kandinsky 2.1)."""

    def __init__(self, width_in: int, width: int, *, compute: Compute, rngs):
        settings = dict(dtype=compute.dtype, rngs=rngs)
        self.text_proj, self.text_norm = Linear(width_in, width, **settings), LayerNorm(width)
        self.image_proj = Linear(width_in, width, **settings)

    def __call__(self, pooled: jax.Array, image: jax.Array) -> jax.Array:
        return self.image_proj(image) + self.text_norm(self.text_proj(pooled))


class ImageVector(nnx.Module):
    """An embedded image (Kandinsky 2.2), and a hint at an eighth of its height and width."""

    def __init__(self, width_in: int, width: int, *, hint: bool, compute: Compute, rngs):
        settings = dict(dtype=compute.dtype, rngs=rngs)
        self.image_proj, self.image_norm = Linear(width_in, width, **settings), LayerNorm(width)
        before = (3, *(channels for channels, _ in _HINT))
        layers = {
            str(2 * i): Conv(before[i], channels, stride=stride, padding=1, **settings)
            for i, (channels, stride) in enumerate(_HINT)
        }
        self.input_hint_block = nnx.Dict(layers) if hint else None

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.image_norm(self.image_proj(image))

    def hint(self, x: jax.Array) -> jax.Array:
        for i in range(len(_HINT)):
            x = self.input_hint_block[str(2 * i)](x if i == 0 else nnx.silu(x))
        return x


class TextPool(nnx.Module):
    """A text in one vector, by attention of its mean to its states (DeepFloyd IF)."""

    def __init__(self, width_in: int, width: int, heads: int, *, compute: Compute, rngs):
        self.norm1 = LayerNorm(width_in)
        self.pool = AttentionPool(width_in, heads, compute=compute, rngs=rngs)
        self.proj, self.norm2 = Linear(width_in, width, dtype=compute.dtype, rngs=rngs), LayerNorm(width)

    def __call__(self, context: jax.Array) -> jax.Array:
        return self.norm2(self.proj(self.pool(self.norm1(context))))


class AttentionPool(nnx.Module):
    """Attention of one query, the mean of the states plus a learned vector, to itself and the states."""

    def __init__(self, width: int, heads: int, *, compute: Compute, rngs):
        settings = dict(dtype=compute.dtype, rngs=rngs)
        init = nnx.initializers.normal(width**-0.5)
        self.positional_embedding = nnx.Param(init(rngs.params(), (1, width), jnp.float32))
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, **settings) for _ in range(3))
        self.heads, self.implementation = heads, compute.attention

    def __call__(self, x: jax.Array) -> jax.Array:
        query = x.mean(1, keepdims=True) + self.positional_embedding[...].astype(x.dtype)
        x = jnp.concatenate([query, x], 1)
        given = (self.q_proj, query), (self.k_proj, x), (self.v_proj, x)
        q, k, v = (split_heads(project(a), self.heads) for project, a in given)
        return attend(q, k, v, implementation=self.implementation).reshape(len(x), -1)
