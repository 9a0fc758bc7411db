"""`UNet2DModel`: the U-Nets of DDPM, ADM, NCSN++ and consistency models as diffusers stores them.

Ho et al. 2020, arXiv:2006.11239; Dhariwal & Nichol 2021, arXiv:2105.05233; Song et al. 2021, arXiv:2011.13456; Song et
al. 2023, arXiv:2303.01469.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from diffjax.core.types import Model
from diffjax.models import settings
from diffjax.models.checks import check_divides, check_least
from diffjax.models.unets.blocks import (
    DOWN,
    MID,
    RULES,
    TYPES,
    DownStage,
    MidStage,
    Stage,
    UpStage,
    check_types,
    skip_channels,
)
from diffjax.nn import ACTIVATIONS, Compute, Conv, GroupNorm, scope, split_key, tap, timestep_waves, widen
from diffjax.nn.blocks import Embedding, Fourier, Projection

KIND = "UNet2DModel"
# Of the types of blocks that have no context.
_TYPES = tuple(name for name, kind in TYPES.items() if kind.attention in (None, "self"))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The config of a `UNet2DModel`, with its defaults."""

    sample_size: int | tuple[int, int] | None = None  # what it was trained at; others do as well
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int | None = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None


class UNet2D(nnx.Module):
    """The module of `unet_2d`.

    Activations: `features`, those of the stages under `down_blocks/0/resnets/0/out` and so on, `temb`.
    """

    def __init__(self, c: Settings, *, compute: Compute, rngs):
        widths, given = c.block_out_channels, dict(compute=compute, rngs=rngs)
        conv = dict(dtype=compute.dtype, rngs=rngs)
        temb_width = c.time_embedding_dim or 4 * widths[0]
        self.conv_in = Conv(c.in_channels, widths[0], **conv)
        waves = 2 * widths[0] if c.time_embedding_type == "fourier" else widths[0]
        self.time_proj = {
            "positional": lambda: None,
            "fourier": lambda: Fourier(widths[0], log=True, cosines_first=False, rngs=rngs),
            "learned": lambda: Embedding(c.num_train_timesteps, widths[0], **given),
        }[c.time_embedding_type]()
        self.time_embedding = Projection(waves, temb_width, **given)
        self.class_embedding = {
            None: lambda: Embedding(c.num_class_embeds, temb_width, **given) if c.num_class_embeds else None,
            "timestep": lambda: Projection(waves, temb_width, **given),
            "identity": lambda: None,
        }[c.class_embed_type]()

        down, up = {}, {}
        for i, kind in enumerate(c.down_block_types):
            stage = _stage(c, kind, widths[i], c.layers_per_block, temb_width)
            down[str(i)] = DownStage(stage, widths[max(i - 1, 0)], half=i < len(widths) - 1, **given)
        mid = _stage(c, "UNetMidBlock2D", widths[-1], 1, temb_width)
        self.mid_block = MidStage(mid, attends=c.add_attention, **given) if c.mid_block_type else None
        skips = skip_channels(widths, (c.layers_per_block,) * len(widths))
        below = widths[-1]
        for i, (kind, width) in enumerate(zip(c.up_block_types, reversed(widths), strict=True)):
            stage = _stage(c, kind, width, c.layers_per_block + 1, temb_width)
            up[str(i)] = UpStage(stage, below, skips[i], twice=i < len(widths) - 1, **given)
            below = width
        self.down_blocks, self.up_blocks = nnx.Dict(down), nnx.Dict(up)
        groups = c.norm_num_groups if c.norm_num_groups is not None else min(widths[0] // 4, 32)
        self.conv_norm_out = GroupNorm(widths[0], groups, eps=c.norm_eps)
        self.conv_out = Conv(widths[0], c.out_channels, **conv)
        self.c = c

    def _waves(self, t):
        if self.time_proj is not None:
            return self.time_proj(t)
        c = self.c
        return timestep_waves(t, c.block_out_channels[0], cosines_first=c.flip_sin_to_cos, shift=c.freq_shift)

    def _embed(self, t, y):
        emb = self.time_embedding(self._waves(t))
        if self.c.class_embed_type == "identity":
            return emb + y.astype(emb.dtype)
        if self.class_embedding is None:
            return emb
        y = self._waves(y) if self.c.class_embed_type == "timestep" else y
        return emb + self.class_embedding(y)

    def __call__(
        self, x: jax.Array, t: jax.Array, y: jax.Array | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:  # fmt: skip
        """`[B, H, W, out_channels] float32`; `unet_2d` tells what the arguments are."""
        c = self.c
        _check_inputs(c, x, y)
        t = settings.times_of(KIND, t, x)
        x = 2 * x - 1.0 if c.center_input_sample else x
        count = len(c.block_out_channels)
        keys = split_key(key, 2 * count + 1)
        temb = tap("temb", self._embed(t, y))
        h, image = tap("features", self.conv_in(x)), x
        skips = [h]
        for i, block in enumerate(self.down_blocks[str(i)] for i in range(len(self.down_blocks))):
            with scope(f"down_blocks/{i}"):
                h, outs, image = block(h, temb, image=image, key=keys[i])
            skips += outs
        if self.mid_block is not None:
            with scope("mid_block"):
                h = self.mid_block(h, temb, key=keys[-1])
        image = None
        for i, block in enumerate(self.up_blocks[str(i)] for i in range(len(self.up_blocks))):
            taken, skips = skips[-block.stage.layers :], skips[: -block.stage.layers]
            with scope(f"up_blocks/{i}"):
                h, image = block(h, taken, temb, image=image, key=keys[count + i])
        out = widen(self.conv_out(nnx.silu(self.conv_norm_out(h))))
        out = out if image is None else out + image
        return out / t.reshape(-1, 1, 1, 1) if c.time_embedding_type == "fourier" else out


def _stage(c: Settings, kind: str, channels: int, layers: int, temb_width: int) -> Stage:
    fir, mid = TYPES[kind].resample == "fir", kind in MID
    groups = c.norm_num_groups
    if groups is None:
        groups = min(channels // 4, 32)
    attention_groups = groups
    if mid:
        plain = groups if c.resnet_time_scale_shift == "default" else None
        attention_groups = c.attn_norm_num_groups if c.attn_norm_num_groups is not None else plain
    return Stage(
        kind, channels, layers, temb_width, head_width=c.attention_head_dim or channels, groups=groups,
        choice=c.downsample_type if kind in DOWN else c.upsample_type, padding=c.downsample_padding,
        attention_groups=32 if fir else attention_groups, eps=c.norm_eps, activation=c.act_fn,
        film=c.resnet_time_scale_shift == "scale_shift", dropout_rate=c.dropout,
        rescale=math.sqrt(2.0) if fir else c.mid_block_scale_factor if mid else 1.0,
    )  # fmt: skip


def _check_inputs(c: Settings, x, y) -> None:
    """Raises `ValueError` for an image that cannot be halved as often as it must, and for labels that do not fit."""
    settings.expect(KIND, "x", x, None, None, None, c.in_channels)
    factor = 2 ** (len(c.block_out_channels) - 1)
    if x.shape[1] % factor or x.shape[2] % factor:
        raise ValueError(f"{KIND}: x is {x.shape[1]}x{x.shape[2]}; its stages need sides divisible by {factor}")
    labelled = c.class_embed_type is not None or c.num_class_embeds is not None
    if labelled != (y is not None):
        told = f"class_embed_type={c.class_embed_type!r}, num_class_embeds={c.num_class_embeds!r}"
        raise ValueError(f"{KIND}: this network {'needs' if labelled else 'has no use for'} y ({told})")
    if labelled:
        width = c.time_embedding_dim or 4 * c.block_out_channels[0]
        settings.expect(KIND, "y", y, *((len(x), width) if c.class_embed_type == "identity" else (len(x),)))


def unet_2d(config: Mapping[str, Any], **how) -> Model:
    """`UNet2DModel` by the config of a checkpoint.

    Args:
      config: see `Settings`.
      how: see `diffjax.models.settings.how`.

    Returns:
      A `Model`: `apply(params, x [B, H, W, in_channels], t [B], y=None, *, key=None)` to `[B, H, W, out_channels]`.
      `y` is `[B]` integers where the network has a table of classes, `[B]` numbers for the class embedding "timestep",
      `[B, time_embedding_dim]` for "identity", and nothing otherwise. Times are those of the checkpoint's schedule:
      steps of 1000, or noise levels sigma for "fourier". A key turns dropout on.

    Raises:
      ValueError: for settings that are unknown or not supported.
    """
    c = settings.read(KIND, Settings, config)
    settings.only(
        KIND, c, time_embedding_type=("positional", "fourier", "learned"), mid_block_type=("UNetMidBlock2D", None),
        resnet_time_scale_shift=("default", "scale_shift"), class_embed_type=(None, "timestep", "identity"),
        downsample_type=("conv", "resnet"), upsample_type=("conv", "resnet"), act_fn=tuple(ACTIVATIONS),
    )  # fmt: skip
    check_types(KIND, c, _TYPES)
    check_least(KIND, 1, layers_per_block=c.layers_per_block)
    optional = "norm_num_groups attn_norm_num_groups attention_head_dim time_embedding_dim num_class_embeds".split()
    given = {name: getattr(c, name) for name in optional}
    check_least(KIND, 1, **{name: value for name, value in given.items() if value is not None})
    if c.norm_num_groups is not None:
        check_divides(KIND, "norm_num_groups", c.norm_num_groups, "the channels", c.block_out_channels[0])
    if c.time_embedding_type == "learned" and c.num_train_timesteps is None:
        raise ValueError(f"{KIND}: time_embedding_type='learned' needs num_train_timesteps")
    fir = [name for name in (*c.down_block_types, *c.up_block_types) if TYPES[name].resample == "fir"]
    if fir and c.in_channels != 3:
        raise ValueError(f"{KIND}: {fir[0]} takes images of 3 channels, not in_channels={c.in_channels}")
    make = lambda compute, rngs: UNet2D(c, compute=compute, rngs=rngs)
    return settings.model(KIND, config, make, settings.how(KIND, **how), RULES)
