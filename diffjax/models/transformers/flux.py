"""FLUX.1 of Black Forest Labs (2024), a transformer over packed latents, as diffusers stores it.

Text and image have weights of their own in the first blocks and attend to both (MMDiT, Esser et al. 2024,
arXiv:2403.03206); then they are one sequence, in blocks whose attention and perceptron run side by side (Dehghani et
al. 2023, arXiv:2302.05442). Places enter as rotations of queries and keys, some channels for each axis of the position
(RoPE, Su et al. 2021, arXiv:2104.09864).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_least
from diffjax.nn import (
    Compute,
    Linear,
    RMSNorm,
    attend,
    layer_norm,
    modulate,
    run_stack,
    scope,
    stack,
    tap,
    times,
    widen,
)  # fmt: skip
from diffjax.nn.blocks import FeedForward, JointAttention, Modulation, TimeTextEmbedding
from diffjax.nn.blocks.joint import project_heads
from diffjax.nn.conv import unshuffle
from diffjax.nn.linear import ACTIVATIONS

KIND = "FluxTransformer2DModel"
# Of the two stacks of blocks and what is in front of them, in the ControlNet as well.
STREAM_RULES = (
    (r"transformer_blocks/.*/(to_[qkv]|add_[qkv]_proj|proj|proj_mlp|linear)/kernel$", (None, "fsdp", "tensor")),
    (r"transformer_blocks/.*/(to_out/0|to_add_out|net/2|proj_out)/kernel$", (None, "tensor", "fsdp")),
    (r"transformer_blocks/.*/(to_[qkv]|add_[qkv]_proj|proj|proj_mlp)/bias$", (None, "tensor")),
    (r"^time_text_embed/.*/linear_1/kernel$", ("fsdp", "tensor")),
    (r"^time_text_embed/.*/linear_2/kernel$", ("tensor", "fsdp")),
    (r"^(controlnet_)?(x|context)_embedder/kernel$", (None, "fsdp")),
)
RULES = (
    *STREAM_RULES,
    (r"^norm_out/linear/kernel$", ("fsdp", "tensor")),
    (r"^proj_out/kernel$", ("fsdp", None)),
    (r"(^|/)(bias|scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `FluxTransformer2DModel`, with its defaults."""

    patch_size: int = 1
    in_channels: int = 64
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)


def pack(latents: jax.Array) -> jax.Array:
    """Latents `[B, H, W, C]` as tokens `[B, H/2 W/2, 4 C]` of 2 x 2 pixels, row major.

    The four pixels of a channel lie side by side in a token.

    Raises:
      ValueError: for a height or width that is odd.
    """
    b, h, w, c = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latents of {h} x {w} pixels cannot be packed: both sides must be even")
    return unshuffle(latents, 2).reshape(b, h * w // 4, 4 * c)


def unpack(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `pack`: latents `[B, height, width, C]` of tokens `[B, height/2 width/2, 4 C]`.

    Raises:
      ValueError: for another number of tokens, or sides that are odd.
    """
    b, length, c = tokens.shape
    if length * 4 != height * width or height % 2 or width % 2:
        raise ValueError(f"{length} tokens are not those of latents of {height} x {width} pixels")
    pixels = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return jnp.transpose(pixels, (0, 1, 4, 2, 5, 3)).reshape(b, height, width, c // 4)


def positions(height: int, width: int) -> np.ndarray:
    """Positions `[height/2 width/2, 3] int32` of the tokens of latents with these sides: 0, the row, the column."""
    rows, columns = np.meshgrid(np.arange(height // 2), np.arange(width // 2), indexing="ij")
    return np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.int32)


def rotations(places: jax.Array, axes: Sequence[int], theta: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[T, d / 2] float32` of the angles of `places [T, len(axes)]`, with d the sum of `axes`.

    Angles are products with `theta ** (-2 i / axes[j])`. A frequency is the sum of one of twelve bits, whose product
    with an integer below 4096 has no rounding, and a small rest: as exact as in float64, which devices may lack.
    """
    places = jnp.asarray(places, jnp.float32)
    cosines, sines = [], []
    for axis, dim in enumerate(axes):
        frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        mantissa, exponent = np.frexp(frequencies)
        coarse = np.ldexp(np.round(mantissa * 2**12), exponent - 12)
        a, b = (places[:, axis, None] * np.float32(part) for part in (coarse, frequencies - coarse))
        cosines.append(jnp.cos(a) * jnp.cos(b) - jnp.sin(a) * jnp.sin(b))
        sines.append(jnp.sin(a) * jnp.cos(b) + jnp.cos(a) * jnp.sin(b))
    return jnp.concatenate(cosines, axis=-1), jnp.concatenate(sines, axis=-1)


def rotate(x: jax.Array, waves: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Pairs of neighbouring channels of `x [B, T, N, d]`, turned by the angles of `rotations`; at least float32."""
    cos, sin = (wave[:, None] for wave in waves)
    pairs = widen(x).reshape(*x.shape[:-1], -1, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Attention of tokens `[B, T, C]` to all of them, without a projection of what was mixed.

    Activations: `q`, `k`, `v` and `mixed`, `[B, T, heads, C / heads]`.
    """

    def __init__(self, width: int, heads: int, head_width: int, *, compute: Compute, rngs):
        linear = lambda: Linear(width, width, dtype=compute.dtype, rngs=rngs)
        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.norm_q, self.norm_k = (RMSNorm(head_width, eps=1e-6) for _ in range(2))
        self.heads, self.implementation = heads, compute.attention

    def __call__(self, x: jax.Array, waves: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows = (self.to_q, self.norm_q), (self.to_k, self.norm_k), (self.to_v, None)
        q, k, v = (project_heads(project, norm, x, self.heads) for project, norm in rows)
        q, k, v = tap("q", rotate(q, waves)), tap("k", rotate(k, waves)), tap("v", v)
        return tap("mixed", attend(q, k, v, implementation=self.implementation)).reshape(x.shape)


class DoubleBlock(nnx.Module):
    """Joint attention of image and text and a perceptron for each, modulated and gated."""

    def __init__(self, width: int, heads: int, head_width: int, *, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.norm1, self.norm1_context = Modulation(width, 6, **given), Modulation(width, 6, **given)
        joint = dict(qk_norm="rms_norm", context_first=True)
        self.attn = JointAttention(width, heads, head_width, **joint, **given)
        self.ff = FeedForward(width, activation="gelu-approximate", **given)
        self.ff_context = FeedForward(width, activation="gelu-approximate", **given)

    def __call__(
        self, x: jax.Array, context: jax.Array, emb: jax.Array, waves: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """`x [B, T, C]` and `context [B, L, C]`; `emb [B, C]` modulates, `waves` are `rotations`."""
        with scope("norm1"):
            shift, scale, gate, *of_x = self.norm1(emb)
        with scope("norm1_context"):
            shift_context, scale_context, gate_context, *of_context = self.norm1_context(emb)
        with scope("attn"):
            h_context = modulate(layer_norm(context), shift_context, scale_context)
            turn = lambda a: rotate(a, waves)
            h, h_context = self.attn(modulate(layer_norm(x), shift, scale), h_context, turn)
        x, context = x + times(h, gate[:, None]), context + times(h_context, gate_context[:, None])
        with scope("ff"):
            x = _perceptron(self.ff, x, *of_x)
        with scope("ff_context"):
            context = _perceptron(self.ff_context, context, *of_context)
        return tap("out", x), tap("out_context", _finite(context))


class SingleBlock(nnx.Module):
    """Attention and a perceptron side by side, with one projection at the end."""

    def __init__(self, width: int, heads: int, head_width: int, *, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.norm = Modulation(width, 3, **given)
        self.attn = Attention(width, heads, head_width, **given)
        self.proj_mlp = Linear(width, 4 * width, dtype=compute.dtype, rngs=rngs)
        self.proj_out = Linear(5 * width, width, dtype=compute.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, emb: jax.Array, waves: tuple[jax.Array, jax.Array]) -> jax.Array:
        """`x [B, L + T, C]`; `emb [B, C]` modulates, `waves` are `rotations`."""
        with scope("norm"):
            shift, scale, gate = self.norm(emb)
        h = modulate(layer_norm(x), shift, scale)
        with scope("attn"):
            mixed = self.attn(h, waves)
        hidden = tap("hidden", ACTIVATIONS["gelu_new"](self.proj_mlp(h)))
        h = self.proj_out(jnp.concatenate([mixed, hidden], axis=-1))
        return tap("out", _finite(x + times(h, gate[:, None])))


def _perceptron(ff, x, shift, scale, gate):
    return x + times(ff(modulate(layer_norm(x), shift, scale)), gate[:, None])


def _finite(x):
    """Sums outgrow float16 in trained networks; there they are cut off, as they were in its pipelines."""
    return jnp.clip(x, -65504, 65504) if x.dtype == jnp.float16 else x


def check_axes(kind: str, c: Any) -> None:
    """Raises `ValueError` unless the channels of a head are those of the axes of the positions, in pairs."""
    if sum(c.axes_dims_rope) != c.attention_head_dim or any(dim % 2 for dim in c.axes_dims_rope):
        raise ValueError(
            f"{kind}: axes_dims_rope={c.axes_dims_rope}: expected even numbers whose sum is "
            f"attention_head_dim={c.attention_head_dim}"
        )


def blocks_of(c: Any, *, compute: Compute, rngs) -> tuple[nnx.Dict, nnx.Dict]:
    """Both stacks of blocks, `transformer_blocks` and `single_transformer_blocks`."""
    sizes = (c.num_attention_heads * c.attention_head_dim, c.num_attention_heads, c.attention_head_dim)
    double = stack(lambda rngs: DoubleBlock(*sizes, compute=compute, rngs=rngs), 0, c.num_layers, rngs=rngs)
    single = stack(lambda rngs: SingleBlock(*sizes, compute=compute, rngs=rngs), 0, c.num_single_layers, rngs=rngs)
    return double, single


def run_double(
    blocks: nnx.Dict, x: jax.Array, context: jax.Array, *, emb: jax.Array, waves: tuple[jax.Array, jax.Array],
    compute: Compute, add: Callable = lambda i: 0, keep: bool = False,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:  # fmt: skip
    """`(x, context)` behind the blocks with two streams, and with `keep` the `x` of each, `[blocks, B, T, width]`.

    Args:
      blocks: a `stack` of `DoubleBlock`.
      x, context: the tokens of the image `[B, T, width]` and of the text `[B, L, width]`.
      emb: `[B, width]`, what modulates.
      waves: `rotations` of the places of the text and of the image, in this order.
      compute: see `diffjax.nn.run_stack`.
      add: `add(i)` goes on top of the image's stream behind block i.
    """

    def body(block, carried, i):
        with scope("transformer_blocks"):
            x, context = block(*carried, emb, waves)
        x = x + add(i)
        return (x, context), x if keep else None

    return run_stack(blocks, body, (x, context), compute)


def run_single(
    blocks: nnx.Dict, x: jax.Array, context: jax.Array, *, emb: jax.Array, waves: tuple[jax.Array, jax.Array],
    compute: Compute, add: Callable = lambda i: 0, keep: bool = False,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """`x` behind the blocks with one stream, and with `keep` that of each; the arguments are those of `run_double`."""
    length = context.shape[1]

    def body(block, h, i):
        with scope("single_transformer_blocks"):
            h = block(h, emb, waves)
        x = h[:, length:] + add(i)
        return jnp.concatenate([h[:, :length], x], axis=1), x if keep else None

    h, kept = run_stack(blocks, body, jnp.concatenate([context, x], axis=1), compute)
    return h[:, length:], kept


def _added(name, residuals, x, depth, repeat):
    """What `run_double` and `run_single` add, of n residuals `[n, B, T, C]` for `depth` blocks."""
    if residuals is None or depth == 0:
        return lambda i: 0
    if not len(residuals):
        raise ValueError(f"{KIND}: {name} are empty; pass None for none")
    residuals = jnp.asarray(residuals, x.dtype)
    settings.expect(KIND, name, residuals, None, *x.shape)
    n = len(residuals)
    every = -(-depth // n)
    return lambda i: jax.lax.dynamic_index_in_dim(residuals, i % n if repeat else i // every, keepdims=False)


class FluxTransformer(nnx.Module):
    """The module of `flux_transformer`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.num_attention_heads * c.attention_head_dim, dict(dtype=compute.dtype, rngs=rngs)
        self.time_text_embed = TimeTextEmbedding(
            c.pooled_projection_dim, width, guidance=c.guidance_embeds, compute=compute, rngs=rngs
        )
        self.context_embedder = Linear(c.joint_attention_dim, width, **given)
        self.x_embedder = Linear(c.in_channels, width, **given)
        self.transformer_blocks, self.single_transformer_blocks = blocks_of(c, compute=compute, rngs=rngs)
        self.norm_out = Modulation(width, 2, compute=compute, rngs=rngs)
        self.proj_out = Linear(width, c.patch_size**2 * settings.channels_out(c), **given)
        self.c, self.compute = c, compute

    def __call__(
        self, x: jax.Array, t: jax.Array, context: jax.Array, pooled: jax.Array, *, positions: jax.Array,
        context_positions: jax.Array | None = None, guidance: jax.Array | None = None,
        residuals: jax.Array | Sequence[jax.Array] | None = None,
        single_residuals: jax.Array | Sequence[jax.Array] | None = None, repeat_residuals: bool = False,
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`[B, T, patch_size^2 out_channels] float32`; `flux_transformer` tells what the arguments are."""
        c = self.c
        places = dict(positions=positions, context_positions=context_positions)
        given = conditions(KIND, c, x=x, t=t, context=context, pooled=pooled, guidance=guidance, **places)
        emb = nnx.silu(self.time_text_embed(given.t, pooled, given.guidance))
        how = dict(emb=emb, waves=rotations(given.places, c.axes_dims_rope), compute=self.compute)
        x, context = tap("tokens", self.x_embedder(x)), tap("context", self.context_embedder(context))
        add = _added("residuals", residuals, x, c.num_layers, repeat_residuals)
        (x, context), _ = run_double(self.transformer_blocks, x, context, add=add, **how)
        add = _added("single_residuals", single_residuals, x, c.num_single_layers, False)
        x, _ = run_single(self.single_transformer_blocks, x, context, add=add, **how)
        scale, shift = self.norm_out(emb)
        return widen(self.proj_out(modulate(layer_norm(x), shift, scale)))


class Conditions(NamedTuple):
    """What a FLUX.1 network is told besides texts.

    Attributes:
      t: `[B] float32`, the times in thousandths.
      guidance: `[B] float32`, the scales of guidance in thousandths, or None.
      places: `[L + T, len(axes_dims_rope)] float32`, the positions of the context and the tokens.
    """

    t: jax.Array
    guidance: jax.Array | None
    places: jax.Array


def conditions(
    kind: str, c: Any, *, x: jax.Array, t: jax.Array, context: jax.Array, pooled: jax.Array, positions: jax.Array,
    context_positions: jax.Array | None, guidance: jax.Array | None,
) -> Conditions:  # fmt: skip
    """The conditions of a call, of `flux_transformer` or its ControlNet; raises `ValueError` for other shapes than the
    settings ask for."""
    settings.expect(kind, "x", x, None, None, c.in_channels)
    batch, length = x.shape[:2]
    settings.expect(kind, "context", context, batch, None, c.joint_attention_dim)
    settings.expect(kind, "pooled", pooled, batch, c.pooled_projection_dim)
    settings.expect(kind, "positions", positions, length, len(c.axes_dims_rope))
    if context_positions is None:
        context_positions = np.zeros((context.shape[1], len(c.axes_dims_rope)), np.float32)
    settings.expect(kind, "context_positions", context_positions, context.shape[1], len(c.axes_dims_rope))
    if c.guidance_embeds != (guidance is not None):
        wanted = "needs guidance, the scale for each sample" if c.guidance_embeds else "takes no guidance"
        raise ValueError(f"{kind}: this network {wanted} (guidance_embeds={c.guidance_embeds})")
    # Both come as in [0, 1] and are counted in thousandths, rounded where PyTorch rounds them.
    thousandths = lambda a, name: 1000 * jnp.asarray(settings.times_of(kind, a, x, name), jnp.float32)
    places = jnp.concatenate([jnp.asarray(a, jnp.float32) for a in (context_positions, positions)])
    return Conditions(thousandths(t, "t"), None if guidance is None else thousandths(guidance, "guidance"), places)


def flux_transformer(config: Mapping[str, Any], **how) -> Model:
    """`FluxTransformer2DModel`: FLUX.1 schnell and dev, and Fill, Depth and Canny with more channels of input.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, T, in_channels], t [B], context [B, L, joint_attention_dim], pooled
      [B, pooled_projection_dim], *, positions [T, 3], context_positions=None, guidance=None, residuals=None,
      single_residuals=None, repeat_residuals=False, key=None)`, `[B, T, patch_size^2 out_channels] float32`. `pack`,
      `unpack` and `positions` of this module make tokens of latents. Times are in [0, 1]. `guidance [B]` is the scale
      that a distilled network (`guidance_embeds`) was trained for. `context_positions [L, 3]` are zeros by default.
      `residuals [n, B, T, width]` of a ControlNet are added behind the first blocks, each to `ceil(blocks / n)` of them
      in a row, or with `repeat_residuals` in turns; `single_residuals` likewise behind the others. There is no dropout
      that a key could turn on.

    Raises:
      ValueError: for settings that are unknown or do not fit each other.
    """
    c = settings.read(KIND, Settings, config)
    check_axes(KIND, c)
    check_least(KIND, 1, out_channels=settings.channels_out(c))
    make = lambda compute, rngs: FluxTransformer(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
