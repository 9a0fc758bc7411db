"""MMDiT, `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5, tokens of image and text that attend to each other.

Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis", arXiv:2403.03206. Each
block has its own weights for either kind of token; attention sees both. The last block leaves the text as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_divides, check_least
from diffjax.models.dit import unpatchify
from diffjax.nn import (
    Compute,
    Fixed,
    Linear,
    layer_norm,
    modulate,
    run_stack,
    scope,
    stack,
    tap,
    times,
    widen,
)
from diffjax.nn.blocks import (
    Attention,
    FeedForward,
    JointAttention,
    Modulation,
    TimeTextEmbedding,
    grid_positions,
    patch_conv,
)
from diffjax.nn.blocks.attention import QK_NORMS

KIND = "SD3Transformer2DModel"
# Of one side of the square of positions, whose waves the host makes when a network is built; SD3.5 has 589,824.
MOST_WAVES = 2**24
RULES = (
    (r"^transformer_blocks/.*/(to_[qkv]|add_[qkv]_proj|proj|linear)/kernel$", (None, "fsdp", "tensor")),
    (r"^transformer_blocks/.*/(to_out/0|to_add_out|net/2)/kernel$", (None, "tensor", "fsdp")),
    (r"^transformer_blocks/.*/(to_[qkv]|add_[qkv]_proj|proj|linear)/bias$", (None, "tensor")),
    (r"^time_text_embed/.*/linear_1/kernel$", ("fsdp", "tensor")),
    (r"^time_text_embed/.*/linear_2/kernel$", ("tensor", "fsdp")),
    (r"^(context_embedder|norm_out/linear|proj_out)/kernel$", ("fsdp",)),
    (r"^pos_embed(_input)?/proj/kernel$", (None, None, None, "fsdp")),
    (r"^pos_embed/pos_embed$", (None, None, "fsdp")),
    (r"(^|/)(bias|scale)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of an `SD3Transformer2DModel`, with its defaults."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int | None = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None


class PositionedPatches(nnx.Module):
    """Patches of `x [B, H, W, C]` as tokens `[B, T, width]` with the positions of a grid added.

    With a `largest` number of patches per side the positions are those of a square of that side, kept in the
    checkpoint, from which an image takes the middle. Without, each shape has its own, scaled to span `base` patches.
    """

    def __init__(
        self, channels: int, width: int, patch: int, *, base: int, largest: int | None, compute: Compute, rngs
    ):  # fmt: skip
        self.proj = patch_conv(channels, width, patch, compute=compute, rngs=rngs)
        square = grid_positions(width, largest, largest, base=base) if largest else None
        self.pos_embed = None if square is None else Fixed(square.reshape(1, -1, width))
        self.patch, self.width, self.base, self.largest = patch, width, base, largest

    def __call__(self, x: jax.Array) -> jax.Array:
        height, breadth = (n // self.patch for n in x.shape[1:3])
        h = self.proj(x).reshape(len(x), -1, self.width)
        if self.pos_embed is None:
            positions = grid_positions(self.width, height, breadth, base=self.base)
        else:
            top, left = ((self.largest - n) // 2 for n in (height, breadth))
            # A constant that checkpoints carry; it is not trained.
            square = jax.lax.stop_gradient(self.pos_embed[...]).reshape(self.largest, self.largest, self.width)
            positions = square[top : top + height, left : left + breadth]
        return h + positions.reshape(-1, self.width).astype(h.dtype)


class JointBlock(nnx.Module):
    """Joint attention and two perceptrons, for `x [B, T, C]` and `context [B, L, C]`.

    Args:
      qk_norm: one of `QK_NORMS`.
      dual: the image also attends to itself alone, beside the joint attention (Stable Diffusion 3.5 medium).
      last: the text is used and comes back as it was.

    Activations: those of the attentions and perceptrons, and `out`, `context_out`.
    """

    def __init__(
        self, width: int, heads: int, *, qk_norm: str | None = None, dual: bool = False, last: bool = False,
        compute: Compute, rngs,
    ):  # fmt: skip
        given = dict(compute=compute, rngs=rngs)
        perceptron = lambda: FeedForward(width, activation="gelu-approximate", **given)
        self.norm1 = Modulation(width, 9 if dual else 6, **given)
        self.norm1_context = Modulation(width, 2 if last else 6, **given)
        self.attn = JointAttention(width, heads, width // heads, qk_norm=qk_norm, last=last, **given)
        alone = dict(bias=True, qk_norm=qk_norm, qk_eps=1e-6)
        self.attn2 = Attention(width, heads, width // heads, **alone, **given) if dual else None
        self.ff = perceptron()
        self.ff_context = None if last else perceptron()
        self.last = last

    def __call__(self, x: jax.Array, context: jax.Array, emb: jax.Array) -> tuple[jax.Array, jax.Array]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(emb)
        with scope("norm1_context"):
            parts = self.norm1_context(emb)
        # Here, as in the last modulation of the network, the scale comes first.
        shift_text, scale_text = parts[::-1] if self.last else parts[:2]
        h = layer_norm(x)
        with scope("attn"):
            given = modulate(h, shift, scale), modulate(layer_norm(context), shift_text, scale_text)
            mixed, mixed_text = self.attn(*given)
        x = x + times(mixed, gate[:, None])
        if dual:
            shift, scale, gate = dual
            with scope("attn2"):
                x = x + times(self.attn2(modulate(h, shift, scale)), gate[:, None])
        with scope("ff"):
            h = self.ff(modulate(layer_norm(x), shift_mlp, scale_mlp))
        x = tap("out", x + times(h, gate_mlp[:, None]))
        if self.last:
            return x, context
        gate, shift, scale, gate_mlp = parts[2:]
        context = context + times(mixed_text, gate[:, None])
        with scope("ff_context"):
            h = self.ff_context(modulate(layer_norm(context), shift, scale))
        return x, tap("context_out", context + times(h, gate_mlp[:, None]))


def joint_blocks(c: Any, *, last: bool, compute: Compute, rngs) -> nnx.Dict:
    """The blocks of a config as a `stack`: layers that follow each other and are of one shape are one part of it.

    Args:
      c: with `num_layers`, `num_attention_heads`, `attention_head_dim`, `dual_attention_layers` and `qk_norm`.
      last: whether the last block is one that leaves the text as it is.
    """
    heads, depth = c.num_attention_heads, c.num_layers
    kind = lambda i: (i in c.dual_attention_layers, last and i == depth - 1)
    given = dict(qk_norm=c.qk_norm, compute=compute)
    parts = {}
    for (dual, ends), group in groupby(range(depth), kind):
        layers = list(group)
        make = lambda rngs, dual=dual, ends=ends: JointBlock(
            heads * c.attention_head_dim, heads, dual=dual, last=ends, **given, rngs=rngs
        )
        parts |= dict(stack(make, layers[0], layers[-1] + 1, rngs=rngs).items())
    return nnx.Dict(parts)


class MMDiT(nnx.Module):
    """The module of `sd3_transformer`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        width, given = c.num_attention_heads * c.attention_head_dim, dict(compute=compute, rngs=rngs)
        linear = lambda *widths: Linear(*widths, dtype=compute.dtype, rngs=rngs)
        self.pos_embed = PositionedPatches(
            c.in_channels, width, c.patch_size, base=c.sample_size // c.patch_size, largest=c.pos_embed_max_size,
            **given,
        )  # fmt: skip
        self.time_text_embed = TimeTextEmbedding(c.pooled_projection_dim, width, **given)
        self.context_embedder = linear(c.joint_attention_dim, width)
        self.transformer_blocks = joint_blocks(c, last=True, **given)
        self.norm_out = Modulation(width, 2, **given)
        self.proj_out = linear(width, c.patch_size**2 * settings.channels_out(c))
        self.c, self.compute = c, compute

    def __call__(
        self, x: jax.Array, t: jax.Array, context: jax.Array, pooled: jax.Array, *,
        residuals: Sequence[jax.Array] | jax.Array | None = None, skip_layers: Iterable[int] | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, out_channels] float32`; `sd3_transformer` tells what the arguments are."""
        c = self.c
        t = check_inputs(KIND, c, x, t, context, pooled)
        h = self.tokens(x)
        emb = nnx.silu(self.time_text_embed(t, pooled))
        context = self.context_embedder(context)
        added, taken = _residuals(residuals, c.num_layers, h)
        skipped = _skipped(skip_layers, c.num_layers)

        def body(block, carry, i):
            with scope("transformer_blocks"):
                if skipped is None:
                    h, context = block(*carry, emb)
                else:
                    h, context = jax.lax.cond(skipped[i], lambda: carry, lambda: block(*carry, emb))
                if added is not None and not block.last:
                    h = h + added[taken[i]]
            return (h, context), None

        (h, _), _ = run_stack(self.transformer_blocks, body, (h, context), self.compute)
        scale, shift = self.norm_out(emb)
        out = self.proj_out(modulate(layer_norm(h), shift, scale))
        return widen(unpatchify(out, c.patch_size, (*x.shape[1:3], settings.channels_out(c))))

    def tokens(self, x: jax.Array) -> jax.Array:
        """What the first block sees of `x [B, H, W, in_channels]`: `[B, T, width]`."""
        check_image(KIND, self.c, x, self.c.in_channels)
        return tap("tokens", self.pos_embed(x))


def check_settings(kind: str, c: Any) -> None:
    """Raises `ValueError` for settings of an MMDiT, or of its ControlNet, that make no network or are not supported."""
    positive = "num_layers num_attention_heads attention_head_dim patch_size in_channels pooled_projection_dim".split()
    check_least(kind, 1, **{name: getattr(c, name) for name in positive})
    check_least(kind, c.patch_size, sample_size=c.sample_size)
    settings.only(kind, c, qk_norm=tuple(QK_NORMS))
    width = c.num_attention_heads * c.attention_head_dim
    if width % 4:
        raise ValueError(f"{kind}: num_attention_heads * attention_head_dim = {width}: positions need a multiple of 4")
    if c.joint_attention_dim is not None and c.caption_projection_dim != width:
        raise ValueError(
            f"{kind}: caption_projection_dim={c.caption_projection_dim}: the blocks need that of the image's tokens, "
            f"num_attention_heads * attention_head_dim = {width}"
        )
    if c.pos_embed_max_size is not None:
        check_least(kind, 1, pos_embed_max_size=c.pos_embed_max_size)
        if c.pos_embed_max_size * width > MOST_WAVES:
            raise ValueError(
                f"{kind}: pos_embed_max_size={c.pos_embed_max_size}: of {width} channels there are positions for "
                f"at most {MOST_WAVES // width} patches a side"
            )


def check_image(kind: str, c: Any, x: jax.Array, channels: int, *, name: str = "x", positions: bool = True) -> None:
    """Raises `ValueError` unless `x [B, H, W, channels]` is of whole patches, with `positions` for all of them."""
    settings.expect(kind, name, x, None, None, None, channels)
    check_divides(kind, "patch_size", c.patch_size, f"the sides of {name},", *x.shape[1:3])
    most = c.pos_embed_max_size and c.pos_embed_max_size * c.patch_size
    if positions and most and max(x.shape[1:3]) > most:
        raise ValueError(f"{kind}: {name} has shape {tuple(x.shape)}; there are positions for sides up to {most} only")


def check_inputs(kind: str, c: Any, x: jax.Array, t, context, pooled) -> jax.Array:
    """The times as `[B]`; raises `ValueError` for conditions of other shapes than `x` and the settings ask for."""
    if c.joint_attention_dim is not None:
        settings.expect(kind, "context", context, len(x), None, c.joint_attention_dim)
    settings.expect(kind, "pooled", pooled, len(x), c.pooled_projection_dim)
    return settings.times_of(kind, t, x)


def _residuals(residuals: Sequence | jax.Array | None, depth: int, h: jax.Array) -> tuple:
    """The residuals of a ControlNet as one array, and which of them each block takes; None and None without any.

    The blocks are dealt to the residuals in order, as evenly as can be, with a quotient in floating point as there.
    """
    if residuals is None:
        return None, None
    if not len(residuals):
        raise ValueError(f"{KIND}: residuals are empty; pass None for none")
    for i, residual in enumerate(residuals):
        settings.expect(KIND, f"residuals[{i}]", residual, *h.shape)
    interval = depth / len(residuals)
    taken = np.array([int(i / interval) for i in range(depth)])
    return jnp.stack([jnp.asarray(a, h.dtype) for a in residuals]), jnp.asarray(taken)


def _skipped(layers: Iterable[int] | None, depth: int) -> jax.Array | None:
    """Which layers are skipped, `[depth] bool`; None if none is."""
    layers = tuple(layers or ())
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong:
        raise ValueError(f"{KIND}: skip_layers has {wrong[0]}; the layers are 0 to {depth - 1}")
    return jnp.asarray(np.isin(np.arange(depth), layers)) if layers else None


def sd3_transformer(config: Mapping[str, Any], **how) -> Model:
    """`SD3Transformer2DModel` (MMDiT, arXiv:2403.03206; Stable Diffusion 3 and 3.5) by the config of a checkpoint.

    Args:
      config: see `Settings`. `dual_attention_layers` may be any; layers alike that follow each other run in one scan.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels], t [B], context [B, L, joint_attention_dim],
      pooled [B, pooled_projection_dim], *, residuals=None, skip_layers=None, key=None)`,
      `[B, H, W, out_channels] float32`. Times are those of 1000 steps. `residuals`, of a ControlNet, are n arrays
      `[B, T, width]`: block i of N adds that of number `int(i / (N / n))` to its result, the last block none.
      `skip_layers` are the numbers of blocks that are left out. There is no dropout: a key changes nothing.
      `apply(params, x, method="tokens")` is what the first block sees, `[B, T, width]`, which ControlNets without
      positions of their own take.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    check_settings(KIND, c)
    check_least(KIND, 1, joint_attention_dim=c.joint_attention_dim)
    make = lambda compute, rngs: MMDiT(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
