"""The levels of a U-Net as checkpoints store them: residual blocks, attention behind each, and a change of resolution.

One class for the way down, one for the middle and one for the way up; what the many types of blocks of diffusers differ
in is a row of `TYPES`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from diffjax.nn import Compute, Conv, GroupNorm, Linear, attend, remat, scope, split_key, tap
from diffjax.nn.blocks import Attention, Downsample, ResnetBlock, Upsample
from diffjax.nn.blocks.attention import split_heads
from diffjax.nn.blocks.resnet import fir_double, fir_halve
from diffjax.nn.blocks.transformer import PixelTransformer


class Type(NamedTuple):
    """What a type of block consists of.

    Attributes:
      attention: behind each residual block: None, "self", "cross" (a transformer), or "added" (one attention to the
        pixels and the context together).
      resample: "conv", "resnet" (a residual block), "fir" (the same with `fir_double`, and a small image beside it), or
        "choice" (what the settings say).
    """

    attention: str | None
    resample: str


TYPES = {
    "DownBlock2D": Type(None, "conv"),
    "AttnDownBlock2D": Type("self", "choice"),
    "CrossAttnDownBlock2D": Type("cross", "conv"),
    "SimpleCrossAttnDownBlock2D": Type("added", "resnet"),
    "ResnetDownsampleBlock2D": Type(None, "resnet"),
    "SkipDownBlock2D": Type(None, "fir"),
    "AttnSkipDownBlock2D": Type("self", "fir"),
    "UpBlock2D": Type(None, "conv"),
    "AttnUpBlock2D": Type("self", "choice"),
    "CrossAttnUpBlock2D": Type("cross", "conv"),
    "SimpleCrossAttnUpBlock2D": Type("added", "resnet"),
    "ResnetUpsampleBlock2D": Type(None, "resnet"),
    "SkipUpBlock2D": Type(None, "fir"),
    "AttnSkipUpBlock2D": Type("self", "fir"),
    "UNetMidBlock2D": Type("self", "conv"),
    "UNetMidBlock2DCrossAttn": Type("cross", "conv"),
    "UNetMidBlock2DSimpleCrossAttn": Type("added", "conv"),
}
DOWN = tuple(name for name in TYPES if "Down" in name)
UP = tuple(name for name in TYPES if "Up" in name)
MID = tuple(name for name in TYPES if "Mid" in name)


@dataclasses.dataclass(frozen=True)
class Level:
    """The settings of a level.

    Attributes:
      type: one of `TYPES`.
      channels: of its residual blocks.
      layers: how many of these.
      temb_width: of the embedded time.
      head_width, heads: of self-attention, of which `head_width` counts; of transformers, whose heads are counted.
      depth: blocks of each transformer, one number for each residual block.
      context_width, only_cross, linear, cross_norm: of attention to a context.
      choice: the resampling of the types that leave it open, "conv" or "resnet".
      padding: of a convolution that halves.
      groups, attention_groups: of the norms; None for none in front of self-attention.
      eps, activation, film, activated, rescale, dropout_rate: of residual blocks (`diffjax.nn.blocks.ResnetBlock`).
    """

    type: str
    channels: int
    layers: int
    temb_width: int
    head_width: int = 8
    heads: int = 8
    depth: tuple[int, ...] = ()
    context_width: int | None = None
    only_cross: bool = False
    linear: bool = False
    cross_norm: str | None = None
    choice: str = "conv"
    padding: int = 1
    groups: int | None = 32
    attention_groups: int | None = 32
    eps: float = 1e-5
    activation: str = "silu"
    film: bool = False
    activated: bool = False
    rescale: float = 1.0
    dropout_rate: float = 0.0

    def resnet(self, channels_in: int, **changes):
        """The arguments of a residual block."""
        settings = dict(
            temb_width=self.temb_width, groups=self.groups, eps=self.eps, activation=self.activation, film=self.film,
            activated=self.activated, rescale=self.rescale, dropout_rate=self.dropout_rate,
        )  # fmt: skip
        return (channels_in, self.channels), settings | changes


def _attention(level: Level, index: int, compute: Compute, rngs) -> nnx.Module | None:
    """The attention behind residual block `index`."""
    kind, channels = TYPES[level.type].attention, level.channels
    if kind == "self":
        heads = channels // level.head_width
        return Attention(
            channels, heads, level.head_width, bias=True, groups=level.attention_groups, eps=level.eps,
            compute=compute, rngs=rngs,
        )  # fmt: skip
    if kind == "cross":
        return PixelTransformer(
            channels, level.heads, channels // level.heads, level.depth[index], context_width=level.context_width,
            groups=level.groups, linear=level.linear, only_cross=level.only_cross, compute=compute, rngs=rngs,
        )  # fmt: skip
    if kind == "added":
        return AddedAttention(level, compute, rngs)
    return None


class AddedAttention(nnx.Module):
    """`x` plus the attention of its pixels to themselves and to a context, in one softmax (Saharia et al. 2022,
    arXiv:2205.11487, as DeepFloyd IF has it); the context alone with `only_cross`."""

    def __init__(self, level: Level, compute: Compute, rngs):
        channels, settings = level.channels, dict(dtype=compute.dtype, rngs=rngs)
        self.group_norm = GroupNorm(channels, level.groups)
        self.norm_cross = GroupNorm(level.context_width, 32) if level.cross_norm else None
        self.to_q = Linear(channels, channels, **settings)
        self.to_k = None if level.only_cross else Linear(channels, channels, **settings)
        self.to_v = None if level.only_cross else Linear(channels, channels, **settings)
        self.add_k_proj = Linear(level.context_width, channels, **settings)
        self.add_v_proj = Linear(level.context_width, channels, **settings)
        self.to_out = nnx.Dict({"0": Linear(channels, channels, **settings)})
        self.heads, self.implementation = channels // level.head_width, compute.attention

    def __call__(self, x, context, *, bias=None, key=None):
        pixels = x.reshape(len(x), -1, x.shape[-1])
        context = context if self.norm_cross is None else self.norm_cross(context)
        h = self.group_norm(pixels)
        q, k, v = self.to_q(h), self.add_k_proj(context), self.add_v_proj(context)
        if self.to_k is not None:
            k, v = jnp.concatenate([k, self.to_k(h)], 1), jnp.concatenate([v, self.to_v(h)], 1)
            bias = bias if bias is None else jnp.pad(bias, ((0, 0),) * 3 + ((0, h.shape[1]),))
        q, k, v = (tap(name, split_heads(a, self.heads)) for name, a in (("q", q), ("k", k), ("v", v)))
        mixed = tap("mixed", attend(q, k, v, bias=bias, implementation=self.implementation))
        return tap("out", x + self.to_out["0"](mixed.reshape(h.shape)).reshape(x.shape))


class Layers(nnx.Module):
    """What all levels share: residual blocks in `resnets`, attention in `attentions`."""

    def _build(self, level: Level, channels_in: list[int], attentions: int, compute: Compute, rngs, groups=None):
        """`groups`: of the first norms, where they are not those of the level."""
        blocks = {}
        for i, channels in enumerate(channels_in):
            few = dict(groups=groups[i], groups_out=_few(level.channels)) if groups else {}
            given, settings = level.resnet(channels, **few)
            blocks[str(i)] = ResnetBlock(*given, **settings, compute=compute, rngs=rngs)
        self.resnets = nnx.Dict(blocks)
        made = {str(i): _attention(level, i, compute, rngs) for i in range(attentions)}
        self.attentions = nnx.Dict(made) if made and TYPES[level.type].attention else None
        self.level, self.compute = level, compute

    def _resnet(self, name: str, x, temb, key):
        return self._run(f"resnets/{name}", self.resnets[name], x, temb, key)

    def _attend(self, name: str, x, context, bias, key):
        """Attention `name` if there is one."""
        if self.attentions is None or name not in self.attentions:
            return x
        attention = self.attentions[name]
        if not isinstance(attention, Attention):
            with scope(f"attentions/{name}"):
                return attention(x, context, bias=bias, key=key)

        def fn(x, *, key=None):
            h = attention(x.reshape(len(x), -1, x.shape[-1])).reshape(x.shape)
            return tap("out", (x + h) / self.level.rescale)

        return self._run(f"attentions/{name}", fn, x, None, key)

    def _run(self, name, fn, x, temb, key):
        def named(x, temb, key):
            with scope(name):
                return fn(x, key=key) if temb is None else fn(x, temb, key=key)

        return remat(named, self.compute.remat)(x, temb, key)

    def _resampler(self, level, compute, rngs, direction, **settings):
        """A residual block that changes the resolution."""
        given, settings = level.resnet(level.channels, resample=direction, **settings)
        return ResnetBlock(*given, **settings, compute=compute, rngs=rngs)


def _few(channels: int) -> int:
    return min(channels // 4, 32)


class DownLevel(Layers):
    """A level on the way down; `half`: whether it ends in half of the resolution."""

    def __init__(self, level: Level, channels_in: int, *, half: bool, compute: Compute, rngs):
        channels = [channels_in] + [level.channels] * (level.layers - 1)
        resample = TYPES[level.type].resample
        groups = [_few(n) for n in channels] if resample == "fir" else None
        self._build(level, channels, level.layers, compute, rngs, groups)
        resample = level.choice if resample == "choice" else resample
        parts: dict[str, nnx.Module] = {}
        if half and resample == "conv":
            down = Downsample(level.channels, padding=level.padding, compute=compute, rngs=rngs)
            parts["downsamplers"] = nnx.Dict({"0": down})
        elif half and resample == "resnet":
            parts["downsamplers"] = nnx.Dict({"0": self._resampler(level, compute, rngs, "down")})
        elif half:
            few = dict(groups=_few(level.channels), kernel="fir", skip=True)
            parts["resnet_down"] = self._resampler(level, compute, rngs, "down", **few)
            parts["skip_conv"] = Conv(3, level.channels, 1, dtype=compute.dtype, rngs=rngs)
        self.downsamplers = parts.get("downsamplers")
        self.resnet_down, self.skip_conv = parts.get("resnet_down"), parts.get("skip_conv")

    def __call__(self, x, temb, context=None, *, bias=None, image=None, residual=None, key=None):
        """The features, those of all layers for the way up, and the small image.

        `residual` is added behind the last layer (T2I-Adapter).
        """
        keys, outs = split_key(key, 2 * self.level.layers + 1), []
        for i in range(self.level.layers):
            x = self._resnet(str(i), x, temb, keys[2 * i])
            x = self._attend(str(i), x, context, bias, keys[2 * i + 1])
            if residual is not None and i == self.level.layers - 1:
                x = x + residual
            outs.append(x)
        if self.downsamplers is not None:
            down = self.downsamplers["0"]
            x = down(x) if isinstance(down, Downsample) else self._run("downsamplers/0", down, x, temb, keys[-1])
            outs.append(x)
        if self.resnet_down is not None:
            image = fir_halve(image)
            x = self.skip_conv(image) + self._run("resnet_down", self.resnet_down, x, temb, keys[-1])
            outs.append(x)
        return x, outs, image


class MidLevel(Layers):
    """The middle: a residual block, and then attention (if `attends`) and another one, `level.layers` times."""

    def __init__(self, level: Level, *, attends: bool = True, compute: Compute, rngs):
        attentions = level.layers if attends else 0
        self._build(level, [level.channels] * (level.layers + 1), attentions, compute, rngs)

    def __call__(self, x, temb, context=None, *, bias=None, key=None):
        keys = split_key(key, 2 * self.level.layers + 1)
        x = self._resnet("0", x, temb, keys[-1])
        for i in range(self.level.layers):
            x = self._attend(str(i), x, context, bias, keys[2 * i])
            x = self._resnet(str(i + 1), x, temb, keys[2 * i + 1])
        return x


class UpLevel(Layers):
    """A level on the way up; `twice`: whether it ends in twice the resolution.

    Args:
      channels_in: of what comes from below.
      skips: of the features that are concatenated, one for each layer.
    """

    def __init__(
        self, level: Level, channels_in: int, skips: list[int], *, twice: bool, compute: Compute, rngs,
    ):  # fmt: skip
        before = [channels_in] + [level.channels] * (level.layers - 1)
        resample = TYPES[level.type].resample
        both, groups = list(zip(before, skips, strict=True)), None
        if resample == "fir":
            # One of the two types forgets the brackets, and so do its checkpoints.
            loose = level.type == "AttnSkipUpBlock2D"
            groups = [min(a + b // 4, 32) if loose else _few(a + b) for a, b in both]
        count = 1 if resample == "fir" else level.layers
        self._build(level, [a + b for a, b in both], count, compute, rngs, groups)
        self.fir = resample == "fir"
        resample = level.choice if resample == "choice" else resample
        parts: dict[str, nnx.Module] = {}
        if twice and resample == "conv":
            parts["upsamplers"] = nnx.Dict({"0": Upsample(level.channels, compute=compute, rngs=rngs)})
        elif twice and resample == "resnet":
            parts["upsamplers"] = nnx.Dict({"0": self._resampler(level, compute, rngs, "up")})
        elif twice:
            few = dict(groups=_few(level.channels), kernel="fir", skip=True)
            parts["resnet_up"] = self._resampler(level, compute, rngs, "up", **few)
            parts["skip_conv"] = Conv(level.channels, 3, dtype=compute.dtype, rngs=rngs)
            parts["skip_norm"] = GroupNorm(level.channels, _few(level.channels), eps=level.eps)
        self.upsamplers, self.resnet_up = parts.get("upsamplers"), parts.get("resnet_up")
        self.skip_conv, self.skip_norm = parts.get("skip_conv"), parts.get("skip_norm")

    def __call__(self, x, skips, temb, context=None, *, bias=None, image=None, size=None, key=None):
        """The features and the small image; `skips` come from the way down, the last is taken first."""
        keys = split_key(key, 2 * self.level.layers + 1)
        for i in range(self.level.layers):
            x = jnp.concatenate([x, skips[-1 - i]], -1)
            x = self._resnet(str(i), x, temb, keys[2 * i])
            x = x if self.fir else self._attend(str(i), x, context, bias, keys[2 * i + 1])
        if self.fir:
            # One attention behind all layers.
            x = self._attend("0", x, context, bias, keys[1])
            image = None if image is None else fir_double(image)
        if self.resnet_up is not None:
            part = self.skip_conv(nnx.silu(self.skip_norm(x)))
            image = part if image is None else image + part
            x = self._run("resnet_up", self.resnet_up, x, temb, keys[-1])
        if self.upsamplers is not None:
            up = self.upsamplers["0"]
            x = up(x, size) if isinstance(up, Upsample) else self._run("upsamplers/0", up, x, temb, keys[-1])
        return x, image


def skip_channels(widths: tuple[int, ...], layers: tuple[int, ...]) -> list[list[int]]:
    """The channels of the features that each level on the way up takes, for levels of `widths` on the way down."""
    made = [widths[0]]
    for i, (width, count) in enumerate(zip(widths, layers, strict=True)):
        made += [width] * count + [width] * (i < len(widths) - 1)
    out = []
    for count in reversed(layers):
        out.append([made.pop() for _ in range(count + 1)])
    return out

