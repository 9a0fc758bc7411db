"""What a conditional U-Net or a ControlNet knows besides its image: time, text, labels, sizes, images.

The parts are attributes of the network itself, under the checkpoint's names.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from diffjax.models import settings
from diffjax.models.checks import check_divides, check_least
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


class Embedders(Protocol):
    """What a network holds for its conditions, under the checkpoint's names; None for what it has not."""

    time_proj: nnx.Module | None
    time_embedding: nnx.Module
    encoder_hid_proj: nnx.Module | None
    class_embedding: nnx.Module | None
    add_embedding: nnx.Module | None


def time_proj(c: Any, *, rngs) -> Fourier | None:
    """Waves of the time that the checkpoint holds; None for those that are always the same."""
    if c.time_embedding_type != "fourier":
        return None
    return Fourier(temb_width(c) // 2, log=False, cosines_first=c.flip_sin_to_cos, rngs=rngs)


def time_embedding(c: Any, *, compute: Compute, rngs) -> Projection:
    """What is made of the waves of a time."""
    return Projection(
        _wave_count(c), temb_width(c), activation=c.act_fn, post_activation=c.timestep_post_act,
        cond_width=c.time_cond_proj_dim, compute=compute, rngs=rngs,
    )  # fmt: skip


def _wave_count(c: Any) -> int:
    return temb_width(c) if c.time_embedding_type == "fourier" else c.block_out_channels[0]


def encoder_hid_proj(c: Any, *, compute: Compute, rngs) -> nnx.Module | None:
    """What makes the context that the blocks look at."""
    kind = projection_of(c)
    if kind is None:
        return None
    if kind == "text_proj":
        return Linear(c.encoder_hid_dim, c.cross_attention_dim, dtype=compute.dtype, rngs=rngs)
    tokens = TextImageTokens if kind == "text_image_proj" else ImageTokens
    return tokens(c.encoder_hid_dim, c.cross_attention_dim, compute=compute, rngs=rngs)


def class_embedding(c: Any, *, activation: str | None = None, compute: Compute, rngs) -> nnx.Module | None:
    """What is made of labels, or of what stands in their place; `activation` of a time among these, by default that of
    the network's own time."""
    kind, width, given = c.class_embed_type, temb_width(c), dict(compute=compute, rngs=rngs)
    if kind is None and c.num_class_embeds is not None:
        return Embedding(c.num_class_embeds, width, **given)
    if kind == "timestep":
        return Projection(_wave_count(c), width, activation=activation or c.act_fn, **given)
    if kind == "projection":
        return Projection(c.projection_class_embeddings_input_dim, width, **given)
    if kind == "simple_projection":
        return Linear(c.projection_class_embeddings_input_dim, width, dtype=compute.dtype, rngs=rngs)
    return None


def add_embedding(c: Any, *, compute: Compute, rngs) -> nnx.Module | None:
    """What is added to the embedded time besides the labels."""
    kind, width, given = c.addition_embed_type, temb_width(c), dict(compute=compute, rngs=rngs)
    if kind == "text":
        return TextPool(c.encoder_hid_dim or c.cross_attention_dim, width, c.addition_embed_type_num_heads, **given)
    if kind == "text_image":
        return TextImageVector(c.cross_attention_dim, width, **given)
    if kind == "text_time":
        return Projection(c.projection_class_embeddings_input_dim, width, **given)
    if kind in ("image", "image_hint"):
        return ImageVector(c.encoder_hid_dim, width, hint=kind == "image_hint", **given)
    return None


def projection_of(c: Any) -> str | None:
    """What is done to the context: older files give its width alone."""
    return "text_proj" if c.encoder_hid_dim_type is None and c.encoder_hid_dim else c.encoder_hid_dim_type


def check_settings(kind: str, c: Any) -> None:
    """Raises `ValueError` for settings that embed no conditions."""
    settings.only(
        kind, c, encoder_hid_dim_type=PROJECTIONS, addition_embed_type=ADDITIONS, class_embed_type=CLASSES,
        time_embedding_type=("positional", "fourier"),
    )  # fmt: skip
    added, projection = c.addition_embed_type, projection_of(c)
    if c.time_embedding_dim is not None:
        check_least(kind, 1, time_embedding_dim=c.time_embedding_dim)
    if c.time_embedding_type == "fourier" and temb_width(c) % 2:
        raise ValueError(f"{kind}: time_embedding_dim={temb_width(c)}: 'fourier' needs an even number")
    if (projection or added in ("image", "image_hint")) and c.encoder_hid_dim is None:
        told = f"encoder_hid_dim_type={projection!r}" if projection else f"addition_embed_type={added!r}"
        raise ValueError(f"{kind}: {told} needs encoder_hid_dim")
    if (projection or added in ("text", "text_image")) and not isinstance(c.cross_attention_dim, int):
        raise ValueError(f"{kind}: cross_attention_dim={c.cross_attention_dim!r}: one number is needed to project to")
    if added == "text":
        heads, width = c.addition_embed_type_num_heads, c.encoder_hid_dim or c.cross_attention_dim
        check_divides(kind, "addition_embed_type_num_heads", heads, "the channels of the text,", width)
    projected = c.class_embed_type in ("projection", "simple_projection") or added == "text_time"
    if projected and c.projection_class_embeddings_input_dim is None:
        raise ValueError(f"{kind}: projection_class_embeddings_input_dim is missing; the embeddings are made by it")
    if added == "text_time" and c.addition_time_embed_dim is None:
        raise ValueError(f"{kind}: addition_embed_type='text_time' needs addition_time_embed_dim")


def check(kind: str, c: Any, x: jax.Array, given: Given) -> None:
    """Raises `ValueError` for a condition that the network needs and did not get, that it has no use for, or whose
    shape is not the one that `x [B, H, W, C]` and the settings ask for."""
    added, projection = c.addition_embed_type, projection_of(c)
    image = projection in ("text_image_proj", "image_proj") or added in ("text_image", "image", "image_hint")
    labelled = c.class_embed_type is not None or c.num_class_embeds is not None
    used = {
        "context": (projection != "image_proj" or added == "text", "encoder_hid_dim_type"),
        "y": (labelled, "class_embed_type num_class_embeds"),
        "pooled": (added in ("text_time", "text_image"), "addition_embed_type"),
        "time_ids": (added == "text_time", "addition_embed_type"),
        "image": (image, "encoder_hid_dim_type addition_embed_type"),
        "hint": (added == "image_hint", "addition_embed_type"),
        "cond": (c.time_cond_proj_dim is not None, "time_cond_proj_dim"),
    }
    shapes = _shapes(c, x)
    for name, (wanted, names) in used.items():
        value = getattr(given, name)
        if value is not None and not wanted:
            told = ", ".join(f"{setting}={getattr(c, setting)!r}" for setting in names.split())
            raise ValueError(f"{kind}: {name} is given, but the network has no use for it ({told}); leave it out")
        if value is None and wanted and name != "cond":
            told = f"help(diffjax.models.network({kind!r})) says what that is"
            raise ValueError(f"{kind}: this network needs {name}; {told}")
        if value is not None:
            settings.expect(kind, name, value, *shapes[name])
    if added == "text_time":
        sizes, width = c.addition_time_embed_dim * given.time_ids.shape[1], c.projection_class_embeddings_input_dim
        if given.pooled.shape[1] + sizes != width:
            raise ValueError(
                f"{kind}: pooled has {given.pooled.shape[1]} channels and {given.time_ids.shape[1]} time_ids {sizes}; "
                f"together they must have projection_class_embeddings_input_dim={width}"
            )


def _shapes(c: Any, x: jax.Array) -> dict[str, tuple[int | None, ...]]:
    """The shape of each condition; None stands for any length."""
    batch, height, width, _ = x.shape
    cross = c.cross_attention_dim
    cross = (cross[0] if len({*cross}) == 1 else None) if isinstance(cross, tuple) else cross
    pictured = projection_of(c) == "text_image_proj" or c.addition_embed_type == "text_image"
    vector = {"identity": temb_width(c), "timestep": None, None: None}
    label = vector.get(c.class_embed_type, c.projection_class_embeddings_input_dim)
    return {
        "context": (batch, None, c.encoder_hid_dim if projection_of(c) else cross),
        "y": (batch,) if label is None else (batch, label),
        "pooled": (batch, cross if c.addition_embed_type == "text_image" else None),
        "time_ids": (batch, None),
        "image": (batch, cross if pictured else c.encoder_hid_dim),
        "hint": (batch, 8 * height, 8 * width, 3),
        "cond": (batch, c.time_cond_proj_dim),
    }


def embed(
    net: Embedders, c: Any, t: jax.Array, given: Given
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:  # fmt: skip
    """The embedded time `[B, temb_width]` (twice as wide with `class_embeddings_concat`), the context `[B, L,
    cross_attention_dim]` for the blocks, and the embedded hint `[B, H, W, 4]`; `t [B]`.

    Args:
      net: holds the embedders.
      c: its settings.
      given: what `check` has let through.
    """
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
    """An embedded image `[B, width_in]` as 32 tokens `[B, 32, width]` (Kandinsky 2.2)."""

    count = 32

    def __init__(self, width_in: int, width: int, *, compute: Compute, rngs):
        self.image_embeds = Linear(width_in, self.count * width, dtype=compute.dtype, rngs=rngs)
        self.norm = LayerNorm(width)

    def __call__(self, image: jax.Array) -> jax.Array:
        return self.norm(self.image_embeds(image).reshape(len(image), self.count, -1))


class TextImageTokens(nnx.Module):
    """An embedded image `[B, width]` as 10 tokens, before those of a text `[B, L, width_in]`: `[B, 10 + L, width]`
    (Kandinsky 2.1)."""

    count = 10

    def __init__(self, width_in: int, width: int, *, compute: Compute, rngs):
        self.image_embeds = Linear(width, self.count * width, dtype=compute.dtype, rngs=rngs)
        self.text_proj = Linear(width_in, width, dtype=compute.dtype, rngs=rngs)

    def __call__(self, context: jax.Array, image: jax.Array) -> jax.Array:
        tokens = self.image_embeds(image).reshape(len(image), self.count, -1)
        return jnp.concatenate([tokens, self.text_proj(context)], 1)


class TextImageVector(nnx.Module):
    """The sum of an embedded text and image (Kandinsky 2.1)."""

    def __init__(self, width_in: int, width: int, *, compute: Compute, rngs):
        options = dict(dtype=compute.dtype, rngs=rngs)
        self.text_proj, self.text_norm = Linear(width_in, width, **options), LayerNorm(width)
        self.image_proj = Linear(width_in, width, **options)

    def __call__(self, pooled: jax.Array, image: jax.Array) -> jax.Array:
        return self.image_proj(image) + self.text_norm(self.text_proj(pooled))


class ImageVector(nnx.Module):
    """An embedded image (Kandinsky 2.2), and a hint at an eighth of its height and width."""

    def __init__(self, width_in: int, width: int, *, hint: bool, compute: Compute, rngs):
        options = dict(dtype=compute.dtype, rngs=rngs)
        self.image_proj, self.image_norm = Linear(width_in, width, **options), LayerNorm(width)
        before = (3, *(channels for channels, _ in _HINT))
        layers = {
            str(2 * i): Conv(before[i], channels, stride=stride, padding=1, **options)
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
        options = dict(dtype=compute.dtype, rngs=rngs)
        init = nnx.initializers.normal(width**-0.5)
        self.positional_embedding = nnx.Param(init(rngs.params(), (1, width), jnp.float32))
        self.q_proj, self.k_proj, self.v_proj = (Linear(width, width, **options) for _ in range(3))
        self.heads, self.implementation = heads, compute.attention

    def __call__(self, x: jax.Array) -> jax.Array:
        query = x.mean(1, keepdims=True) + self.positional_embedding[...].astype(x.dtype)
        x = jnp.concatenate([query, x], 1)
        given = (self.q_proj, query), (self.k_proj, x), (self.v_proj, x)
        q, k, v = (split_heads(project(a), self.heads) for project, a in given)
        return attend(q, k, v, implementation=self.implementation).reshape(len(x), -1)
