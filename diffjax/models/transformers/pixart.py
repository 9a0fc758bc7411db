"""PixArt, `PixArtTransformer2DModel`: a DiT with cross-attention to a text and one modulation for all blocks.

Chen et al. 2023, "PixArt-alpha", arXiv:2310.00426, and Chen et al. 2024, "PixArt-Sigma", arXiv:2403.04692. Every block
adds a small table of its own to the shared modulation (section 2.3 of the former, adaLN-single).
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
from diffjax.models.checks import check_divides, check_least
from diffjax.models.dit import unpatchify
from diffjax.nn import (
    Compute,
    LayerNorm,
    Linear,
    fold_key,
    layer_norm,
    modulate,
    plus,
    run_stack,
    scope,
    split_key,
    stack,
    tap,
    times,
    timestep_waves,
    widen,
)
from diffjax.nn.blocks import (
    FEEDFORWARDS,
    Attention,
    FeedForward,
    PatchEmbed,
    Projection,
    grid_positions,
    mask_bias,
)

KIND = "PixArtTransformer2DModel"
RULES = (
    (r"^transformer_blocks/.*/(to_[qkv]|proj)/kernel$", (None, "fsdp", "tensor")),
    (r"^transformer_blocks/.*/(to_out/0|net/2)/kernel$", (None, "tensor", "fsdp")),
    (r"^transformer_blocks/.*/(to_[qkv]|proj)/bias$", (None, "tensor")),
    (r"/linear_1/kernel$", ("fsdp", "tensor")),
    (r"/linear_2/kernel$", ("tensor", "fsdp")),
    (r"^(adaln_single/linear|proj_out)/kernel$", ("fsdp",)),
    (r"^pos_embed/proj/kernel$", (None, None, None, "fsdp")),
    (r"(^|/)(bias|scale|scale_shift_table)$", ()),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `PixArtTransformer2DModel`, with its defaults."""

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int | None = 8
    num_layers: int = 28
    dropout: float = 0.0
    norm_num_groups: int = 32  # of nothing: a relic in the files
    cross_attention_dim: int | None = 1152
    attention_bias: bool = True
    sample_size: int = 128
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    num_embeds_ada_norm: int | None = 1000  # of nothing as well
    upcast_attention: bool = False
    norm_type: str = "ada_norm_single"
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    interpolation_scale: float | None = None
    use_additional_conditions: bool | None = None
    caption_channels: int | None = None
    attention_type: str = "default"

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def sized(self) -> bool:
        """Whether the network is told the resolution and the aspect ratio."""
        given = self.use_additional_conditions
        return self.sample_size == 128 if given is None else given


class TimeSizeEmbedding(nnx.Module):
    """An embedded time, `[B, width]`; with `sized`, plus the embedded resolution and aspect ratio side by side.

    Each number has 256 waves, cosines first, and of a resolution there are two: each gets a third of the width.
    """

    def __init__(self, width: int, *, sized: bool, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.timestep_embedder = Projection(256, width, **given)
        self.resolution_embedder = Projection(256, width // 3, **given) if sized else None
        self.aspect_ratio_embedder = Projection(256, width // 3, **given) if sized else None

    def __call__(self, t: jax.Array, resolution: jax.Array | None, aspect_ratio: jax.Array | None) -> jax.Array:
        emb = self.timestep_embedder(timestep_waves(t, 256))
        if self.resolution_embedder is None:
            return emb
        given = (self.resolution_embedder, resolution), (self.aspect_ratio_embedder, aspect_ratio)
        sizes = [embed(timestep_waves(a.reshape(-1), 256)).reshape(len(t), -1) for embed, a in given]
        return emb + jnp.concatenate(sizes, axis=-1)


class SharedModulation(nnx.Module):
    """The embedding `[B, width]`, and shifts, scales and gates for both branches of every block, `[B, 6, width]`."""

    def __init__(self, width: int, *, sized: bool, compute: Compute, rngs):
        self.emb = TimeSizeEmbedding(width, sized=sized, compute=compute, rngs=rngs)
        self.linear = Linear(width, 6 * width, dtype=compute.dtype, rngs=rngs)

    def __call__(self, *given) -> tuple[jax.Array, jax.Array]:
        emb = self.emb(*given)
        return emb, tap("modulation", self.linear(nnx.silu(emb))).reshape(len(emb), 6, -1)


def _table(rows, width, rngs):
    """Shifts, scales and gates that a block, or the end, adds to the shared ones: `[rows, width]`."""
    return nnx.Param(nnx.initializers.normal(width**-0.5)(rngs.params(), (rows, width), jnp.float32))


class Block(nnx.Module):
    """Self-attention and a perceptron, modulated and gated, and between them cross-attention, which is neither."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        attention = dict(bias=c.attention_bias, dropout_rate=c.dropout, **given)
        heads = c.num_attention_heads, c.attention_head_dim
        self.scale_shift_table = _table(6, c.width, rngs)
        self.norm1 = LayerNorm(c.width, eps=c.norm_eps, scale=c.norm_elementwise_affine)
        self.attn1 = Attention(c.width, *heads, **attention)
        self.attn2 = Attention(c.width, *heads, context_width=c.cross_attention_dim, **attention)
        self.norm2 = LayerNorm(c.width, eps=c.norm_eps, scale=c.norm_elementwise_affine)
        self.ff = FeedForward(c.width, activation=c.activation_fn, dropout_rate=c.dropout, **given)

    def __call__(self, x, modulation, context, bias, key):
        keys = split_key(key, 3)
        modulation = plus(modulation, self.scale_shift_table[...])
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (modulation[:, i] for i in range(6))
        with scope("attn1"):
            h = self.attn1(modulate(self.norm1(x), shift, scale), key=keys[0])
        x = x + times(h, gate[:, None])
        with scope("attn2"):
            x = x + self.attn2(x, context, bias=bias, key=keys[1])
        with scope("ff"):
            h = self.ff(modulate(self.norm2(x), shift_mlp, scale_mlp), key=keys[2])
        return tap("out", x + times(h, gate_mlp[:, None]))


class PixArt(nnx.Module):
    """The module of `pixart_transformer`."""

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        given = dict(compute=compute, rngs=rngs)
        self.pos_embed = PatchEmbed(c.in_channels, c.width, c.patch_size, **given)
        self.transformer_blocks = stack(lambda rngs: Block(c, compute=compute, rngs=rngs), 0, c.num_layers, rngs=rngs)
        self.scale_shift_table = _table(2, c.width, rngs)
        self.proj_out = Linear(c.width, c.patch_size**2 * settings.channels_out(c), dtype=compute.dtype, rngs=rngs)
        self.adaln_single = SharedModulation(c.width, sized=c.sized, **given)
        caption = c.caption_channels
        self.caption_projection = Projection(caption, c.width, activation="gelu_new", **given) if caption else None
        self.c, self.compute = c, compute

    def __call__(self, x, t, context, *, mask=None, resolution=None, aspect_ratio=None, key=None):
        c = self.c
        t = _check_inputs(c, x, t, context, mask, resolution, aspect_ratio)
        emb, modulation = self.adaln_single(t, resolution, aspect_ratio)
        context = context if self.caption_projection is None else self.caption_projection(context)
        bias = mask_bias(mask)
        h = self.pos_embed(x)
        h = tap("tokens", h + jnp.asarray(_positions(c, *x.shape[1:3]), h.dtype))

        def body(block, h, i):
            with scope("transformer_blocks"):
                return block(h, modulation, context, bias, fold_key(key, i)), None

        h, _ = run_stack(self.transformer_blocks, body, h, self.compute)
        ends = plus(jnp.stack([emb, emb], 1), self.scale_shift_table[...])
        out = self.proj_out(modulate(layer_norm(h), ends[:, 0], ends[:, 1]))
        return widen(unpatchify(out, c.patch_size, (*x.shape[1:3], settings.channels_out(c))))


def _positions(c: Settings, height: int, breadth: int):
    interpolation = max(c.sample_size // 64, 1) if c.interpolation_scale is None else c.interpolation_scale
    sides = height // c.patch_size, breadth // c.patch_size
    positions = grid_positions(c.width, *sides, base=c.sample_size // c.patch_size, interpolation=interpolation)
    return positions.reshape(-1, c.width)


def _check_inputs(c: Settings, x, t, context, mask, resolution, aspect_ratio) -> jax.Array:
    """The times as `[B]`; raises `ValueError` for inputs of other shapes than the settings ask for."""
    settings.expect(KIND, "x", x, None, None, None, c.in_channels)
    check_divides(KIND, "patch_size", c.patch_size, "the sides of x,", *x.shape[1:3])
    settings.expect(KIND, "context", context, len(x), None, c.caption_channels or c.cross_attention_dim)
    if mask is not None:
        settings.expect(KIND, "mask", mask, len(x), context.shape[1])
    for name, value, count in (("resolution", resolution, 2), ("aspect_ratio", aspect_ratio, 1)):
        if (value is not None) != c.sized:
            told = "needs" if c.sized else "takes no"
            raise ValueError(f"{KIND}: a network with use_additional_conditions={c.sized} {told} {name} [B, {count}]")
        if c.sized:
            settings.expect(KIND, name, value, len(x), count)
    return settings.times_of(KIND, t, x)


def _check_settings(c: Settings) -> None:
    sizes = "num_layers num_attention_heads attention_head_dim in_channels patch_size cross_attention_dim".split()
    check_least(KIND, 1, **{name: getattr(c, name) for name in sizes})
    check_least(KIND, c.patch_size, sample_size=c.sample_size)
    settings.only(
        KIND, c, norm_type=("ada_norm_single",), attention_type=("default",), activation_fn=tuple(FEEDFORWARDS)
    )
    what = f"{KIND}: num_attention_heads * attention_head_dim = {c.width}:"
    if c.width % 4:
        raise ValueError(f"{what} positions need a multiple of 4")
    if c.sized and c.width % 3:
        raise ValueError(f"{what} use_additional_conditions needs a multiple of 3")
    if c.caption_channels is not None:
        check_least(KIND, 1, caption_channels=c.caption_channels)
        if c.cross_attention_dim != c.width:
            raise ValueError(f"{what} cross_attention_dim={c.cross_attention_dim} is not that of the projected text")


def pixart_transformer(config: Mapping[str, Any], **how) -> Model:
    """`PixArtTransformer2DModel` (PixArt-alpha and PixArt-Sigma, arXiv:2310.00426) by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels], t [B], context [B, L, caption_channels], *, mask=None,
      resolution=None, aspect_ratio=None, key=None)`, `[B, H, W, out_channels] float32`. Times are those of 1000 steps;
      `mask [B, L]` is 1 where the text is seen; a key turns dropout on. A network with `use_additional_conditions`
      (by default, one whose `sample_size` is 128) also needs the `resolution [B, 2]`, height and width in pixels of
      the image, and `aspect_ratio [B, 1]`, height over width. Half of twice as many `out_channels` as `in_channels` is
      a variance.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    _check_settings(c)
    make = lambda compute, rngs: PixArt(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
